"""The recipe that teaches sparse attention to a text model."""

from openkeye.recipes.adapt_text import LONG, SHORT, adapt_text


def test_the_indexer_learns_first_and_the_trunk_slowly_after_it():
    run = adapt_text("keye", "text/train", "runs/a", "out", context=4096, short_context=1024)
    *warm_ups, adaptation = run.stages
    for warm_up in warm_ups:
        assert (warm_up.trains, warm_up.attention, warm_up.indexer_target, warm_up.answer_weight) == (
            ("indexer",), "dense", "dense", 0.0,
        )  # fmt: skip
    assert (adaptation.attention, adaptation.indexer_target, adaptation.answer_weight) == ("sparse", "selected", 1.0)
    assert set(adaptation.trains) == {"decoder", "indexer"} and run.indexer_optimizer == "muon"
    assert adaptation.rates["indexer"] > adaptation.rate and warm_ups[-1].rate > adaptation.rates["indexer"]
    assert {share.source for stage in run.stages for share in stage.mixture} == set(run.sources)
    assert [stage.context for stage in run.stages] == [1024, 4096, 4096]
    # Four bytes a token is what prose has: pieces must leave room for text that has fewer.
    assert {name: source.options["tokens"] for name, source in run.sources.items()} == {SHORT: 768, LONG: 3072}
    assert all(source.reader == "text_files" and source.path == "text/train" for source in run.sources.values())


def test_every_step_has_room_for_the_longest_piece():
    for stage in adapt_text("keye", "text", "run", "out").stages:
        assert stage.tokens_per_pack >= 2 * stage.context and stage.packs_per_step == 1
