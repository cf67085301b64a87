# Copyright 2026 The sam-obf authors. Licensed under the Apache License, Version 2.0.
"""Images per second of the training input, by either decoder, beside that of timm's own loader.

All read the same folder of JPEG files with the same transforms, workers and batch size, and put
normalised batches on the device. They take turns, an epoch each, and a ratio compares two epochs of
the same round.

    python benchmarks/loader.py              # 1024 made-up photographs of 500 x 375 pixels
    python benchmarks/loader.py --size 4032 3024 --images 16 --batch-size 8  # as of a phone: 3 MB
    python benchmarks/loader.py --folder imagenet/train --workers 12 --device cuda
"""

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from timm.data import create_dataset, create_loader
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import data, loaders, settings

CONFIG = {
    "input_size": (3, 224, 224), "interpolation": "bilinear",
    "crop_pct": 0.875, "crop_mode": "center",
    "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225),
}  # fmt: skip
AUGMENTATION = {"scale": (0.05, 1.0), "ratio": (3 / 4, 4 / 3), "hflip": 0.5}
TARGETS = {"pil": 1.0, "torchcodec": 1.3}  # of timm's
LARGE = {"pil": 3.0, "torchcodec": 1.0}  # the same for photographs of 12 megapixels
COPIES = 4  # of each large photograph, as one takes seconds to make


def write_photographs(folder, number, seed=0, size=(500, 375)):
    """JPEG files whose spectrum, and so size, is like that of photographs: about 100 kB each.

    Large ones are smoother, as a lens has them: 3 MB for 12 megapixels.
    """
    rng, (width, height) = np.random.default_rng(seed), size
    slope = 1.2 if width <= 1000 else 1.35
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(height), np.fft.fftfreq(width), indexing="ij"))
    for i in tqdm(range(number), desc="making photographs", leave=False):
        noise = np.fft.fft2(rng.normal(size=(3, height, width)))
        noise /= np.maximum(frequency, 1 / width) ** slope
        image = np.fft.ifft2(noise).real
        image = 128 + 50 * (image - image.mean()) / image.std()
        path = Path(folder) / f"class{i % 4}" / f"{i}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)).save(
            path, quality=92
        )


def ours(args, accelerator, decoder):
    """A function that returns an iterator over an epoch's batches."""
    split = data.image_folder(args.folder)
    transform, _ = loaders.transforms(CONFIG, **AUGMENTATION, decoder=decoder)
    args = argparse.Namespace(**vars(args), seed=0, train_num_samples=None, decoder=decoder)
    _, batches = loaders.train_batches(args, accelerator, split, transform, args.batch_size)
    to_input = loaders.to_input(CONFIG, torch.float32)
    return lambda epoch: (to_input(batch["image"]) for batch in batches(epoch, 0))


def timms(args, accelerator):
    dataset = create_dataset("", root=args.folder, class_map="")
    kept = {key: value for key, value in CONFIG.items() if key not in ("crop_pct", "crop_mode")}
    loader = create_loader(
        dataset, batch_size=args.batch_size, is_training=True, num_workers=args.workers,
        device=accelerator.device, pin_memory=accelerator.device.type == "cuda",
        color_jitter=None, **kept, **AUGMENTATION,
    )  # fmt: skip
    return lambda epoch: (images for images, _ in loader)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", help="images as CLASS/FILE (made up)")
    parser.add_argument("--images", type=int, default=1024, help="to make up (%(default)s)")
    parser.add_argument(
        "--size", type=int, nargs=2, default=(500, 375), help="of those, width and height (500 375)"
    )
    parser.add_argument("--batch-size", type=int, default=64, help="(%(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="epochs of each (%(default)s)")
    args = parser.parse_args()
    decoders = list(TARGETS)
    try:
        settings.check_decoder("torchcodec")
    except settings.InputError as error:
        print(error)
        decoders.remove("torchcodec")
    # Those that normalise wait spinning, beside workers.
    torch.set_num_threads(max(1, os.cpu_count() - args.workers))
    accelerator = Accelerator()
    with tempfile.TemporaryDirectory() as made_up:
        if args.folder is None:
            write_photographs(made_up, args.images, size=args.size)
            for path in list(Path(made_up).rglob("*.jpg")) if args.size[0] >= 4000 else ():
                for copy in range(1, COPIES):
                    path.with_stem(f"{path.stem}-{copy}").hardlink_to(path)
            args.folder = made_up
        contestants = {name: ours(args, accelerator, name) for name in decoders} | {
            "timm": timms(args, accelerator)
        }
        rates = {name: [] for name in contestants}
        for epoch in tqdm(range(args.rounds + 1), desc="rounds", leave=False):
            for name in random.Random(epoch).sample(list(contestants), len(contestants)):
                start, seen = time.perf_counter(), 0
                for images in contestants[name](epoch):
                    seen += len(images)
                if accelerator.device.type == "cuda":
                    torch.cuda.synchronize()
                if epoch:  # the first one starts the workers
                    rates[name].append(seen / (time.perf_counter() - start))
    setup = f"batch {args.batch_size}, {args.workers} workers, {accelerator.device}"
    print(f"{setup}, {args.rounds} rounds, medians")
    print(f"timm        {statistics.median(rates['timm']):8.1f} images/s")
    for name in decoders:
        ratios = sorted(one / other for one, other in zip(rates[name], rates["timm"]))
        ratio = statistics.median(ratios)
        shown = f"{name:<11} {statistics.median(rates[name]):8.1f} images/s   of timm's {ratio:.3f}"
        target = (LARGE if args.size[0] >= 4000 else TARGETS)[name]
        verdict = "ok" if ratio >= target else "MISSED"
        print(f"{shown} ({ratios[0]:.2f}-{ratios[-1]:.2f})   target >= {target} {verdict}")


if __name__ == "__main__":
    main()
