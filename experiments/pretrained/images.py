"""The images of this experiment, as Parquet in the layout of the Hub; from the repository's root.

python -m experiments.pretrained.images --dataset CIFAR-10 --output outputs/pretrained/images

``tune/SIZE`` is for choosing hyperparameters: ``train``, and ``validation`` with 1,000 images.
``SIZE/SEED`` has other training images for each seed, and the ``test`` split. All have as many
images of each class.
"""

import argparse
from pathlib import Path

import numpy as np
from sklearn.model_selection import train_test_split

from common import data

SIZES, SEEDS, HELD_OUT = (200, 2000), range(400, 405), 1000


def main(argv=None):
    """Run as from the command line."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--dataset", default="uoft-cs/cifar10", help="CIFAR-10 (%(default)s)")
    p.add_argument("--output", type=Path, default=Path("outputs/pretrained/images"))
    args = p.parse_args(argv)
    splits = data.load(args.dataset)
    train, labels = splits["train"], np.array(splits["train"]["label"])
    balanced = {"stratify": labels, "random_state": 0}
    held_out, others = train_test_split(range(len(train)), train_size=HELD_OUT, **balanced)
    for size in SIZES:
        for seed in (None, *SEEDS):
            balanced = {"stratify": labels[others], "random_state": seed or 0}
            own, _ = train_test_split(others, train_size=size, **balanced)
            folder = args.output / (f"tune/{size}" if seed is None else f"{size}/{seed}")
            folder.mkdir(parents=True, exist_ok=True)
            train.select(own).to_parquet(folder / "train.parquet")
            if seed is None:
                train.select(held_out).to_parquet(folder / "validation.parquet")
            else:
                splits["test"].to_parquet(folder / "test.parquet")


if __name__ == "__main__":
    main()
