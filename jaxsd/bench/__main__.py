"""Speed, one JSON object per line: `python -m jaxsd.bench step|recipe|patches ...`.

step: one training step of a backbone on random inputs. recipe: a whole ScaleNet run (rotation at growing scales, then
fine-tuning on a few labels). patches: the late stages of a patch ladder, or its memory. With --against=PYTHON the first
two are also run in PyTorch, by the script --peer with that interpreter, in turn with ours and in fresh processes;
`ratio` is the peer's time over ours: above 1 is faster here. `step` has its PyTorch script in jaxsd/bench/peer.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path

from jaxsd.bench import patches, recipe, step, turns
from jaxsd.bench.turns import Line
from jaxsd.errors import RunError, UserError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{self.prog}: {message}: see --help")


def flags() -> argparse.ArgumentParser:
    """The command line."""
    parser = _Parser(prog="python -m jaxsd.bench", description="Speed, one JSON object per line.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what, peer, about in (
        ("step", step, step.PEER, "one training step of a backbone on random inputs"),
        ("recipe", recipe, Path("peers", "torch_rotnet.py"), "a whole ScaleNet run"),
        ("patches", patches, None, "what a patch ladder costs"),
    ):
        command = commands.add_parser(name, help=about)
        what.add_flags(command)
        command.add_argument(
            "--threads", type=int, default=min(2, turns.cores()), help="cores that each side may use (%(default)s)"
        )
        if peer is not None:
            command.add_argument("--against", metavar="PYTHON", help="interpreter that has torch")
            command.add_argument("--peer", type=Path, default=peer, help="the PyTorch script")
            command.add_argument("--repeats", type=int, default=3, help="runs with each PyTorch setting (%(default)s)")
    return parser


def main(argv: list[str]) -> int:
    """Runs the command line; returns the exit status."""
    try:
        given = flags().parse_args(argv)
        turns.bind(given.threads)
        for line in _lines(given):
            print(json.dumps(line), flush=True)
        return 0
    except (UserError, RunError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1


def _lines(given: argparse.Namespace) -> Iterable[Line]:
    if given.command == "patches":
        return patches.lines(given)
    what = step if given.command == "step" else recipe
    return what.compared(given) if given.against else [what.line(given)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
