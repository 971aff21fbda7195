"""Sparse attention taught to a converted text model on plain text files, in minutes on one GPU.

    openkeye convert --from smollm2 --to keye --indexer-heads 8 --top-k 256
    openkeye train adapt_text model_dir=keye data=text/train run_dir=runs/adapt out_dir=keye-sparse
    openkeye evaluate text --model keye-sparse --files text/heldout/*.txt --oracle

The number of keys is the model's own (`openkeye convert --top-k`).
"""

from dataclasses import replace

from openkeye.data.config import Share, SourceConfig
from openkeye.train.config import RunConfig, StageConfig

TEXT = "text"
CONTEXT = 8192
PACK_CONTEXTS = 4
# contexts that a pack is long: documents of about 0.7 contexts then leave a tenth of it empty, not a third
WARM_UP_RATE = 1e-3
TRUNK_RATE = 1.5e-5
INDEXER_RATE = 1e-4


def adapt_text(
    model_dir: str,
    data: str,
    run_dir: str,
    out_dir: str,
    context: int = CONTEXT,
    warm_up_steps: int = 200,
    adaptation_steps: int = 160,
    packs_per_step: int = 2,
    seed: int = 0,
) -> RunConfig:
    """Indexer warm-up, then sparse adaptation (report, section 2), on the text files of a folder.

    Steps are of 65,536 tokens: 13.1M for the indexer alone under dense attention, then 10.5M for everything under sparse
    attention. For SmolLM2-135M on one H100 that is meant to take 2 and 3 minutes, at 110,000 and 60,000 tokens a second: an
    estimate from counted operations, 1.2 and 2.1 billion a token, at a tenth to a seventh of the GPU's bf16 rate.

    Args:
        data: a folder of .txt files, or one file.
        context: tokens of the longest document; texts are cut into pieces of three quarters of it, four bytes counted as a
            token, so that pieces with many rare words fit too.
    """
    warm_up = StageConfig(
        name="warm-up",
        num_steps=warm_up_steps,
        context=context,
        mixture=(Share(TEXT),),
        tokens_per_pack=PACK_CONTEXTS * context,
        packs_per_step=packs_per_step,
        trains=("indexer",),
        attention="dense",
        indexer_target="dense",
        rate=WARM_UP_RATE,
        num_warmup_steps=warm_up_steps // 10,
        answer_weight=0.0,
    )
    adaptation = replace(
        warm_up,
        name="adaptation",
        num_steps=adaptation_steps,
        trains=("decoder", "indexer"),
        attention="sparse",
        indexer_target="selected",
        emulates_e4m3=True,
        rate=TRUNK_RATE,
        rates={"indexer": INDEXER_RATE},
        num_warmup_steps=adaptation_steps // 10,
        answer_weight=1.0,
    )
    return RunConfig(
        model_dir=model_dir,
        run_dir=run_dir,
        out_dir=out_dir,
        sources={TEXT: SourceConfig("text_files", data, {"tokens": context * 3 // 4})},
        stages=(warm_up, adaptation),
        seed=seed,
        weight_decay=0.0,
    )
