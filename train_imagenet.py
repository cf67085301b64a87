"""Train a timm model from scratch with SAM, OBF or a baseline.

On ImageNet-1k, another dataset of the Hub, a folder of images, or the bundled digits.
"""

import difflib

import timm

from common import allocator, checkpoints, loop, run, settings
from common.build import build_job
from common.dry_run import dry_run
from common.errors import InputError, clear_errors
from common.monitor import Monitor


def parser() -> settings.Parser:
    """The flags."""
    model_help = "timm architecture, trained from scratch (%(default)s)"
    return settings.parser(__doc__, model_help, model="resnet50")


def create_model(args, num_classes):
    """The timm model of a run.

    Raises:
        InputError: timm has no such model (with the nearest names), or it does not take
            ``model_kwargs``.
    """
    options = {"num_classes": num_classes, **args.model_kwargs}
    try:
        return checkpoints.create_model(args.model, args.img_size, **options)
    except Exception as error:  # timm, its models and the Hub each raise their own
        message = f"timm cannot create {args.model!r} with {args.model_kwargs}: {error}"
        if not timm.is_model(args.model):
            nearest = difflib.get_close_matches(args.model, timm.list_models(), 3)
            hint = f"; the nearest are {', '.join(nearest)}" if nearest else ""
            message = f"timm has no model {args.model!r}{hint}"
        raise InputError(message) from error


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
                run.save_model(job, "last")
                if run.due(args, progress, args.save_interval):
                    run.save_model(job, f"epochs/{progress.epoch + 1:04d}")
                top1 = run.validate(job, progress)
                if run.is_best(job, progress, top1):
                    run.save_model(job, "best")
                monitor.end_epoch(top1)
        return run.finish(job)


if __name__ == "__main__":
    with clear_errors():
        main()
