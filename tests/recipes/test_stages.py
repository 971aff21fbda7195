"""The report's stages as settings: token counts, contexts, what trains, mixtures, and refusals."""

import pytest

from openkeye.common.checks import InputError
from openkeye.recipes.stages import GROUPS, adaptation, open_groups, sft, stages, warm_up

DATA = {group: (f"chat_json_lines:/data/{group}.jsonl",) for group in GROUPS}


def run(recipe, **options):
    return recipe("keye-30b", options.pop("data", DATA), "run", "out", **options)


def test_the_four_stages_see_the_tokens_of_the_report():
    config = run(stages)
    tokens = {stage.name: stage.num_steps * stage.packs_per_step * stage.context for stage in config.stages}
    wanted = {"stage-0": 4e9, "stage-1": 1e12, "stage-2": 2e12, "stage-3": 5e11}
    assert tokens == {name: pytest.approx(count, rel=2e-3) for name, count in wanted.items()}
    assert [stage.context for stage in config.stages] == [8192, 32768, 65536, 262144]
    assert [stage.max_clip_seconds for stage in config.stages] == [15, 15, 900, 7200]
    assert [stage.video_tokens for stage in config.stages[1:]] == [24 * 1024, 60 * 1024, 180 * 1024]
    assert [stage.trains for stage in config.stages] == [("projector",)] + [("vision", "projector", "decoder")] * 3
    assert {stage.attention for stage in config.stages} == {"dense"} and config.fresh == ("projector",)


def test_scale_and_batch_change_the_steps():
    config = run(stages, scale=1e-3, tokens_per_step=1 << 20)
    for stage in config.stages:
        assert stage.packs_per_step * stage.context == 1 << 20
    assert [stage.num_steps for stage in config.stages] == [4, 954, 1908, 477]
    assert run(stages, scale=1e-9).num_steps == 4


@pytest.mark.parametrize("groups", [GROUPS, ("video", "text", "captions", "long"), ("captions", "knowledge", "long")])
def test_the_last_stage_is_half_long(groups):
    config = run(stages, data={group: DATA[group] for group in groups})
    weights = {share.source: share.weight for share in config.stages[3].mixture}
    long = weights.pop("long")
    assert long == pytest.approx(sum(weights.values())) and "captions" not in weights and "sft" not in weights


def test_sources_of_one_group_share_its_weight():
    config = run(stages, data=DATA | {"video": ("web_dataset:/a", "parquet:/b")})
    assert config.sources["video-0"].reader == "web_dataset" and config.sources["video-1"].path == "/b"
    weights = {share.source: share.weight for share in config.stages[1].mixture}
    assert weights["video-0"] == weights["video-1"] == weights["interleaved"] / 2


def test_the_indexer_learns_alone_then_along():
    (alone,), (along,), (chats,) = (run(recipe).stages for recipe in (warm_up, adaptation, sft))
    assert alone.trains == ("indexer",) and alone.attention == "dense" and alone.indexer_target == "dense"
    assert alone.answer_weight == 0 and alone.rate == 1e-3 and alone.num_steps * alone.packs_per_step * alone.context > 2e9
    assert along.attention == chats.attention == "sparse" and along.indexer_target == "selected" and along.rate == 7.3e-6
    assert "indexer" in along.trains and "decoder" in along.trains and [share.source for share in chats.mixture] == ["sft"]


def test_groups_that_nobody_knows_and_stages_without_data():
    with pytest.raises(InputError, match=r"data\.videos: no such group; choose from captions"):
        run(stages, data={"videos": ("parquet:/x",)})
    with pytest.raises(InputError, match=r"data\.video=/x: expected READER:PATH"):
        open_groups({"video": ("/x",)})
    with pytest.raises(InputError, match=r"stage-0 has no data; give at least one of data\.captions, data\.interleaved"):
        run(stages, data={"video": ("parquet:/x",)})
