"""Prints every backbone, or the options of one: `python -m jaxsd.models [NAME] [--json]`."""

import argparse
import json
import sys

from jaxsd.errors import UserError


def table(rows: list[dict]) -> str:
    """The rows of the catalogue as aligned text, one line each, with a line of names and one of units."""
    cells = [("name", "parameters", "GFLOPs", "pixels", "blocks")]
    for row in rows:
        gflops = f"{row['flops'] / 1e9:.3f}"
        cells.append((row["name"], f"{row['parameters']:,}", gflops, str(row["resolution"]), " ".join(row["blocks"])))
    widths = [max(len(cell) for cell in column) for column in zip(*cells, strict=True)]
    lines = []
    for name, *numbers, blocks in cells:
        aligned = [text.rjust(width) for text, width in zip(numbers, widths[1:], strict=False)]
        lines.append("  ".join([name.ljust(widths[0]), *aligned, blocks]))
    return "\n".join([*lines, "for 3 channels and 1,000 outputs; a multiplication and an addition count as 2 FLOPs"])


def main(argv: list[str]) -> int:
    """Reads the flags, then counts; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m jaxsd.models", description="Every backbone and what it costs.")
    parser.add_argument("name", nargs="?", help="one backbone: its options, with defaults and what they are")
    parser.add_argument("--json", action="store_true", help="print JSON instead")
    flags = parser.parse_args(argv)
    from jaxsd.models.catalogue import catalogue, explained, options

    try:
        if flags.name is None:
            rows = catalogue()
            print(json.dumps(rows) if flags.json else table(rows))
        else:
            print(json.dumps(options(flags.name)) if flags.json else explained(flags.name))
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
