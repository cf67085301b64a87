"""Weights in files: of several kinds, with prefixes and averages; what does not fit is named."""

import argparse
import os

import pytest
import timm
import torch
from helpers import fresh_process, saved, train, write_folder
from safetensors.torch import save_file
from timm.utils import CheckpointSaver, ModelEmaV3

import eval_robustness
import finetune_cifar
from common import checkpoints
from common.errors import InputError

SIZE = 32


def model_of(seed, **options):
    torch.manual_seed(seed)
    return timm.create_model("test_resnet", **options)


def same_state(model, other):
    pairs = zip(model.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def prefixed(weights, prefix):
    return {f"{prefix}{name}": tensor for name, tensor in weights.items()}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One model of three classes, in every kind of file."""
    folder, model = tmp_path_factory.mktemp("files"), model_of(1, num_classes=3)
    weights = model.state_dict()
    save_file(weights, folder / "plain.safetensors")
    torch.save(weights, folder / "plain.pth")
    torch.save(prefixed(weights, "module."), folder / "ddp.pth")
    torch.save(prefixed(weights, "_orig_mod.module."), folder / "both.pth")
    torch.save({"model": prefixed(weights, "_orig_mod."), "epoch": 3}, folder / "compiled.pt")
    return folder, model


@pytest.fixture(scope="module")
def timms(tmp_path_factory):
    """What timm's train.py saves: a model, and an average that is not it."""
    folder = str(tmp_path_factory.mktemp("timm"))
    model, other = model_of(1, num_classes=3), ModelEmaV3(model_of(2, num_classes=3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    args = argparse.Namespace(model="test_resnet")
    options = {"args": args, "checkpoint_dir": folder, "recovery_dir": folder}
    CheckpointSaver(model, optimizer, model_ema=other, **options).save_checkpoint(0, metric=0.5)
    return os.path.join(folder, "last.pth.tar"), model, other.module


@pytest.mark.parametrize(
    "name", ["plain.safetensors", "plain.pth", "ddp.pth", "both.pth", "compiled.pt"]
)
def test_weights_come_out_of_every_kind_of_file(files, name):
    folder, model = files
    assert same_state(checkpoints.open_file(str(folder / name), "test_resnet"), model)


def test_a_checkpoint_of_timms_training_has_weights_and_their_average(timms):
    path, model, average = timms
    assert same_state(checkpoints.open_file(path, "test_resnet"), model)
    assert same_state(checkpoints.open_file(path, "test_resnet", use_ema=True), average)


@pytest.mark.parametrize("key", ["state_dict_ema", "model_ema"])
def test_averaged_weights_have_either_of_timms_names(tmp_path, key):
    model, average = model_of(1, num_classes=3), model_of(2, num_classes=3)
    path = str(tmp_path / "both.pth")
    torch.save({"state_dict": model.state_dict(), key: average.state_dict()}, path)
    assert same_state(checkpoints.open_file(path, "test_resnet"), model)
    assert same_state(checkpoints.open_file(path, "test_resnet", use_ema=True), average)


def test_model_kwargs_reach_a_model_whose_weights_are_in_a_file(tmp_path):
    torch.save(model_of(1, num_classes=3).state_dict(), tmp_path / "weights.pth")
    path = str(tmp_path / "weights.pth")
    assert checkpoints.open_file(path, "test_resnet").drop_rate == 0
    assert checkpoints.open_file(path, "test_resnet", drop_rate=0.25).drop_rate == 0.25


def test_position_embeddings_are_adapted_to_the_size_of_the_images(tmp_path):
    model = timm.create_model("test_vit", num_classes=3)
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    opened = checkpoints.open_file(str(tmp_path / "vit.pth"), "test_vit", 96)
    assert opened(torch.zeros(1, 3, 96, 96)).shape == (1, 3)
    for (name, before), (_, after) in zip(model.named_parameters(), opened.named_parameters()):
        assert torch.equal(before, after) or name == "pos_embed"


def test_what_does_not_fit_is_named(tmp_path, files):
    _, model = files
    weights = dict(model.state_dict())
    weights["conv1.0.weight"] = torch.zeros(5, 3, 3, 3)
    weights["neck.weight"] = weights.pop("layer1.0.conv1.weight")
    torch.save(weights, tmp_path / "other.pth")
    with pytest.raises(InputError) as error:
        checkpoints.open_file(str(tmp_path / "other.pth"), "test_resnet")
    for part in (
        "other.pth does not fit test_resnet", "it lacks layer1.0.conv1.weight;",
        "the model has no neck.weight;", "conv1.0.weight is (5, 3, 3, 3), and in the model (",
    ):  # fmt: skip
        assert part in str(error.value)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def test_a_file_that_would_run_code_is_refused(tmp_path):
    torch.save({"state_dict": {}, "hook": Bomb(str(tmp_path / "exploded"))}, tmp_path / "bomb.pth")
    with pytest.raises(
        InputError, match=r"bomb\.pth as weights alone .*: save its state_dict"
    ) as e:
        checkpoints.open_file(str(tmp_path / "bomb.pth"), "test_resnet")
    assert "weights_only=False" not in str(e.value) and not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "cannot load .* as weights alone"),
        (b"not a file of torch's", "cannot load .* as weights alone"),
        ([1, 2], "cannot load .* as weights alone"),
        ({"epoch": 3, "lr": 0.1}, "holds no weights by name, but epoch, lr"),
        (None, "--checkpoint .*x.pth is no file"),
    ],
)
def test_a_file_without_weights_says_so(tmp_path, content, words):
    if isinstance(content, bytes):
        (tmp_path / "x.pth").write_bytes(content)
    elif content is not None:
        torch.save(content, tmp_path / "x.pth")
    with pytest.raises(InputError, match=words):
        checkpoints.open_file(str(tmp_path / "x.pth"), "test_resnet")


def test_a_folder_and_a_file_without_averages_and_a_wrong_name_are_errors(tmp_path, files):
    folder, _ = files
    with pytest.raises(InputError, match="is a folder, which goes to --model"):
        checkpoints.open_file(str(tmp_path), "test_resnet")
    for name in ("plain.safetensors", "plain.pth", "compiled.pt"):
        with pytest.raises(InputError, match=f"--use-ema: .*{name} has no averaged weights"):
            checkpoints.open_file(str(folder / name), "test_resnet", use_ema=True)
    with pytest.raises(InputError, match="timm has no 'test_resnett'; the nearest are test_resnet"):
        checkpoints.open_file(str(folder / "plain.pth"), "test_resnett")


# --------------------------------------------------------------------------------------------------
# In the scripts


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Images of three classes."""
    return write_folder(tmp_path_factory.mktemp("three"), classes=("cat", "dog", "owl"))


@pytest.mark.parametrize("classes", [3, 7])
def test_fine_tuning_from_a_file_gives_a_new_head(tmp_path, three, capsys, classes):
    """Of another size or of the same, which is said."""
    model = model_of(1, num_classes=classes)
    torch.save({"state_dict": prefixed(model.state_dict(), "module.")}, tmp_path / "w.pth.tar")
    path = str(tmp_path / "w.pth.tar")
    flags = {"model": "test_resnet", "checkpoint": path, "method": "base", "lr": 0.0}
    train(finetune_cifar, tmp_path, dataset=three, **flags)
    after, before = saved(tmp_path / "run" / "last"), model.state_dict()
    for name in after:
        if "running" not in name and "num_batches" not in name and not name.startswith("fc."):
            assert torch.equal(after[name], before[name]), name
    assert after["fc.weight"].shape[0] == 3
    assert not torch.equal(after["fc.weight"], before["fc.weight"][:3])
    line = f"w.pth.tar: a new classifier takes the place of its {classes} outputs"
    assert line in capsys.readouterr().out


def test_fine_tuning_takes_the_average_only_if_asked_to(tmp_path, timms, three):
    path, model, average = timms
    changes = {"model": "test_resnet", "checkpoint": path, "method": "base", "lr": 0.0}
    for use_ema, expected in ((False, model), (True, average)):
        output = str(tmp_path / str(use_ema))
        train(
            finetune_cifar, tmp_path, dataset=three, use_ema=use_ema, output=output, **changes
        )  # fmt: skip
        after = saved(tmp_path / str(use_ema) / "last")
        assert torch.equal(after["conv1.0.weight"], expected.state_dict()["conv1.0.weight"])


def test_use_ema_without_a_file_is_an_error(tmp_path, three, checkpoint):
    with pytest.raises(InputError, match="--use-ema has no effect without --checkpoint"):
        train(finetune_cifar, tmp_path, dataset=three, model=str(checkpoint), use_ema=True)
    with pytest.raises(InputError, match="--use-ema has no effect without --checkpoint"):
        eval_robustness.parse(["--model", str(checkpoint), "--use-ema"])


def test_a_file_is_evaluated_as_the_folder_of_the_same_weights(tmp_path, capsys):
    """Of 1000 outputs, which are ImageNet's classes."""
    fresh_process()
    model, classes = model_of(1), ("n01440764", "n01443537")
    torch.save(prefixed(model.state_dict(), "module."), tmp_path / "weights.pth")
    timm.models.save_for_hf(model, tmp_path / "model", safe_serialization=True)
    images = write_folder(tmp_path / "images", splits=("",), classes=classes)
    shared = ["--data", f"mine={images}", "--workers", "0", "--img-size", str(SIZE)]
    results = []
    for flags in (
        ["--model", str(tmp_path / "model")],
        ["--model", "test_resnet", "--checkpoint", str(tmp_path / "weights.pth")],
    ):
        fresh_process()
        output = str(tmp_path / f"out{len(results)}")
        (result,) = eval_robustness.main([*flags, *shared, "--output", output]).values()
        results.append(result)
    assert results[0] == results[1]
    assert "its outputs are taken for ImageNet's 1000" in capsys.readouterr().out


def test_files_and_architectures_go_together():
    one = eval_robustness.parse("--model a --checkpoint x.pth y.pth".split())
    assert one.architectures == {"x.pth": "a", "y.pth": "a"} and one.model == ["x.pth", "y.pth"]
    two = eval_robustness.parse("--model a b --checkpoint x.pth y.pth".split())
    assert two.architectures == {"x.pth": "a", "y.pth": "b"}
    with pytest.raises(InputError, match="3 files for 2 architectures"):
        eval_robustness.parse("--model a b --checkpoint x y z".split())
