# Copyright 2026 The sam-obf authors. Licensed under the Apache License, Version 2.0.
"""Images per second of ``eval_robustness.py``, beside timm's own validation: its loader, and a plain loop.

Same model, folder, batch size, workers and preprocessing; they take turns, and a ratio compares two of the same round.
The third contestant scores ImageNet-Real besides, in the same pass; the fourth makes what ``--corrupt`` adds, of the
first ``--corrupt-images``, since it evaluates every image 28 times.

    python benchmarks/evaluation.py                                                   # 2048 made-up photographs
    python benchmarks/evaluation.py --folder imagenet/val --model vit_small_patch32_224 --workers 12
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import timm
import torch
from accelerate import Accelerator
from loader import write_photographs
from timm.data import ImageNetInfo, create_dataset, create_loader, resolve_data_config
from timm.utils import accuracy
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import eval_robustness
from robustness import sets

MIN_RATIO, MAX_REAL = 1.0, 1.05


def name_like_imagenet(folder):
    """Made-up photographs as validation images: in folders called by WordNet id, numbered from 1."""
    names = ImageNetInfo("imagenet-1k").label_names()
    for number, path in enumerate(sorted(Path(folder).glob("*/*.jpg")), 1):
        target = Path(folder) / names[number % 1000] / f"ILSVRC2012_val_{number:08d}.JPEG"
        target.parent.mkdir(exist_ok=True)
        path.rename(target)


@torch.no_grad()
def timms(args, accelerator, model, config, folder):
    dataset = create_dataset("", root=folder, class_map="")
    options = {key: config[key] for key in ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")}
    pin = accelerator.device.type == "cuda"
    options |= {
        "batch_size": args.batch_size,
        "num_workers": args.workers,
        "device": accelerator.device,
        "pin_memory": pin,
    }
    loader = create_loader(dataset, persistent_workers=False, **options)
    right = 0
    for images, labels in loader:
        right += accuracy(model(images), labels, topk=(1, 5))[0].item() * len(labels)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="validation images as WORDNET_ID/FILE (made up)")
    parser.add_argument("--images", type=int, default=2048, help="to make up (%(default)s)")
    parser.add_argument("--model", default="test_vit", help="fast by default: the loader is what differs (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="(%(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="(%(default)s)")
    parser.add_argument("--corrupt-images", type=int, default=128, help="(%(default)s)")
    parser.set_defaults(channels_last=None)  # the evaluator's own
    args = parser.parse_args()
    torch.set_num_threads(max(1, os.cpu_count() - args.workers))  # or the model's threads disturb the workers at random
    accelerator = Accelerator()
    model = timm.create_model(args.model, num_classes=1000).eval().to(accelerator.device)
    config = resolve_data_config({"img_size": 224, "crop_pct": 0.875}, model=model)
    with tempfile.TemporaryDirectory() as made_up:
        if args.folder is None:
            write_photographs(made_up, args.images)
            name_like_imagenet(made_up)
            args.folder = made_up
        ds = sets.open_set(sets.Pass("imagenet", ()), args.folder, allow_partial=True)

        def ours(*benchmarks, ds=ds, corrupt=False):
            args.corrupt = corrupt
            which = sets.Pass("imagenet", benchmarks)
            eval_robustness.predict(accelerator, model, config, which, ds, args)

        part = ds.select(range(min(args.corrupt_images, len(ds))))

        contestants = {
            "timm": lambda: timms(args, accelerator, model, config, args.folder),
            "ours": lambda: ours("imagenet"),
            "with Real": lambda: ours("imagenet", "real"),
            "corrupted": lambda: ours("imagenet", ds=part, corrupt=True),
        }
        seconds = {name: [] for name in contestants}
        for i in tqdm(range(args.rounds + 1), desc="rounds", leave=False):
            names = list(contestants)
            for name in names[i % 4 :] + names[: i % 4]:
                start = time.perf_counter()
                contestants[name]()
                if i:  # the first round warms up
                    seconds[name].append(time.perf_counter() - start)
    to_timm = statistics.median(a / b for a, b in zip(seconds["timm"], seconds["ours"]))
    real = statistics.median(a / b for a, b in zip(seconds["with Real"], seconds["ours"]))
    setup = f"batch {args.batch_size}, {args.workers} workers, {accelerator.device}"
    print(f"{args.model}, {len(ds)} images, {setup}, medians of {args.rounds}")
    for name, values in seconds.items():
        images = len(part) if name == "corrupted" else len(ds)
        print(f"{name:<10} {images / statistics.median(values):8.1f} images/s")
    times = statistics.median(a / len(part) * len(ds) / b for a, b in zip(seconds["corrupted"], seconds["ours"]))
    print(f"time an image, with --corrupt to without    {times:.1f}, for 28 evaluations of it")
    verdicts = ["ok" if fine else "MISSED" for fine in (to_timm >= MIN_RATIO, real <= MAX_REAL)]
    print(f"throughput, ours to timm's    {to_timm:.3f}   target >= {MIN_RATIO} {verdicts[0]}")
    print(f"time, with Real to without    {real:.3f}   target <= {MAX_REAL} {verdicts[1]}")


if __name__ == "__main__":
    main()
