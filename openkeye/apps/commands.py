"""`openkeye COMMAND`: parses arguments, then imports only what that command needs.

Each command is a module of `openkeye.apps` with `SUMMARY`, `add_arguments(parser)` and `run(arguments) -> exit status`;
those modules import nothing heavy at the top, so that `openkeye --help` answers at once.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from openkeye import __version__
from openkeye.common.checks import InputError
from openkeye.common.launch import rank

COMMANDS = {
    "ask": "openkeye.apps.ask",
    "chat": "openkeye.apps.chat",
    "frames": "openkeye.apps.frames",
    "budget": "openkeye.apps.budget",
    "info": "openkeye.apps.info",
    "check": "openkeye.apps.check",
    "evaluate": "openkeye.apps.evaluate",
    "frameforge": "openkeye.apps.frameforge_command",
    "make-data": "openkeye.apps.make_data",
    "distill": "openkeye.apps.distill",
    "serve": "openkeye.apps.serve",
    "convert": "openkeye.apps.convert",
    "train": "openkeye.apps.train",
    "rl": "openkeye.apps.rl",
    "tasks": "openkeye.apps.tasks",
}


def build_parser() -> argparse.ArgumentParser:
    """The whole command line, every option with its help text."""
    parser = argparse.ArgumentParser(
        prog="openkeye", description="Ask questions about videos with the Keye-VL-2.0 architecture."
    )
    parser.add_argument("--version", action="version", version=f"openkeye {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, module_name in COMMANDS.items():
        module = importlib.import_module(module_name)
        subparser = subparsers.add_parser(name, help=module.SUMMARY, description=module.SUMMARY)
        module.add_arguments(subparser)
        subparser.set_defaults(run=module.run)
    return parser


def follow_leader() -> int:
    """What an engine's command does on every rank but the first (torchrun): the first one reads, writes and serves."""
    from openkeye.engine.parallel import follow

    follow()
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0 done, 1 a check failed, 2 wrong input, 3 more to do, 130 interrupted."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    if hasattr(arguments, "words") and not any(word.startswith("-") for word in rest):
        # A parser that has met an option takes no more words of an open list; ours may stand anywhere.
        arguments.words += rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    # Before torch is loaded. On a CPU its threads would else spin at every barrier while a video's decoder, or anyone else,
    # needs the cores: measured on two busy cores, ten times the processor time for the same answer.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        if getattr(arguments, "has_engine", False) and rank():
            return follow_leader()
        return arguments.run(arguments)
    except InputError as error:
        print(f"openkeye {arguments.command}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader of our output (head, less) has gone: nothing is lost and nothing is left to say.
        sys.stderr.close()
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
