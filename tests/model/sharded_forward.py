"""One rank of a model's plain run: python -m tests.model.sharded_forward MODEL_DIR INPUT OUTPUT_DIR (see test_sharding.py)."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from openkeye.inputs.patches import Patches
from openkeye.model.config import KeyeConfig
from openkeye.model.keye import KeyeModel
from openkeye.model.past import PlainPast
from openkeye.model.sharding import Shard
from openkeye.model.weights import load_model


@torch.inference_mode()
def run(model: KeyeModel, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Hidden states, logits and the selection of every layer."""
    vectors = model.encode_patches(Patches(given["pixels"], given["grid"])) if "pixels" in given else None
    embeds = model.embed(given["ids"], None, vectors)
    past = PlainPast(model.config.indexer.top_k)
    hidden = model(embeds, given["positions"], past)
    return {"hidden": hidden, "logits": model.logits(hidden), "selected": torch.stack(list(past.selected.values()))}


def main() -> None:
    folder, given, out = (Path(argument) for argument in sys.argv[1:])
    dist.init_process_group("gloo")
    shard = Shard(dist.get_rank(), dist.get_world_size())
    for are_experts_e4m3 in (False, True) if KeyeConfig.load(folder).num_experts else (False,):
        model = load_model(folder, dtype=torch.float32, are_experts_e4m3=are_experts_e4m3, shard=shard)
        torch.save(run(model, torch.load(given)), out / f"{shard.rank}-{are_experts_e4m3}.pt")
    dist.barrier()
    # What is measured is written. gloo's threads, torn down beside those of other ranks, now and then end the process instead.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
