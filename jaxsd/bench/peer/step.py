"""One training step in PyTorch, one JSON line: what `python -m jaxsd.bench step --against=PYTHON` runs.

    PYTHON jaxsd/bench/peer/step.py --model=resnet50 --resolution=64 --batch=32 --threads=2

PYTHON needs torch, and timm and torchvision for their networks; JAX it needs not. Forward, cross-entropy, backward and
SGD with momentum on random inputs, in float32 and training mode. The step is eager, the optimiser fused.
"""

import argparse
import importlib.metadata
import json
import platform
import statistics
import time


def flags():
    """The command line."""
    parser = argparse.ArgumentParser(description="One training step in PyTorch, one JSON line.")
    parser.add_argument("--model", required=True, help="timm's name, tv:NAME for torchvision's, own:NAME for a twin")
    parser.add_argument("--resolution", type=int, default=224)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--cifar-stem", action="store_true", help="for ResNets: 3x3, stride 1, no pooling")
    parser.add_argument("--channels-last", action="store_true")
    return parser


def step_seconds(given, model):
    """Seconds of each timed step of a network."""
    import torch

    images = torch.randn(given.batch, 3, given.resolution, given.resolution)
    labels = torch.randint(given.classes, (given.batch,))
    if given.channels_last:
        model, images = (it.to(memory_format=torch.channels_last) for it in (model, images))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True)
    seconds = []
    for _ in range(given.warmup + given.steps):
        start = time.perf_counter()
        optimiser.zero_grad(set_to_none=True)
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimiser.step()
        loss.item()
        seconds.append(time.perf_counter() - start)
    return seconds[given.warmup :]


def version(package):
    """Its installed version, None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main():
    """Times the step and prints the line."""
    given = flags().parse_args()
    import networks  # beside this file
    import torch

    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    model = networks.build(given.model, given.classes, given.resolution, given.cifar_stem)
    seconds = step_seconds(given, model)
    median = statistics.median(seconds)
    line = {
        "model": given.model,
        "resolution": given.resolution,
        "batch": given.batch,
        "threads": torch.get_num_threads(),
        "steps": given.steps,
        "memory_format": "channels_last" if given.channels_last else "contiguous",
        "images_per_s": round(given.batch / median, 2),
        "images_per_s_range": [round(given.batch / max(seconds), 2), round(given.batch / min(seconds), 2)],
        "step_ms": round(1e3 * median, 2),
        "parameters": sum(p.numel() for p in model.parameters()),
        **{name: version(name) for name in ("torch", "torchvision", "timm")},
        "python": platform.python_version(),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
