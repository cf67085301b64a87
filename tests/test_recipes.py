"""Every row of the paper: its settings beside a typed table, its schedule, two of its updates."""

from pathlib import Path

import pytest
import timm
import yaml
from helpers import fresh_process, write_folder
from timm.models import save_for_hf

import finetune_cifar
import train_imagenet
from common import build, settings

RECIPES = Path(__file__).parent.parent / "recipes"

INPUT = {
    "img_size": 224, "crop_pct": 0.875, "interpolation": "bilinear", "scale": [0.05, 1.0],
    "hflip": 0.5, "m": 64, "sched": "poly", "warmup_lr": 0.0, "perturb_fraction": 1.0,
    "link": "sigmoid", "lam": None,
}  # fmt: skip
VIT = INPUT | {
    "dataset": "ILSVRC/imagenet-1k", "epochs": 300, "warmup_epochs": 32, "batch_size": 4096,
    "opt": "adamw", "opt_kwargs": {}, "weight_decay": 0.3, "lr": 3e-3, "min_lr": 3e-5,
    "clip_grad": 1.0, "loss": "bce", "head_bias": -10.0,
    "model_kwargs": {"class_token": False, "global_pool": "avg"},
}  # fmt: skip
RESNET = INPUT | {
    "dataset": "ILSVRC/imagenet-1k", "epochs": 90, "warmup_epochs": 16, "batch_size": 4096,
    "opt": "sgdw", "opt_kwargs": {"nesterov": False}, "momentum": 0.9, "weight_decay": 1e-3,
    "lr": 1.6, "min_lr": 0.016, "clip_grad": None, "loss": "ce", "head_bias": None,
    "model_kwargs": {},
}  # fmt: skip
CIFAR = INPUT | {
    "epochs": 100, "warmup_epochs": 5, "batch_size": 512, "opt": "momentum", "momentum": 0.9,
    "weight_decay": 0.0, "min_lr": 0.0, "clip_grad": 1.0, "smoothing": 0.0, "shrink_perturb": None,
    "rho_min": None, "head_bias": None,
}  # fmt: skip
IMAGENET = {
    "vit_s32": VIT | {"model": "vit_small_patch32_224"},
    "vit_s16": VIT | {"model": "vit_small_patch16_224"},
    "resnet50": RESNET | {"model": "resnet50"}, "resnet101": RESNET | {"model": "resnet101"},
}  # fmt: skip
# model, row: method, rho, rho_min, gamma, adaptive, gsam_alpha, gsam_normalize, smoothing,
# shrink_perturb
IMAGENET_ROWS = """
vit_s32   base             base      -     -     -      -       -     -    0    -
vit_s32   label-smoothing  base      -     -     -      -       -     -    0.1  -
vit_s32   shrink-perturb   base      -     -     -      -       -     -    0    1e-5
vit_s32   sam              sam       0.6   0.0   -      -       -     -    0    -
vit_s32   obf              obf       0.6   -     1      -       -     -    0    -
vit_s32   random           random    0.6   -     -      -       -     -    0    -
vit_s32   gsam             gsam      0.6   0.0   -      -       0.4   no   0    -
vit_s32   gsam-obf         gsam+obf  0.6   -     1      -       0.4   yes  0    -
vit_s32   asam             asam      6.0   -     -      after   -     -    0    -
vit_s32   asam-obf         asam+obf  6.0   -     1e-12  after   -     -    0    -
resnet50  base             base      -     -     -      -       -     -    0    -
resnet50  label-smoothing  base      -     -     -      -       -     -    0.1  -
resnet50  shrink-perturb   base      -     -     -      -       -     -    0    1e-5
resnet50  sam              sam       0.04  0.02  -      -       -     -    0    -
resnet50  obf              obf       0.04  -     1e-12  -       -     -    0    -
resnet50  random           random    0.04  -     -      -       -     -    0    -
resnet50  gsam             gsam      0.04  0.02  -      -       0.01  yes  0    -
resnet50  gsam-obf         gsam+obf  0.04  -     1e-12  -       0.01  no   0    -
resnet50  asam             asam      0.8   0.4   -      before  -     -    0    -
resnet50  asam-obf         asam+obf  0.8   -     1e-12  before  -     -    0    -
vit_s16   base             base      -     -     -      -       -     -    0    -
vit_s16   sam              sam       0.6   -     -      -       -     -    0    -
vit_s16   obf              obf       0.6   -     1      -       -     -    0    -
vit_s16   gsam             gsam      0.6   0.0   -      -       1.0   no   0    -
vit_s16   gsam-obf         gsam+obf  0.6   -     1      -       0.4   yes  0    -
resnet101 base             base      -     -     -      -       -     -    0    -
resnet101 sam              sam       0.04  0.02  -      -       -     -    0    -
resnet101 obf              obf       0.04  -     1e-12  -       -     -    0    -
resnet101 gsam             gsam      0.04  0.02  -      -       0.01  yes  0    -
resnet101 gsam-obf         gsam+obf  0.04  -     1e-12  -       0.01  no   0    -
"""
# model, row: checkpoint, method, rho, gamma, lr, loss; for CIFAR-10 and CIFAR-100 alike
CIFAR_ROWS = """
vit_s32   sam-sgd   sam   base  -     -      3e-3  bce
vit_s32   obf-sgd   obf   base  -     -      3e-3  bce
vit_s32   base-sam  base  sam   0.05  -      3e-3  bce
vit_s32   base-obf  base  obf   0.05  1e-12  3e-3  bce
resnet50  sam-sgd   sam   base  -     -      1e-2  ce
resnet50  obf-sgd   obf   base  -     -      1e-2  ce
resnet50  base-sam  base  sam   0.1   -      1e-2  bce
resnet50  base-obf  base  obf   0.1   1e-12  1e-2  bce
"""


def typed_rows():
    value = {"-": None, "yes": True, "no": False}
    numbers = ("rho", "rho_min", "gamma", "gsam_alpha", "smoothing", "shrink_perturb", "lr")

    def read(line, *keys):
        pairs = ((key, value.get(word, word)) for key, word in zip(keys, line.split(), strict=True))
        return {
            key: float(word) if key in numbers and word is not None else word for key, word in pairs
        }

    rows = {}
    for line in IMAGENET_ROWS.strip().splitlines():
        row = read(
            line, "model", "row", "method", "rho", "rho_min", "gamma", "adaptive", "gsam_alpha",
            "gsam_normalize", "smoothing", "shrink_perturb",
        )  # fmt: skip
        name = f"{row['model']}-{row.pop('row')}"
        output = {"output": f"outputs/imagenet/{name}"}
        rows[f"imagenet/{name}.yaml"] = row | IMAGENET[row["model"]] | output
    for line in CIFAR_ROWS.strip().splitlines():
        for dataset in ("cifar10", "cifar100"):
            row = read(line, "model", "row", "from", "method", "rho", "gamma", "lr", "loss")
            name = f"{dataset}-{row['model']}-{row.pop('row')}"
            checkpoint = f"outputs/imagenet/{row['model']}-{row.pop('from')}/last"
            places = {
                "dataset": f"uoft-cs/{dataset}",
                "model": checkpoint,
                "output": f"outputs/cifar/{name}",
            }
            rows[f"cifar/{name}.yaml"] = row | CIFAR | places
    return rows


ROWS = typed_rows()


def parse(name, *flags):
    return settings.parse(settings.parser("", ""), ["--recipe", str(RECIPES / name), *flags])


def test_there_is_a_recipe_for_every_row():
    assert [name for name in ROWS if not (RECIPES / name).exists()] == []


@pytest.mark.parametrize("name", ROWS)
def test_recipe_resolves_to_the_row_of_the_paper(name):
    resolved = settings.resolved(parse(name))
    unused = dict.fromkeys(("base", "random"), ("link", "perturb_fraction"))
    unused |= dict.fromkeys(("sam", "gsam", "asam"), ("link",))
    expected = ROWS[name] | dict.fromkeys(unused.get(resolved["method"], ()))
    assert {key: resolved[key] for key in expected} == expected


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """Eight images per class and, as checkpoints to fine-tune, a small ViT and a small ResNet."""
    folder = tmp_path_factory.mktemp("stand_ins")
    write_folder(folder / "images", images=4)
    for model in ("test_vit", "test_resnet"):
        save_for_hf(
            timm.create_model(model, num_classes=7), folder / model, safe_serialization=True
        )
    return folder


@pytest.mark.parametrize("name", ROWS)
def test_recipe_takes_two_updates_with_a_small_model(name, stand_ins, capsys):
    fresh_process()
    small = "test_vit" if "vit" in name else "test_resnet"
    script, model = (
        (train_imagenet, small)
        if name.startswith("imagenet")
        else (finetune_cifar, stand_ins / small)
    )
    flags = [
        "--dataset", str(stand_ins / "images"), "--model", str(model),
        *"--img-size 160 --workers 0".split(),
    ]  # fmt: skip
    flags += ["--batch-size", "8", "--m", "4", "--device-batch-size", "4", "--dry-run"]
    script.main(["--recipe", str(RECIPES / name), *flags])
    printed = capsys.readouterr().out
    assert (
        f"method {ROWS[name]['method']}: the loss is " in printed and "loss is nan" not in printed
    )
    assert not Path(ROWS[name]["output"]).exists()


@pytest.mark.parametrize("name", ["imagenet/vit_s32-sam.yaml", "imagenet/resnet50-asam.yaml"])
def test_lr_and_rho_equal_the_closed_form(name):
    args, updates = parse(name, "--model", "test_resnet"), 1281167 // 4096
    model = timm.create_model("test_resnet", num_classes=2)
    optimizer = build.build_optimizer(args, model)
    schedule = build.build_schedule(args, optimizer, updates)
    warmup, total = args.warmup_epochs * updates, args.epochs * updates
    for update in (
        0, 1, warmup // 2, warmup - 1, warmup, warmup + 1, (warmup + total) // 2, total - 1,
    ):  # fmt: skip
        schedule(update)
        lr = args.lr * update / warmup
        if update >= warmup:
            lr = args.lr + (args.min_lr - args.lr) * (update - warmup) / (total - warmup)
        part = max(0, (lr - args.min_lr) / (args.lr - args.min_lr))
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(lr, rel=1e-9)
            assert group["rho"] == pytest.approx(
                args.rho_min + (args.rho - args.rho_min) * part, rel=1e-9
            )


def test_no_weight_decay_on_vectors_and_position_embedding():
    args = parse("imagenet/vit_s32-obf.yaml")
    model = timm.create_model("test_vit", class_token=False, global_pool="avg")
    groups = build.build_optimizer(args, model).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for name, p in model.named_parameters():
        assert decay[id(p)] == (0.0 if p.ndim <= 1 or name == "pos_embed" else 0.3)


def test_accelerate_reads_every_launch_configuration():
    from accelerate.commands.config.config_args import load_config_from_file

    files = sorted((RECIPES.parent / "accelerate_configs").glob("*.yaml"))
    assert [file.stem for file in files] == [
        *"cpu fsdp2 gpu_bf16 gpu_fp16 multi_gpu multi_node".split(),
    ]  # fmt: skip
    for file in files:
        config, raw = load_config_from_file(str(file)), yaml.safe_load(file.read_text())
        assert (
            config.num_processes == raw["num_processes"]
            and str(config.mixed_precision) == raw["mixed_precision"]
        )
