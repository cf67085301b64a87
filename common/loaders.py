"""From images to batches: transforms, order, streams, and the loaders of a run."""

import contextlib
import dataclasses
import functools
import itertools
import multiprocessing
import random
import signal
import sys
import warnings
from collections.abc import Callable

import datasets
import numpy as np
import torch
from accelerate.utils import send_to_device
from timm.data import Mixup, create_transform, resolve_data_config
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.transforms import Compose, Normalize, v2

from common import allocator, images
from common.crops import CropOfFile, lighter
from common.data import explained, noisy_labels
from common.errors import InputError

IMAGES_PER_WORKER = 1000  # to evaluate: reading fewer takes less time than starting a worker
TIMEOUT = 600  # seconds that a loader waits for a batch of its workers
READERS = 8  # of a stream by a process, at most; its loader workers share them
BUFFER = 500  # undecoded examples from which a reader draws
MAX_SHARDS = 512  # a stream with more has them in groups, as datasets is slow to name one of many


@dataclasses.dataclass(frozen=True)
class Batches:
    """The batches of a run."""

    train: Callable  # (epoch, first): the batches of an epoch after the ``first`` of this process
    updates: int  # of an epoch
    accumulation: int  # loader batches of an update
    m: int  # examples of a micro-batch
    evaluation: dict  # by split: a prepared loader of its images in order
    to_input: Callable  # from a batch's images to the model's input
    memory_format: torch.memory_format  # of that input, and for the model's weights
    config: dict  # timm's data config: size, crop, interpolation, mean, standard deviation
    label_names: list

    @property
    def held_out(self) -> str:
        """The split that shows progress, and chooses the best epoch if it is validation."""
        return "validation" if "validation" in self.evaluation else "test"


def open_splits(args, accelerator, splits: datasets.DatasetDict, model) -> Batches:
    """The batches of a run on ``splits``, as the model's data config and the settings have them.

    An ``args.m`` that was not given becomes what a process loads at once, and
    ``args.channels_last`` what suits the model: from then on they are settings of the run.

    Raises:
        InputError: the batch does not split over the processes, or exceeds the training images; or
            ``channels_last`` does not go with the model.
    """
    layout = memory_format(args.channels_last, model, accelerator.is_fsdp2)
    args.channels_last = layout is torch.channels_last
    if accelerator.is_fsdp2 and layout is not memory_format(None, model):
        accelerator.print("memory format: contiguous, as FSDP2 needs")
    loaded, accumulation, m = split_batch(args, accelerator.num_processes)
    if args.m is None:
        args.m = m
        if m < args.batch_size:
            process = "a process" if accelerator.num_processes > 1 else "the process"
            accelerator.print(f"m is {m}, what {process} loads at once: set it by --m")
    wanted = {key: getattr(args, key) for key in ("img_size", "crop_pct", "interpolation")}
    config = resolve_data_config(wanted, model=model)
    keys = ("scale", "ratio", "hflip", "vflip", "aa", "color_jitter", "reprob", "decoder")
    augmentation = {key: getattr(args, key) for key in keys}
    train_transform, eval_transform = transforms(config, **augmentation)
    labels = labels_of(args, accelerator, splits["train"])
    size, train = train_batches(args, accelerator, splits["train"], train_transform, loaded, labels)
    if args.mixup or args.cutmix:
        train = mixed(args, accelerator, train, len(splits["train"].features["label"].names))
    if size < args.batch_size:
        raise InputError(
            f"batch_size {args.batch_size} exceeds the {size} training images: lower it"
        )
    streamed = isinstance(splits["train"], datasets.IterableDataset)
    if (rest := size % args.batch_size) and not streamed:
        accelerator.print(
            f"an epoch leaves out {rest} of {size} training images, other ones each time: they do "
            f"not fill an update of {args.batch_size}"
        )
    held_out = "validation" if "validation" in splits else "test"
    evaluation = {}
    for split in (split for split in splits if split != "train"):
        options = {"persistent": split == held_out}
        loader = evaluation_loader(
            args, accelerator, splits[split], eval_transform, loaded, **options
        )
        evaluation[split] = loader
    return Batches(
        train,
        updates=size // args.batch_size,
        accumulation=accumulation,
        m=m,
        evaluation=evaluation,
        to_input=to_input(config, next(model.parameters()).dtype, layout),
        memory_format=layout,
        config=config,
        label_names=splits["train"].features["label"].names,
    )


def split_batch(args, processes: int) -> tuple[int, int, int]:
    """Divide ``batch_size``.

    Without ``m``, micro-batches are whole loader batches.

    Returns:
        Examples per loader batch, loader batches per update, examples per micro-batch.

    Raises:
        InputError: m does not divide the batch, or it does not split over the processes, or without
            m only in tiny loader batches; with what would.
    """
    unit = args.m or 1
    if args.batch_size % unit:
        choices = _divisors(args.batch_size)
        raise InputError(f"m {unit} does not divide batch_size {args.batch_size}: {choices}")
    if args.batch_size // unit % processes:
        raise InputError(
            f"batch_size {args.batch_size} in micro-batches of {unit} does not split over "
            f"{processes} processes: {_divisors(args.batch_size // unit)} processes"
        )
    share = args.batch_size // processes
    loaded = _loaded(share, unit, args.device_batch_size)
    if args.m is None and _tiny(share, args.device_batch_size):
        larger = itertools.count(share + 1)
        fitting = next(n for n in larger if not _tiny(n, args.device_batch_size))
        raise InputError(
            f"batch_size {args.batch_size} splits over {processes} processes only in loader "
            f"batches of {loaded}, which would also be m: choose batch_size "
            f"{fitting * processes}, or give --m, {_divisors(share)}"
        )
    return loaded, share // loaded, args.m or loaded


def _loaded(share, unit, most):
    """The examples to load at once: of the multiples of ``unit`` up to ``most``, the largest that
    divides ``share``.
    """
    return max(n for n in range(unit, max(most, unit) + 1, unit) if share % n == 0)


def _tiny(share, most):
    """Whether ``share`` can only be loaded in less than a quarter of what fits at once."""
    return 4 * _loaded(share, 1, most) < min(share, most)


def _divisors(number):
    divisors = [str(i) for i in range(1, number + 1) if number % i == 0]
    return f"choose one of {', '.join(divisors)}"


def transforms(
    config: dict, *, scale, ratio, hflip: float, vflip: float = 0.0, aa: str | None = None,
    color_jitter: float | None = None, reprob: float = 0.0, decoder: str = "pil",
):  # fmt: skip
    """timm's training and evaluation transforms for a model's data config.

    That is the result of ``timm.data.resolve_data_config``.

    Images come out as uint8 (3, height, width), for ``to_input`` to normalise on the device. With
    the decoder "torchcodec", that of training takes them as such, and draws what timm's draws.

    Raises:
        InputError: the decoder's transforms lack the interpolation, the model does not take three
            channels, or timm knows no such policy ``aa``.
    """
    evaluation = evaluation_transform(config)
    shared = {key: config[key] for key in ("input_size", "interpolation")} | {"normalize": False}
    augmentation = {"scale": scale, "ratio": ratio, "hflip": hflip, "vflip": vflip}
    augmentation |= {"auto_augment": aa, "color_jitter": color_jitter}
    if aa:
        augmentation["mean"] = config["mean"]  # fills what a rotation leaves empty
    try:
        train = create_transform(**shared, is_training=True, **augmentation)
    except (AssertionError, KeyError, ValueError) as error:  # timm's parser of policies
        raise InputError(f"timm does not understand --aa {aa}: {error}") from error
    if reprob:
        train.transforms.append(Erasing(reprob, config["mean"], config["std"]))
    if decoder == "torchcodec":
        if config["interpolation"] not in ("bilinear", "bicubic"):
            raise InputError(
                f"--decoder torchcodec does not resize by {config['interpolation']}: choose "
                f"--interpolation bilinear or bicubic, or --decoder pil"
            )
        size, interpolation = config["input_size"][1:], config["interpolation"]
        train.transforms[0] = RandomCropOfTensor(size, scale, ratio, interpolation)
    return train, evaluation


class Erasing(RandomErasing):
    """timm's random erasing with noise, for uint8 images of the loader.

    The noise is N(0, 1) where the model's input is normalised, so here it is cut off at 0 and 255.
    """

    def __init__(self, probability: float, mean, std):
        super().__init__(probability, mode="pixel", device="cpu")
        self.normalize = Normalize(mean, std)
        self.mean, self.std = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))

    def __call__(self, image):
        """Erase a rectangle, or nothing."""
        image = super().__call__(self.normalize(image / 255))
        return image.mul_(self.std).add_(self.mean).mul_(255).round_().clamp_(0, 255).byte()


def evaluation_transform(config: dict, model_name: str = "the model"):
    """The second of ``transforms``: resize and centre crop.

    Raises:
        InputError: the model does not take three channels.
    """
    channels = config["input_size"][0]
    if channels != 3:
        raise InputError(
            f"{model_name} takes images of {channels} channels, and those here have 3, red, green "
            f"and blue: choose another model"
        )
    keys = ("input_size", "interpolation", "crop_pct", "crop_mode")
    return create_transform(**{key: config[key] for key in keys}, normalize=False)


class RandomCropOfTensor(RandomResizedCropAndInterpolation):
    """timm's random crop, for uint8 tensors.

    torchvision's older transforms would resize them as floats.
    """

    def __call__(self, image):
        """Crop and resize."""
        params = self.get_params(image, self.scale, self.ratio)
        return v2.functional.resized_crop(image, *params, self.size, self.interpolation)


def memory_format(channels_last: bool | None, model, fsdp2: bool = False) -> torch.memory_format:
    """The order in memory of a model's images and weights: channels_last if asked for, or useful.

    It helps models with more than one 2-d convolution, on CPUs and GPUs alike; that of a ViT cuts
    its patches.

    Raises:
        InputError: it is asked for without effect, or with FSDP2.
    """
    convolutions = sum(isinstance(module, torch.nn.Conv2d) for module in model.modules())
    if channels_last and not convolutions:
        raise InputError(
            "--channels-last has no effect on a model without 2-d convolutions: drop it"
        )
    if channels_last and fsdp2:
        raise InputError(
            "--channels-last does not go with FSDP2, which shards contiguous weights only: drop it"
        )
    if channels_last is None:
        channels_last = convolutions > 1 and not fsdp2
    return torch.channels_last if channels_last else torch.contiguous_format


def format_name(layout: torch.memory_format) -> str:
    """channels_last or contiguous."""
    return str(layout).removeprefix("torch.").removesuffix("_format")


def to_input(
    config: dict, dtype: torch.dtype, layout: torch.memory_format = torch.contiguous_format
):
    """A function from uint8 images to the model's normalised input.

    The images are (batch, 3, height, width), on any device.
    """

    @functools.cache  # torchvision's Normalize copies them to the device for every batch
    def statistics(device):
        values = (torch.tensor(config[key], dtype=dtype, device=device) for key in ("mean", "std"))
        return [255 * value.view(-1, 1, 1) for value in values]

    def normalize(pixels):
        mean, std = statistics(pixels.device)
        return pixels.to(dtype, memory_format=layout).sub(mean).div_(std)

    return normalize


def _decoder(args, split, transform):
    """How training images are decoded, and what is left to do of the first of ``transforms``."""
    turn = images.is_turned(split.features["label"].names)
    if args.decoder == "pil":
        crop, *others = transform.transforms
        return CropOfFile(crop, turn), Compose([lighter(step) for step in others])
    # "spawn", since workers may be spawned: those that are forked can use such a lock too.
    unsaid = multiprocessing.get_context("spawn").Lock()
    return functools.partial(images.decode_to_tensor, unsaid=unsaid, turn=turn), transform


def _pil_decoder(split):
    return functools.partial(images.decode, turn=images.is_turned(split.features["label"].names))


class Images(torch.utils.data.Dataset):
    """A split as ``{"image": transformed image, "label": class index}``.

    Keys are an index or (epoch, index).

    Random transforms depend on seed, epoch and index alone: not on processes, workers or an
    interrupted run. ``labels``, an array, takes the place of the split's own. Raises ``InputError``
    with the file name if an image cannot be read.
    """

    def __init__(self, split: datasets.Dataset, transform, seed: int = 0, decode=None, labels=None):
        self.split, self.transform, self.seed, self.labels = split, transform, seed, labels
        self.decode = decode or _pil_decoder(split)

    def __len__(self):
        return len(self.split)

    def __getitems__(self, keys):
        keys = [key if isinstance(key, tuple) else (0, key) for key in keys]
        indices = [index for _, index in keys]
        rows = self.split[indices]
        labels = rows["label"] if self.labels is None else self.labels[indices].tolist()
        return _examples(rows["image"], labels, keys, self.transform, self.seed, self.decode)


class EpochSampler(torch.utils.data.Sampler):
    """Shuffled keys (epoch, index) of ``Images``, as many as make whole batches.

    ``set_epoch`` changes the order.
    """

    def __init__(self, size: int, batch_size: int, seed: int):
        self.size, self.batch_size, self.seed, self.epoch = size, batch_size, seed, 0

    def __len__(self):
        return self.size // self.batch_size * self.batch_size

    def __iter__(self):
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.size)[: len(self)]
        return iter([(self.epoch, index) for index in order.tolist()])

    def set_epoch(self, epoch):
        self.epoch = epoch


class Stream(torch.utils.data.IterableDataset):
    """Batches of a streamed split.

    For training it is endless and shuffled, and starts at ``epoch`` after the ``first`` batches of
    this process, in the order of an uninterrupted run. Each process has ``readers``, which take
    turns; the loader's workers divide them, so that their number, which must divide that of the
    readers, changes nothing. An epoch's order of the shards, by seed, is cut into parts for all
    readers that are equal as far as the shards are. An evaluation has one reader.
    """

    def __init__(
        self, split, transform, batch_size, *,
        training=False, seed=0, process=0, processes=1, decode=None,
    ):  # fmt: skip
        self.split, self.transform, self.batch_size = split, transform, batch_size
        self.training, self.seed, self.process, self.processes = training, seed, process, processes
        self.decode = decode or _pil_decoder(split)
        self.num_classes = split.features["label"].num_classes
        most = min(READERS, max(1, split.num_shards // processes))
        self.readers = power_of_two(most) if training else 1
        self.epoch = self.first = 0

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        workers, worker = (info.num_workers, info.id) if info else (1, 0)
        if self.readers % workers:
            raise ValueError(f"{workers} workers cannot share {self.readers} readers")
        batches = {}
        # A loader takes its first batch from worker 0.
        for number in itertools.count(self.first + worker, workers):
            reader = number % self.readers
            if reader not in batches:
                done = len(range(reader, self.first, self.readers))
                batches[reader] = itertools.islice(self._batches(reader), done, None)
            rows = next(batches[reader], None)
            if rows is None:
                return
            encoded, labels = zip(*rows)
            for label in labels:
                if label is None or not 0 <= label < self.num_classes:
                    raise InputError(
                        f"the stream has the label {label}; labels must lie in "
                        f"0..{self.num_classes - 1}"
                    )
            keys = [(self.epoch, self.process, number, i) for i in range(len(rows))]
            examples = _examples(encoded, labels, keys, self.transform, self.seed, self.decode)
            yield torch.utils.data.default_collate(examples)

    def _batches(self, reader):
        share = self.process * self.readers + reader
        rows = self._endless(share) if self.training else self._rows(self.split)
        while batch := list(itertools.islice(rows, self.batch_size)):
            yield batch

    def _rows(self, split):
        for rows in reading(split.iter(self.batch_size)):
            yield from zip(rows["image"], rows["label"])

    def _endless(self, share):
        for lap in itertools.count():
            empty = True
            for row in self._rows(self._share(share, [self.seed, self.epoch, lap])):
                empty = False
                yield row
            if empty:
                raise InputError(
                    f"the stream has no images for reader {share}: start fewer processes"
                )

    def _share(self, share, seeds):
        shards, shares = min(self.split.num_shards, MAX_SHARDS), self.processes * self.readers
        order = np.random.default_rng(seeds).permutation(shards)
        parts = []
        for place, low, high in portions(share, shares, shards):
            part = self.split.shard(shards, int(order[place]))
            if high - low < shares:
                inside = functools.partial(_inside, shares=shares, low=low, high=high)
                part = part.filter(inside, with_indices=True, input_columns=["label"])
            parts.append(part)
        generator = np.random.default_rng([*seeds, share])
        whole = datasets.concatenate_datasets(parts)
        return whole.shuffle(generator=generator, buffer_size=BUFFER)


def portions(share: int, shares: int, shards: int) -> list[tuple[int, int, int]]:
    """Which part of shards in a row is the ``share``-th of ``shares`` equal ones.

    Returns:
        (place, low, high): of the shard in that place, the examples whose number modulo ``shares``
        is in [low, high).
    """
    first, last = share * shards, (share + 1) * shards  # in units of which a shard has ``shares``
    places = range(first // shares, -(-last // shares))
    return [(i, max(first - i * shares, 0), min(last - i * shares, shares)) for i in places]


def _inside(_, number, *, shares, low, high):
    return low <= number % shares < high


def power_of_two(number: int) -> int:
    """The greatest up to ``number``, or 0."""
    return 1 << number.bit_length() >> 1


def reading(batches):
    """The same batches of a stream; whatever its reader raises becomes an ``InputError``."""
    try:
        yield from batches
    except Exception as error:
        reason = f"cannot read on from the stream: {type(error).__name__}: {explained(error)}"
        raise InputError(f"{reason}; training goes on with --resume auto") from error


def _examples(encoded, labels, keys, transform, seed, decode):
    """Decode and transform; random numbers come from streams named by ``seed`` and each key."""
    examples = []
    with _own_randomness() as begin_stream:
        for image, label, key in zip(encoded, labels, keys):
            begin_stream(f"{seed} {key}")
            examples.append({"image": transform(decode(image)), "label": label})
    return examples


@contextlib.contextmanager
def _own_randomness():
    """Give a function that begins a named stream of random numbers, for Python, NumPy and torch.

    Afterwards all three are where they were.
    """

    def begin_stream(name):
        random.seed(name)
        bits = random.getrandbits(63)
        torch.default_generator.manual_seed(bits)
        np.random.seed(bits % 2**32)  # timm's RandAugment, AugMix and Mixup draw from it

    state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        yield begin_stream
    random.setstate(state)
    np.random.set_state(numpy_state)


def mixed(args, accelerator, batches: Callable, num_classes: int) -> Callable:
    """The batches of ``train_batches`` with each micro-batch mixed by timm's Mixup.

    Labels become probabilities, smoothed by ``args.smoothing``. What is drawn depends on seed,
    epoch and which images the micro-batch holds: not on an interrupted run, nor on what a process
    loads at once.

    Raises:
        InputError: a micro-batch has an odd number of examples, and timm mixes pairs.
    """
    if args.m % 2:
        raise InputError(
            f"mixup and cutmix mix the examples of a micro-batch in pairs, and m is {args.m}: "
            "choose an even --m"
        )
    alphas = {"mixup_alpha": args.mixup, "cutmix_alpha": args.cutmix}
    mixup = Mixup(**alphas, label_smoothing=args.smoothing, num_classes=num_classes)
    rank, processes = accelerator.process_index, accelerator.num_processes

    def mixed_batches(epoch, first):
        for number, batch in enumerate(batches(epoch, first), first):
            parts = list(zip(batch["image"].split(args.m), batch["label"].split(args.m)))
            before = (number * processes + rank) * len(parts)  # micro-batches of this epoch
            with _own_randomness() as begin_stream:
                for i, (pixels, labels) in enumerate(parts):
                    begin_stream(f"{args.seed} mixup {epoch} {before + i}")
                    parts[i] = mixup(pixels.float(), labels)
            images, labels = map(torch.cat, zip(*parts))
            yield {"image": images, "label": labels}

    return mixed_batches


def train_batches(args, accelerator, split, transform, loaded, labels=None):
    """The number of training images, and a function of ``epoch`` and ``first``.

    It returns the batches of an epoch after the first ones of this process. ``labels`` take the
    place of the split's own, unless that is a stream.
    """
    if isinstance(split, datasets.IterableDataset):
        known = (split.info.splits or {}).get(str(split.split))
        size = args.train_num_samples or (known and known.num_examples)
        if not size:
            raise InputError(
                f"{args.dataset!r} does not say how many images it streams: give "
                f"--train-num-samples"
            )
        return size, _streamed_batches(args, accelerator, split, transform, loaded)
    decode, transform = _decoder(args, split, transform)
    dataset = Images(split, transform, args.seed, decode, labels)
    options = {"sampler": EpochSampler(len(dataset), args.batch_size, args.seed), "drop_last": True}
    options |= {"persistent_workers": args.workers > 0, "batch_size": loaded}
    loader = _loader(args, accelerator, dataset, **options)
    loader = accelerator.prepare_data_loader(loader, device_placement=False)

    def batches(epoch, first):
        loader.set_epoch(epoch)
        rest = accelerator.skip_first_batches(loader, first) if first else loader
        return on_device(rest, accelerator.device)

    return len(dataset), batches


def labels_of(args, accelerator, split):
    """The labels to train on, if not the split's own, but noisy ones."""
    if not args.label_noise:
        return None
    labels = noisy_labels(split, args.label_noise, args.seed)
    accelerator.print(
        f"label noise: {round(args.label_noise * len(labels)):,} of {len(labels):,} training "
        f"images have another class, drawn by --seed {args.seed}"
    )
    return labels


def on_device(batches, device: torch.device):
    """The same batches on a device; a copy to a GPU does not wait for what that still computes."""
    if device.type != "cuda":
        yield from (send_to_device(batch, device) for batch in batches)
        return
    copying, computing = _copying_stream(device), torch.cuda.current_stream(device)
    for batch in batches:
        with torch.cuda.stream(copying):
            batch = send_to_device(batch, device, non_blocking=True)
        computing.wait_stream(copying)
        for tensor in batch.values():
            # Or its memory could be given to the next copy while it is in use.
            tensor.record_stream(computing)
        yield batch


@functools.cache  # each stream keeps memory of its own
def _copying_stream(device):
    return torch.cuda.Stream(device)


def _streamed_batches(args, accelerator, split, transform, loaded):
    rank = {"process": accelerator.process_index, "processes": accelerator.num_processes}
    decode, transform = _decoder(args, split, transform)
    options = {"training": True, "seed": args.seed, "decode": decode}
    stream = Stream(split, transform, loaded, **rank, **options)
    workers = power_of_two(min(args.workers, stream.readers))
    if workers < args.workers:
        accelerator.print(
            f"{workers} of {args.workers} workers read the stream, since they share "
            f"{stream.readers} readers"
        )
    loader = _loader(args, accelerator, stream, workers, batch_size=None)

    def batches(epoch, first):
        stream.epoch, stream.first = epoch, first
        return on_device(loader, accelerator.device)

    return batches


def evaluation_loader(args, accelerator, split, transform, loaded, persistent=False):
    """The prepared loader of a split in order; the main process alone reads a stream."""
    if isinstance(split, datasets.IterableDataset):
        stream = Stream(split, transform, loaded)
        loader = _loader(args, accelerator, stream, min(args.workers, 1), batch_size=None)
        return accelerator.prepare(loader)
    workers = min(args.workers, len(split) // IMAGES_PER_WORKER)
    options = {"batch_size": loaded, "persistent_workers": persistent and workers > 0}
    loader = _loader(args, accelerator, Images(split, transform), workers, **options)
    return accelerator.prepare(loader)


def _loader(args, accelerator, dataset, workers=None, **options):
    # A generator of its own: a loader's start would otherwise draw from the stream that a resumed
    # run continues.
    options |= worker_options(accelerator, args.workers if workers is None else workers)
    return torch.utils.data.DataLoader(dataset, generator=torch.Generator(), **options)


def worker_options(accelerator, workers: int) -> dict:
    """How a ``DataLoader`` of this project runs its workers."""
    # They are as many as were asked for.
    warnings.filterwarnings("ignore", "This DataLoader will create")
    # Before 3.12, CPython's child can deadlock if it forks while a thread of torch.distributed
    # enters or leaves Python.
    risky = workers > 0 and accelerator.num_processes > 1 and sys.version_info < (3, 12)
    return {
        "timeout": TIMEOUT if workers else 0,
        "num_workers": workers,
        "pin_memory": accelerator.device.type == "cuda",
        "multiprocessing_context": "spawn" if risky else None,
        "worker_init_fn": _begin_worker,
    }


def _begin_worker(_):
    """Keep freed memory, and outlive a SIGTERM or Ctrl-C.

    A scheduler's SIGTERM reaches workers too, and the main process needs them for a minute. So does
    Ctrl-C, after which the main process ends them.
    """
    allocator.keep_freed_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(60))
