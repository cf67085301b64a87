# Copyright 2026 The sam-obf authors. Licensed under the Apache License, Version 2.0.
"""Gather timm's published top-1, one file for each test set, into ``robustness/timm_results.csv``.

git clone https://github.com/huggingface/pytorch-image-models
python benchmarks/timm_results.py pytorch-image-models/results --source "commit 90cae8c5, 2026-08"
"""

import argparse
import csv
from pathlib import Path

TARGET = Path(__file__).resolve().parents[1] / "common" / "timm_results.csv"
FILES = {  # our column: timm's results-FILE.csv
    "imagenet": "imagenet",
    "imagenet-real": "imagenet-real",
    "imagenetv2-matched-frequency": "imagenetv2-matched-frequency",
    "imagenet-r": "imagenet-r",
    "imagenet-r-clean": "imagenet-r-clean",
    "imagenet-a": "imagenet-a",
    "imagenet-a-clean": "imagenet-a-clean",
    "imagenet-sketch": "sketch",
}
KEYS = ("model", "img_size", "crop_pct", "interpolation")  # what tells a model's evaluations apart


def read(path):
    """Top-1 in %, as published, by what tells evaluations apart."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = {tuple(row[key] for key in KEYS): row["top1"] for row in rows}
    if len(found) != len(rows):
        raise SystemExit(f"{path} has two rows for the same model at the same size and crop")
    return found


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("folder", type=Path, help="of timm's results-*.csv")
    p.add_argument("--source", required=True, help="the files' version, for the first line")
    args = p.parse_args()
    columns = {name: read(args.folder / f"results-{file}.csv") for name, file in FILES.items()}
    first = columns["imagenet"]
    for name, column in columns.items():
        for what, keys in (
            ("lacks", set(first) - set(column)),
            ("alone has", set(column) - set(first)),
        ):
            for key in sorted(keys):  # a cell left empty; a row left out
                print(f"results-{FILES[name]}.csv {what} {', '.join(key)}")
    with TARGET.open("w", newline="") as file:
        file.write(
            "# Top-1 in % by timm's validation script: "
            "results-*.csv of huggingface/pytorch-image-models "
        )
        file.write(f"(Apache-2.0), {args.source}\n")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*KEYS, *columns])
        writer.writerows(
            [*key, *(column.get(key) for column in columns.values())] for key in sorted(first)
        )


if __name__ == "__main__":
    main()
