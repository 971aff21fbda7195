"""What others published of steps of reinforcement learning: other machines, models and settings than what is measured here."""

PUBLISHED = (
    (
        "NeMo-RL 0.6, GRPO of Qwen3-30B-A3B",
        "32 H100, 4K, 2,048 rollouts: on-policy / 1 step off / 8 steps off (192 GPUs)",
        "192 / 152 / 34.5 s a step; 1,102 / 1,414 / 1,025 tokens/s a GPU",
        "as its project reports",
    ),
    (
        "verl, Qwen3.5-35B-A3B",
        "4 nodes, responses of 32K: synchronous / colocated asynchronous / separate asynchronous",
        "12,053 / 18,852 / 18,829 tokens/s in all",
        "as its project reports",
    ),
    (
        "verl, GRPO of Qwen3-30B-A3B",
        "128 H20, responses of 8K: synchronous / fully asynchronous",
        "498 / 283 s a step",
        "as its project reports",
    ),
    ("verl, the actor of Qwen3-30B-A3B on Megatron", "8 / 16 / 32 GPUs", "40 / 37 / 31% of peak", "verl, `docs/perf/dpsk.md`"),
    (
        "prime-rl, RL of Qwen3-30B-A3B",
        "8 H100, 16K: all weights / LoRA of rank 16",
        "764 / 4,140 tokens/s a GPU; 2.9 / 15.3% of peak",
        "prime-rl, `benchmarks/results/BENCHMARKS.md`",
    ),
    (
        "NeMo Automodel, SFT of Qwen3-MoE-30B",
        "8 H100, 4K, forced balance",
        "12,040 tokens/s a GPU; 28% of peak",
        "Automodel, `docs/performance-summary.mdx`",
    ),
    (
        "verl, weights of Qwen3-30B-A3B to engines",
        "16 + 16 ranks: plain / checkpoint engine",
        "15.76 / 4.38 s",
        "as its project reports",
    ),
    ("verl, the same", "whole broadcast / sharded deltas", "32 to 43 / 7.1 to 8.1 s", "as its project reports"),
    ("slime, weights of GLM-4.5 355B", "", "48 s", "as its project reports"),
)


def published_table() -> list[str]:
    """Lines of a table."""
    lines = ["Published by others for other machines and settings, **not measured here**:", ""]
    lines += ["| system | setting | figure | source |", "|---|---|---|---|"]
    return [*lines, *("| " + " | ".join(row) + " |" for row in PUBLISHED), ""]
