"""An hour of video on a CPU: time to the first token beside the decoder alone, and the memory of the full token budget.

    python -m benchmarks.video [--threads 2] [--minutes 60] [--gop 250] [--repeats 1]
    python -m benchmarks.video --memory [--minutes 60]

The first takes a 720p H.264 file and the bundled model as it is: (a) the library's own loop over the sampled frames, resizing
included and nothing else; (b) a question from its messages to the first token: reading packets, decoding, encoding, prefill.
The goal is (b) <= 1.3 (a). The second takes a 1080p file, the published token budget (184,320) and the bundled model's weights,
and prints the peak of resident memory above the start: weights and key-value pages are in memory before, encoded pictures that
are kept for the next question are told apart. Files are made once, in runs/video.
"""

import argparse
import os


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", action="store_true", help="peak memory of the full token budget instead of the time")
    parser.add_argument("--minutes", type=int, default=60, help="of video")
    parser.add_argument("--gop", type=int, default=250, help="frames between keyframes")
    parser.add_argument("--threads", type=int, default=2, help="of torch; the decoder takes as many as there are cores")
    parser.add_argument("--repeats", type=int, default=1)
    arguments = parser.parse_args()
    # As the command line does it, before torch is loaded: see `openkeye/apps/commands.py`.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    import torch

    from benchmarks.video_measures import first_token, memory

    torch.set_num_threads(arguments.threads)
    if arguments.memory:
        memory(arguments.minutes)
    else:
        first_token(arguments.minutes, arguments.gop, arguments.repeats)


if __name__ == "__main__":
    main()
