"""Fine-tune a trained model with SAM, OBF or a baseline: on CIFAR-10, CIFAR-100, a folder of images or the digits."""

from accelerate.utils import set_seed

import builders
import checkpoints
import data
import settings
import training

MODEL_HELP = (
    "folder of a trained model (OUTPUT/best), timm name with pretrained weights, or hf-hub:OWNER/NAME (%(default)s)"
)


def parser() -> settings.Parser:
    """The flags."""
    defaults = {"model": "resnet50", "dataset": "uoft-cs/cifar10", "epochs": 100, "batch_size": 512, "lr": 0.01}
    return settings.parser(__doc__, MODEL_HELP, **defaults)


def main(argv=None):
    """Run as from the command line; returns top-1, in [0, 1], by split."""
    args = settings.parse(parser(), argv)
    accelerator = builders.build_accelerator(args)
    # Its cache is locked, so one process downloads; a barrier would time out when that takes long.
    splits = data.load(args.dataset, args.streaming, args.validation_share)
    set_seed(args.seed)
    model = checkpoints.open_model(args.model, **args.model_kwargs)
    model.reset_classifier(splits["train"].features["label"].num_classes)
    return training.train(args, accelerator, splits, model)


if __name__ == "__main__":
    with settings.clear_errors():
        main()
