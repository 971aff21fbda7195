"""What torchrun tells a process about the others that it was started with. Without it a process is alone."""

import os


def num_ranks() -> int:
    """How many processes were started together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's place among them; 0 leads."""
    return int(os.environ.get("RANK", "0")) if num_ranks() > 1 else 0


def local_rank() -> int:
    """Its place among those of this machine: the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", str(rank()))) if num_ranks() > 1 else 0


def num_local_ranks() -> int:
    """How many of them run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", str(num_ranks())))
