"""Fine-tune a trained model with SAM, OBF or a baseline: on CIFAR-10, CIFAR-100, a folder of images or the digits."""

from accelerate.utils import set_seed

from common import checkpoints, data, loaders, settings, training

MODEL_HELP = (
    "folder of a trained model (OUTPUT/last), timm name with pretrained weights, or hf-hub:OWNER/NAME (%(default)s)"
)


def parser() -> settings.Parser:
    """The flags."""
    defaults = {"model": "resnet50", "dataset": "uoft-cs/cifar10", "epochs": 100, "batch_size": 512, "lr": 0.01}
    return settings.parser(__doc__, MODEL_HELP, **defaults)


def create_model(args, num_classes):
    """The trained model, with a new head.

    Raises:
        InputError: there is no such model, or its files are damaged.
    """
    model = checkpoints.open_model(args.model, args.img_size, **args.model_kwargs)
    model.reset_classifier(num_classes)
    return model


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
