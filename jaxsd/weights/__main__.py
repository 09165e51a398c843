"""`python -m jaxsd.weights STAGE OUT.safetensors`: a stage's network as a file for timm (AlexNet: torchvision).

STAGE is a stage's folder in a workdir: runs/scalenet/stages/original/few/finetune/seed0.
"""

import argparse
import sys
from pathlib import Path

from jaxsd import models
from jaxsd.errors import RunError, UserError
from jaxsd.models.forward import STANDARDISE
from jaxsd.train.checkpoint import read_model
from jaxsd.weights.names import save
from jaxsd.workdir import read_json


def main(argv: list[str] | None = None) -> int:
    """Writes the file and says what the network expects of images; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m jaxsd.weights", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("stage", type=Path, help="folder of a finished stage: WORKDIR/stages/../seed0")
    parser.add_argument("out", type=Path, help="file to write; it ends in .safetensors")
    arguments = parser.parse_args(argv)
    try:
        print(export(arguments.stage, arguments.out))
        return 0
    except (UserError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1


def export(folder: Path, out: Path) -> str:
    """Writes the network that a stage's folder holds to a safetensors file; returns a line about it."""
    identity = read_json(folder / "stage.json")
    if identity is None or not (folder / "done.json").exists():
        raise UserError(f"{folder} holds no finished stage: give WORKDIR/stages/../seed0")
    network = identity["stage"]["network"]
    if "trunk" in network:
        raise UserError(f"{folder} holds linear probes: give the stage before them")
    trained = read_model(folder / "checkpoints")
    collections = trained["extra"]["model"]
    save(out, models.build(**network), trained["params"], collections)
    mean, std = (", ".join(f"{x:.6g}" for x in collections[STANDARDISE][key]) for key in ("mean", "std"))
    return f"{out}: {network['name']}, {network['outputs']} outputs; of images in [0, 1] it takes ({mean}) over ({std})"


if __name__ == "__main__":
    sys.exit(main())
