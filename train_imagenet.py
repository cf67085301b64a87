"""Train a timm model from scratch with SAM, OBF or a baseline: on ImageNet-1k, a folder of images or the digits."""

import difflib

import timm
from accelerate.utils import set_seed

from common import checkpoints, data, loaders, settings, training


def create_model(args, num_classes):
    """The timm model of a run.

    Raises:
        InputError: timm has no such model (with the nearest names), or it does not take ``model_kwargs``.
    """
    try:
        return checkpoints.create_model(args.model, args.img_size, num_classes=num_classes, **args.model_kwargs)
    except Exception as error:  # timm, its models and the Hub each raise their own
        message = f"timm cannot create {args.model!r} with {args.model_kwargs}: {error}"
        if not timm.is_model(args.model):
            nearest = difflib.get_close_matches(args.model, timm.list_models(), 3)
            hint = f"; the nearest are {', '.join(nearest)}" if nearest else ""
            message = f"timm has no model {args.model!r}{hint}"
        raise settings.InputError(message) from error


def parser() -> settings.Parser:
    """The flags."""
    return settings.parser(__doc__, "timm architecture, trained from scratch (%(default)s)", model="resnet50")


def main(argv=None):
    """Run as from the command line; returns top-1, in [0, 1], of the last epoch by split."""
    args = settings.parse(parser(), argv)
    accelerator = training.build_accelerator(args)
    # Its cache is locked, so one process downloads; a barrier would time out when that takes long.
    splits = data.load(args.dataset, args.streaming, args.validation_share, args.train_share)
    set_seed(args.seed)
    model = create_model(args, splits["train"].features["label"].num_classes)
    batches = loaders.open_splits(args, accelerator, splits, model)
    training.check_model(args, model, batches)
    training.set_head_bias(args, model)
    timm_config = checkpoints.timm_config(args, model, batches)
    model = model.to(memory_format=batches.memory_format)
    criterion = training.build_criterion(args)
    optimizer = training.build_optimizer(args, model)
    objective = training.build_objective(args, criterion, optimizer)
    model, optimizer = accelerator.prepare(model, optimizer)
    schedule = training.build_schedule(args, optimizer, batches.steps)
    job = training.Job(args, accelerator, model, timm_config, criterion, objective, optimizer, schedule, batches)
    if args.dry_run:
        return training.dry_run(job)
    training.fit(job)
    return training.final_evaluation(job)


if __name__ == "__main__":
    with settings.clear_errors():
        main()
