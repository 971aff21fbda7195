"""The recipe that teaches sparse attention to a text model."""

from openkeye.recipes.adapt_text import adapt_text


def test_the_indexer_learns_first_and_the_trunk_slowly_after_it():
    run = adapt_text("keye", "text/train", "runs/a", "out", context=4096)
    warm_up, adaptation = run.stages
    assert (warm_up.trains, warm_up.attention, warm_up.indexer_target, warm_up.answer_weight) == (
        ("indexer",), "dense", "dense", 0.0,
    )  # fmt: skip
    assert (adaptation.attention, adaptation.indexer_target, adaptation.answer_weight) == ("sparse", "selected", 1.0)
    assert set(adaptation.trains) == {"decoder", "indexer"}
    assert adaptation.rates["indexer"] > adaptation.rate and warm_up.rate > adaptation.rates["indexer"]
    assert {share.source for stage in run.stages for share in stage.mixture} == set(run.sources)
    assert all(stage.context == 4096 and stage.tokens_per_pack >= 4096 for stage in run.stages)
    # Four bytes a token is what prose has: pieces must leave room for text that has fewer.
    (source,) = run.sources.values()
    assert source.reader == "text_files" and source.path == "text/train" and source.options["tokens"] == 3072


def test_steps_are_of_as_many_tokens_as_the_estimate_says():
    warm_up, adaptation = adapt_text("keye", "text", "run", "out").stages
    tokens = [stage.num_steps * stage.packs_per_step * stage.tokens_per_pack for stage in (warm_up, adaptation)]
    assert tokens == [13_107_200, 10_485_760]
