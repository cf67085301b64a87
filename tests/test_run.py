"""A whole run: what it does with its epochs and processes, what it saves, tracks and uploads."""

import itertools
import json
import os
import shutil
import subprocess
import sys

import accelerate.tracking
import huggingface_hub
import pytest
import torch
import yaml
from accelerate.tracking import GeneralTracker, on_main_process
from accelerate.utils import LoggerType
from helpers import (
    ROOT,
    TORCHRUN,
    logged_epochs,
    make_job,
    run_script,
    same,
    saved,
    small_recipe,
    train,
    write_folder,
)
from safetensors.torch import load_file

import train_imagenet
from common import checkpoints, loop, report, run, settings
from common.errors import InputError


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """What two_processes.py wrote, by process, and the run's folder."""
    folder = tmp_path_factory.mktemp("two")
    # Of 14 images, two processes evaluate four at a time.
    images = write_folder(folder / "images", images=7)
    flags = [*small_recipe(folder, images), *"--epochs 2 --scale 0.2 1 --method random".split()]
    flags += "--model-ema --model-ema-decay 0.5".split()
    program = str(ROOT / "tests" / "two_processes.py")
    command = [*TORCHRUN, "2", program, str(folder), *flags]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [load_file(folder / f"{rank}.safetensors") for rank in range(2)], folder / "run"


@pytest.mark.slow
def test_each_process_draws_noise_of_its_own(processes):
    (one, two), _ = processes
    assert not torch.isclose(one["noise"], two["noise"]).any()


@pytest.mark.slow
@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("weights", ["", " average"])
def test_batch_norm_is_the_mean_over_processes_before_it_is_evaluated(processes, weights, epoch):
    (one, two), _ = processes
    own = [process[f"own{weights} {epoch}"] for process in (one, two)]
    assert not torch.allclose(*own)
    for process in (one, two):
        torch.testing.assert_close(process[f"evaluated{weights} {epoch}"], (own[0] + own[1]) / 2)


@pytest.mark.slow
def test_training_accuracy_is_that_of_all_processes_images(processes):
    (one, two), run = processes
    lines = logged_epochs(run)
    right = [[int(process[f"right {epoch}"]) for process in (one, two)] for epoch in (0, 1)]
    assert any(first != second for first, second in right)
    assert [12 * line["train"] for line in lines] == [sum(both) for both in right]


@pytest.mark.slow
def test_two_processes_evaluate_every_image_once(processes):
    assert [process["examples"].item() for process in processes[0]] == [14, 14]


SCRIPTED = [0.2, 0.5, 0.5, 0.4]  # top-1 on validation after each epoch


@pytest.fixture(scope="module")
def scripted(tmp_path_factory):
    """A finished run of four epochs with ``SCRIPTED`` accuracies, and what it evaluated last."""
    folder = tmp_path_factory.mktemp("scripted")
    images = write_folder(folder / "images", splits=("train", "val", "test"), images=4)
    told, finally_seen = iter(SCRIPTED), []

    def evaluate_top1(job, loader):
        model = job.accelerator.unwrap_model(job.model)
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        accuracy = next(told, None)
        if accuracy is None:
            finally_seen.append(weights)
            for p in job.model.parameters():  # whatever is in memory now, what is saved counts
                p.data.add_(1.0)
            return {"top1": 0.25, "examples": 8}
        return {"top1": accuracy, "examples": 8}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "evaluate_top1", evaluate_top1)
        flags = [
            *small_recipe(folder, images),
            *"--epochs 4 --save-interval 2 --head-bias -3 --lr 0.1".split(),
        ]  # fmt: skip
        train_imagenet.main([*flags, "--method", "base"])
    return folder / "run", finally_seen


def test_epochs_are_kept_by_their_number_from_one(scripted):
    run, _ = scripted
    assert sorted(path.name for path in (run / "epochs").iterdir()) == ["0002", "0004"]


def test_last_is_the_last_epoch_and_best_the_first_of_the_best(scripted):
    run, _ = scripted
    assert same(saved(run / "last"), saved(run / "epochs" / "0004"))
    # Not the third, as good, nor the fourth, worse.
    assert same(saved(run / "best"), saved(run / "epochs" / "0002"))
    assert not same(saved(run / "best"), saved(run / "last"))


def test_the_final_evaluation_is_of_the_models_that_were_saved(scripted):
    run, seen = scripted
    expected = [saved(run / "last")] * 2 + [saved(run / "best")] * 2  # on validation and test
    assert len(seen) == 4
    # Each evaluation spoils the weights in memory: only the first split of a model sees them whole.
    assert same(seen[0], expected[0]) and same(seen[2], expected[2])


def test_metrics_have_one_line_for_each_epoch_with_its_accuracy(scripted):
    run, _ = scripted
    lines = logged_epochs(run)
    assert [(line["epoch"], line["validation"]) for line in lines] == list(enumerate(SCRIPTED, 1))


def test_metrics_have_what_the_epoch_trained_with_and_how_well(tmp_path, monkeypatch):
    images, seen = write_folder(tmp_path / "images", images=5), []
    update = loop.update

    def recorded(job, batches, perturb):
        before = job.right.item()
        loss = update(job, batches, perturb)
        lr = job.optimizer.param_groups[0]["lr"]
        seen.append((loss.item(), job.right.item() - before, lr))
        return loss

    monkeypatch.setattr(loop, "update", recorded)
    recipe = {
        "epochs": 3, "warmup_epochs": 1, "method": "sam", "rho": 0.3, "rho_min": 0.1, "lr": 0.01,
        "min_lr": 0.001,
    }  # fmt: skip
    train_imagenet.main(small_recipe(tmp_path, images, **recipe))
    lines = logged_epochs(tmp_path / "run")
    updates = len(seen) // 3
    assert updates > 1
    for i, line in enumerate(lines):
        losses, right, lrs = zip(*seen[i * updates : (i + 1) * updates])
        assert line["loss"] == pytest.approx(sum(losses) / updates)
        assert line["train"] == sum(right) / (4 * updates)
        assert line["rho"] == pytest.approx(0.1 + 0.2 * (line["lr"] - 0.001) / 0.009)
        assert line["epoch"] == i + 1 and line["lr"] == lrs[-1] and line["seconds"] > 0
    assert lines[1]["lr"] > lines[2]["lr"] > 0.001
    assert all((tmp_path / "run" / f"curves.{ending}").exists() for ending in ("png", "svg"))


def test_metrics_have_the_mean_loss_of_each_epoch_and_the_last_epoch_is_kept_too(
    tmp_path, monkeypatch
):
    images = write_folder(tmp_path / "images", images=4)  # two updates an epoch
    losses, modes, own = [], [], loop.update

    def update(job, *args, **options):
        modes.append(job.model.training)
        losses.append(own(job, *args, **options).item())
        return torch.tensor(losses[-1])

    monkeypatch.setattr(loop, "update", update)
    train_imagenet.main(small_recipe(tmp_path, images, epochs=3, save_interval=2))
    lines = logged_epochs(tmp_path / "run")
    expected = [sum(losses[start : start + 2]) / 2 for start in (0, 2, 4)]
    assert [line["loss"] for line in lines] == pytest.approx(expected) and len(losses) == 6
    assert all(modes)  # after an evaluation too
    assert sorted(path.name for path in (tmp_path / "run" / "epochs").iterdir()) == ["0002", "0003"]


@pytest.mark.slow
def test_epochs_between_validations_and_the_last_one_are_validated_and_the_weights_are_the_same(
    tmp_path,
):
    images, outputs = write_folder(tmp_path / "images", images=4), {}
    for interval in (1, 2, 9):
        outputs[interval] = tmp_path / str(interval)
        output = str(outputs[interval])
        train_imagenet.main(
            small_recipe(tmp_path, images, epochs=5, val_interval=interval, output=output)
        )
    rows = {
        key: [row["validation"] for row in report.read_metrics(output)]
        for key, output in outputs.items()
    }
    every = rows[1]
    assert rows[2] == [None, every[1], None, every[3], every[4]]
    assert rows[9] == [None, None, None, None, every[4]]
    for interval in (2, 9):
        assert same(saved(outputs[1] / "last"), saved(outputs[interval] / "last"))
        assert (outputs[interval] / "best").exists() and (outputs[interval] / "curves.png").exists()


def test_each_epoch_sees_the_images_in_an_order_and_crops_of_its_own(tmp_path, monkeypatch):
    images = write_folder(tmp_path / "images", images=8)
    seen, forward_backward = [], loop.forward_backward

    def recorded(job, batch, *args, **options):
        seen.append((batch["image"].sum((1, 2, 3)).tolist(), batch["label"].tolist()))
        return forward_backward(job, batch, *args, **options)

    monkeypatch.setattr(loop, "forward_backward", recorded)
    train_imagenet.main(small_recipe(tmp_path, images, epochs=3))
    epochs = [[list(itertools.chain(*parts)) for parts in zip(*seen[i : i + 4])] for i in (0, 4, 8)]
    for i, (pixels, labels) in enumerate(epochs):
        assert sorted(labels) == [0] * 8 + [1] * 8
        assert all(not set(pixels) & set(other) and labels != order for other, order in epochs[:i])


def test_without_validation_images_last_is_saved_and_there_is_no_best(tmp_path):
    images = write_folder(tmp_path / "images", splits=("train", "test"), images=4)
    train_imagenet.main(small_recipe(tmp_path, images, epochs=2, save_interval=1))
    assert same(saved(tmp_path / "run" / "last"), saved(tmp_path / "run" / "epochs" / "0002"))
    assert not same(saved(tmp_path / "run" / "last"), saved(tmp_path / "run" / "epochs" / "0001"))
    assert not (tmp_path / "run" / "best").exists()
    assert set(json.loads((tmp_path / "run" / "results.json").read_text())) == {"last"}


def test_last_and_best_are_the_epochs_that_they_say(tmp_path, accelerator, monkeypatch):
    """Epochs 2 and 3 are equally good: the earlier one is the best."""
    dataset = write_folder(tmp_path / "images")
    top1 = iter([0.5, 0.9, 0.9, 0.7, 0.11, 0.22])  # of four epochs, then of the saved models
    monkeypatch.setattr(run, "evaluate_top1", lambda *_: {"top1": next(top1), "examples": 6})
    returned = train_imagenet.main(small_recipe(tmp_path, dataset, epochs=4, save_interval=1))
    weights = {
        file.parent.name: file.read_bytes()
        for file in (tmp_path / "run").rglob("*/model.safetensors")
    }
    assert weights["best"] == weights["0002"] and weights["last"] == weights["0004"]
    assert len({weights[name] for name in ("0001", "0002", "0003", "0004")}) == 4
    saved = json.loads((tmp_path / "run" / "results.json").read_text())
    assert saved == {"last": {"validation": 0.11}, "best": {"validation": 0.22}}
    assert returned == saved["last"]


@pytest.mark.parametrize("size", [1, 5, 7, 10])
@pytest.mark.parametrize("classes", [4, 1000])
def test_top1_counts_every_example_once(accelerator, size, classes):
    torch.manual_seed(size)
    logits, labels = torch.randn(size, classes), torch.randint(0, classes, (size,))
    for number in range(size):  # every second one is right, the others wrong by 256 if that can be
        logits[number, (labels[number] + number % 2 * min(256, classes - 1)) % classes] += 10
    examples = [{"image": row, "label": label} for row, label in zip(logits, labels)]
    loader = accelerator.prepare(torch.utils.data.DataLoader(examples, batch_size=3))
    model = torch.nn.Identity()
    result = run.evaluate_top1(make_job(accelerator, model, None), loader)
    assert result["examples"] == size and not model.training
    assert result["top1"] == pytest.approx(
        sum(row.argmax() == label for row, label in zip(logits, labels)).item() / size
    )


OPENED_ELSEWHERE = """
import sys, timm, torch
from common import dry_run, data, loaders
from timm.data import create_transform, resolve_data_config
model = timm.create_model("local-dir:" + sys.argv[1], pretrained=True).eval()
model = model.to(memory_format=torch.channels_last)  # as in training: others round otherwise
transform = create_transform(**resolve_data_config({}, model=model))
images = loaders.Images(data.load("digits")["test"], transform)
loader = torch.utils.data.DataLoader(images, 100)
with torch.no_grad():
    pairs = [(model(batch["image"]).argmax(-1), batch["label"]) for batch in loader]
right = sum((predicted == labels).sum().item() for predicted, labels in pairs)
print(right / 697)
"""


@pytest.mark.slow
def test_digits_run_leaves_a_checkpoint_that_another_process_opens_with_the_same_accuracy(tmp_path):
    flags = [
        *"--recipe recipes/digits.yaml --epochs 4 --warmup-epochs 1 --output".split(),
        str(tmp_path / "run"),
    ]  # fmt: skip
    done = run_script(*flags)
    assert done.returncode == 0, done.stderr
    assert "epoch 1/4:" in done.stderr and "epoch 2/4, best " in done.stderr
    assert all(f" {key} " in done.stderr for key in ("loss", "lr", "rho", "images/s", "validation"))
    saved = json.loads((tmp_path / "run" / "results.json").read_text())
    assert list(saved) == ["last", "best"]
    results = saved["best"]
    assert list(saved["last"]) == list(results)
    assert list(results) == "validation test recoloured rotated sketch occluded noisy".split()
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["split", "images", "last", "best"] in lines
    for split, top1 in results.items():
        assert any(
            line[:1] == [split] and line[2:] == [f"{saved['last'][split]:.2%}", f"{top1:.2%}"]
            for line in lines
        )
    assert results["test"] > 0.5  # four epochs, ten classes
    epochs = logged_epochs(tmp_path / "run")
    assert [line["epoch"] for line in epochs] == [1, 2, 3, 4]
    assert all(f"loss {line['loss']:.3f}, " in done.stderr for line in epochs)  # an epoch's mean
    assert results["validation"] == max(line["validation"] for line in epochs)
    assert saved["last"]["validation"] == epochs[-1]["validation"]
    assert yaml.safe_load((tmp_path / "run" / "settings.yaml").read_text())["gamma"] == 1.0

    best = tmp_path / "run" / "best"
    assert sorted(file.name for file in best.iterdir()) == ["config.json", "model.safetensors"]
    opened = subprocess.run(
        [sys.executable, "-c", OPENED_ELSEWHERE, str(best)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    assert float(opened.stdout) == results["test"], opened.stderr


@pytest.mark.parametrize("method", settings.METHODS)
def test_every_method_trains_on_a_folder(tmp_path, method, accelerator):
    dataset = write_folder(tmp_path / "images", images=5)
    options = {
        "method": method, "device_batch_size": 4, "batch_size": 8, "clip_grad": 1.0,
        "loss": "bce", "smoothing": 0.1,
    }  # fmt: skip
    argv = small_recipe(tmp_path, dataset, epochs=2, opt="adamw", weight_decay=0.1, **options)
    assert set(train_imagenet.main(argv)) == {"validation"}
    assert (tmp_path / "run" / "last" / "model.safetensors").is_file()


@pytest.mark.slow
def test_the_same_seed_gives_the_same_run_and_another_seed_another(tmp_path, accelerator):
    dataset = write_folder(tmp_path / "images", images=8)
    weights = []
    for seed in (0, 0, 1):
        argv = small_recipe(tmp_path, dataset, method="random", workers=2, seed=seed)
        train_imagenet.main([*argv, "--overwrite"])
        weights.append((tmp_path / "run" / "best" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


@pytest.mark.parametrize("batch_size, said", [(5, True), (4, False)])
def test_images_that_fill_no_update_are_said(tmp_path, accelerator, capsys, batch_size, said):
    dataset = write_folder(tmp_path / "images", images=8)
    size = sum(path.is_file() for path in (dataset / "train").rglob("*"))
    assert (size % batch_size > 0) == said
    train_imagenet.main(small_recipe(tmp_path, dataset, batch_size=batch_size, m=batch_size))
    line = f"an epoch leaves out {size % batch_size} of {size} training images"
    assert (line in capsys.readouterr().out) == said


def test_m_that_was_not_given_is_said_and_written_into_the_settings(tmp_path, accelerator, capsys):
    dataset = write_folder(tmp_path / "images")
    train_imagenet.main(small_recipe(tmp_path, dataset, m=None, batch_size=6, device_batch_size=3))
    assert "m is 3, what the process loads at once" in capsys.readouterr().out
    assert yaml.safe_load((tmp_path / "run" / "settings.yaml").read_text())["m"] == 3


def test_what_is_as_usual_is_not_said_and_the_last_line_names_the_folder(
    tmp_path, accelerator, capsys
):
    dataset = write_folder(tmp_path / "images", images=4)
    train_imagenet.main(small_recipe(tmp_path, dataset, m=None, batch_size=4))
    printed = capsys.readouterr().out
    assert "m is" not in printed and "memory format" not in printed
    assert printed.splitlines()[-1].startswith(f"written: {tmp_path / 'run'}/")


def test_streamed_folder_trains_and_evaluates_every_validation_image(tmp_path, images):
    changes = {
        "dataset": str(images), "model": "test_resnet", "streaming": True, "train_num_samples": 6,
    }  # fmt: skip
    results = train(train_imagenet, tmp_path, **changes)
    assert list(results) == ["validation"]
    first = (tmp_path / "run" / "best" / "model.safetensors").read_bytes()
    train(train_imagenet, tmp_path, "--overwrite", **changes)
    assert (tmp_path / "run" / "best" / "model.safetensors").read_bytes() == first


def test_stream_of_unknown_length_asks_for_it(tmp_path):
    images = write_folder(tmp_path / "images")
    with pytest.raises(InputError, match="give --train-num-samples"):
        train(train_imagenet, tmp_path, dataset=str(images), model="test_resnet", streaming=True)


def test_tracker_receives_settings_and_values(tmp_path, images, monkeypatch):
    class Memory(GeneralTracker):
        name, requires_logging_directory, config, values = "memory", False, {}, {}
        tracker = None

        @on_main_process
        def __init__(self, run_name, **kwargs):
            super().__init__()

        @on_main_process
        def store_init_configuration(self, values):
            self.config.update(values)

        @on_main_process
        def log(self, values, step=None, **kwargs):
            self.values.update(values)

    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", Memory)
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [LoggerType.TENSORBOARD])
    results = train(
        train_imagenet, tmp_path, dataset=str(images), model="test_resnet", log_with="tensorboard"
    )
    assert Memory.config["lr"] == 0.01 and Memory.config["method"] == "obf"
    top1 = results["validation"]
    assert Memory.values["last/validation"] == Memory.values["best/validation"] == top1
    assert Memory.values["validation/top1"] == top1
    assert {"train/loss", "train/lr", "train/rho"} <= set(Memory.values)


def test_upload_holds_model_and_card_with_settings_and_accuracies(tmp_path, images, monkeypatch):
    uploaded = {}

    def upload_folder(self, *, repo_id, folder_path, **kwargs):
        shutil.copytree(folder_path, tmp_path / "uploaded")
        uploaded["repo"] = repo_id

    def create_repo(*args, **kwargs):
        return huggingface_hub.RepoUrl("https://huggingface.co/me/model")

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")
    monkeypatch.setattr(huggingface_hub, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "file_exists", lambda *args, **kwargs: False)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    results = train(
        train_imagenet, tmp_path, dataset=str(images), model="test_resnet", push_to_hub="me/model"
    )
    assert uploaded["repo"] == "me/model"
    assert {file.name for file in (tmp_path / "uploaded").iterdir()} == {
        "config.json",
        "model.safetensors",
        "README.md",
    }
    card = (tmp_path / "uploaded" / "README.md").read_text()
    assert f"validation: {results['validation']:.2%}" in card
    assert "rho: 0.05" in card and "--method obf" in card and "hf-hub:me/model" in card
    config = json.loads((tmp_path / "uploaded" / "config.json").read_text())
    assert config["label_names"] == ["cat", "dog"]
    weights = load_file(tmp_path / "run" / "last" / "model.safetensors")
    assert all(
        torch.equal(t, weights[n])
        for n, t in load_file(tmp_path / "uploaded/model.safetensors").items()
    )


@pytest.mark.parametrize(
    "token, error, words",
    [
        (None, None, "needs a login: run `hf auth login`"),
        ("t", OSError("403 Forbidden"), "cannot write .* 403"),
    ],
)
def test_upload_that_cannot_work_ends_before_training(
    tmp_path, images, monkeypatch, token, error, words
):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
    monkeypatch.setattr(huggingface_hub, "create_repo", fail)
    with pytest.raises(InputError, match=words):
        train(
            train_imagenet, tmp_path, dataset=str(images), model="test_resnet",
            push_to_hub="me/model",
        )  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_upload_that_fails_at_the_end_says_what_was_saved(tmp_path, images, monkeypatch):
    monkeypatch.setattr(checkpoints, "check_hub", lambda repo: None)
    monkeypatch.setattr(checkpoints, "push_to_hf_hub", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(
        InputError, match=r"cannot upload .*run/last to the Hub's me/model, but all is saved"
    ):
        train(
            train_imagenet, tmp_path, dataset=str(images), model="test_resnet",
            push_to_hub="me/model",
        )  # fmt: skip
    assert (tmp_path / "run" / "results.json").exists()
