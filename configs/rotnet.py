"""RotNet (Gidaris, Singh & Komodakis, ICLR 2018): rotation pretraining of a Network in Network, and few labels.

    python -m jaxsd.main --config=configs/rotnet.py[:PRESET]

    preset    data                                what is compared
    (none)    5,000 handwritten digits, embedded  supervised and RotNet + conv with 20 labels per class, at 14 pixels
    tiny      1,797 digits of 8 pixels, embedded  the same in seconds, with 2 labels per class, for tests
    folder    --config.data.path=FOLDER           the same on class folders, 20 labels per class
    tfds      --config.data.dataset=NAME          the same on any prepared set of TFDS
    cifar10   CIFAR-10 (TFDS)                     the paper's recipe with 20, 100, 400, 1,000 and 5,000 per class

Arms: `supervised` (three blocks, all trained), `rotnet_conv` (the first two blocks frozen after the rotation task, a
new third block and head on top). Numbers are those of the public code (FeatureLearningRotNet) unless marked "ours".
"""

import ml_collections
from ml_collections import config_dict

SGD = dict(name="sgd", momentum=0.9, nesterov=True, weight_decay=5e-4)
CROP_FLIP = (dict(name="pad_crop", padding=4), dict(name="flip_horizontal"))


def get_config(preset=None):
    """The config of a preset; every value can be overridden by --config.KEY=VALUE."""
    presets = {None: embedded, "tiny": tiny, "folder": folder, "tfds": tfds, "cifar10": cifar10}
    if preset not in presets:
        raise ValueError(f"configs/rotnet.py has no preset {preset!r}: choose from {', '.join(list(presets)[1:])}")
    config = ml_collections.ConfigDict()
    config.name = "rotnet"
    config.preset = preset
    config.pretext_data = None
    config.inputs = ordered(original=())
    config.subsets = ordered(unlabelled=dict())
    config.model = dict(name="nin", blocks=4)
    config.arms = ordered(supervised=("supervised",), rotnet_conv=("rotation", "conv"))
    config.probe = None
    config.evaluations = ("pretext", "ridge", "finetune")
    config.baseline = "supervised"
    config.seeds = (0, 1, 2)  # ours: the paper gives single runs
    config.attention = False
    config.save_seconds = 60.0
    presets[preset](config)
    return config


def cifar10(config):
    """Expected error in per cent with 20 / 100 / 400 / 1,000 / 5,000 labels per class, as later surveys quote it.

    RotNet + conv 35.37 / 24.72 / 17.16 / 13.57 / 8.05; supervised 66.34 / 52.74 / 25.81 / 16.53 / 6.93. An epoch stays
    about 50,000 draws however few the labels, so the number of steps does not shrink.
    """
    config.data = dict(name="tfds", dataset="cifar10", data_dir=config_dict.placeholder(str))
    config.labels = ordered(**{f"per_class_{count}": few(count) for count in (20, 100, 400, 1000, 5000)})
    config.stages = stages(rotation_epochs=200, conv_epochs=100, supervised_epochs=200, draws=50_000)


def embedded(config):
    """Sized for two cores (ours): few images and epochs, at half the side; the network is the paper's."""
    config.data = dict(name="mnist5k", test=1000, validation=0.0)
    config.subsets = ordered(unlabelled=dict(total=500))
    config.labels = ordered(per_class_20=few(20))
    config.stages = stages(rotation_epochs=2, conv_epochs=3, supervised_epochs=3, draws=200, alpha=0.5)
    config.seeds = (0, 1)


def tiny(config):
    """The same in seconds."""
    config.data = dict(name="digits", test=360, validation=0.0)
    config.subsets = ordered(unlabelled=dict(total=64))
    config.labels = ordered(per_class_2=few(2))
    config.stages = stages(rotation_epochs=1, conv_epochs=1, supervised_epochs=1, draws=20)
    config.seeds = (0,)


def folder(config):
    """Images in class folders; lengths are ours."""
    config.data = dict(
        name="folder",
        path=config_dict.placeholder(str),
        size=32,
        canvas="crop",
        channels=3,
        validation=0.0,
        test=0.2,  # where there is no test folder
        groups=config_dict.placeholder(str),  # the scene in a file's name, such as "([^_]+)_[0-9]+" for frames
        on_bad_image="error",
    )
    config.splits = crossvalidation()
    config.labels = ordered(per_class_20=few(20))
    config.stages = stages(rotation_epochs=50, conv_epochs=25, supervised_epochs=50, draws=5_000)


def tfds(config):
    """The preset `folder` on any prepared classification set of TFDS."""
    folder(config)
    config.data = dict(
        name="tfds",
        dataset=config_dict.placeholder(str),
        data_dir=config_dict.placeholder(str),
        size=32,
        canvas="crop",
        channels=3,
        train="train",
        test=config_dict.placeholder(str),  # a split or a share; else the split test, or 0.2 where there is none
    )


def few(per_class):
    """The first images of each class, as the public code takes them."""
    return dict(per_class=per_class, first=True)


def stages(rotation_epochs, conv_epochs, supervised_epochs, draws, alpha=1.0):
    """Rotation, conv classifier on frozen blocks 1 and 2, and supervised training, their milestones scaled alike."""

    def ladder(shares):
        return dict(name="steps", rate=0.1, shares=shares, factor=0.2)

    view = (dict(name="scale", alpha=alpha),)
    shared = dict(optimiser=dict(SGD), view=view, augment=CROP_FLIP, batch_size=128)
    task = dict(**shared, objective=dict(name="supervised"), on="labelled", model=dict(blocks=3), epoch_images=draws)
    return dict(
        rotation=dict(
            **shared,
            objective=dict(name="rotation"),
            on="unlabelled",
            schedule=ladder((0.3, 0.6, 0.8)),  # 60, 120, 160 of 200
            epochs=rotation_epochs,
        ),
        conv=dict(
            **task,
            schedule=ladder((0.35, 0.7, 0.85)),  # 35, 70, 85 of 100
            epochs=conv_epochs,
            freeze=("block1", "block2"),
            fresh=("block3", "block4", "head"),
        ),
        supervised=dict(**task, schedule=ladder((0.3, 0.6, 0.8)), epochs=supervised_epochs),
    )


def crossvalidation():
    """None until `folds` are given, such as 5 with the seeds 0 to 4 and data.test=0; by="group" keeps scenes whole."""
    return ordered(crossvalidation=dict(by="image", folds=0))


def ordered(**parts):
    """A ConfigDict that keeps this order, which is the table's."""
    return ml_collections.ConfigDict(parts, sort_keys=False)
