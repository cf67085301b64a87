"""Augmentation by timm's names: what is drawn depends on seed, epoch and image alone."""

import argparse
import random
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import in_process, logged_epochs, recipe, same, saved, train, write_folder
from PIL import Image
from test_loaders import CONFIG, WHOLE, opened, ramp, trained
from timm.data import Mixup
from timm.data.mixup import mixup_target
from timm.data.random_erasing import RandomErasing

import train_imagenet
from common import build, data, loaders, methods, settings
from common.errors import InputError

POLICIES = ("rand-m9-mstd0.5", "rand-m9-n3-mstd0.5-inc1", "original", "v0", "augmix-m3-w3", "3a")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Four updates an epoch."""
    return write_folder(tmp_path_factory.mktemp("images"), images=8)


# --------------------------------------------------------------------------------------------------
# One image


@pytest.mark.parametrize("policy", POLICIES)
def test_a_policys_draw_depends_on_seed_epoch_and_image_alone(policy):
    split = data.load("digits")["train"]
    transform, _ = loaders.transforms(CONFIG, **WHOLE, aa=policy)

    def look(seed, keys, noise=0):
        for begin in (random.seed, np.random.seed, torch.manual_seed):
            begin(noise)
        dataset = loaders.Images(split, transform, seed)
        return [example["image"] for example in dataset.__getitems__(keys)]

    keys = [(epoch, 0) for epoch in range(8)]
    first = look(0, keys)
    for other in (look(0, keys, noise=1), look(0, keys[::-1], noise=2)[::-1]):
        assert all(torch.equal(a, b) for a, b in zip(first, other))
    assert len({tuple(image.flatten().tolist()) for image in first}) > 1
    assert any(not torch.equal(a, b) for a, b in zip(first, look(1, keys)))


def test_the_programs_own_random_numbers_go_on_where_they_were():
    transform, _ = loaders.transforms(CONFIG, **WHOLE, aa=POLICIES[0])
    dataset = loaders.Images(data.load("digits")["train"], transform)
    expected = [
        random.getstate(),
        np.random.get_state()[1].tolist(),
        torch.get_rng_state().tolist(),
    ]
    dataset.__getitems__([(1, 0)])
    now = [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]
    assert now == expected


def test_vertical_flips_and_colours_are_as_asked():
    plain = trained(ramp(32, 32))
    assert torch.equal(trained(ramp(32, 32), vflip=1.0), plain.flip(1))
    random.seed(0), torch.manual_seed(0)
    jittered = trained(Image.new("RGB", (32, 32), (100, 100, 100)), color_jitter=0.5)
    assert not torch.equal(jittered, torch.full((3, 32, 32), 100.0))
    assert 50 <= jittered.mean() <= 150


def test_erasing_is_timms_where_the_models_input_is_normalised():
    torch.manual_seed(0)
    image = torch.randint(0, 256, (3, 40, 40), dtype=torch.uint8)
    mean, std = (
        torch.tensor(CONFIG["mean"]).view(3, 1, 1),
        torch.tensor(CONFIG["std"]).view(3, 1, 1),
    )
    for seed in range(5):
        random.seed(seed), torch.manual_seed(seed)
        ours = loaders.Erasing(1.0, CONFIG["mean"], CONFIG["std"])(image)
        random.seed(seed), torch.manual_seed(seed)
        theirs = RandomErasing(1.0, mode="pixel", device="cpu")((image / 255 - mean) / std)
        expected = ((theirs * std + mean) * 255).clamp(0, 255)
        assert ours.dtype == torch.uint8 and (ours - expected).abs().max() < 0.51
        erased = (ours != image).float().mean()
        assert 0.01 < erased < 0.4
    kept = loaders.Erasing(1e-9, CONFIG["mean"], CONFIG["std"])(image)
    assert torch.equal(kept, image)


def test_crops_and_flips_are_those_of_runs_before_there_were_policies():
    """Python's and torch's streams are begun as ever; NumPy's takes nothing out of them."""
    random.seed("3 (0, 5)")
    expected = [random.getrandbits(63), random.random()]
    with loaders._own_randomness() as begin_stream:
        begin_stream("3 (0, 5)")
        assert [torch.initial_seed(), random.random()] == expected


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--aa rand-m9 --color-jitter 0.4", "color_jitter has no effect beside aa rand-m9"),
        ("--aa rand-m9 --decoder torchcodec", "torchcodec does not go with --aa"),
        ("--color-jitter 0", "color_jitter is 0.0"),
        ("--reprob 2", "reprob is 2.0"),
        ("--vflip 2", "vflip is 2.0"),
        ("--mixup -1", "mixup is -1.0"),
        ("--cutmix -1", "cutmix is -1.0"),
    ],
)
def test_flags_that_make_no_sense_are_errors(tmp_path, flags, words):
    flags = [*flags.split(), "--output", str(tmp_path / "run")]
    with pytest.raises(InputError, match=words):
        settings.parse(train_imagenet.parser(), flags)


def test_colours_may_be_changed_beside_three_augment(tmp_path):
    flags = ["--aa", "3a", "--color-jitter", "0.3", "--output", str(tmp_path / "run")]
    assert settings.parse(train_imagenet.parser(), flags).aa == "3a"


@pytest.mark.parametrize("policy", ["random", "nonsense", "rand-x5-m9"])
def test_a_policy_that_timm_does_not_know_is_named(policy):
    with pytest.raises(InputError, match=f"timm does not understand --aa {policy}"):
        loaders.transforms(CONFIG, **WHOLE, aa=policy)


# --------------------------------------------------------------------------------------------------
# Pairs of images


def mixed(accelerator, images, *flags):
    """The batches of an epoch, mixed; without crops and flips."""
    still = ["--scale", "1", "1", "--ratio", "1.2", "1.2", "--hflip", "0"]
    return opened(accelerator, images, *still, *flags)[0].train


def all_of(batches, epoch=0, first=0):
    kept = list(batches(epoch, first))
    return [torch.cat([batch[key] for batch in kept]) for key in ("image", "label")]


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_micro_batches_are_mixed_as_timm_mixes_them(accelerator, images, kind):
    flags = ["--batch-size", "8", "--m", "4", "--smoothing", "0.2"]
    pixels, labels = all_of(mixed(accelerator, images, *flags))
    ours, soft = all_of(mixed(accelerator, images, *flags, f"--{kind}", "0.8"))
    mixup = Mixup(**{"mixup_alpha": 0.0, f"{kind}_alpha": 0.8}, label_smoothing=0.2, num_classes=2)
    for number, (x, y) in enumerate(zip(pixels.split(4), labels.split(4))):
        random.seed(f"0 mixup 0 {number}")
        np.random.seed(random.getrandbits(63) % 2**32)
        x, y = mixup(x.float(), y)
        torch.testing.assert_close(ours[4 * number :][:4], x)
        torch.testing.assert_close(soft[4 * number :][:4], y)
    torch.testing.assert_close(soft.sum(1), torch.ones(len(soft)))


def test_what_is_drawn_depends_on_seed_epoch_and_number(accelerator, images):
    flags = ["--batch-size", "4", "--m", "4", "--mixup", "0.5", "--cutmix", "0.5"]
    batches = mixed(accelerator, images, *flags)
    whole = all_of(batches)
    np.random.seed(5)
    for first in (1, 3):  # resumed inside the epoch
        rest = all_of(batches, first=first)
        assert all(torch.equal(a[4 * first :], b) for a, b in zip(whole, rest))
    assert not torch.equal(all_of(batches, epoch=1)[1], whole[1])
    other = all_of(mixed(accelerator, images, *flags, "--seed", "1"))
    assert not torch.equal(other[1], whole[1])


def test_no_seed_epoch_or_micro_batch_shares_its_draws_with_another(
    accelerator, images, monkeypatch
):
    """Seed 0's epoch 1 is not seed 1's epoch 0, say."""
    drawn = []

    def draw(pixels, labels):
        drawn.append(np.random.rand())
        return pixels, labels

    monkeypatch.setattr(loaders, "Mixup", lambda **_: draw)
    flags = ["--batch-size", "8", "--m", "2", "--mixup", "0.5"]
    for seed in range(3):
        batches = mixed(accelerator, images, *flags, "--seed", str(seed))
        for epoch in range(3):
            all_of(batches, epoch=epoch)
    assert len(set(drawn)) == len(drawn) == 9 * 8


def test_what_a_process_loads_at_once_changes_nothing(accelerator, images):
    flags = ["--batch-size", "8", "--m", "2", "--mixup", "0.5"]
    one = all_of(mixed(accelerator, images, *flags))
    two = all_of(mixed(accelerator, images, *flags, "--device-batch-size", "2"))
    assert all(torch.equal(a, b) for a, b in zip(one, two))


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("parts", [1, 2])
def test_processes_mix_their_batches_as_one_process_does(processes, parts):
    args = argparse.Namespace(m=2, mixup=0.5, cutmix=0.0, smoothing=0.1, seed=3)
    pixels, labels = torch.rand(16 * parts, 3, 4, 4), torch.randint(0, 2, (16 * parts,))

    def mixed_by(rank, count, first=0):
        images = pixels.clone()  # timm mixes in place
        batches = zip(images.split(2 * parts), labels.split(2 * parts))
        loaded = [{"image": x, "label": y} for x, y in batches][rank::count]
        process = argparse.Namespace(process_index=rank, num_processes=count)
        return list(loaders.mixed(args, process, lambda _, skip: loaded[skip:], 2)(1, first))

    whole = mixed_by(0, 1)
    assert not torch.equal(torch.cat([batch["image"] for batch in whole]), pixels)
    for rank in range(processes):
        for first in (0, 1):
            own, expected = mixed_by(rank, processes, first), whole[rank::processes][first:]
            assert len(own) == len(expected)
            assert all(same(batch, other) for batch, other in zip(own, expected))


@pytest.mark.parametrize("m", ["1", "3", "15"])
def test_an_odd_micro_batch_cannot_be_mixed(accelerator, images, m):
    with pytest.raises(InputError, match=f"in pairs, and m is {m}: choose an even --m"):
        mixed(accelerator, images, "--batch-size", "15", "--m", m, "--mixup", "0.5")


@pytest.mark.parametrize("loss", ["ce", "bce"])
def test_labels_are_smoothed_once(loss):
    """By the loss without mixup, by timm's Mixup with it: the same loss where nothing is mixed."""
    args = argparse.Namespace(loss=loss, smoothing=0.2)
    criterion, logits = build.build_criterion(args), torch.randn(6, 5)
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    soft = mixup_target(labels, 5, lam=1.0, smoothing=0.2)
    torch.testing.assert_close(criterion(logits, soft), criterion(logits, labels))
    target = 0.8 * F.one_hot(labels, 5) + 0.2 / 5
    by_hand = -(target * logits.log_softmax(-1)).sum(-1).mean()
    if loss == "bce":
        negative = (1 - target) * F.logsigmoid(-logits)
        by_hand = -(target * F.logsigmoid(logits) + negative).sum(-1).mean()
    torch.testing.assert_close(criterion(logits, soft), by_hand)


def test_obf_ascends_towards_the_mixed_targets():
    """u - alpha p - (1 - alpha) y, with p_y = <y, p>."""
    args = argparse.Namespace(gamma=0.5, lam=None, link="softmax")
    objective = methods.obf(args, None, None)
    torch.manual_seed(0)
    logits = (3 * torch.randn(4, 3)).double().requires_grad_()
    y = mixup_target(torch.tensor([0, 1, 2, 0]), 3, lam=0.7).double()
    (g,) = torch.autograd.grad(objective(lambda x: x, logits, y), logits)
    p = logits.detach().softmax(-1)
    alpha = 0.5 * ((1 - (1 / 3) / (y * p).sum(-1)) / (1 - 1 / 3)).clamp_min(0)[:, None]
    torch.testing.assert_close(4 * g, 1 / 3 - alpha * p - (1 - alpha) * y)


ALL = {
    "aa": "rand-m9-mstd0.5-inc1", "reprob": 0.5, "mixup": 0.4, "cutmix": 1.0, "vflip": 0.5,
    "smoothing": 0.1, "m": 2,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("method", ["base", "obf", "gsam"])
def test_a_mixed_run_has_no_training_accuracy_and_resumes_bit_for_bit(tmp_path, images, method):
    changes = {"method": method, "rho_min": None, "workers": 0, "epochs": 2, "loss": "bce"}
    changes |= {"rho": None} if method == "base" else {}
    path = recipe(tmp_path, images, **ALL, **changes)
    in_process(path, tmp_path / "run", "--checkpoint-hist", "9")
    assert [line["train"] for line in logged_epochs(tmp_path / "run")] == [None, None]
    shutil.copytree(tmp_path / "run", tmp_path / "resumed")
    for late in range(3, 9):
        shutil.rmtree(tmp_path / "resumed" / "checkpoints" / f"step-{late:08d}")
    in_process(path, tmp_path / "resumed", "--resume", "auto", "--checkpoint-hist", "9")
    assert same(saved(tmp_path / "run" / "last"), saved(tmp_path / "resumed" / "last"))


@pytest.mark.slow
def test_workers_draw_what_the_main_process_draws(tmp_path, images):
    for workers in (0, 2):
        train(
            train_imagenet, tmp_path, dataset=images, workers=workers, **ALL,
            output=str(tmp_path / str(workers)),
        )  # fmt: skip
    assert same(saved(tmp_path / "0" / "last"), saved(tmp_path / "2" / "last"))
