"""Images that show their class, a model that reads it, and robustness sets of such images.

The sets are in their real layouts. Run as ``oracle.py FOLDER OUTPUT``, it evaluates two oracles on
every ImageNet-V2 ``FOLDER/v2-*``, on any number of processes.
"""

import io
import sys
import tarfile
from pathlib import Path

import torch
from accelerate import PartialState
from PIL import Image

COLOUR = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def picture(index, size=16):
    """Its three channels are the three decimal digits of ``index``; robust to JPEG."""
    return Image.new("RGB", (size, size), tuple(25 * (index // 10**i % 10) + 12 for i in range(3)))


def jpeg(index):
    file = io.BytesIO()
    picture(index).save(file, "jpeg", quality=95)
    return file.getvalue()


class Oracle(torch.nn.Module):
    """Right on every ``picture``, but for ``mistaken`` classes, which it takes for the next one."""

    def __init__(self, mistaken=()):
        super().__init__()
        self.num_classes, self.mistaken = 1000, torch.tensor(sorted(mistaken), dtype=torch.long)
        size = {"input_size": (3, 16, 16), "crop_pct": 1.0, "interpolation": "bilinear"}
        self.pretrained_cfg = size | COLOUR
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, x):
        mean, std = (torch.tensor(COLOUR[key]).view(3, 1, 1) for key in ("mean", "std"))
        digits = (((x * std + mean) * 255).mean((-2, -1)) / 25).floor().clamp(0, 9).long()
        index = (digits * torch.tensor([1, 10, 100])).sum(-1)
        index = (index + torch.isin(index, self.mistaken)) % 1000
        return 10 * torch.nn.functional.one_hot(index, 1000).float() * self.weight


def write_folders(root, classes, images=1):
    """``classes``: index by folder name."""
    for name, index in classes.items():
        (root / name).mkdir(parents=True)
        for i in range(images):
            (root / name / f"{name}_{i}.jpeg").write_bytes(jpeg(index))
    return root


def write_tars(root, labels, indices, shards=2):
    """WebDataset shards as clip-benchmark's: ``sNNNNNNN.jpg`` and ``.cls``."""
    (root / "test").mkdir(parents=True)
    for shard in range(shards):
        with tarfile.open(root / "test" / f"{shard}.tar", "w") as tar:
            for i in range(shard, len(labels), shards):
                for suffix, content in (
                    ("cls", str(labels[i]).encode()),
                    ("jpg", jpeg(indices[i])),
                ):
                    entry = tarfile.TarInfo(f"s{i:07d}.{suffix}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    return root


if __name__ == "__main__":
    import eval_robustness
    from common import checkpoints
    from robustness import sets

    if PartialState().is_main_process is False:
        sets.revision = None  # asking is the main process's
    checkpoints.open_model = lambda name, **_: Oracle({"right": (), "wrong": (0, 3, 6)}[name])
    for folder in sorted(Path(sys.argv[1]).glob("v2-*")):
        flags = ["--data", f"v2={folder}", "--allow-partial", "--workers", "1", "--batch-size", "8"]
        output = ["--output", f"{sys.argv[2]}/{folder.name}"]
        eval_robustness.main(["--model", "right", "wrong", "--benchmarks", "v2", *flags, *output])
