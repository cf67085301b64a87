"""From images to batches: what transforms do, and that seed, epoch, index and process count."""

import argparse
import contextlib
import itertools
import multiprocessing
import os
import sys
import warnings

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from PIL import ExifTags, Image
from test_data import file_of, write_folder
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.transforms import Compose

import train_imagenet
from common import data, loaders, settings
from common.errors import InputError, lost_worker
from common.images import decode, decode_to_tensor

CONFIG = {
    "input_size": (3, 32, 32), "interpolation": "bilinear", "crop_pct": 0.5, "crop_mode": "center",
    "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.25, 0.2),
}  # fmt: skip
WHOLE = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "hflip": 0.0}


def ramp(width=64, height=64):
    """Red grows from left to right, green from top to bottom; blue is constant."""
    red, green = np.meshgrid(np.linspace(0, 252, width), np.linspace(0, 252, height))
    return Image.fromarray(np.stack([red, green, np.full_like(red, 77)], -1).astype(np.uint8))


def trained(image, **changes):
    transform, _ = loaders.transforms(CONFIG, **WHOLE | changes)
    return transform(image).float()


def span(pixels, axis):
    """The share of the ramp that a crop shows, along width (0) or height (1)."""
    values = pixels[axis].mean(axis)
    return ((values[-1] - values[0]).abs() / 252 / (31 / 32)).item()


def test_a_whole_image_stays_as_it_is_or_is_flipped():
    plain, flipped = trained(ramp()), trained(ramp(), hflip=1.0)
    torch.testing.assert_close(plain.flip(-1), flipped, atol=1, rtol=0)
    assert plain[0, 0, 0] < 10 and flipped[0, 0, 0] > 240
    seen = {(trained(ramp(), hflip=0.5)[0, 0, 0] > 120).item() for _ in range(50)}
    assert seen == {True, False}


def test_scale_is_the_share_of_the_area_and_ratio_that_of_width_to_height():
    for _ in range(10):
        quarter = trained(ramp(256, 256), scale=(0.25, 0.25))
        assert [span(quarter, axis) for axis in (0, 1)] == pytest.approx([0.5, 0.5], abs=0.03)
        wide = trained(ramp(256, 256), scale=(0.25, 0.25), ratio=(2.0, 2.0))
        assert span(wide, 0) == pytest.approx(0.5 * 2**0.5, abs=0.03)
        assert span(wide, 1) == pytest.approx(0.5 / 2**0.5, abs=0.03)


def test_training_images_keep_their_colours():
    colour = Image.new("RGB", (40, 40), (200, 100, 50))
    for _ in range(5):
        pixels = trained(colour, scale=(0.05, 1.0), hflip=0.5)
        assert torch.equal(pixels.amax((1, 2)), torch.tensor([200.0, 100.0, 50.0]))
        assert torch.equal(pixels.amin((1, 2)), torch.tensor([200.0, 100.0, 50.0]))


def test_images_are_interpolated_as_asked():
    step = Image.fromarray(np.repeat([[0, 255]], 2, 0).astype(np.uint8)).convert("RGB")
    for is_training in (True, False):
        values = {}
        for kind in ("nearest", "bilinear"):
            config = {**CONFIG, "interpolation": kind, "crop_pct": 1.0}
            transform = loaders.transforms(config, **WHOLE)
            values[kind] = len(transform[0 if is_training else 1](step).unique())
        assert values["nearest"] == 2 and values["bilinear"] > 5


def test_input_is_normalised_by_the_models_own_mean_and_deviation():
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    result = loaders.to_input(CONFIG, torch.float64)(images.clone())
    mean, std = (
        torch.tensor(CONFIG[key], dtype=torch.float64).view(3, 1, 1) for key in ("mean", "std")
    )
    torch.testing.assert_close(result, (images.double() / 255 - mean) / std)
    channels_last = loaders.to_input(CONFIG, torch.float64, torch.channels_last)(images)
    assert torch.equal(channels_last, result)
    assert channels_last.is_contiguous(memory_format=torch.channels_last)


def test_channels_last_is_for_more_than_one_convolution_unless_asked_for():
    patches = torch.nn.Conv2d(3, 4, 2)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 2), torch.nn.Conv2d(4, 4, 2))
    last, contiguous = torch.channels_last, torch.contiguous_format
    assert loaders.memory_format(None, network) is loaders.memory_format(True, patches) is last
    assert loaders.memory_format(None, patches) is contiguous
    assert loaders.memory_format(False, network) is contiguous
    assert loaders.memory_format(None, network, fsdp2=True) is contiguous
    with pytest.raises(settings.InputError, match="no effect on a model without 2-d convolutions"):
        loaders.memory_format(True, torch.nn.Linear(3, 4))
    with pytest.raises(settings.InputError, match="does not go with FSDP2"):
        loaders.memory_format(True, network, fsdp2=True)


# --------------------------------------------------------------------------------------------------


@pytest.fixture
def accelerator():
    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    return Accelerator(cpu=True)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("images"), images=12)


def opened(accelerator, images, *flags):
    """The batches of a run on a folder, as its flags have them."""
    usual = ["--dataset", str(images), "--model", "test_resnet", "--img-size", "32"]
    usual += ["--batch-size", "8", "--m", "8"]
    usual += ["--workers", "0", "--crop-pct", "0.5", "--interpolation", "nearest"]
    usual += ["--output", "nowhere"]
    args = settings.parse(train_imagenet.parser(), [*usual, *flags])
    splits = data.load(args.dataset, args.streaming, args.validation_share)
    model = train_imagenet.create_model(args, 2)
    return loaders.open_splits(args, accelerator, splits, model), splits


def epoch_of(batches, epoch):
    return torch.cat([batch["image"].flatten(1) for batch in batches.train(epoch, 0)])


def test_held_out_images_get_the_evaluation_transform_with_the_flags_crop_and_interpolation(
    accelerator, images
):
    batches, splits = opened(accelerator, images)
    seen = torch.cat([batch["image"] for batch in batches.evaluation["validation"]])
    for row, pixels in zip(splits["validation"], seen, strict=True):
        image = decode(row["image"])
        # The shorter side becomes 32 / 0.5 pixels, of which the middle 32 are kept.
        width, height = image.size
        scale = 64 / min(image.size)
        image = image.resize((int(width * scale), int(height * scale)), Image.NEAREST)
        left, top = (image.width - 32) // 2, (image.height - 32) // 2
        expected = np.asarray(image.crop((left, top, left + 32, top + 32))).transpose(2, 0, 1)
        assert np.array_equal(pixels.numpy(), expected)


def test_the_order_and_the_augmentation_of_an_epoch_depend_on_seed_and_epoch(accelerator, images):
    # nothing random but the order
    whole = ["--scale", "1", "1", "--ratio", "1.2", "1.2", "--hflip", "0"]
    first, _ = opened(accelerator, images, *whole, "--seed", "3")
    again, _ = opened(accelerator, images, *whole, "--seed", "3")
    other, _ = opened(accelerator, images, *whole, "--seed", "4")
    assert torch.equal(epoch_of(first, 0), epoch_of(again, 0))
    assert not torch.equal(epoch_of(first, 0), epoch_of(first, 1))
    assert not torch.equal(epoch_of(first, 0), epoch_of(other, 0))
    assert len(epoch_of(first, 0).unique(dim=0)) == 24  # every image once

    flags = ["--scale", "0.1", "1"]
    for one, two in (((3, 0), (3, 1)), ((3, 0), (4, 0))):
        crops = [
            epoch_of(opened(accelerator, images, *flags, "--seed", str(seed))[0], e)
            for seed, e in (one, two)
        ]
        alike = (crops[0][:, None] == crops[1][None]).all(-1)
        assert alike.sum() <= 2, "the same crops, if in another order"


def test_flags_reach_the_training_transform(accelerator, images, tmp_path):
    flags = ["--scale", "1", "1", "--ratio", "1.2", "1.2"]
    plain = epoch_of(opened(accelerator, images, *flags, "--hflip", "0")[0], 0).view(24, 3, 32, 32)
    flipped = epoch_of(opened(accelerator, images, *flags, "--hflip", "1")[0], 0)
    flipped = flipped.view(24, 3, 32, 32)
    assert torch.equal(plain.flip(-1), flipped)
    for path in write_folder(tmp_path).rglob("*.png"):
        ramp(256, 256).save(path)
    flags = ["--scale", "0.25", "0.25", "--ratio", "2", "2", "--hflip", "0", "--batch-size", "6"]
    flags += ["--m", "6"]
    for crop in epoch_of(opened(accelerator, tmp_path, *flags)[0], 0).view(6, 3, 32, 32).float():
        assert span(crop, 0) == pytest.approx(0.5 * 2**0.5, abs=0.03)
        assert span(crop, 1) == pytest.approx(0.5 / 2**0.5, abs=0.03)


def test_each_image_is_augmented_in_its_own_way(accelerator, tmp_path):
    for path in write_folder(tmp_path).rglob("*.png"):
        ramp().save(path)
    crops = epoch_of(opened(accelerator, tmp_path, "--batch-size", "6", "--m", "6")[0], 0)
    assert len(crops.unique(dim=0)) == 6


def test_no_image_is_left_out_of_every_epoch():
    """Each epoch leaves out what does not make a whole batch, and another rest."""
    sampler, seen = loaders.EpochSampler(7, 4, seed=0), set()
    for epoch in range(12):
        sampler.set_epoch(epoch)
        indices = [index for _, index in sampler]
        assert len(indices) == len(set(indices)) == 4
        seen |= set(indices)
    assert seen == set(range(7))


def streamed(seed=0, epoch=0, process=0, batches=8):
    """The first images that one of four processes reads: names of their pixels, in order."""
    split = data.load("digits", streaming=True)["train"]
    options = {"training": True, "seed": seed, "process": process, "processes": 4}
    stream = loaders.Stream(split, lambda image: torch.tensor(np.asarray(image)), 28, **options)
    stream.epoch = epoch
    rows = itertools.islice(stream, batches)
    return [hash(pixels.numpy().tobytes()) for batch in rows for pixels in batch["image"]]


def test_a_streams_order_depends_on_seed_epoch_process_and_lap():
    first = streamed()
    assert first == streamed()
    for other in (streamed(seed=1), streamed(epoch=1), streamed(process=1)):
        assert sum(a == b for a, b in zip(first, other)) < 0.1 * len(first)
    lap = 900 // 4
    twice = streamed(batches=-(-2 * lap // 28))
    assert sum(a == b for a, b in zip(twice[:lap], twice[lap:])) < 0.1 * lap


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_a_models_input_has_its_dtype_and_the_layout(dtype, layout):
    pixels = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    made = loaders.to_input(CONFIG, dtype, layout)(pixels)
    mean, std = (torch.tensor(CONFIG[key], dtype=float).view(3, 1, 1) for key in ("mean", "std"))
    assert made.dtype == dtype and made.is_contiguous(memory_format=layout)
    rough = {"rtol": 0, "atol": 16 * torch.finfo(dtype).eps}
    torch.testing.assert_close(made.double(), (pixels.double() / 255 - mean) / std, **rough)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_a_streams_images_are_divided_among_processes(processes):
    args = argparse.Namespace(
        seed=0, dataset="digits", train_num_samples=900, workers=0, decoder="pil"
    )
    split, read = data.load("digits", streaming=True)["train"], []
    whole, _ = loaders.transforms(CONFIG, **WHOLE)
    for rank in range(processes):
        process = argparse.Namespace(
            process_index=rank, num_processes=processes, device=torch.device("cpu"), print=print
        )
        _, batches = loaders.train_batches(args, process, split, whole, 10)
        lap = itertools.islice(batches(0, 0), 900 // processes // 10)
        read += [pixels.numpy().tobytes() for batch in lap for pixels in batch["image"]]
    # Readers' parts differ by a few images, so some begin their second lap.
    assert len(read) == 900 and len(set(read)) > 0.97 * 900


def test_a_stream_augments_each_image_of_each_process_and_epoch_in_its_own_way(tmp_path):
    for path in write_folder(tmp_path, images=8).rglob("*.png"):
        ramp().save(path)
    split = data.load(str(tmp_path), streaming=True)["train"]
    crop, _ = loaders.transforms(CONFIG, scale=(0.05, 1.0), ratio=(0.75, 1.3), hflip=0.5)

    def crops(epoch, process):
        stream = loaders.Stream(split, crop, 4, training=True, process=process, processes=2)
        stream.epoch = epoch
        return next(iter(stream))["image"].flatten(1)

    seen = torch.cat([crops(0, 0), crops(0, 1), crops(1, 0)])
    assert len(seen.unique(dim=0)) == 12


class Killed:
    """A transform that kills its worker."""

    def __call__(self, image):
        os.kill(os.getpid(), 9)


def test_a_worker_that_is_killed_in_training_is_one_line(accelerator, images):
    args = argparse.Namespace(batch_size=8, seed=0, decoder="pil", workers=1)
    split = data.load(str(images))["train"]
    transform = Compose([RandomResizedCropAndInterpolation(8), Killed()])
    _, batches = loaders.train_batches(args, accelerator, split, transform, 8)
    with pytest.raises(RuntimeError) as caught:
        next(batches(0, 0))
    assert lost_worker(caught.value).startswith("a loader worker was killed")


# --------------------------------------------------------------------------------------------------
# --decoder torchcodec


def photograph(rng, mode="RGB"):
    """Noise as smooth as a photograph, of a size of its own."""
    small = Image.fromarray(rng.integers(0, 256, (12, 15, 3), dtype=np.uint8))
    return small.resize(tuple(rng.integers(40, 120, 2).tolist()), Image.BICUBIC).convert(mode)


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory):
    pytest.importorskip("torchcodec")
    root = write_folder(tmp_path_factory.mktemp("jpegs"), images=8)
    rng = np.random.default_rng(0)
    for i, path in enumerate(root.rglob("*.png")):
        photograph(rng, "L" if i % 4 == 0 else "RGB").save(path.with_suffix(".jpg"), quality=90)
        path.unlink()
    return root


@pytest.mark.parametrize("interpolation, tolerance", [("bilinear", 1), ("bicubic", 2)])
@pytest.mark.parametrize("streaming", [False, True])
def test_torchcodec_gives_the_pixels_of_timms_crops_and_flips_within_1_or_2_of_255(
    accelerator, jpegs, capfd, streaming, interpolation, tolerance
):
    flags = ["--interpolation", interpolation, "--scale", "0.05", "1", *["--streaming"] * streaming]
    flags += ["--train-num-samples", "16"] * streaming
    usual, fast = (
        opened(accelerator, jpegs, *flags, "--decoder", name)[0] for name in ("pil", "torchcodec")
    )
    for epoch in range(2):
        rows = zip(range(usual.updates), usual.train(epoch, 0), fast.train(epoch, 0))
        for _, one, other in rows:
            assert one["image"].shape == other["image"].shape
            assert other["image"].dtype == torch.uint8
            assert (one["image"].int() - other["image"].int()).abs().max() <= tolerance
            assert torch.equal(one["label"], other["label"])
            assert one["image"].float().std() > 20
    assert "torchcodec" not in capfd.readouterr().err


def test_torchcodec_is_of_training_images_alone(accelerator, jpegs):
    flags = ["--interpolation", "bilinear", "--decoder"]
    both = [opened(accelerator, jpegs, *flags, name)[0] for name in ("pil", "torchcodec")]
    one, other = (
        torch.cat([row["image"] for row in batches.evaluation["validation"]]) for batches in both
    )
    assert torch.equal(one, other)


def test_an_epoch_read_by_torchcodec_goes_on_where_it_stopped_on_any_number_of_workers(
    accelerator, jpegs
):
    flags = ["--interpolation", "bilinear", "--decoder", "torchcodec"]
    whole = epoch_of(opened(accelerator, jpegs, *flags)[0], 1)
    for workers in ("0", "2"):
        batches, _ = opened(accelerator, jpegs, *flags, "--workers", workers)
        rest = torch.cat([batch["image"].flatten(1) for batch in batches.train(1, 1)])
        assert torch.equal(rest, whole[8:])


def turned(image):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    return file_of(image, "jpeg", exif=exif)


def test_what_torchcodec_does_not_read_as_pil_does_is_read_by_pil_and_said_once(capsys):
    pytest.importorskip("torchcodec")
    image = photograph(np.random.default_rng(1))
    unsaid = multiprocessing.get_context("spawn").Lock()
    assert decode_to_tensor(file_of(image, "jpeg"), unsaid).shape == (3, image.height, image.width)
    assert not capsys.readouterr().err
    files = [
        turned(image),
        file_of(image.convert("CMYK"), "jpeg"),
        file_of(image, "webp"),
        file_of(image, "png"),
    ]
    for file in files:
        expected = np.asarray(decode(file)).transpose(2, 0, 1)
        assert np.array_equal(decode_to_tensor(file, unsaid).numpy(), expected)
    assert capsys.readouterr().err == (
        "read by PIL, not by torchcodec, as others like it will be: a.jpeg "
        "(JPEG, RGB, Exif orientation 6)\n"
    )


def test_a_folder_that_torchcodec_does_not_read_is_said_once_by_all_workers(
    accelerator, images, capfd
):
    pytest.importorskip("torchcodec")
    flags = ["--interpolation", "bilinear", "--decoder", "torchcodec", "--workers", "2"]
    batches, _ = opened(accelerator, images, *flags)
    assert len(epoch_of(batches, 0)) == len(epoch_of(batches, 1)) == 24
    assert capfd.readouterr().err.count("read by PIL, not by torchcodec") == 1


@pytest.mark.parametrize("file", [b"", b"text", None])
def test_an_image_that_neither_reads_is_named(file):
    pytest.importorskip("torchcodec")
    if file is None:
        whole = file_of(photograph(np.random.default_rng(2)), "jpeg")["bytes"]
        file = whole[: len(whole) // 2]
    unsaid = multiprocessing.get_context("spawn").Lock()
    with pytest.raises(InputError, match=r"cannot read the image broken\.jpg: replace or remove"):
        decode_to_tensor({"bytes": file, "path": "broken.jpg"}, unsaid)


def test_torchcodec_without_its_package_or_for_another_interpolation_is_an_error(
    accelerator, images, monkeypatch
):
    pytest.importorskip("torchcodec")
    with pytest.raises(
        settings.InputError,
        match="does not resize by lanczos: choose --interpolation bilinear or bic",
    ):
        opened(accelerator, images, "--decoder", "torchcodec", "--interpolation", "lanczos")
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    with pytest.raises(
        settings.InputError, match=r"cannot load its package: pip install 'torchcodec>=0\.17'"
    ):
        opened(accelerator, images, "--decoder", "torchcodec")
    opened(accelerator, images)  # without which nothing needs it


def test_batches_reach_a_gpu_by_a_stream_of_their_own_which_the_model_waits_for(monkeypatch):
    """CUDA's streams as far as they can be played without one: what is copied, awaited and kept."""
    log, copying = [], []

    class Stream:
        def wait_stream(self, other):
            log.append(("wait", other))

    computing, own = Stream(), []

    @contextlib.contextmanager
    def stream(chosen):
        copying.append(chosen)
        yield
        copying.pop()

    def send(batch, device, non_blocking):
        log.append(("copy", copying[-1], non_blocking))
        keep = argparse.Namespace(record_stream=lambda stream: log.append(("keep", stream)))
        return {"image": keep, "label": keep}

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: own.append(Stream()) or own[-1])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: computing)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(loaders, "send_to_device", send)
    loaders._copying_stream.cache_clear()
    for _ in range(2):  # epochs
        for _ in loaders.on_device([{"image": 1}, {"image": 2}], torch.device("cuda")):
            assert not copying  # the model computes in its own stream
            log.append("computed")
    loaders._copying_stream.cache_clear()
    assert len(own) == 1
    assert log == 4 * [
        ("copy", own[0], True),
        ("wait", own[0]),
        *2 * [("keep", computing)],
        "computed",
    ]


def batch_settings(**values):
    return argparse.Namespace(
        **({"batch_size": 4096, "device_batch_size": 256, "m": None} | values)
    )


@pytest.mark.parametrize(
    "values, processes, split",
    [
        ({}, 8, (256, 2, 256)),
        ({"m": 64}, 1, (256, 16, 64)),
        ({"m": 64}, 8, (256, 2, 64)),
        ({"m": 64}, 32, (128, 1, 64)),  # what a process loads at once shrinks with its share
        ({"m": 64, "device_batch_size": 200}, 8, (128, 4, 64)),
        ({"m": 64, "device_batch_size": 32}, 8, (64, 8, 64)),
        ({"m": 3, "batch_size": 60}, 4, (15, 1, 3)),
        ({"batch_size": 6}, 2, (3, 1, 3)),
        ({"m": 1, "batch_size": 1018}, 2, (1, 509, 1)),  # tiny, but asked for
        ({"batch_size": 64 * 257}, 1, (64, 257, 64)),  # a quarter of what fits is not tiny
    ],
)
def test_batch_splits_into_loader_batches_and_micro_batches(values, processes, split):
    assert loaders.split_batch(batch_settings(**values), processes) == split


@pytest.mark.parametrize(
    "values, processes, words",
    [
        ({"m": 48}, 8, "m 48 does not divide batch_size 4096: choose one of 1, 2, 4,"),
        (
            {},
            3,
            "4096 in micro-batches of 1 does not split over 3 processes: choose one of 1, 2, 4",
        ),
        (
            {"m": 64, "batch_size": 384},
            4,
            "does not split over 4 processes: choose one of 1, 2, 3, 6 processes",
        ),
        (
            {"batch_size": 32 * 257},
            1,
            "in loader batches of 32, .* choose batch_size 8225, or give",
        ),
        (
            {"batch_size": 1018},
            2,
            "in loader batches of 1, .* choose batch_size 1020, or give --m, .* 1, 509$",
        ),
    ],
)
def test_batch_that_does_not_split_names_what_does(values, processes, words):
    with pytest.raises(InputError, match=words):
        loaders.split_batch(batch_settings(**values), processes)


def test_torch_does_not_warn_of_as_many_workers_as_were_asked_for(accelerator):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        options = loaders.worker_options(accelerator, 512)
        torch.utils.data.DataLoader([1], **options)
    assert caught == []
