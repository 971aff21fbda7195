"""`openkeye convert --from DIR --to DIR`: a Hugging Face text checkpoint with a fresh lightning indexer."""

import argparse

SUMMARY = "turn a Llama, Mistral, Qwen3 or Qwen3-MoE checkpoint into a text model with a fresh indexer"
DETAILS = """\
The weights are copied unchanged: in dense attention the new model computes what the old one does. The indexer that sparse
attention selects with is fresh and must be taught (indexer warm-up, then sparse adaptation).

A GGUF file becomes such a folder with transformers, gguf and accelerate; with SmolLM2-135M-Instruct, for example:
  from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
  model = AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=FILE, dtype="bfloat16")
  plain = LlamaForCausalLM(model.config).bfloat16()   # a model read from GGUF cannot be saved itself
  plain.load_state_dict(model.state_dict())
  plain.save_pretrained(DIR)
  AutoTokenizer.from_pretrained(FOLDER, gguf_file=FILE).save_pretrained(DIR)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog, parser.formatter_class = DETAILS, argparse.RawDescriptionHelpFormatter
    parser.add_argument("--from", dest="source", required=True, metavar="DIR", help="a folder with config.json and safetensors")
    parser.add_argument("--to", dest="target", required=True, metavar="DIR", help="the new folder; must not exist or be empty")
    parser.add_argument("--indexer-heads", type=int, default=16, metavar="N", help="heads of the indexer (default: 16)")
    parser.add_argument(
        "--indexer-head-dim", type=int, default=64, metavar="D", help="numbers of an indexer head, a power of two (default: 64)"
    )
    parser.add_argument("--top-k", type=int, default=2048, metavar="K", help="keys that a query attends to (default: 2048)")
    parser.add_argument("--seed", type=int, default=0, help="of the fresh indexer's weights")


def run(arguments: argparse.Namespace) -> int:
    """Convert, and say what came out."""
    from pathlib import Path

    from openkeye.model.config import IndexerConfig
    from openkeye.model.convert import convert_checkpoint
    from openkeye.model.inventory import take_inventory

    indexer = IndexerConfig(arguments.indexer_heads, arguments.indexer_head_dim, arguments.top_k)
    config = convert_checkpoint(Path(arguments.source), Path(arguments.target), indexer, arguments.seed)
    parts = {part.name: part.num_parameters for part in take_inventory(config, 0).parts}
    print(
        f"{arguments.target}: {sum(parts.values()):,} parameters, {parts['indexer']:,} of them a fresh indexer of "
        f"{indexer.num_heads} heads of {indexer.head_dim}, top-k {indexer.top_k}; teach it before sparse attention is used"
    )
    return 0
