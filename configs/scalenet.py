"""ScaleNet (Huang & Roozbahani, GCPR 2021, arXiv 2310.02386): rotation pretraining on growing image scales.

    python -m jaxsd.main --config=configs/scalenet.py[:PRESET]

    preset           data                                what is compared                            time
    (none)           5,000 handwritten digits, embedded  the four arms below, 10 labels per class,   3 minutes, 2 cores
                                                         at 14 pixels (so ScaleNet begins at 7)
    tiny             1,797 digits of 8 pixels, embedded  the same, for tests                         seconds
    folder           --config.data.path=FOLDER           the four arms, plain and Harris inputs      see the README
    tfds             any set, --config.data.dataset=NAME the same                                    as folder
    photos           crops of 10 photographs, embedded   the four arms on the five inputs of Table 3 minutes, 1 GPU
    cifar10          CIFAR-10 (TFDS)                     Tables 1, 2: scales and rates (--only)      days, 1 GPU
    cifar10_limited  CIFAR-10 (TFDS)                     Table 3: five inputs, 4,000 labels and all  days, 1 GPU
    imagenet_subset  --config.data.path=FOLDER           Table 4: AlexNet, 65 and 240 per class      hours, 1 GPU

The times of the last four are estimates.

Arms: `scratch` (the downstream task alone), `scratch_matched` (downstream until the pretext's pixels are spent too),
`rotnet` (scale 1 only, ScaleNet's pixels up to whole epochs), `scalenet` (scales 0.5, then 1).

"ours" marks what the paper leaves open. Ours everywhere: legacy resizing (at 0.5 it keeps the even pixels, as section
3.1.1 says), a batch of 128 is 128 images and so 512 turned inputs, no augmentation, Harris with OpenCV's tutorial
settings and the same inputs downstream, the last scale (alpha 1) feeds the downstream task, probes with momentum and
weight decay as the other stages and 35 epochs as in RotNet's code, and the arms `scratch` and `scratch_matched`.
"""

import ml_collections
from ml_collections import config_dict

SGD = dict(name="sgd", momentum=0.9, nesterov=False, weight_decay=5e-4)  # section 3.1.1; plain momentum: ours
ARMS = dict(
    scratch=("finetune",),
    scratch_matched=("finetune_long",),
    rotnet=("rotnet", "finetune"),
    scalenet=("half", "full", "finetune"),
)


def get_config(preset=None):
    """The config of a preset; every value can be overridden by --config.KEY=VALUE."""
    presets = {
        None: embedded,
        "tiny": tiny,
        "folder": folder,
        "tfds": tfds,
        "photos": photos,
        "cifar10": cifar10,
        "cifar10_limited": cifar10_limited,
        "imagenet_subset": imagenet_subset,
    }
    if preset not in presets:
        raise ValueError(f"configs/scalenet.py has no preset {preset!r}: choose from {', '.join(list(presets)[1:])}")
    config = base()
    config.preset = preset
    presets[preset](config)
    return config


def base():
    """What the presets share."""
    config = ml_collections.ConfigDict()
    config.name = "scalenet"
    config.pretext_data = None
    config.init = dict(weights=config_dict.placeholder(str), standardise="auto")  # the weights that all arms begin with
    config.inputs = ordered(original=())
    config.subsets = ordered(unlabelled=amount())
    config.arms = ordered(**ARMS)
    config.evaluations = ("pretext", "ridge", "knn", "probe", "finetune")
    config.baseline = "scratch"
    config.seeds = (0, 1, 2)  # three runs: captions of Tables 2 and 3
    config.attention = True  # Figure 3
    config.save_seconds = 60.0
    return config


def embedded(config):
    """What the bare command runs: sized for two cores, so size, lengths and rates are ours; alphas are the paper's."""
    config.data = dict(name="mnist5k", test=1000, validation=0.0)
    config.inputs = ordered(pixels_14=(dict(name="scale", alpha=0.5),))
    config.subsets = ordered(unlabelled=amount(total=400))
    config.labels = ordered(few=amount(per_class=10))
    config.model = dict(name="resnet8")
    config.stages = small_batches(four_arms(half=(0.1, 4), full=(0.05, 2), downstream=downstream(0.05, 15)))
    config.probe = {**probe(), "batch_size": 32}
    config.attention = False


def tiny(config):
    """The same in seconds, with a network of one convolution, since compiling takes longest here."""
    embedded(config)
    config.data = dict(name="digits", test=360, validation=0.0)
    small = dict(first=(16,), widths=(), hidden=(32,), dropout=0.0)
    config.model = dict(name="patchnet", patch=8, adaptive_pool=True, **small)
    config.inputs = ordered(original=())
    config.subsets = ordered(unlabelled=amount(total=128))
    config.stages = small_batches(four_arms(half=(0.1, 2), full=(0.05, 1), downstream=downstream(0.05, 4)))
    config.probe = {**probe(), "batch_size": 32, "epochs": 4}
    config.seeds = (0, 1)


def folder(config):
    """Images in class folders; every length is ours."""
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
    # A path here gives the pretext stages images of their own.
    config.pretext_data = {**config.data, "path": config_dict.placeholder(str), "groups": config_dict.placeholder(str)}
    config.inputs = ordered(original=(), harris=(dict(name="harris"),))
    config.labels = ordered(few=amount(per_class=10))
    config.model = dict(name="resnet8")
    config.stages = four_arms(half=(0.1, 20), full=(0.05, 10), downstream=downstream(0.05, 40, epoch_images=500))
    config.probe = probe()


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
    config.pretext_data = None


def photos(config):
    """The five inputs of section 3.1.2 on crops of photographs, each photograph a class."""
    config.data = dict(name="photos", size=32, train_per_class=100, test_per_class=25)
    config.inputs = limited_inputs()
    config.labels = ordered(few=amount(per_class=10))
    config.model = dict(name="resnet8")
    config.stages = four_arms(half=(0.1, 8), full=(0.05, 8), downstream=downstream(0.05, 20, epoch_images=1000))
    config.evaluations = ("pretext", "ridge", "finetune")
    config.probe = None


def cifar10(config):
    """Tables 1 and 2 (section 3.1.1): ResNet50, 100 epochs per scale, fine-tuned with all labels.

    Arms are named after scales and initial rates in per cent: a50_100_r10_5 is alphas [0.5, 1], rates [0.1, 0.05].
    Expected (Table 2, three runs): rotnet 87.17 +- .13, a25_100_r10_5 86.19 +- .16, a50_100_r10_5 88.19 +- .04,
    a75_100_r10_5 87.63 +- .21, a25_50_100_r10_5_1 86.31 +- .17, a25_75_100_r10_5_1 86.59 +- .35,
    a50_75_100_r10_5_1 88.00 +- .05; (Table 1) a50_100_r10_10 86.81, a50_100_r10_1 88.00, a50_75_100_r10_5_5 86.16.
    RotNet has 100 epochs as in the paper, which is fewer pixels than ScaleNet's; rotnet_matched has as many (ours).
    """
    rows = {
        "rotnet": ((100,), (10,)),
        "a25_100_r10_5": ((25, 100), (10, 5)),
        "a50_100_r10_5": ((50, 100), (10, 5)),
        "a75_100_r10_5": ((75, 100), (10, 5)),
        "a25_50_100_r10_5_1": ((25, 50, 100), (10, 5, 1)),
        "a25_75_100_r10_5_1": ((25, 75, 100), (10, 5, 1)),
        "a50_75_100_r10_5_1": ((50, 75, 100), (10, 5, 1)),
        "a50_100_r10_10": ((50, 100), (10, 10)),
        "a50_100_r10_1": ((50, 100), (10, 1)),
        "a50_75_100_r10_5_5": ((50, 75, 100), (10, 5, 5)),
    }
    cifar10_data(config)
    config.labels = ordered(all=amount())
    stages: dict[str, dict] = dict(finetune=paper_downstream())
    arms: dict[str, tuple[str, ...]] = dict(scratch=("finetune",))
    for arm, (alphas, rates) in rows.items():
        names = [f"a{alpha}_r{rate}" for alpha, rate in zip(alphas, rates, strict=True)]
        for name, alpha, rate in zip(names, alphas, rates, strict=True):
            stages[name] = rotation(alpha / 100, rate / 100, 100, milestones=(30, 60, 80))
        arms[arm] = (*names, "finetune")
    stages["matched"] = {**stages["a100_r10"], "match": ("a50_r10", "a100_r5")}
    config.stages = stages
    config.arms = ordered(**arms, rotnet_matched=("matched", "finetune"))
    config.baseline = "rotnet"
    config.evaluations = ("pretext", "finetune")
    config.probe = None


def cifar10_limited(config):
    """Table 3 (section 3.1.2): RotNet and ScaleNet [0.5, 1] on five inputs, classified with 4,000 labels and with all.

    Expected, RotNet / ScaleNet: original 71.98 / 73.69 with 4,000 labels and 87.17 / 88.19 with all; Harris
    62.80 / 69.83 and 86.04 / 87.27; hybrid 69.32 / 73.16 and 87.17 / 88.12; gray 70.63 / 72.48 and 86.96 / 87.2;
    gray-Harris 61.63 / 68.09 and 85.77 / 86.04. The inputs feed the downstream task too (ours).
    """
    cifar10_data(config)
    config.inputs = limited_inputs()
    config.labels = ordered(labels_4000=amount(total=4000), all=amount())
    config.stages = dict(
        rotnet=rotation(1.0, 0.1, 100, milestones=(30, 60, 80)),
        half=rotation(0.5, 0.1, 100, milestones=(30, 60, 80)),
        full=rotation(1.0, 0.05, 100, milestones=(30, 60, 80)),
        finetune=paper_downstream(),
    )
    config.arms = ordered(rotnet=ARMS["rotnet"], scalenet=ARMS["scalenet"])
    config.baseline = "rotnet"
    config.evaluations = ("pretext", "finetune")
    config.probe = None


def imagenet_subset(config):
    """Table 4 (section 3.2): AlexNet, linear probes after every convolution of the frozen network.

    Expected, ConvB1 to ConvB5, single runs: rotnet_65 5.62 9.24 11.30 11.71 11.75; scalenet_65 5.93 9.91 12.05 12.64
    12.25; rotnet_240_from_rotnet 11.30 17.60 21.26 22.15 21.90; rotnet_240_from_scalenet 14.55 23.18 27.75 27.50 26.61.
    FOLDER is ImageNet's train and val with at least 240 images per class in train; all are held in memory, so copy the
    240 of each class that are to be used (240,000 images are 36 GB). The probes learn from the images of the pretext
    task (ours). At alpha 0.5 pool5 is 2x2 and not 6x6, so fc1 starts anew at alpha 1 (ours).
    """
    config.data = dict(name="folder", path=config_dict.placeholder(str), size=224, canvas="crop", test="val")
    config.subsets = ordered(per_class_65=amount(per_class=65), per_class_240=amount(per_class=240))
    config.labels = ordered(all=amount())
    config.model = dict(name="alexnet_rotnet")

    def pretext(alpha, rate, on):
        stage = rotation(alpha, rate, 30, milestones=(10, 20), factor=0.1)
        return {**stage, "batch_size": 192, "on": on}

    config.stages = dict(
        rotnet=pretext(1.0, 0.01, "per_class_65"),
        half=pretext(0.5, 0.01, "per_class_65"),
        full={**pretext(1.0, 0.001, "per_class_65"), "fresh": ("fc1",)},
        rotnet_240=pretext(1.0, 0.01, "per_class_240"),
    )
    config.arms = ordered(
        rotnet_65=("rotnet",),
        scalenet_65=("half", "full"),
        rotnet_240_from_rotnet=("rotnet", "rotnet_240"),
        rotnet_240_from_scalenet=("half", "full", "rotnet_240"),
    )
    config.baseline = "rotnet_65"
    config.evaluations = ("pretext", "probe")
    config.probe = {**probe(), "on": "pretext", "batch_size": 192}
    config.seeds = (0,)
    config.attention = False


def cifar10_data(config):
    """CIFAR-10 and the paper's network; the stem for small images is ours."""
    config.data = dict(name="tfds", dataset="cifar10", data_dir=config_dict.placeholder(str))
    config.model = dict(name="resnet50", stem="cifar")


def limited_inputs():
    """Section 3.1.2: original, corners overwritten, a mix of both, gray in three channels, gray with corners gone."""
    corners = dict(name="harris")
    return ordered(
        original=(),
        harris=(corners,),
        hybrid=(dict(name="hybrid", view=corners, share=0.5, seed=0),),  # share one half: ours
        gray=(dict(name="gray"),),
        gray_harris=(dict(name="gray"), corners),
    )


def amount(total=None, fraction=None, per_class=None):
    """How many training images a subset has; all where nothing is given. A plain random draw, anew for each seed."""
    return dict(
        total=config_dict.placeholder(int) if total is None else total,
        fraction=config_dict.placeholder(float) if fraction is None else fraction,
        per_class=config_dict.placeholder(int) if per_class is None else per_class,
    )


def rotation(alpha, rate, epochs, milestones=None, factor=0.2):
    """One pretext stage: rate times factor at the milestones (section 3.1.1: 1/5 at 30, 60, 80 of 100 epochs)."""
    return dict(
        objective=dict(name="rotation"),
        on="unlabelled",
        view=(dict(name="scale", alpha=alpha, rule="legacy"),),
        augment=(),  # none is named in the paper
        optimiser=dict(SGD),
        schedule=dict(name="steps", rate=rate, factor=factor, **drops(milestones)),
        epochs=epochs,
        batch_size=128,
    )


def drops(milestones):
    """Milestones in epochs, or the paper's shares of however many epochs there are."""
    return dict(milestones=milestones) if milestones else dict(shares=(0.3, 0.6, 0.8))


def downstream(rate, epochs, milestones=None, epoch_images=None):
    """Everything fine-tuned on the labelled images, with a new head."""
    return dict(
        objective=dict(name="supervised"),
        on="labelled",
        fresh=("head",),
        augment=(),
        optimiser=dict(SGD),
        schedule=dict(name="steps", rate=rate, factor=0.2, **drops(milestones)),
        epochs=epochs,
        epoch_images=epoch_images,
        batch_size=128,
    )


def paper_downstream():
    """Section 3.1.1: rate 0.001, a fifth at epochs 80, 160, 200; 100 epochs as every network, so only one drop.

    --config.stages.finetune.epochs=240 reaches all three.
    """
    return downstream(0.001, 100, milestones=(80, 160, 200))


def probe():
    """Section 3.2: logistic regression on every block, rate 0.01, a fifth at epochs 5, 15, 25."""
    return dict(
        optimiser=dict(SGD),
        schedule=dict(name="steps", rate=0.01, milestones=(5, 15, 25), factor=0.2),
        epochs=35,
        batch_size=128,
    )


def four_arms(half, full, downstream):
    """The stages of the four arms from (rate, epochs) of the two scales."""
    rate, epochs = half
    longer = max(epochs, full[1])
    return dict(
        half=rotation(0.5, *half),
        full=rotation(1.0, *full),
        rotnet={**rotation(1.0, rate, longer), "match": ("half", "full")},
        finetune=downstream,
        finetune_long=dict(like="finetune", match=("half", "full", "finetune")),
    )


def crossvalidation():
    """None until `folds` are given, such as 5 with the seeds 0 to 4 and data.test=0; by="group" keeps scenes whole."""
    return ordered(crossvalidation=dict(by="image", folds=0))


def ordered(**parts):
    """A ConfigDict that keeps this order, which is the table's."""
    return ml_collections.ConfigDict(parts, sort_keys=False)


def small_batches(stages):
    """The stages with batches of 32: few images need more steps than 128 would give (ours)."""
    return {name: {**stage, "batch_size": 32} if "like" not in stage else stage for name, stage in stages.items()}
