"""Fine-tuning from a checkpoint, and what a run can be asked to do besides: stream, try dry, track, upload."""

import json
import re
import shutil

import accelerate.tracking
import huggingface_hub
import pytest
import timm
import torch
import yaml
from accelerate.state import AcceleratorState, PartialState
from accelerate.tracking import GeneralTracker, on_main_process
from accelerate.utils import LoggerType
from safetensors.torch import load_file
from test_data import write_cifar100, write_folder
from timm.models import save_for_hf

import finetune_cifar
import train_imagenet
from common import build, checkpoints
from common.settings import InputError

SMALL = {"img_size": 32, "crop_pct": 1.0, "epochs": 1, "batch_size": 4, "m": 2, "workers": 0, "lr": 0.01}


def train(script, tmp_path, *flags, **settings):
    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**SMALL, "output": str(tmp_path / "run"), **settings}))
    return script.main(["--recipe", str(path), *flags])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "run" / "best"
    torch.manual_seed(7)  # not that of the runs
    save_for_hf(timm.create_model("test_resnet", num_classes=2), folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("images"))


# ----------------------------------------------------------------------------------------------------------------------


def test_fine_tuning_starts_from_the_checkpoint_with_a_new_head(tmp_path, checkpoint, images):
    """As many classes as before: the old head would fit, and must not be used."""
    train(finetune_cifar, tmp_path, dataset=str(images), model=str(checkpoint), method="base", lr=0.0)
    before, after = load_file(checkpoint / "model.safetensors"), load_file(tmp_path / "run/best/model.safetensors")
    for name, tensor in before.items():
        if "running" in name or "num_batches" in name:
            continue
        same = torch.equal(tensor, after[name])
        assert same == (not name.startswith("fc.")), name
    torch.manual_seed(99)  # the new head depends on the run's seed alone
    train(finetune_cifar, tmp_path, "--overwrite", dataset=str(images), model=str(checkpoint), method="base", lr=0.0)
    assert torch.equal(load_file(tmp_path / "run/best/model.safetensors")["fc.weight"], after["fc.weight"])


def test_fine_tuning_holds_out_and_streams_as_asked(tmp_path, checkpoint, images):
    whole = write_folder(tmp_path / "images", splits=("",), images=8)
    changes = {"model": str(checkpoint), "dataset": str(whole), "validation_share": 0.25}
    assert train(finetune_cifar, tmp_path, "--dry-run", **changes) is None
    with pytest.raises(InputError, match="give --train-num-samples"):
        train(finetune_cifar, tmp_path, "--dry-run", model=str(checkpoint), dataset=str(images), streaming=True)


def test_fine_tuning_on_a_local_copy_of_cifar_reports_the_last_epoch_on_test(tmp_path, checkpoint):
    cifar = write_cifar100(tmp_path) / "cifar100"
    results = train(finetune_cifar, tmp_path, dataset=str(cifar), model=str(checkpoint), epochs=3, loss="bce")
    assert list(results) == ["test"]
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == {"last": results}
    assert not (tmp_path / "run" / "best").exists()
    last = timm.create_model(f"local-dir:{tmp_path / 'run' / 'last'}", pretrained=True)
    assert last.num_classes == 100
    epochs = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert results["test"] == epochs[-1]["test"] and len(epochs) == 3


def test_pretrained_weights_of_timm_are_asked_for(tmp_path, images, monkeypatch):
    asked = []
    create_model = timm.create_model

    def create(name, pretrained=False, **kwargs):
        asked.append((name, pretrained))
        return create_model("test_resnet", **kwargs)

    monkeypatch.setattr(timm, "create_model", create)
    for model in ("resnet18.a1_in1k", "hf-hub:somebody/model"):
        train(finetune_cifar, tmp_path, "--dry-run", dataset=str(images), model=model, img_size=None)
    assert asked == [("resnet18.a1_in1k", True), ("hf-hub:somebody/model", True)]


def test_img_size_suffices_for_a_model_that_is_made_for_one_size(tmp_path, images):
    """Trained at 64 pixels, fine-tuned at 96, opened elsewhere at that."""
    first = train(train_imagenet, tmp_path, dataset=str(images), model="test_vit", img_size=64)
    model = str(tmp_path / "run" / "last")
    output = str(tmp_path / "tuned")
    assert first and train(finetune_cifar, tmp_path, dataset=str(images), model=model, img_size=96, output=output)
    for folder, size in (("run", 64), ("tuned", 96)):
        opened = timm.create_model(f"local-dir:{tmp_path / folder / 'last'}", pretrained=True)
        assert opened.patch_embed.img_size == (size, size)
        assert opened.pretrained_cfg["input_size"] == (3, size, size)


@pytest.mark.parametrize("flag", ["--channels-last", "--no-channels-last"])
@pytest.mark.parametrize("script", [train_imagenet, finetune_cifar])
def test_model_and_input_have_the_memory_format(tmp_path, checkpoint, images, monkeypatch, capsys, script, flag):
    jobs = []
    monkeypatch.setattr(script, "dry_run", jobs.append)
    model = str(checkpoint) if script is finetune_cifar else "test_resnet"
    train(script, tmp_path, flag, "--dry-run", dataset=str(images), model=model, method="base")
    layout = torch.channels_last if flag == "--channels-last" else torch.contiguous_format
    shown = jobs[0].batches.to_input(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    for tensor in (shown, *(p for p in jobs[0].model.parameters() if p.shape[1:].numel() > p.shape[1:2].numel())):
        assert tensor.is_contiguous(memory_format=layout)
    assert jobs[0].args.channels_last == (flag == "--channels-last")
    name = "channels_last" if flag == "--channels-last" else "contiguous"
    assert f"memory format: {name}\n" in capsys.readouterr().out


def damage(folder, file, content):
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content((folder / file).read_bytes()))


@pytest.mark.parametrize(
    "file, content, words",
    [
        ("model.safetensors", lambda whole: whole[:-100], "cannot load the model .*best"),
        ("model.safetensors", None, r"has no model\.safetensors, so it is no model in timm's layout"),
        ("config.json", None, r"has no config\.json"),
        ("config.json", lambda whole: whole[:50], "cannot load the model"),
        ("config.json", lambda whole: whole.replace(b"test_resnet", b"no_such_net"), "cannot load the model"),
        ("config.json", lambda whole: whole.replace(b"test_resnet", b"test_vit"), "cannot load the model"),
    ],
)
def test_damaged_checkpoint_is_one_clear_error(tmp_path, checkpoint, images, file, content, words):
    copy = shutil.copytree(checkpoint, tmp_path / "run" / "best")
    damage(copy, file, content)
    with pytest.raises(InputError, match=words):
        train(finetune_cifar, tmp_path, dataset=str(images), model=str(copy), output=str(tmp_path / "new"))


@pytest.mark.parametrize(
    "model, words",
    [("nowhere/best", "no folder 'nowhere/best', and timm has no pretrained"), ("resnet51", "no pretrained model")],
)
def test_model_that_does_not_exist(tmp_path, images, model, words):
    with pytest.raises(InputError, match=words):
        train(finetune_cifar, tmp_path, dataset=str(images), model=model)


def test_folder_of_the_run_instead_of_its_best_model(tmp_path, checkpoint, images):
    with pytest.raises(InputError, match=r"did you mean .*run/best"):
        train(finetune_cifar, tmp_path, dataset=str(images), model=str(checkpoint.parent))


# ----------------------------------------------------------------------------------------------------------------------


def test_streamed_folder_trains_and_evaluates_every_validation_image(tmp_path, images):
    changes = {"dataset": str(images), "model": "test_resnet", "streaming": True, "train_num_samples": 6}
    results = train(train_imagenet, tmp_path, **changes)
    assert list(results) == ["validation"]
    first = (tmp_path / "run" / "best" / "model.safetensors").read_bytes()
    train(train_imagenet, tmp_path, "--overwrite", **changes)
    assert (tmp_path / "run" / "best" / "model.safetensors").read_bytes() == first


def test_stream_of_unknown_length_asks_for_it(tmp_path):
    images = write_folder(tmp_path / "images")
    with pytest.raises(InputError, match="give --train-num-samples"):
        train(train_imagenet, tmp_path, dataset=str(images), model="test_resnet", streaming=True)


def test_dry_run_reports_and_writes_nothing(tmp_path, images, capsys):
    assert train(train_imagenet, tmp_path, "--dry-run", dataset=str(images), model="test_resnet") is None
    printed = capsys.readouterr().out
    assert "4 examples per update: 1 process x 1 loader batch x micro-batches of 2" in printed
    assert re.search(r"^1 epoch of 1 update of [\d.]+ seconds: about [\d.]+ seconds, and", printed, re.MULTILINE)
    assert "GiB on cpu" in printed and "nothing was written" in printed
    assert not (tmp_path / "run").exists()


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
    results = train(train_imagenet, tmp_path, dataset=str(images), model="test_resnet", log_with="tensorboard")
    assert Memory.config["lr"] == 0.01 and Memory.config["method"] == "obf"
    top1 = results["validation"]
    assert Memory.values["last/validation"] == Memory.values["best/validation"] == top1
    assert Memory.values["validation/top1"] == top1
    assert {"train/loss", "train/lr", "train/rho"} <= set(Memory.values)


def test_missing_tracker_package_is_named(tmp_path, images, monkeypatch):
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [])
    with pytest.raises(InputError, match="--log-with wandb needs its package: pip install wandb"):
        train(train_imagenet, tmp_path, dataset=str(images), model="test_resnet", log_with="wandb")
    assert not (tmp_path / "run").exists()


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
    results = train(train_imagenet, tmp_path, dataset=str(images), model="test_resnet", push_to_hub="me/model")
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
    assert all(torch.equal(t, weights[n]) for n, t in load_file(tmp_path / "uploaded/model.safetensors").items())


@pytest.mark.parametrize(
    "token, error, words",
    [(None, None, "needs a login: run `hf auth login`"), ("t", OSError("403 Forbidden"), "cannot write .* 403")],
)
def test_upload_that_cannot_work_ends_before_training(tmp_path, images, monkeypatch, token, error, words):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
    monkeypatch.setattr(huggingface_hub, "create_repo", fail)
    with pytest.raises(InputError, match=words):
        train(train_imagenet, tmp_path, dataset=str(images), model="test_resnet", push_to_hub="me/model")
    assert not (tmp_path / "run").exists()


def test_upload_that_fails_at_the_end_says_what_was_saved(tmp_path, images, monkeypatch):
    monkeypatch.setattr(checkpoints, "check_hub", lambda repo: None)
    monkeypatch.setattr(checkpoints, "push_to_hf_hub", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(InputError, match=r"cannot upload .*run/last to the Hub's me/model, but all is saved"):
        train(train_imagenet, tmp_path, dataset=str(images), model="test_resnet", push_to_hub="me/model")
    assert (tmp_path / "run" / "results.json").exists()


def test_fsdp_that_saves_what_needs_unpickling_is_refused(monkeypatch):
    plugin = type("Plugin", (), {"fsdp_version": 2, "state_dict_type": "SHARDED_STATE_DICT"})
    state = type("State", (), {"fsdp_plugin": plugin})
    fake = type("Fake", (), {"state": state, "device": torch.device("cpu")})
    monkeypatch.setattr(build, "Accelerator", lambda **kwargs: fake)
    with pytest.raises(InputError, match="fsdp_state_dict_type: FULL_STATE_DICT"):
        build.build_accelerator(type("Args", (), {"log_with": None, "output": None, "torchcompile": None}))
