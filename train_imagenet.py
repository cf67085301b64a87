"""Train a timm model from scratch with SAM, OBF or a baseline.

On ImageNet-1k, another dataset of the Hub, a folder of images, or the bundled digits.
"""

from pathlib import Path

import timm

from common import allocator, checkpoints, loop, run, settings
from common.build import build_job
from common.dry_run import dry_run
from common.errors import InputError, clear_errors, the_nearest
from common.monitor import Monitor


def parser() -> settings.Parser:
    """The flags."""
    model_help = "timm architecture, trained from scratch (%(default)s)"
    return settings.parser(__doc__, model_help, model="resnet50")


def create_model(args, num_classes):
    """The timm model of a run.

    Raises:
        InputError: it is a trained model, timm has no such model (with the nearest names), or it
            does not take ``model_kwargs``.
    """
    refuse_trained(args.model)
    options = {"num_classes": num_classes, **args.model_kwargs}
    try:
        return checkpoints.create_model(args.model, args.img_size, **options)
    except Exception as error:  # timm, its models and the Hub each raise their own
        message = f"timm cannot create {args.model!r} with {args.model_kwargs}: {error}"
        if not timm.is_model(args.model):
            hint = the_nearest(args.model, timm.list_models())
            message = f"timm has no model {args.model!r}{hint}"
        raise InputError(message) from error


def refuse_trained(name: str) -> None:
    """Check that ``--model`` names an architecture, since no trained weights are loaded here.

    Raises:
        InputError: it names trained weights: a tag of timm's, a folder, or a place such as hf-hub:.
    """
    architecture, _, tag = name.partition(".")
    known = timm.is_model(architecture)
    folder = not known and Path(name).expanduser().is_dir()
    if ":" in name or folder or (known and tag):
        example = architecture if known else "resnet50"
        raise InputError(
            f"--model {name} is a trained model, and train_imagenet.py trains from random weights: "
            f"fine-tune it with finetune_cifar.py, or give an architecture, --model {example}"
        )


def main(argv=None):
    """Run as from the command line; returns top-1, in [0, 1], of the last epoch by split."""
    allocator.keep_freed_memory()
    args = settings.parse(parser(), argv)
    job = build_job(args, create_model)
    if args.dry_run:
        return dry_run(job)
    with run.started(job) as progress:  # from a checkpoint, if there is one to resume from
        with Monitor(job, progress) as monitor:
            while progress.epoch < args.epochs:
                loop.train_epoch(job, progress, monitor.after_update)
                run.save_checkpoint(job, progress)  # a kill in the evaluation costs no training
                run.save_last(job)
                if run.due(args, progress, args.save_interval):
                    run.save_model(job, f"epochs/{progress.epoch + 1:04d}")
                top1 = run.validate(job, progress)
                if run.is_best(job, progress, top1):
                    run.save_model(job, "best")
                monitor.end_epoch(top1, run.validate_ema(job, progress))
        return run.finish(job)


if __name__ == "__main__":
    with clear_errors():
        main()
