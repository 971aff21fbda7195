"""Sparse attention taught to a converted text model on plain text files, in minutes on one GPU.

    openkeye convert --from smollm2 --to keye --indexer-heads 8 --top-k 256
    openkeye train adapt_text model_dir=keye data=text/train run_dir=runs/adapt out_dir=keye-sparse
    openkeye evaluate text --model keye-sparse --files text/heldout/*.txt --oracle

The number of keys is the model's own (`openkeye convert --top-k`).
"""

from dataclasses import replace

from openkeye.data.config import Share, SourceConfig
from openkeye.train.config import RunConfig, StageConfig

SHORT, LONG = "short pieces", "long pieces"
MIXED = (Share(SHORT, 4.0), Share(LONG, 1.0))
# about equally many tokens of each
WARM_UP_RATE = 3e-2
# of the indexer's matrices, which Muon steps; its gates take a tenth
INDEXER_RATE = 5e-3
TRUNK_RATE = 1.5e-5


def adapt_text(
    model_dir: str,
    data: str,
    run_dir: str,
    out_dir: str,
    context: int = 8192,
    short_context: int = 2048,
    short_steps: int = 600,
    warm_up_steps: int = 500,
    adaptation_steps: int = 300,
    seed: int = 0,
) -> RunConfig:
    """Indexer warm-up on short, then on short and long pieces, then sparse adaptation (report, section 2), on plain text files.

    Many small steps: at equal numbers of tokens, steps of 8,192 taught a layer's indexer far more than steps of 32,768
    (`docs/experiment_log.md`). Steps are of 8,192 tokens on short pieces and of 16,384 afterwards.

    Args:
        data: a folder of .txt files, or one file.
        context: tokens of the longest document; texts are cut into pieces of three quarters of it, four bytes counted as a
            token, so that pieces with many rare words fit too.
        short_context: the same for short pieces.
    """
    short = StageConfig(
        name="warm-up",
        num_steps=short_steps,
        context=short_context,
        mixture=(Share(SHORT),),
        tokens_per_pack=4 * short_context,
        trains=("indexer",),
        attention="dense",
        indexer_target="dense",
        rate=WARM_UP_RATE,
        rate_end_share=0.3,
        num_warmup_steps=short_steps // 20,
        answer_weight=0.0,
    )
    long = replace(
        short,
        name="long warm-up",
        num_steps=warm_up_steps,
        context=context,
        mixture=MIXED,
        tokens_per_pack=2 * context,
        rate=0.5 * WARM_UP_RATE,
        rate_end_share=0.05,
        num_warmup_steps=0,
    )
    adaptation = replace(
        long,
        name="adaptation",
        num_steps=adaptation_steps,
        trains=("decoder", "indexer"),
        attention="sparse",
        indexer_target="selected",
        emulates_e4m3=True,
        rate=TRUNK_RATE,
        rate_end_share=0.1,
        rates={"indexer": INDEXER_RATE},
        num_warmup_steps=adaptation_steps // 10,
        answer_weight=1.0,
    )
    pieces = {SHORT: short_context, LONG: context}
    return RunConfig(
        model_dir=model_dir,
        run_dir=run_dir,
        out_dir=out_dir,
        sources={name: SourceConfig("text_files", data, {"tokens": size * 3 // 4}) for name, size in pieces.items()},
        stages=(short, long, adaptation),
        seed=seed,
        indexer_optimizer="muon",
        weight_decay=0.0,
    )
