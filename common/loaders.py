"""From images to batches: decoding, transforms, order, streams, and the loaders of a run."""

import dataclasses
import functools
import io
import itertools
import multiprocessing
import random
import signal
import sys
from collections.abc import Callable

import datasets
import numpy as np
import torch
from accelerate.utils import send_to_device
from datasets.utils.file_utils import xopen
from PIL import ExifTags, Image
from timm.data import create_transform, resolve_data_config
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.transforms import v2

from common.data import explained
from common.settings import InputError

IMAGES_PER_WORKER = 1000  # to evaluate: reading fewer takes less time than starting a worker
READERS = 8  # of a stream by a process, at most; its loader workers share them
BUFFER = 500  # undecoded examples from which a reader draws
MAX_SHARDS = 512  # a stream with more has them in groups, since datasets takes long to name one of many


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
    """The batches of a run on ``splits``, as ``model``'s own data config and the settings have them.

    An ``args.m`` that was not given becomes what a process loads at once, and ``args.channels_last`` what suits the
    model: from then on they are settings of the run.

    Raises:
        InputError: the batch does not split over the processes, or exceeds the training images; or ``channels_last``
            does not go with the model.
    """
    layout = memory_format(args.channels_last, model, accelerator.is_fsdp2)
    args.channels_last = layout is torch.channels_last
    accelerator.print(f"memory format: {format_name(layout)}{', as FSDP2 needs' if accelerator.is_fsdp2 else ''}")
    loaded, accumulation, m = split_batch(args, accelerator.num_processes)
    if args.m is None:
        args.m = m
        accelerator.print(f"m is {m}: without --m, the examples that each of {accelerator.num_processes} loads at once")
    wanted = {key: getattr(args, key) for key in ("img_size", "crop_pct", "interpolation")}
    config = resolve_data_config(wanted, model=model)
    augmentation = {key: getattr(args, key) for key in ("scale", "ratio", "hflip", "decoder")}
    train_transform, eval_transform = transforms(config, **augmentation)
    size, train = train_batches(args, accelerator, splits["train"], train_transform, loaded)
    if size < args.batch_size:
        raise InputError(f"batch_size {args.batch_size} exceeds the {size} training images: lower it")
    held_out = "validation" if "validation" in splits else "test"
    evaluation = {
        split: evaluation_loader(args, accelerator, ds, eval_transform, loaded, persistent=split == held_out)
        for split, ds in splits.items()
        if split != "train"
    }
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
    """Divide ``batch_size``: examples per loader batch, loader batches per update, examples per micro-batch.

    Without ``m``, micro-batches are whole loader batches.

    Raises:
        InputError: m does not divide the batch, or it does not split over the processes, or without m only in tiny
            loader batches; with what would.
    """
    unit = args.m or 1
    if args.batch_size % unit:
        raise InputError(f"m {unit} does not divide batch_size {args.batch_size}: {_divisors(args.batch_size)}")
    if args.batch_size // unit % processes:
        raise InputError(
            f"batch_size {args.batch_size} in micro-batches of {unit} does not split over {processes} processes: "
            f"{_divisors(args.batch_size // unit)} processes"
        )
    share = args.batch_size // processes
    loaded = _loaded(share, unit, args.device_batch_size)
    if args.m is None and _tiny(share, args.device_batch_size):
        fits = (n for n in itertools.count(1) if not _tiny(share + n, args.device_batch_size))
        raise InputError(
            f"batch_size {args.batch_size} splits over {processes} processes only in loader batches of {loaded}, which "
            f"would also be m: choose batch_size {(share + next(fits)) * processes}, or give --m, {_divisors(share)}"
        )
    return loaded, share // loaded, args.m or loaded


def _loaded(share, unit, most):
    """The examples to load at once: the largest multiple of ``unit`` up to ``most`` that divides ``share``."""
    return max(n for n in range(unit, max(most, unit) + 1, unit) if share % n == 0)


def _tiny(share, most):
    """Whether ``share`` can only be loaded in less than a quarter of what could be loaded at once."""
    return 4 * _loaded(share, 1, most) < min(share, most)


def _divisors(number):
    return "choose one of " + ", ".join(str(i) for i in range(1, number + 1) if number % i == 0)


def transforms(config: dict, *, scale, ratio, hflip: float, decoder: str = "pil"):
    """timm's training and evaluation transforms for a model's data config (``timm.data.resolve_data_config``).

    Images come out as uint8 (3, height, width), for ``to_input`` to normalise on the device. With the decoder
    "torchcodec", that of training takes them as such, and draws what timm's draws.

    Raises:
        InputError: the decoder's transforms lack the interpolation.
    """
    shared = {"input_size": config["input_size"], "interpolation": config["interpolation"], "normalize": False}
    train = create_transform(**shared, is_training=True, scale=scale, ratio=ratio, hflip=hflip, color_jitter=None)
    evaluation = create_transform(**shared, crop_pct=config["crop_pct"], crop_mode=config["crop_mode"])
    if decoder == "torchcodec":
        if config["interpolation"] not in ("bilinear", "bicubic"):
            raise InputError(
                f"--decoder torchcodec does not resize by {config['interpolation']}: choose --interpolation bilinear "
                f"or bicubic, or --decoder pil"
            )
        train.transforms[0] = RandomCropOfTensor(config["input_size"][1:], scale, ratio, config["interpolation"])
    return train, evaluation


class RandomCropOfTensor(RandomResizedCropAndInterpolation):
    """timm's random crop, for uint8 tensors, which torchvision's older transforms would resize as floats."""

    def __call__(self, image):
        """Crop and resize."""
        params = self.get_params(image, self.scale, self.ratio)
        return v2.functional.resized_crop(image, *params, self.size, self.interpolation)


def memory_format(channels_last: bool | None, model, fsdp2: bool = False) -> torch.memory_format:
    """The order in memory of a model's images and weights: channels_last if that is asked for, or None and it helps.

    It helps models with more than one 2-d convolution, on CPUs and GPUs alike; that of a ViT cuts its patches.

    Raises:
        InputError: it is asked for without effect, or with FSDP2.
    """
    convolutions = sum(isinstance(module, torch.nn.Conv2d) for module in model.modules())
    if channels_last and not convolutions:
        raise InputError("--channels-last has no effect on a model without 2-d convolutions: drop it")
    if channels_last and fsdp2:
        raise InputError("--channels-last does not go with FSDP2, which shards contiguous weights only: drop it")
    helps = convolutions > 1 and not fsdp2
    return torch.channels_last if channels_last or (channels_last is None and helps) else torch.contiguous_format


def format_name(layout: torch.memory_format) -> str:
    """channels_last or contiguous."""
    return str(layout).removeprefix("torch.").removesuffix("_format")


def to_input(config: dict, dtype: torch.dtype, layout: torch.memory_format = torch.contiguous_format):
    """A function from uint8 images (batch, 3, height, width), on any device, to the model's normalised input."""

    @functools.cache  # torchvision's Normalize copies them to the device, and reads them back, for every batch
    def statistics(device):
        return [255 * torch.tensor(config[key], dtype=dtype, device=device).view(-1, 1, 1) for key in ("mean", "std")]

    def normalize(images):
        mean, std = statistics(images.device)
        return images.to(dtype, memory_format=layout).sub(mean).div_(std)

    return normalize


def decode(image: dict | None) -> Image.Image:
    """An undecoded image of ``datasets``, in RGB; None is one that is missing.

    Its path may lie inside an archive or on the Hub, as streams have it ("zip://a.png::..."). As with timm and
    torchvision, of an animation it is the first frame, and transparency is dropped.

    Raises:
        InputError: it cannot be read, or has no known range of values; the message has its file name.
    """
    path = image and image["path"]
    try:
        with Image.open(io.BytesIO(_encoded(image))) as opened:
            opened.load()
            return _to_rgb(opened)
    except Exception as error:  # what a damaged file makes PIL's plugins stumble over is of any class
        raise InputError(
            f"cannot read the image {path or '(without a file name)'}: replace or remove it ({error!r})"
        ) from error


def _encoded(image):
    """The bytes of an undecoded image; none if it is missing."""
    image = image or {"bytes": b"", "path": None}
    if image["bytes"] is not None or not image["path"]:
        return image["bytes"] or b""
    with xopen(image["path"], "rb") if "://" in image["path"] else open(image["path"], "rb") as file:
        return file.read()


def decode_to_tensor(image: dict | None, unsaid) -> torch.Tensor:
    """What ``decode`` returns, as a tensor: uint8 (3, height, width).

    An upright JPEG in RGB or grey is read by torchcodec, which finds the same pixels as PIL. Any other image is read by
    PIL, since torchcodec turns it as its Exif tag has it, converts CMYK in another way or does not read it. The first
    one is said; ``unsaid`` is a lock, shared by the loader's workers, that is held from then on.

    Raises:
        InputError: as ``decode`` does.
    """
    from torchcodec.decoders import decode_jpeg  # an optional package, which takes seconds to load

    try:
        encoded = _encoded(image)
        with Image.open(io.BytesIO(encoded)) as opened:
            turn = opened.getexif().get(ExifTags.Base.Orientation, 1)
            kind = f"{opened.format}, {opened.mode}, Exif orientation {turn}"
            if opened.format == "JPEG" and opened.mode in ("RGB", "L") and turn == 1:
                return decode_jpeg(encoded)
    except Exception as error:  # of whatever class, as in decode(), which has the last word
        kind = repr(error)
    pixels = v2.functional.pil_to_tensor(decode(image))
    if unsaid.acquire(block=False):
        path = image["path"] or "(without a file name)"
        print(f"read by PIL, not by torchcodec, as others like it will be: {path} ({kind})", file=sys.stderr)
    return pixels


def _decoder(args):
    """How training images are decoded for ``transforms``."""
    if args.decoder == "pil":
        return decode
    # "spawn", since workers may be spawned: those that are forked can use such a lock too.
    return functools.partial(decode_to_tensor, unsaid=multiprocessing.get_context("spawn").Lock())


def _to_rgb(image):
    """PIL's own conversion cuts values off at 255."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):  # 0 to 65535
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("32 bits a pixel have no known range of values; save it with 8 or 16")
    return image if image.mode == "RGB" else image.convert("RGB")


class Images(torch.utils.data.Dataset):
    """A split as ``{"image": transformed image, "label": class index}``, by index or by (epoch, index).

    Random transforms depend on seed, epoch and index alone: not on processes, workers or an interrupted run. Raises
    ``InputError`` with the file name if an image cannot be read.
    """

    def __init__(self, split: datasets.Dataset, transform, seed: int = 0, decode=decode):
        self.split, self.transform, self.seed, self.decode = split, transform, seed, decode

    def __len__(self):
        return len(self.split)

    def __getitems__(self, keys):
        keys = [key if isinstance(key, tuple) else (0, key) for key in keys]
        rows = self.split[[index for _, index in keys]]
        return _examples(rows["image"], rows["label"], keys, self.transform, self.seed, self.decode)


class EpochSampler(torch.utils.data.Sampler):
    """Shuffled keys (epoch, index) of ``Images``, as many as make whole batches; ``set_epoch`` changes the order."""

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

    For training it is endless and shuffled, and starts at ``epoch`` after the ``first`` batches of this process, in the
    order of an uninterrupted run. Each process has ``readers``, which take turns; the loader's workers divide them, so
    that their number, which must divide that of the readers, changes nothing. An epoch's order of the shards, by seed,
    is cut into parts for all readers that are equal as far as the shards are. An evaluation has one reader.
    """

    def __init__(self, split, transform, batch_size, *, training=False, seed=0, process=0, processes=1, decode=decode):
        self.split, self.transform, self.batch_size, self.training = split, transform, batch_size, training
        self.seed, self.process, self.processes, self.decode = seed, process, processes, decode
        self.num_classes = split.features["label"].num_classes
        self.readers = power_of_two(min(READERS, max(1, split.num_shards // processes))) if training else 1
        self.epoch = self.first = 0

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        workers, worker = (info.num_workers, info.id) if info else (1, 0)
        if self.readers % workers:
            raise ValueError(f"{workers} workers cannot share {self.readers} readers")
        batches = {}
        for number in itertools.count(self.first + worker, workers):  # a loader takes its first batch from worker 0
            reader = number % self.readers
            if reader not in batches:
                done = len(range(reader, self.first, self.readers))
                batches[reader] = itertools.islice(self._batches(reader), done, None)
            rows = next(batches[reader], None)
            if rows is None:
                return
            images, labels = zip(*rows)
            wrong = [label for label in labels if label is None or not 0 <= label < self.num_classes]
            if wrong:
                raise InputError(f"the stream has the label {wrong[0]}; labels must lie in 0..{self.num_classes - 1}")
            keys = [(self.epoch, self.process, number, i) for i in range(len(rows))]
            examples = _examples(images, labels, keys, self.transform, self.seed, self.decode)
            yield torch.utils.data.default_collate(examples)

    def _batches(self, reader):
        rows = self._laps(self.process * self.readers + reader) if self.training else self._rows(self.split)
        while batch := list(itertools.islice(rows, self.batch_size)):
            yield batch

    def _rows(self, split):
        for rows in reading(split.iter(self.batch_size)):
            yield from zip(rows["image"], rows["label"])

    def _laps(self, share):
        for lap in itertools.count():
            empty = True
            for row in self._rows(self._share(share, [self.seed, self.epoch, lap])):
                empty = False
                yield row
            if empty:
                raise InputError(f"the stream has no images for reader {share}: start fewer processes")

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
        own = np.random.default_rng([*seeds, share])
        return datasets.concatenate_datasets(parts).shuffle(generator=own, buffer_size=BUFFER)


def portions(share: int, shares: int, shards: int) -> list[tuple[int, int, int]]:
    """Which part of shards in a row is the ``share``-th of ``shares`` equal ones.

    Returns:
        (place, low, high): of the shard in that place, the examples whose number modulo ``shares`` is in [low, high).
    """
    first, last = share * shards, (share + 1) * shards  # in units of which each shard has ``shares``
    places = range(first // shares, -(-last // shares))
    return [(i, max(first - i * shares, 0), min(last - i * shares, shares)) for i in places]


def _inside(_, number, *, shares, low, high):
    return low <= number % shares < high


def power_of_two(number: int) -> int:
    """The greatest up to ``number``, or 0."""
    return 1 << number.bit_length() >> 1


def reading(batches):
    """The same batches of a stream; what its reader raises, of whatever kind, becomes an ``InputError``."""
    try:
        yield from batches
    except Exception as error:
        reason = f"cannot read on from the stream: {type(error).__name__}: {explained(error)}"
        raise InputError(f"{reason}; training goes on with --resume auto") from error


def _examples(images, labels, keys, transform, seed, decode):
    """Decode and transform; random numbers are drawn from streams named by ``seed`` and each key."""
    examples, state = [], random.getstate()
    with torch.random.fork_rng(devices=[]):
        for image, label, key in zip(images, labels, keys):
            random.seed(f"{seed} {key}")
            torch.default_generator.manual_seed(random.getrandbits(63))
            examples.append({"image": transform(decode(image)), "label": label})
    random.setstate(state)
    return examples


def train_batches(args, accelerator, split, transform, loaded):
    """The number of training images, and a function: the batches of an epoch after the ``first`` of this process."""
    if isinstance(split, datasets.IterableDataset):
        known = (split.info.splits or {}).get("train")
        size = args.train_num_samples or (known and known.num_examples)
        if not size:
            raise InputError(f"{args.dataset!r} does not say how many images it streams: give --train-num-samples")
        return size, _streamed_batches(args, accelerator, split, transform, loaded)
    images = Images(split, transform, args.seed, _decoder(args))
    options = {"sampler": EpochSampler(len(images), args.batch_size, args.seed), "drop_last": True}
    options["persistent_workers"] = args.workers > 0
    loader = _loader(args, accelerator, images, batch_size=loaded, **options)
    loader = accelerator.prepare_data_loader(loader, device_placement=False)

    def batches(epoch, first):
        loader.set_epoch(epoch)
        return on_device(accelerator.skip_first_batches(loader, first) if first else loader, accelerator.device)

    return len(images), batches


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
            tensor.record_stream(computing)  # or its memory could be given to the next copy while it is in use
        yield batch


@functools.cache  # each stream keeps memory of its own
def _copying_stream(device):
    return torch.cuda.Stream(device)


def _streamed_batches(args, accelerator, split, transform, loaded):
    options = {"process": accelerator.process_index, "processes": accelerator.num_processes, "decode": _decoder(args)}
    stream = Stream(split, transform, loaded, training=True, seed=args.seed, **options)
    workers = power_of_two(min(args.workers, stream.readers))
    if workers < args.workers:
        accelerator.print(
            f"{workers} of {args.workers} workers read the stream, since they share {stream.readers} readers"
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
        return accelerator.prepare(_loader(args, accelerator, stream, min(args.workers, 1), batch_size=None))
    workers = min(args.workers, len(split) // IMAGES_PER_WORKER)
    options = {"batch_size": loaded, "persistent_workers": persistent and workers > 0}
    return accelerator.prepare(_loader(args, accelerator, Images(split, transform), workers, **options))


def _loader(args, accelerator, dataset, workers=None, **options):
    # A generator of its own: a loader's start would otherwise draw from the stream that a resumed run continues.
    options |= worker_options(accelerator, args.workers if workers is None else workers)
    return torch.utils.data.DataLoader(dataset, generator=torch.Generator(), **options)


def worker_options(accelerator, workers: int) -> dict:
    """How a ``DataLoader`` of this project runs its workers."""
    # Before 3.12, CPython's child can deadlock if it forks while a thread of torch.distributed enters or leaves Python.
    risky = workers > 0 and accelerator.num_processes > 1 and sys.version_info < (3, 12)
    return {
        "num_workers": workers,
        "pin_memory": accelerator.device.type == "cuda",
        "multiprocessing_context": "spawn" if risky else None,
        "worker_init_fn": _outlive_sigterm,
    }


def _outlive_sigterm(_):
    """A scheduler's SIGTERM reaches loader workers too, and the main process needs them for a minute at most.

    So does Ctrl-C, after which the main process ends them.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(60))
