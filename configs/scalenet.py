"""ScaleNet against RotNet and training from scratch."""

import ml_collections

SGD = dict(name="sgd", momentum=0.9, weight_decay=5e-4)


def get_config(preset=None):
    config = ml_collections.ConfigDict()
    config.name = "scalenet"
    config.preset = preset
    config.data = dict(name="mnist5k", test=1000)
    config.inputs = dict(original=())
    config.unlabelled = dict(total=1000)
    config.labels = dict(per_class_10=dict(per_class=10))
    config.model = dict(name="resnet8")
    config.stages = dict(
        half=rotation(0.5, 0.1, 4),
        full=rotation(1.0, 0.05, 2),
        rotnet={**rotation(1.0, 0.1, 2), "match": ("half", "full")},
        finetune=finetune(20),
        finetune_long={**finetune(20), "match": ("half", "full", "finetune")},
    )
    config.arms = dict(
        scratch=("finetune",), scratch_matched=("finetune_long",), rotnet=("rotnet", "finetune"),
        scalenet=("half", "full", "finetune"),
    )
    config.probe = dict(
        optimiser=SGD, schedule=dict(name="steps", rate=0.01, milestones=(5, 15, 25), factor=0.2), epochs=35, batch_size=100, repeat=1
    )
    config.evaluations = ("pretext", "ridge", "knn", "probe", "finetune")
    config.baseline = "scratch"
    config.seeds = (0, 1, 2)
    config.attention = False
    config.save_seconds = 60.0
    return config


def rotation(alpha, rate, epochs):
    return dict(
        objective=dict(name="rotation"), on="unlabelled", view=(dict(name="scale", alpha=alpha),),
        optimiser=SGD, schedule=dict(name="steps", rate=rate, milestones=(0.3 * epochs, 0.6 * epochs, 0.8 * epochs), factor=0.2), epochs=epochs,
        batch_size=128,
    )


def finetune(epochs):
    return dict(
        objective=dict(name="supervised"), on="labelled", fresh=("head",), optimiser=SGD,
        schedule=dict(name="steps", rate=0.01, milestones=(0.3 * epochs, 0.6 * epochs, 0.8 * epochs), factor=0.2), epochs=epochs, batch_size=128, repeat=1,
    )
