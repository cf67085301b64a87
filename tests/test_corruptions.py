"""Corruptions: what each does to an image, and that it does so alike however it is read."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform
from timm.models import save_for_hf

from robustness import corruptions, sets
from robustness.corruptions import CORRUPTIONS, SEVERITIES, STRENGTHS, corrupt

ROOT = Path(__file__).parent.parent
KINDS = list(itertools.product(CORRUPTIONS, SEVERITIES))


def photograph(seed=0, size=64):
    """Something smooth with edges and colours."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    return small.resize((size, size), Image.BICUBIC)


def pixels(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


# --------------------------------------------------------------------------------------------------
# What each does


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_each_severity_changes_the_image_more_than_the_one_before(corruption):
    x = pixels(photograph())
    changes = [0.0]
    for severity in SEVERITIES:
        y = corrupt(x, corruption, severity, seed=3)
        assert y.dtype == torch.uint8 and y.shape == x.shape
        changes.append((y.float() - x).abs().mean().item())
    assert all(b > a + 0.3 for a, b in itertools.pairwise(changes)), changes


@pytest.mark.parametrize("severity", SEVERITIES)
def test_strengths_mean_what_the_table_says(severity):
    x, strength = (
        pixels(photograph()),
        {name: values[severity - 1] for name, values in STRENGTHS.items()},
    )
    grey = torch.full((3, 128, 128), 128, dtype=torch.uint8)
    noise = corrupt(grey, "noise", severity, 0).float() - 128
    expected = (255 * strength["noise"] * torch.randn(200_000)).clamp(-128, 127)
    assert (
        noise.std().item() == pytest.approx(expected.std().item(), rel=0.05)
        and abs(noise.mean()) < 1
    )
    line = torch.zeros(3, 100, 200, dtype=torch.uint8)
    line[:, :, 100] = 255
    profile = corrupt(line, "blur", severity, 0)[0, 50].double()
    variance = (profile * (torch.arange(200) - 100) ** 2).sum() / profile.sum()
    assert variance.sqrt().item() == pytest.approx(100 * strength["blur"], rel=0.05)
    factor = strength["pixelate"]
    blocks = corrupt(pixels(photograph(size=48)), "pixelate", severity, 0).unfold(1, factor, factor)
    blocks = blocks.unfold(2, factor, factor).flatten(-2)
    assert (blocks == blocks[..., :1]).all() and len(blocks[0].unique()) > 20
    bright = (x.double() * strength["brightness"]).clamp(0, 255)
    assert (corrupt(x, "brightness", severity, 0) - bright).abs().max() <= 1
    luma = (x.double() * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(0)
    flat = luma.mean() + strength["contrast"] * (x.double() - luma.mean())
    assert (corrupt(x, "contrast", severity, 0) - flat.clamp(0, 255)).abs().max() <= 2
    pale = luma + strength["saturation"] * (x.double() - luma)
    assert (corrupt(x, "saturation", severity, 0) - pale.clamp(0, 255)).abs().max() <= 2


@pytest.mark.parametrize("severity", SEVERITIES)
def test_rotations_go_to_either_side_and_squares_anywhere(severity):
    dot = torch.zeros(3, 101, 101, dtype=torch.uint8)
    dot[:, 49:52, 79:82] = 255  # 30 to the right of the centre
    angles, places = set(), set()
    for seed in range(20):
        turned = corrupt(dot, "rotate", severity, seed)[0].double()
        y, x = (
            (turned * grid).sum() / turned.sum() - 50
            for grid in torch.meshgrid(*[torch.arange(101)] * 2, indexing="ij")
        )
        angles.add(round(torch.rad2deg(torch.atan2(-y, x)).item()))
        x = torch.zeros(3, 40, 60, dtype=torch.uint8)
        rows, columns = corrupt(x, "occlude", severity, seed)[0].nonzero().T
        side = round(40 * STRENGTHS["occlude"][severity - 1])
        assert (
            len(rows) == side**2
            and rows.max() - rows.min() == columns.max() - columns.min() == side - 1
        )
        places.add((rows.min().item(), columns.min().item()))
    assert angles == {-STRENGTHS["rotate"][severity - 1], STRENGTHS["rotate"][severity - 1]}
    assert len(places) > 10


@pytest.mark.parametrize("severity", SEVERITIES)
def test_squares_reach_every_edge(severity):
    tops, lefts = set(), set()
    side = round(6 * STRENGTHS["occlude"][severity - 1])
    for seed in range(150):
        black = torch.zeros(3, 6, 7, dtype=torch.uint8)
        rows, columns = corrupt(black, "occlude", severity, seed)[0].nonzero().T
        tops.add(rows.min().item())
        lefts.add(columns.min().item())
    assert (tops, lefts) == (set(range(6 - side + 1)), set(range(7 - side + 1)))


@pytest.mark.parametrize("severity", SEVERITIES)
def test_rotations_are_pils_bilinear_ones(severity):
    picture, degrees = photograph(), STRENGTHS["rotate"][severity - 1]
    turned = corrupt(pixels(picture), "rotate", severity, 0).float()
    differences = []
    for angle in (degrees, -degrees):
        expected = pixels(picture.rotate(angle, Image.BILINEAR)).float()
        inside = (slice(None), slice(16, 48), slice(16, 48))
        differences.append((turned - expected)[inside].abs().max().item())
    assert min(differences) <= 2 < 50 < max(differences)


# Top-1 error of AlexNet in %, as the paper's table 3 prints it (Hendrycks and Dietterich 2019).
ALEXNET = {
    "gaussian_noise": 88.6, "shot_noise": 89.4, "impulse_noise": 92.3, "defocus_blur": 82.0,
    "glass_blur": 82.6, "motion_blur": 78.6, "zoom_blur": 79.8, "snow": 86.7, "frost": 82.7,
    "fog": 81.9, "brightness": 56.5, "contrast": 85.3, "elastic_transform": 64.6,
    "pixelate": 71.8, "jpeg_compression": 60.7,
}  # fmt: skip


@pytest.mark.parametrize("corruption", ALEXNET)
def test_each_corruptions_error_counts_against_alexnets_own(corruption):
    top1 = {name: dict.fromkeys("12345", 1.0) for name in ALEXNET}
    for severity, value in zip("12345", (0.9, 0.7, 0.5, 0.3, 0.1)):
        top1[corruption][severity] = value
    expected = 0.5 / (ALEXNET[corruption] / 100) / 15
    assert corruptions.mce(top1) == pytest.approx(expected, rel=0.05 / 56)


def test_jpeg_is_that_of_its_quality():
    x = pixels(photograph())
    for quality, severity in zip(STRENGTHS["jpeg"], SEVERITIES):
        again = torch.from_numpy(np.array(corrupt(x, "jpeg", severity, 0)))
        y = torch.from_numpy(np.array(corrupt(again, "jpeg", severity, 0)))
        assert (y.float() - again).abs().mean() < 0.3 * (again.float() - x).abs().mean(), (
            quality
        )  # it has settled


# --------------------------------------------------------------------------------------------------
# Alike wherever it is read


def test_what_is_drawn_depends_on_image_corruption_and_severity_and_leaves_the_stream_alone():
    x, state = pixels(photograph()), torch.get_rng_state()
    seeds = [corruptions.seed_of(photograph(i)) for i in range(2)]
    drawn = [corrupt(x, "noise", severity, seed) for seed in seeds for severity in SEVERITIES]
    again = [corrupt(x, "noise", severity, seed) for seed in seeds for severity in SEVERITIES]
    assert all(torch.equal(a, b) for a, b in zip(drawn, again))
    residues = [(y.float() - x).sign() for y in drawn]
    assert all((a == b).float().mean() < 0.7 for a, b in itertools.combinations(residues, 2))
    assert torch.equal(torch.get_rng_state(), state)


def read_all(ds, size, batch, workers, processes):
    """Every corrupted image by path and corruption."""
    found, transform = {}, create_transform(size, normalize=False)
    for process in range(processes):
        pictures = sets.Pictures(
            "mine", ds, transform, batch, process=process, processes=processes, corrupt=True
        )
        for rows in torch.utils.data.DataLoader(
            pictures, batch_size=None, num_workers=workers, collate_fn=dict
        ):
            for path, image in zip(rows.get("path", ()), rows["image"]):
                kind = (path, rows["corruption"], rows["severity"])
                assert found.setdefault(kind, image) is image  # each once
    return found


@pytest.mark.parametrize("batch, workers, processes", [(1, 0, 1), (3, 2, 1), (8, 1, 2)])
def test_batches_workers_and_processes_change_no_corrupted_image(
    tmp_path, batch, workers, processes
):
    features = datasets.Features(
        {"image": datasets.Image(decode=False), "label": datasets.Value("int64")}
    )
    paths = [tmp_path / f"{i}.png" for i in range(7)]
    for i, path in enumerate(paths):
        photograph(i).save(path)
    images = [{"bytes": path.read_bytes(), "path": path.name} for path in paths]
    ds = datasets.Dataset.from_dict({"image": images, "label": range(7)}, features=features)
    expected = read_all(ds, 32, 7, 0, 1)
    assert len(expected) == 7 * (1 + len(KINDS))
    for read in (ds, ds.to_iterable_dataset(num_shards=2)):
        found = read_all(read, 32, batch, workers, processes)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    larger = read_all(ds, 64, 7, 0, 1)  # another model's size, with the same draws
    for path in ("0.png", "1.png"):
        places = [
            (x[path, "occlude", "2"] == 128).all(0).nonzero().float().mean(0)
            for x in (expected, larger)
        ]
        assert (2 * places[0] - places[1]).abs().max() < 3


# --------------------------------------------------------------------------------------------------
# Runs


@pytest.fixture
def place(tmp_path):
    """A model of three classes, and a folder of images of them."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=3)
    names = {"label_names": ["c", "a", "b"]}
    config = {"input_size": (3, 32, 32), "crop_pct": 1.0}
    save_for_hf(
        model, tmp_path / "model", data_config=config, model_config=names, safe_serialization=True
    )
    for i in range(21):
        folder = tmp_path / "images" / "abc"[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        photograph(i).save(folder / f"{i}.png")
    return tmp_path


def run(place, output, processes=1, *flags):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launch if processes > 1 else []), str(ROOT / "eval_robustness.py")]
    command += ["--model", str(place / "model"), "--data", f"mine={place / 'images'}", "--corrupt"]
    command += ["--workers", "0", "--output", str(place / output), *flags]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((place / output / "results.json").read_text())


@pytest.mark.slow
def test_a_row_for_each_corruption_a_clean_one_beside_them_and_their_mean(place):
    printed, saved = run(place, "out")
    ((_, found),) = saved["corrupted"][str(place / "model")].items()
    assert list(saved["results"][str(place / "model")]) == ["mine"]
    assert found["clean"] == saved["results"][str(place / "model")]["mine"]["top1"]
    assert sorted(found["corruptions"]) == sorted(CORRUPTIONS)
    values = [top1 for rows in found["corruptions"].values() for top1 in rows.values()]
    assert len(values) == len(KINDS) and found["mean"] == pytest.approx(np.mean(values))
    assert found["low"] < found["mean"] < found["high"]
    for row in ("none: clean", *CORRUPTIONS, "mean"):
        assert f"mine       {row}" in printed
    again, _ = run(place, "out")
    assert "finished before" in again


@pytest.mark.slow
def test_two_processes_and_other_batches_give_the_same_rows(place):
    one, two = (
        run(place, f"out{n}", n, "--batch-size", str(batch))[1] for n, batch in ((1, 21), (2, 4))
    )
    assert one["corrupted"] == two["corrupted"]
