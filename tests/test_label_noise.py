"""Labels that are wrong on purpose: how many, of which images, and that nothing else changes."""

import numpy as np
import pytest
import torch
from helpers import fresh_process, in_process, logged_epochs, recipe, small_recipe, write_folder
from scipy.stats import chisquare

import measure_forgetting
import train_imagenet
from common import data, loaders, settings
from common.errors import InputError


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Four updates an epoch."""
    return write_folder(tmp_path_factory.mktemp("images"), images=8)


def test_the_share_is_exact_and_all_other_classes_are_as_likely():
    split = data.load("digits")["train"]
    true = np.asarray(split["label"])
    counts = np.zeros((10, 10))
    for seed in range(20):
        noisy = data.noisy_labels(split, 0.4, seed)
        assert (noisy != true).sum() == 360
        np.add.at(counts, (true[noisy != true], noisy[noisy != true]), 1)
    assert not counts.diagonal().any()
    for number, row in enumerate(counts):
        assert chisquare(np.delete(row, number)).pvalue > 1e-4
    assert np.asarray(split["label"]).tolist() == true.tolist()  # the split is as it was


def test_the_draw_is_the_seeds():
    split = data.load("digits")["train"]
    first, again, other = (data.noisy_labels(split, 0.2, seed) for seed in (1, 1, 2))
    assert (first == again).all() and (first != other).any()


def test_labels_of_a_part_of_the_images_are_that_parts():
    """A split with a mapping of its rows."""
    split = data.load("digits")["train"]
    part = split.select([5, 3, 8, 1] * 20)
    labels = data.noisy_labels(part, 0.0, 0)
    assert labels.tolist() == part["label"]
    noisy = loaders.Images(part, lambda image: torch.zeros(1), labels=labels[::-1].copy())
    assert [e["label"] for e in noisy.__getitems__([0, (3, 1)])] == labels[::-1][:2].tolist()


def test_training_images_alone_are_noisy_and_a_line_says_so(tmp_path, images, monkeypatch, capsys):
    seen, own = [], loaders.Images.__getitems__

    def getitems(self, keys):
        rows = own(self, keys)
        for key, row in zip(keys, rows):
            index = key[1] if isinstance(key, tuple) else key
            seen.append((self.labels is not None, row["label"] == self.split[index]["label"]))
        return rows

    monkeypatch.setattr(loaders.Images, "__getitems__", getitems)
    fresh_process()
    train_imagenet.main([*small_recipe(tmp_path, images), "--label-noise", "0.25"])
    training = [right for noisy, right in seen if noisy]
    assert len(training) == 16 and training.count(False) == 4
    assert all(right for noisy, right in seen if not noisy) and len(seen) > 16
    assert "label noise: 4 of 16 training images have another class, drawn by --seed 0" in (
        capsys.readouterr().out
    )


@pytest.mark.slow
def test_a_resumed_run_must_have_the_same_noise(tmp_path, images):
    path = recipe(tmp_path, images, workers=0, epochs=2, label_noise=0.5)
    in_process(path, tmp_path / "run")
    assert len(logged_epochs(tmp_path / "run")) == 2
    with pytest.raises(InputError, match=r"of a run with label_noise 0\.5, and this one has 0\.25"):
        in_process(path, tmp_path / "run", "--resume", "auto", "--label-noise", "0.25")


@pytest.mark.slow
def test_measuring_a_noisy_run_of_mixed_images_takes_the_datasets_own_labels(
    tmp_path, images, capsys
):
    changes = {"label_noise": 0.5, "mixup": 0.2, "smoothing": 0.1, "save_interval": 1}
    fresh_process()
    train_imagenet.main(small_recipe(tmp_path, images, **changes))
    fresh_process()
    flags = ["--runs", str(tmp_path / "run"), "--workers", "0", "--m", "4", "--micro-batches", "2"]
    measure_forgetting.main([*flags, "--output", str(tmp_path / "measured")])
    assert "the labels are those of the dataset, without the runs' label_noise" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--label-noise 1", r"label_noise is 1.0; it must lie in \[0, 1\)"),
        ("--label-noise 0.1 --streaming", "label_noise does not go with streaming"),
    ],
)
def test_noise_that_cannot_be_is_an_error(tmp_path, flags, words):
    with pytest.raises(InputError, match=words):
        argv = [*flags.split(), "--output", str(tmp_path / "run")]
        settings.parse(train_imagenet.parser(), argv)
