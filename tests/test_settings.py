"""Recipes and flags: who wins, and what a user reads when they are wrong."""

import errno
import tempfile

import pytest
import yaml

from common import settings
from common.settings import InputError


def parse(tmp_path, recipe=None, *flags):
    argv = list(flags)
    if recipe is not None:
        (tmp_path / "recipe.yaml").write_text(
            recipe if isinstance(recipe, str) else yaml.safe_dump(recipe)
        )
        argv += ["--recipe", str(tmp_path / "recipe.yaml")]
    return settings.parse(
        settings.parser("test", "a model"), ["--output", str(tmp_path / "run"), *argv]
    )


def test_flags_override_the_recipe_and_both_the_defaults(tmp_path):
    recipe = {
        "lr": 0.3,
        "scale": [0.5, 1.0],
        "model_kwargs": {"drop_rate": 0.1, "global_pool": "avg"},
        "workers": 3,
    }
    args = parse(tmp_path, recipe, "--lr", "0.7", "--m", "8")
    assert (args.lr, args.scale, args.workers, args.m) == (0.7, [0.5, 1.0], 3, 8)
    assert args.model_kwargs == {"drop_rate": 0.1, "global_pool": "avg"}
    assert args.hflip == 0.5


PARSER = settings.parser("test", "a model")
KEYS = {action.dest: action for action in PARSER._actions}
KEYS = {key: KEYS[key] for key in KEYS if key not in ("help", *settings.NOT_SETTINGS)}


@pytest.mark.parametrize("key", KEYS)
def test_every_setting_is_a_recipe_key(key):
    """It comes through YAML and argparse as it was."""
    action = KEYS[key]
    value = {int: 3, float: 0.25}.get(action.type, "text")
    if action.choices:
        value = list(action.choices)[-1]
    elif isinstance(action, settings.BOOLEAN):
        value = not action.default
    elif isinstance(action, settings.KeyValues):
        value = {"a": 1, "b": "text", "c": False}
    value = [value, value] if action.nargs == 2 else value
    flags = settings.as_flags(PARSER, yaml.safe_load(yaml.safe_dump({key: value})), "a recipe")
    assert getattr(PARSER.parse_args(flags), key) == value


def test_numbers_that_yaml_reads_as_text_are_numbers(tmp_path):
    assert parse(tmp_path, "lr: 3e-3\n").lr == 0.003


@pytest.mark.parametrize("method", settings.METHODS)
def test_methods_resolve_their_own_settings_and_no_others(tmp_path, method):
    args = parse(tmp_path, {"method": method})
    assert (args.rho is None) == (method == "base")
    assert (args.gamma is None) == ("obf" not in method)
    assert (args.adaptive is None) == ("asam" not in method)
    assert (args.gsam_alpha is None) == ("gsam" not in method)
    defaults = {"rho": 0.05, "gamma": 1.0, "link": "sigmoid", "adaptive": "both", "gsam_alpha": 0.4}
    assert all(getattr(args, key) in (None, value) for key, value in defaults.items())
    p, flags = settings.parser("test", "a model"), ["--method", method, "--dry-run"]
    assert settings.parse(p, flags).output == f"outputs/imagenet-1k-{method}"


@pytest.mark.parametrize(
    "recipe, flags, words",
    [
        ({"roh": 0.1}, (), "unknown key 'roh': did you mean 'rho'"),
        ({"weight-decay": 0.1}, (), "did you mean 'weight_decay'"),
        ({"lr": "fast"}, (), "invalid float value: 'fast'"),
        ({"method": "sharp"}, (), "invalid choice: 'sharp'"),
        ("- lr\n", (), "must be a mapping"),
        ("lr: [", (), "cannot read the recipe"),
        (None, ("--recipe", "nowhere.yaml"), "cannot read the recipe nowhere.yaml"),
        (None, ("--method", "sharp"), "invalid choice: 'sharp'"),
        (None, ("--roh", "0.1"), "unknown argument --roh: did you mean '--rho'"),
        (None, ("--roh=0.1",), "unknown argument --roh=0.1: did you mean '--rho'"),
        (None, ("digits",), "unknown argument digits; --help lists them all$"),
        ({"zzzz": 0.1}, (), "has an unknown key 'zzzz'$"),
        ("lr: 1\n  epochs: 2\n", (), "^cannot read the recipe [^\n]*$"),
        ({"lr": 0.1, "min_lr": 0.2}, (), "min_lr is 0.2, above lr, 0.1"),
        ({"lr": 0.1}, ("--warmup-lr", "0.2"), "warmup_lr is 0.2, above lr, 0.1"),
        (
            None,
            ("--resume", "auto", "--overwrite"),
            "--resume auto continues the run that --overwrite would replace",
        ),
        ({}, ("--method", "sam", "--gamma", "1"), "gamma contradicts method sam: .* obf, gsam"),
        ({}, ("--method", "obf", "--gsam-alpha", "1"), "gsam_alpha contradicts method obf"),
        ({}, ("--method", "gsam", "--adaptive", "both"), "adaptive contradicts method gsam"),
        ({"rho": 0.1}, ("--method", "base"), "rho contradicts method base"),
        ({"m": 0}, (), "m is 0"),
        ({"epochs": 3, "warmup_epochs": 3}, (), "warmup_epochs is 3"),
        ({"rho_min": 0.0, "lr": 0.1, "min_lr": 0.1}, (), "min_lr below lr"),
        ({"perturb_fraction": 1.5}, (), "perturb_fraction is 1.5"),
        ({"perturb_fraction": 0.0}, (), r"perturb_fraction is 0.0; it must lie in \(0, 1\]"),
        ({"smoothing": 1.0}, (), r"smoothing is 1.0; it must lie in \[0, 1\)"),
        ({"scale": [1.0, 0.5]}, (), r"scale is \[1.0, 0.5\]; give the smaller value first"),
        ({"ratio": [2.0, 0.5]}, (), r"ratio is \[2.0, 0.5\]; give the smaller value first"),
        (
            {"method": "base", "perturb_fraction": 0.5},
            (),
            "perturb_fraction contradicts method base",
        ),
        ({"shrink_perturb": -1}, (), "shrink_perturb is -1"),
        ({"checkpoint_hist": 0}, (), "checkpoint_hist is 0"),
        ({"log_with": "tensorbored"}, (), "invalid choice: 'tensorbored'"),
        ({"base": "nowhere.yaml"}, (), "cannot read the recipe .*nowhere.yaml"),
        ({"base": "recipe.yaml"}, (), "is its own base"),
        ({"rho": 0.1, "rho_min": 0.2}, (), r"choose rho_min in \[0, rho\]"),
    ],
)
def test_wrong_settings_are_named_with_the_remedy(tmp_path, recipe, flags, words):
    with pytest.raises(InputError, match=words):
        parse(tmp_path, recipe, *flags)


NUMBERS = [key for key, action in KEYS.items() if action.type in (int, float)]
# Those that are counted from 1, and the one that may be below 0.
COUNTS = {"batch_size", "device_batch_size", "m", "train_num_samples", "epochs", "img_size"}
COUNTS |= {key for key in NUMBERS if key.endswith("_interval")} | {"checkpoint_hist"}
OF_METHODS = {"gamma", "lam", "perturb_fraction", "gsam_alpha", "rho", "rho_min"}


@pytest.mark.parametrize("key", sorted({*NUMBERS} - {"head_bias"}))
def test_no_number_is_negative_and_no_count_is_zero(key):
    action = KEYS[key]
    values = [-1] + [0] * (key in COUNTS) + [float("nan")] * (action.type is float)
    others = ["--method", "gsam+obf"] if key in OF_METHODS else []
    others += ["--model-ema"] * (key == "model_ema_decay")
    for value in values:
        given = [f"{action.option_strings[0]}={value}"]
        if action.nargs:
            given = [action.option_strings[0], *[str(value)] * action.nargs]
        with pytest.raises(InputError, match=rf"{key} is {float(value):.0f}\b.*it must lie"):
            settings.parse(settings.parser("", ""), ["--output", "x", *others, *given])


def test_a_recipe_builds_on_its_base(tmp_path):
    (tmp_path / "bases").mkdir()
    (tmp_path / "bases" / "first.yaml").write_text("lr: 1.0\nepochs: 5\nm: 4\n")
    (tmp_path / "bases" / "second.yaml").write_text("base: first.yaml\nlr: 2.0\nepochs: 6\n")
    args = parse(tmp_path, "base: bases/second.yaml\nlr: 3.0\n")
    assert (args.lr, args.epochs, args.m) == (3.0, 6, 4)


def test_the_printed_config_is_a_recipe_of_the_same_settings(tmp_path, capsys):
    flags = "--method gsam+obf --rho 1e-12 --model-kwargs a=1 b=no --scale 0.1 1".split()
    with pytest.raises(SystemExit) as ended:
        parse(tmp_path, {"lr": 3e-3, "opt_kwargs": {"nesterov": False}}, *flags, "--print-config")
    assert ended.value.code is None
    printed = capsys.readouterr().out
    again = parse(tmp_path, printed)
    assert settings.resolved(again) == yaml.safe_load(printed)
    assert (again.rho, again.model_kwargs, again.opt_kwargs) == (
        1e-12,
        {"a": 1, "b": "no"},
        {"nesterov": False},
    )


def test_an_earlier_run_is_not_replaced_unasked(tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(InputError, match="--overwrite"):
        parse(tmp_path)
    assert parse(tmp_path, None, "--overwrite").overwrite
    assert parse(tmp_path, None, "--resume", "auto").resume == "auto"
    assert parse(tmp_path, None, "--dry-run").dry_run  # which writes nothing


def test_a_run_resumed_from_elsewhere_does_not_replace_another(tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(InputError, match="run exists: continue that run with --resume auto"):
        parse(tmp_path, None, "--resume", str(tmp_path / "other"))
    assert parse(tmp_path, None, "--resume", str(tmp_path / "other"), "--overwrite")
    for own in (tmp_path / "run", tmp_path / "run" / "checkpoints" / "step-00000003"):
        assert parse(tmp_path, None, "--resume", str(own))
        with pytest.raises(InputError, match="drop one of them"):
            parse(tmp_path, None, "--resume", str(own), "--overwrite")


@pytest.mark.parametrize(
    "kind, words", [("file", "file is a file"), ("folder", "folder may not be written")]
)
def test_output_where_nothing_can_be_written(tmp_path, monkeypatch, kind, words):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    temporary_file = tempfile.TemporaryFile

    def refuse(dir):
        if dir == tmp_path / "folder":  # root may write anywhere
            raise PermissionError(errno.EACCES, "Permission denied")
        return temporary_file(dir=dir)

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    for flags in ((), ("--dry-run",)):
        with pytest.raises(
            InputError, match=f"cannot write to .*{words}.*; choose another --output"
        ):
            parse(tmp_path, None, "--output", str(tmp_path / kind / "below" / "run"), *flags)


def test_settings_are_as_they_are_read_back(tmp_path):
    """A resumed run is compared with what is in its checkpoint, where tuples are lists."""
    flags = ("--opt-kwargs", "betas=(0.9,0.95)", "--model-kwargs", "sizes=(1,(2,3))")
    found = settings.resolved(parse(tmp_path, None, *flags))
    assert found == yaml.safe_load(yaml.safe_dump(found))
    assert found["opt_kwargs"] == {"betas": [0.9, 0.95]}
    assert found["model_kwargs"] == {"sizes": [1, [2, 3]]}
