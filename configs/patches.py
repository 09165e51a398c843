"""Self-pretraining on patches of growing size (anonymous submission to ICLR 2021): quality scores and scenes.

    python -m jaxsd.main --config=configs/patches.py[:PRESET]

    preset                 data                                         patches                time
    (none)                 photographs degraded in five ways, embedded  8, 16, 32              3 minutes, 2 cores
    tiny                   the same, fewer                              16, 32                 seconds
    live                   LIVE release 2, --config.data.path=FOLDER    32, 64, 128, 256, 512  hours, 1 GPU
    live_itw               LIVE In the Wild, --config.data.path=FOLDER  32, 64, 128, 256       hours, 1 GPU
    koniq                  KonIQ-10k, --config.data.path=FOLDER         32, 64, 128, 256       hours, 1 GPU
    indoor67               MIT Indoor67, --config.data.path=FOLDER      64, 128, 256           hours, 1 GPU
    folder                 class folders, --config.data.path=FOLDER     16, 32, 64             see the README
    tfds                   any set of TFDS, --config.data.dataset=NAME  16, 32, 64             as folder
    scores                 a CSV file, --config.data.path=FILE          32, 64, 128, 256       see the README
    rotation_then_patches  as (none)                                    8, 16, 32              3 minutes, 2 cores

The times of `live` to `indoor67` and of `rotation_then_patches` are estimates.

Arms: `patch32` and so on (the ladder up to that size: what stands below the newest block is frozen, section 2), the
last of them being the method; `scratch` (the last network, nothing frozen, the same epochs); `scratch_matched` (until
the whole ladder's pixels are spent; ours); `statistics` (ridge on hand-made statistics, no network: ours).

"ours" marks what the paper leaves open. Ours everywhere: the network (3x3 convolutions, every step ending in a map of
4x4), patches side by side, the L1 loss, batches of 128 halved with every step down to 8, and no augmentation.
"""

import ml_collections
from ml_collections import config_dict


def get_config(preset=None):
    """The config of a preset; every value can be overridden by --config.KEY=VALUE."""
    presets = {
        None: embedded,
        "tiny": tiny,
        "live": live,
        "live_itw": live_itw,
        "koniq": koniq,
        "indoor67": indoor67,
        "folder": folder,
        "tfds": tfds,
        "scores": scores,
        "rotation_then_patches": rotation_then_patches,
    }
    if preset not in presets:
        raise ValueError(f"configs/patches.py has no preset {preset!r}: choose from {', '.join(list(presets)[1:])}")
    config = base()
    config.preset = preset
    presets[preset](config)
    return config


def base():
    """What the presets share."""
    config = ml_collections.ConfigDict()
    config.name = "patches"
    config.pretext_data = None
    config.inputs = ordered(original=())
    config.splits = ordered()
    config.subsets = ordered(unlabelled=amount())
    config.labels = ordered(all=amount())
    config.evaluations = ("finetune",)
    config.baseline = "scratch"
    config.seeds = (0, 1, 2)
    config.probe = None
    config.attention = False
    config.save_seconds = 60.0
    return config


def embedded(config):
    """What the bare command runs: sized for two cores, so sizes, widths and lengths are ours."""
    config.data = dict(name="photos_quality", size=32, levels=5, scenes_per_photo=5)
    config.splits = ordered(by_scene=dict(by="group", test=0.2))
    config.model = dict(name="patchnet", patch=8, first=(16,), widths=(32, 64), hidden=(128, 64), dropout=0.0)
    growing(config, (8, 16, 32), regression(), epochs=6, batch=128)


def tiny(config):
    """The same in seconds."""
    embedded(config)
    config.data = dict(name="photos_quality", size=32, levels=5, scenes_per_photo=2)
    config.model = dict(name="patchnet", patch=16, first=(8, 8), widths=(8,), hidden=(16, 8), dropout=0.0)
    growing(config, (16, 32), regression(), epochs=2, batch=128)
    config.seeds = (0, 1)


def live(config):
    """Table 1 (section 3.1): 779 images, 5 distortions; centre crop and padding to 512 pixels.

    Expected, Pearson / Spearman / MAE, one split of the images: patch32 .9649 .9642 5.224; patch64 .9675 .9648 5.051;
    patch128 .9704 .9672 4.441; patch256 .9748 .9679 3.614; patch512 .9743 .9670 3.479; scratch .8910 .8977 9.331.
    by_image is the paper's random split of images, by_scene keeps a scene on one side (ours). Mirrored padding: ours.
    """
    config.data = dict(name="live", path=config_dict.placeholder(str), size=512, canvas="reflect")
    config.splits = both()
    config.model = network(32, (128, 256, 256, 512))
    growing(config, (32, 64, 128, 256, 512), regression(), epochs=80, batch=128)


def live_itw(config):
    """The ladder on 1,162 photographs with authentic distortions and mean opinion scores: not in the paper."""
    config.data = dict(name="live_itw", path=config_dict.placeholder(str), size=256, canvas="crop")
    ours(config)


def koniq(config):
    """The ladder on the 10,073 photographs of KonIQ-10k: not in the paper."""
    config.data = dict(name="koniq", path=config_dict.placeholder(str), size=256, canvas="crop")
    ours(config)


def scores(config):
    """Any images with a CSV file `file,score[,std][,group]`: every length is ours."""
    config.data = dict(
        name="table",
        path=config_dict.placeholder(str),
        images=config_dict.placeholder(str),
        size=256,
        canvas="crop",
        score="score",
        on_bad_image="error",
    )
    ours(config)


def indoor67(config):
    """Table 2 (section 3.2): 67 classes, the official 80 + 20 images of each, resized to 256 pixels.

    Expected, per cent: patch64 37.71; patch128 38.83; patch256 42.95; scratch 39.88, each the best test epoch of 80:
    --config.stages.patch256.best_test=True, and so for every other stage, adds that number, marked. The answer for an
    image is the mean of its
    patches' probabilities (ours).
    """
    config.data = dict(name="indoor67", path=config_dict.placeholder(str), size=256)
    config.model = network(64, (256, 256))
    growing(config, (64, 128, 256), dict(name="supervised"), epochs=80, batch=128)


def folder(config):
    """Images in class folders, in Table 2's form; every length is ours."""
    config.data = dict(
        name="folder",
        path=config_dict.placeholder(str),
        size=64,
        canvas="crop",
        channels=3,
        validation=0.0,
        test=0.2,  # where there is no test folder
        groups=config_dict.placeholder(str),  # the scene in a file's name, such as "([^_]+)_[0-9]+" for frames
        on_bad_image="error",
    )
    config.splits = crossvalidation()
    config.model = network(16, (128, 256))
    growing(config, (16, 32, 64), dict(name="supervised"), epochs=20, batch=128)


def tfds(config):
    """The preset `folder` on any prepared classification set of TFDS."""
    folder(config)
    config.data = dict(
        name="tfds",
        dataset=config_dict.placeholder(str),
        data_dir=config_dict.placeholder(str),
        size=64,
        canvas="crop",
        channels=3,
        train="train",
        test=config_dict.placeholder(str),  # a split or a share; else the split test, or 0.2 where there is none
    )


def rotation_then_patches(config):
    """The ladder on a first block that has learned to tell four rotations of the smallest patches (ours)."""
    embedded(config)
    stages, arms = config.stages.to_dict(), config.arms.to_dict()
    first, *rest = arms["patch32"]
    stages["rotation"] = {**stages[first], "objective": dict(name="rotation"), "on": "unlabelled"}
    stages["turned"] = {**stages[first], "fresh": ("top",)}
    config.stages = stages
    config.arms = ordered(**arms, rotation_then_patch32=("rotation", "turned", *rest))
    config.evaluations = ("pretext", "finetune")


def ours(config):
    """Without named scenes, so images are split at random; resized to 256 pixels, while scores are of the full size."""
    config.splits = ordered(random=dict(by="image", test=0.2, folds=0))  # folds=5, test=0: cross-validation
    config.model = network(32, (128, 256, 256))
    growing(config, (32, 64, 128, 256), regression(), epochs=80, batch=128)


def network(patch, widths):
    """The network, all ours: channels of the first block by the smallest patch, then of each further block."""
    first = {16: (32, 64), 32: (32, 64, 128), 64: (32, 64, 128, 128)}[patch]
    return dict(name="patchnet", patch=patch, first=first, widths=widths, hidden=(512, 256), dropout=0.5)


def growing(config, sizes, objective, epochs, batch):
    """The stages and arms of a ladder of patch sizes (algorithm 1) and of its baselines."""
    stages, names = {}, [f"patch{size}" for size in sizes]
    for step, (name, size) in enumerate(zip(names, sizes, strict=True)):
        stages[name] = dict(
            objective=objective,
            on="labelled",
            model=dict(grow=step + 1),
            view=(dict(name="patches", size=size),),
            freeze=tuple(f"block{i + 1}" for i in range(step)),
            fresh=(f"block{step + 1}", "top") if step else (),
            augment=(),
            optimiser=dict(name="adam"),  # section 3.1
            schedule=dict(name="steps", rate=0.001, factor=0.1, shares=(0.375, 0.75)),  # epochs 30 and 60 of 80
            epochs=epochs,
            batch_size=max(8, batch >> step),
            trunk="auto",
            average="probability",
            best_test=False,
        )
    stages["scratch"] = {**stages[names[-1]], "freeze": (), "fresh": ()}
    stages["scratch_matched"] = dict(like="scratch", match=tuple(names))
    config.stages = stages
    ladder = {name: tuple(names[: step + 1]) for step, name in enumerate(names)}
    config.arms = ordered(statistics=(), scratch=("scratch",), scratch_matched=("scratch_matched",), **ladder)


def regression():
    """Absolute error, as the mean absolute error is reported; scores are divided by 100 inside (ours)."""
    return dict(name="regression", loss="l1", scale=100.0)


def both():
    """One scene on one side of the split, or the paper's random images, side by side: the gap is the leak."""
    return ordered(by_scene=dict(by="group", test=0.2), by_image=dict(by="image", test=0.2))


def amount(total=None, fraction=None, per_class=None):
    """How many training images are used; all where nothing is given."""
    return dict(
        total=config_dict.placeholder(int) if total is None else total,
        fraction=config_dict.placeholder(float) if fraction is None else fraction,
        per_class=config_dict.placeholder(int) if per_class is None else per_class,
    )


def crossvalidation():
    """None until `folds` are given, such as 5 with the seeds 0 to 4 and data.test=0; by="group" keeps scenes whole."""
    return ordered(crossvalidation=dict(by="image", folds=0))


def ordered(**parts):
    """A ConfigDict that keeps this order, which is the table's."""
    return ml_collections.ConfigDict(parts, sort_keys=False)
