"""Fine-tune a trained model with SAM, OBF or a baseline.

On CIFAR-10, CIFAR-100, another dataset of the Hub, a folder of images, or the bundled digits.
"""

from accelerate import PartialState

from common import allocator, checkpoints, loop, run, settings
from common.build import build_job
from common.dry_run import dry_run
from common.errors import InputError, clear_errors
from common.monitor import Monitor

MODEL_HELP = "a run's OUTPUT/last, a timm name, or hf-hub:OWNER/NAME (%(default)s)"


def parser() -> settings.Parser:
    """The flags."""
    own = {"model": "resnet50", "dataset": "uoft-cs/cifar10", "epochs": 100}
    p = settings.parser(__doc__, MODEL_HELP, **own, batch_size=512, lr=0.01)
    settings.add_checkpoint_flags(p.add_argument_group("weights in a file").add_argument)
    return p


def create_model(args, num_classes):
    """The trained model, with a new head.

    Raises:
        InputError: there is no such model, its files are damaged, or do not fit it.
    """
    if args.checkpoint:
        options = {"use_ema": args.use_ema, "new_head": True, **args.model_kwargs}
        model = checkpoints.open_file(args.checkpoint, args.model, args.img_size, **options)
    elif args.use_ema:
        raise InputError("--use-ema has no effect without --checkpoint: drop it")
    else:
        model = checkpoints.open_model(args.model, args.img_size, **args.model_kwargs)
        say_tag(args.model, model)
    model.reset_classifier(num_classes)
    return model


def say_tag(name, model):
    """Say which weights of timm's a name without a tag stands for."""
    tag = model.pretrained_cfg.get("tag")
    if name == model.pretrained_cfg["architecture"] and tag:
        PartialState().print(f"--model {name}: fine-tunes timm's {name}.{tag}")


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
