"""Fine-tuning: from which weights it starts, and what it says of those that it cannot use."""

import json
import shutil

import pytest
import timm
import torch
from helpers import train, write_cifar100, write_folder
from safetensors.torch import load_file, save_file
from timm.models import is_model_pretrained

import finetune_cifar
import train_imagenet
from common.errors import InputError


def test_fine_tuning_starts_from_the_checkpoint_with_a_new_head(tmp_path, checkpoint, images):
    """As many classes as before: the old head would fit, and must not be used."""
    train(
        finetune_cifar, tmp_path, dataset=str(images), model=str(checkpoint), method="base", lr=0.0
    )
    before, after = (
        load_file(checkpoint / "model.safetensors"),
        load_file(tmp_path / "run/best/model.safetensors"),
    )
    for name, tensor in before.items():
        if "running" in name or "num_batches" in name:
            continue
        same = torch.equal(tensor, after[name])
        assert same == (not name.startswith("fc.")), name
    torch.manual_seed(99)  # the new head depends on the run's seed alone
    train(
        finetune_cifar, tmp_path, "--overwrite", dataset=str(images), model=str(checkpoint),
        method="base", lr=0.0,
    )  # fmt: skip
    assert torch.equal(
        load_file(tmp_path / "run/best/model.safetensors")["fc.weight"], after["fc.weight"]
    )


def test_fine_tuning_holds_out_and_streams_as_asked(tmp_path, checkpoint, images):
    whole = write_folder(tmp_path / "images", splits=("",), images=8)
    changes = {"model": str(checkpoint), "dataset": str(whole), "validation_share": 0.25}
    assert train(finetune_cifar, tmp_path, "--dry-run", **changes) is None
    with pytest.raises(InputError, match="give --train-num-samples"):
        train(
            finetune_cifar, tmp_path, "--dry-run", model=str(checkpoint), dataset=str(images),
            streaming=True,
        )  # fmt: skip


def test_fine_tuning_on_a_local_copy_of_cifar_reports_the_last_epoch_on_test(tmp_path, checkpoint):
    cifar = write_cifar100(tmp_path) / "cifar100"
    results = train(
        finetune_cifar, tmp_path, dataset=str(cifar), model=str(checkpoint), epochs=3, loss="bce"
    )
    assert list(results) == ["test"]
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == {"last": results}
    assert not (tmp_path / "run" / "best").exists()
    last = timm.create_model(f"local-dir:{tmp_path / 'run' / 'last'}", pretrained=True)
    assert last.num_classes == 100
    epochs = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert results["test"] == epochs[-1]["test"] and len(epochs) == 3


def test_pretrained_weights_of_timm_are_asked_for(tmp_path, images, monkeypatch):
    asked = []
    create_model = timm.create_model

    def create(name, pretrained=False, **kwargs):
        asked.append((name, pretrained))
        return create_model("test_resnet", **kwargs)

    monkeypatch.setattr(timm, "create_model", create)
    for model in ("resnet18.a1_in1k", "hf-hub:somebody/model"):
        train(
            finetune_cifar, tmp_path, "--dry-run", dataset=str(images), model=model, img_size=None
        )
    assert asked == [("resnet18.a1_in1k", True), ("hf-hub:somebody/model", True)]


def test_which_weights_a_name_without_a_tag_stands_for_is_said(
    tmp_path, images, monkeypatch, capsys
):
    create_model = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **_: create_model(name))
    changes = {"dataset": str(images), "img_size": None, "method": "base"}
    for name, said in (("test_resnet", True), ("test_resnet.r160_in1k", False)):
        train(finetune_cifar, tmp_path, "--dry-run", model=name, **changes)
        line = "--model test_resnet: fine-tunes timm's test_resnet.r160_in1k"
        assert (line in capsys.readouterr().out) == said


@pytest.mark.parametrize("source", ["folder", "file"])
def test_img_size_suffices_for_a_model_that_is_made_for_one_size(tmp_path, images, source):
    """Trained at 64 pixels, fine-tuned at 96, opened elsewhere at that."""
    first = train(train_imagenet, tmp_path, dataset=str(images), model="test_vit", img_size=64)
    last = tmp_path / "run" / "last"
    start = {"model": str(last)}
    if source == "file":
        weights = load_file(last / "model.safetensors")
        weights["pos_embed"] = timm.create_model("test_vit").state_dict()["pos_embed"]
        save_file(weights, tmp_path / "vit.safetensors")  # of 160 pixels, as timm's is
        start = {"model": "test_vit", "checkpoint": str(tmp_path / "vit.safetensors")}
    output = str(tmp_path / "tuned")
    changes = {"dataset": str(images), "img_size": 96, "output": output, **start}
    assert first and train(finetune_cifar, tmp_path, **changes)
    for folder, size in (("run", 64), ("tuned", 96)):
        opened = timm.create_model(f"local-dir:{tmp_path / folder / 'last'}", pretrained=True)
        assert opened.patch_embed.img_size == (size, size)
        assert opened.pretrained_cfg["input_size"] == (3, size, size)


UNTRAINED = next(name for name in timm.list_models() if not is_model_pretrained(name))


def damage(folder, file, content):
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content((folder / file).read_bytes()))


@pytest.mark.parametrize(
    "file, content, words",
    [
        ("model.safetensors", lambda whole: whole[:-100], "cannot load the model .*best"),
        (
            "model.safetensors",
            None,
            r"has no model\.safetensors, so it is no model in timm's layout",
        ),
        ("config.json", None, r"has no config\.json"),
        ("config.json", lambda whole: whole[:50], "cannot load the model"),
        (
            "config.json",
            lambda whole: whole.replace(b"test_resnet", b"no_such_net"),
            "cannot load the model",
        ),
        (
            "config.json",
            lambda whole: whole.replace(b"test_resnet", b"test_vit"),
            "cannot load the model",
        ),
    ],
)
def test_damaged_checkpoint_is_one_clear_error(tmp_path, checkpoint, images, file, content, words):
    copy = shutil.copytree(checkpoint, tmp_path / "run" / "best")
    damage(copy, file, content)
    with pytest.raises(InputError, match=words):
        train(
            finetune_cifar, tmp_path, dataset=str(images), model=str(copy),
            output=str(tmp_path / "new"),
        )  # fmt: skip


@pytest.mark.parametrize(
    "model, words",
    [
        ("nowhere/best", "no folder 'nowhere/best', and timm has no pretrained"),
        ("resnet51", "no pretrained model of that name; the nearest are .*resnet50"),
        (
            "resnet18.a1_in1",
            r"no pretrained model of that name; the nearest are .*resnet18\.a1_in1k",
        ),
        (UNTRAINED, "it has the architecture alone, so give weights by --checkpoint PATH"),
    ],
)
def test_model_that_does_not_exist(tmp_path, images, model, words):
    with pytest.raises(InputError, match=words):
        train(finetune_cifar, tmp_path, dataset=str(images), model=model)


def test_folder_of_the_run_instead_of_its_best_model(tmp_path, checkpoint, images):
    with pytest.raises(InputError, match=r"did you mean .*run/best"):
        train(finetune_cifar, tmp_path, dataset=str(images), model=str(checkpoint.parent))
