"""Fine-tune a trained model with SAM, OBF or a baseline: on CIFAR-10, CIFAR-100, a folder of images or the digits."""

from pathlib import Path

import timm
from accelerate.utils import set_seed
from timm.models import is_model_pretrained

import builders
import data
import settings
import training

MODEL_HELP = (
    "folder of a trained model (OUTPUT/best), timm name with pretrained weights, or hf-hub:OWNER/NAME (%(default)s)"
)


def load_model(args, num_classes):
    """The trained model of a run, with a new head.

    Raises:
        InputError: there is no such model, or its files are damaged or do not fit each other.
    """
    name, folder = args.model, Path(args.model).expanduser()
    if folder.is_dir():
        for file in ("config.json", "model.safetensors"):
            if not (folder / file).exists():
                hint = f": did you mean {folder / 'best'}?" if (folder / "best").is_dir() else ""
                raise data.InputError(f"the folder {folder} has no {file}, so it is no model in timm's layout{hint}")
        name = f"local-dir:{folder}"
    elif ":" not in name and not is_model_pretrained(name):
        raise data.InputError(f"there is no folder {name!r}, and timm has no pretrained model of that name")
    try:
        model = timm.create_model(name, pretrained=True, **args.model_kwargs)
    except Exception as error:  # safetensors, json, the Hub and timm each raise their own
        raise data.InputError(f"cannot load the model {args.model!r}: {error}") from error
    model.reset_classifier(num_classes)
    return model


def main(argv=None):
    defaults = {"model": "resnet50", "dataset": "uoft-cs/cifar10", "epochs": 100, "batch_size": 512, "lr": 0.01}
    args = settings.parse(settings.parser(__doc__, MODEL_HELP, **defaults), argv)
    accelerator = builders.build_accelerator(args)
    with accelerator.main_process_first():  # one process downloads
        splits = data.load(args.dataset, args.streaming)
    set_seed(args.seed)
    model = load_model(args, splits["train"].features["label"].num_classes)
    return training.train(args, accelerator, splits, model)


if __name__ == "__main__":
    with settings.clear_errors():
        main()
