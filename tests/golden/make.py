"""Writes tests/golden/NAME.json: what timm or torchvision computes from the tensors of `filled`, in float64.

    PYTHONPATH=.:tests python tests/golden/make.py [NAME ...]

Needs torch 2.13, torchvision 0.28 and timm 1.0.31; the tests need none of them. Each file holds, for two resolutions in
inference mode, the first logits and for every block its shape, mean, mean magnitude and a few entries; with `train`
also the loss, the norm of every gradient and the sums of the running statistics after one training step.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from flax.traverse_util import flatten_dict
from golden.cases import CASES, entries, features_of

from jaxsd.bench.peer.networks import TWINS, load_torchvision
from jaxsd.weights import published_name
from jaxsd.weights.names import LEAVES, kept, turned

HERE = Path(__file__).parent


def reference(case, resolution):
    """The peer's network for a case: timm's, torchvision's for names that begin with tv:, own: or blur:."""
    options = {"num_classes": case.outputs, **({"img_size": resolution} if case.sized else {}), **case.peer_options}
    if case.peer.startswith("own:"):
        return TWINS[case.peer[4:]](**options)
    if case.peer.startswith("tv:"):
        return getattr(load_torchvision().models, case.peer[3:])(**options)
    load_torchvision()  # timm imports it
    import timm

    if case.peer.startswith("blur:"):
        return blurred(timm.create_model(case.peer[5:], aa_layer=timm.layers.BlurPool2d, **options))
    return timm.create_model(case.peer, **options)


def blurred(peer):
    """A timm network with blur pooling whose shortcuts halve the map by it, too (as in Zhang's own code)."""
    from timm.layers import BlurPool2d

    for name, layer in peer.named_modules():
        if name.endswith("downsample.0") and layer.stride == (2, 2):
            layer.stride = (1, 1)
            blur = BlurPool2d(layer.in_channels).double()
            layer.register_forward_pre_hook(lambda layer, given, blur=blur: (blur(given[0]),))
    return peer


def peers_name(case, model, path):
    """The peer's name of the tensor at a path; an unpublished network's twin has the modules of ours."""
    if case.published:
        return published_name(model, path)
    return ".".join((*path[1:-1], LEAVES[path[-1]]))


def loaded(case, resolution):
    """Our network and the peer with the tensors of `filled`, every one of them in its place."""
    model, params, collections = case.filled(resolution)
    tensors = {
        peers_name(case, model, path): torch.from_numpy(turned(model, path, np.asarray(leaf)).copy()).double()
        for path, leaf in flatten_dict({"params": params, **kept(collections)}).items()
    }
    peer = reference(case, resolution).double()
    peer.load_state_dict(tensors, strict=True)
    return model, peer


def shown(case, peer, model, images, train):
    """Outputs and the blocks' features as [B, h, w, D]."""
    found, hooks = {}, []
    modules = dict(peer.named_modules())
    for block in model.blocks:
        keep = lambda module, given, value, block=block: found.__setitem__(block, value)  # noqa: E731
        hooks.append(modules[model.published(block) if case.published else block].register_forward_hook(keep))
    peer.train(train)
    outputs = peer(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).double())
    for hook in hooks:
        hook.remove()
    return outputs, {block: features_of(value) for block, value in found.items()}


def inference(case, resolution):
    model, peer = loaded(case, resolution)
    with torch.no_grad():
        outputs, features = shown(case, peer, model, case.pictures(resolution, 2), False)
    return {
        "logits": outputs[:, :8].tolist(),
        "features": {block: entries(value.numpy()) for block, value in features.items()},
    }


def training(case, resolution):
    model, peer = loaded(case, resolution)
    outputs, _ = shown(case, peer, model, case.pictures(resolution, 3), True)
    loss = torch.nn.functional.cross_entropy(outputs, torch.arange(3))
    loss.backward()
    gradients, state = dict(peer.named_parameters()), peer.state_dict()
    _, params, collections = case.filled(resolution)
    names = {"/".join(path): peers_name(case, model, ("params", *path)) for path in flatten_dict(params)}
    running = {
        "/".join(path): peers_name(case, model, ("batch_stats", *path))
        for path in flatten_dict(collections.get("batch_stats", {}))
    }
    return {
        "loss": loss.item(),
        "gradients": {path: float(gradients[name].grad.norm()) for path, name in names.items()},
        "running": {path: float(state[name].sum()) for path, name in running.items()},
    }


def main():
    torch.set_num_threads(1)  # spinning threads take the cores from each other
    for name in sys.argv[1:] or CASES:
        case = CASES[name]
        found = {"inference": {str(resolution): inference(case, resolution) for resolution in case.resolutions}}
        if case.train:
            found["train"] = training(case, case.resolutions[0])
        rounded = json.loads(json.dumps(found), parse_float=lambda text: float(f"{float(text):.7g}"))
        (HERE / f"{name}.json").write_text(json.dumps(rounded) + "\n")
        print(name, (HERE / f"{name}.json").stat().st_size, "bytes", flush=True)


if __name__ == "__main__":
    main()
