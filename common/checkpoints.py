"""What a run keeps on disk: checkpoints to resume from, and models in timm's layout."""

import argparse
import contextlib
import inspect
import json
import os
import shutil
import tempfile
from pathlib import Path

import huggingface_hub
import timm
import torch
from accelerate import PartialState
from accelerate.utils import gather_object, load
from safetensors import SafetensorError
from safetensors.torch import load_model as load_weights
from safetensors.torch import save_file
from safetensors.torch import save_model as save_weights
from timm.models import (
    is_model_pretrained,
    load_state_dict,
    push_to_hf_hub,
    resolve_model_input_args,
)
from timm.models._hub import save_config_for_hf
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from common.errors import InputError, lost_process, lost_worker, the_nearest
from common.folders import some

FORMAT = 2  # of progress.json
PAPER = (
    "Forget Sharpness: Perturbed Forgetting of Model Biases Within SAM Dynamics, arXiv 2406.06700"
)  # fmt: skip


def save(accelerator, model, optimizer, ema, folder: Path, record: dict, keep: int) -> None:
    """Write the checkpoint ``folder/step-N`` whole or not at all; keep the newest ``keep``.

    ``record`` has "progress", numbers, N among them under "updates", and "settings", which a
    resumed run must share.

    Raises:
        InputError: the disk is full; earlier checkpoints are untouched.
    """
    final, draft = folder / _name(record["progress"]["updates"]), folder / "draft"
    if (final / "progress.json").exists():
        return
    averages = [ema.state_dict()] if ema else []
    needed = _bytes([model.state_dict(), optimizer.state_dict(), *averages])
    with fail_together(accelerator), writing(folder, needed):
        if accelerator.is_main_process:
            make_room(folder, needed)
    # With FSDP, Accelerate exchanges weights in here: if one process fails, the others wait.
    with fail_together(accelerator), writing(folder, needed):
        accelerator.save_state(str(draft))
    with fail_together(accelerator), writing(folder, needed):
        if accelerator.is_main_process:
            if ema:  # not through Accelerate, which would unpickle whatever is in the file
                save_weights(ema, str(draft / "ema.safetensors"))
            files = [file for file in draft.rglob("*") if file.is_file()]
            sizes = {str(file.relative_to(draft)): file.stat().st_size for file in files}
            record = {"format": FORMAT, **record, "files": sizes}
            (draft / "progress.json").write_text(json.dumps(record, indent=2) + "\n")
            shutil.rmtree(final, ignore_errors=True)  # if a kill left a part of one
            draft.rename(final)
            remove(_all(folder)[:-keep])


@contextlib.contextmanager
def fail_together(accelerator):
    """Around what may fail in one process alone: then all fail, with its message.

    The block must not exchange anything between processes.
    """
    failure = None
    try:
        yield
    except Exception as error:
        if lost_process(error):
            raise
        failure = error
    messages = gather_object([None if failure is None else str(failure) or repr(failure)])
    if failure is not None:
        raise failure
    if any(messages):
        raise InputError(next(filter(None, messages)))


@contextlib.contextmanager
def writing(folder: Path | str, needed: int = 0):
    """Raise ``InputError`` if writing ``needed`` bytes into ``folder`` fails; leave no draft."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch's writer raises RuntimeError
        if lost_process(error) or lost_worker(error):
            raise
        folder = Path(folder)
        shutil.rmtree(folder / "draft", ignore_errors=True)
        free = shutil.disk_usage(folder).free / 2**20 if folder.exists() else 0
        space = f". It needs {needed / 2**20:.1f} MiB, {free:.1f} MiB are free" if needed else ""
        raise InputError(
            f"cannot write to {folder}: {error}{space}. What was saved before is intact: mend "
            "that, then go on with --resume auto"
        ) from error


def write_whole(file: Path, text: str) -> None:
    """Write a file whole or not at all: a kill, or a full disk, leaves the earlier one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_suffix(".draft")
    draft.write_text(text)
    draft.replace(file)


def make_room(folder: Path, needed: int) -> None:
    """Create ``folder``, without a draft; raise ``OSError`` if ``needed`` bytes do not fit."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / "draft", ignore_errors=True)
    if shutil.disk_usage(folder).free < needed:
        raise OSError("the disk is full")


def _bytes(state) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(state))


def _tensors(state):
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, (dict, list)):
        for value in state.values() if isinstance(state, dict) else state:
            yield from _tensors(value)


def _name(updates):
    return f"step-{updates:08d}"


def _all(folder):
    number = 8 * "[0-9]"  # a copy by the user, step-00000009-good, is none of the run's own
    return sorted(path.parent for path in folder.glob(f"step-{number}/progress.json"))


def newer(folder: Path, updates: int) -> list[Path]:
    """The checkpoints in ``folder`` of more than these updates, the newest last."""
    return [checkpoint for checkpoint in _all(folder) if checkpoint.name > _name(updates)]


def remove(folders: list[Path]) -> None:
    """Remove checkpoints and models; what a kill leaves of a checkpoint is none."""
    for folder in folders:
        (folder / "progress.json").unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)


def find(resume: str, folder: Path) -> Path | None:
    """The checkpoint that ``--resume`` means.

    "auto" is the newest in ``folder``, or None if there is none yet.

    Raises:
        InputError: a path without a checkpoint.
    """
    if resume == "auto":
        return (_all(folder) or [None])[-1]
    path = Path(resume)
    if (path / "progress.json").exists():
        return path
    for candidate in (path, path / "checkpoints"):
        if _all(candidate):
            return _all(candidate)[-1]
    remedy = "name a run's folder, or use --resume auto"
    raise InputError(f"there is no checkpoint in {resume}: {remedy}")


def read(path: Path, settings: dict) -> dict:
    """Check that a checkpoint is whole and of a run with these ``settings``; return its progress.

    Raises:
        InputError: it is damaged, of another format, or of other settings.
    """
    remedy = f"remove {path} to resume from the one before it, or start anew with --overwrite"
    try:
        record = json.loads((path / "progress.json").read_text())
        keys = ("format", "progress", "settings", "files")
        version, progress, saved, files = (record[key] for key in keys)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"cannot read {path / 'progress.json'} ({error!r}): {remedy}") from error
    if version > FORMAT:
        newer = f"format {version}, newer than {FORMAT}"
        raise InputError(f"the checkpoint {path} has {newer}: update sam-obf")
    if version < FORMAT:
        older = f"format {version}, of an older sam-obf"
        finish = "finish that run with the version that began it, or start anew with --overwrite"
        raise InputError(f"the checkpoint {path} has {older}: {finish}")
    for name, expected in files.items():
        size = (path / name).stat().st_size if (path / name).exists() else 0
        if size != expected:
            truncated = f"{path / name} is truncated, {size} of {expected} bytes"
            raise InputError(f"{truncated}: {remedy}")
    for key in sorted({*saved, *settings}):
        before, now, remedy = saved.get(key), settings.get(key), "resume with the same settings"
        if before == now:
            continue
        if key == "m":  # the one setting whose default depends on the number of processes
            remedy = f"resume with --m {before}"
        if key == "label_names":
            key, before, now = _different_class(before, now)
            remedy = "give it the classes that it had, in their order"
        raise InputError(
            f"{path} is of a run with {key} {before!r}, and this one has {now!r}: {remedy}, "
            "or start anew in another --output"
        )
    return progress


def _different_class(before: list[str], now: list[str]) -> tuple:
    """What the class names of two runs differ in: their number, or the first name."""
    if len(before) != len(now):
        return "number of classes", len(before), len(now)
    number = next(i for i, names in enumerate(zip(before, now)) if names[0] != names[1])
    return f"class {number}", before[number], now[number]


def restore(accelerator, ema, path: Path) -> None:
    """Load weights, optimizer, loss scale and random states of a checkpoint that ``read`` took.

    ``ema`` is None, or gets its averaged weights.

    Raises:
        InputError: its contents are damaged.
    """
    try:
        accelerator.load_state(str(path))
        if ema:
            load_weights(ema, path / "ema.safetensors")
        # Accelerate goes on without a random state that it cannot load.
        state = path / f"random_states_{accelerator.process_index}.pkl"
        if state.exists():
            load(state)
        else:
            differ = "random numbers differ from those of an unbroken run"
            accelerator.print(f"{path} is of fewer processes: {differ}")
    except Exception as error:  # whatever unpickling a damaged file may raise
        if lost_process(error) or lost_worker(error):
            raise
        raise InputError(
            f"cannot load the checkpoint {path}: {error}. Remove it to resume from the one before"
        ) from error


def timm_config(model, batches) -> str:
    """The ``config.json`` of timm's layout for a model that is not prepared yet."""
    names = {"label_names": batches.label_names}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.json"
        save_config_for_hf(model, file, names, data_config=batches.config)
        return file.read_text()


def save_model(accelerator, model, folder: Path, config: str) -> None:
    """Replace the model in ``folder``, in timm's layout.

    Whenever this is interrupted, the old model or the new one is there.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options)
    needed = _bytes(weights)
    with fail_together(accelerator), writing(folder, needed):
        if accelerator.is_main_process:
            make_room(folder, needed)
            draft = folder / "draft"
            draft.mkdir()
            tensors = {name: tensor.contiguous() for name, tensor in weights.items()}
            save_file(tensors, draft / "model.safetensors")
            os.replace(draft / "model.safetensors", folder / "model.safetensors")
            draft.rmdir()
            (folder / "config.json").write_text(config)


def create_model(name: str, img_size: int | None, **model_kwargs) -> torch.nn.Module:
    """timm's ``create_model``, for images of ``img_size`` if the model is made for one size."""
    if img_size is not None:
        model_kwargs = resolve_model_input_args(name, {"img_size": img_size}, **model_kwargs)
        name = model_kwargs.pop("model_name")
    return timm.create_model(name, **model_kwargs)


def open_model(name: str, img_size: int | None = None, **model_kwargs) -> torch.nn.Module:
    """A trained model: a folder in timm's layout, or a timm, ``hf-hub:`` or ``local-dir:`` name.

    One made for images of another size than ``img_size``, pixels, is adapted to that.

    Raises:
        InputError: there is no such model, or its files are damaged or do not fit each other.
    """
    source, folder = name, Path(name.removeprefix("local-dir:")).expanduser()
    if folder.is_dir():
        for file in ("config.json", "model.safetensors"):
            if not (folder / file).exists():
                inside = [folder / name for name in ("last", "best") if (folder / name).is_dir()]
                hint = f": did you mean {inside[0]}?" if inside else ""
                no_model = f"has no {file}, so it is no model in timm's layout"
                raise InputError(f"the folder {folder} {no_model}{hint}")
        source = f"local-dir:{folder}"
    elif ":" not in name and not is_model_pretrained(name):
        unknown = "and timm has no pretrained model of that name"
        raise InputError(f"there is no folder {name!r}, {unknown}{_remedy_for(name)}")
    try:
        return create_model(source, img_size, pretrained=True, **model_kwargs)
    except Exception as error:  # safetensors, json, the Hub and timm each raise their own
        raise InputError(f"cannot load the model {name!r}: {error}") from error


def _remedy_for(name):
    """What to do about a name that is no pretrained model's."""
    if timm.is_model(name) and "." not in name:
        return ": it has the architecture alone, so give weights by --checkpoint PATH"
    if "." in name:
        return the_nearest(name, timm.list_pretrained())
    return the_nearest(name, [known for known in timm.list_models() if is_model_pretrained(known)])


def open_file(
    path: str, name: str, img_size: int | None = None, *,
    use_ema: bool = False, new_head: bool = False, **model_kwargs,
) -> torch.nn.Module:  # fmt: skip
    """timm's architecture ``name`` with the weights in a file.

    The file is safetensors, or what ``torch.save`` wrote: weights, or a checkpoint of training with
    weights in it.

    Args:
        use_ema: take the checkpoint's averaged weights.
        new_head: the caller will replace the classifier, so it need not fit. Otherwise the model
            gets as many outputs as the file's classifier has.

    Raises:
        InputError: there is no such architecture or file, it cannot be loaded as weights alone, or
            they do not fit the architecture; what does not is named.
    """
    if not timm.is_model(name):
        hint = the_nearest(name, timm.list_models())
        raise InputError(f"--checkpoint needs an architecture, and timm has no {name!r}{hint}")
    weights = read_weights(path, use_ema)
    try:
        model = create_model(name, img_size, **model_kwargs)
        # timm's own rewriting of older layouts, and of position embeddings of another size
        rewrite = getattr(inspect.getmodule(type(model)), "checkpoint_filter_fn", None)
        weights = rewrite(weights, model) if rewrite else weights
    except Exception as error:  # timm's models each raise their own
        raise InputError(f"cannot load {path} into {name}: {error}") from error
    head = head_names(model)
    outputs = next((len(weights[key]) for key in head if key in weights), None)
    if new_head:
        weights = {key: value for key, value in weights.items() if key not in head}
        PartialState().print(f"{path}: a new classifier takes the place of its {outputs} outputs")
    elif outputs not in (None, model.num_classes):
        model.reset_classifier(outputs)
    load_fitting(model, weights, f"{path} does not fit {name}", head if new_head else [])
    return model


def head_names(model) -> list[str]:
    """The names of the classifier's weights in a timm model's ``state_dict``."""
    prefixes = model.pretrained_cfg.get("classifier") or ()
    prefixes = (prefixes,) if isinstance(prefixes, str) else prefixes
    return [key for key in model.state_dict() if key.startswith(tuple(f"{p}." for p in prefixes))]


def load_fitting(model, weights: dict, refusal: str, optional: list[str]) -> None:
    """Load weights by name; those that are ``optional`` may be missing.

    Raises:
        InputError: begins with ``refusal``, and names what is missing, too much, or of another
            shape.
    """
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    other = [key for key in weights if shapes.get(key, weights[key].shape) != weights[key].shape]
    fitting = {key: value for key, value in weights.items() if key not in other}
    keys = model.load_state_dict(fitting, strict=False)  # which names no shapes, but raises
    missing = [key for key in keys.missing_keys if key not in (*other, *optional)]
    reasons = [f"it lacks {some(missing)}"] * bool(missing)
    reasons += [f"the model has no {some(keys.unexpected_keys)}"] * bool(keys.unexpected_keys)
    for key in other[:1]:
        reasons.append(f"{key} is {tuple(weights[key].shape)}, and in the model {shapes[key]}")
    if reasons:
        raise InputError(f"{refusal}: {'; '.join(reasons)}: name the architecture of the weights")


def read_weights(path: str, use_ema: bool) -> dict[str, torch.Tensor]:
    """The weights in a file by name, without the prefixes of DDP and torch.compile.

    Raises:
        InputError: there is no such file, it cannot be loaded as weights alone, or has no averaged
            ones.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        folder = "a folder, which goes to --model" if file.is_dir() else "no file"
        raise InputError(f"--checkpoint {path} is {folder}")
    try:
        weights = load_state_dict(str(file), use_ema, weights_only=True)
        averaged = not use_ema or _has_ema(file)
    except Exception as error:  # safetensors and torch each raise their own
        reason = str(error).partition(" No automatic")[0]  # timm advises what is no option here
        remedy = "save its state_dict alone, by torch.save or as safetensors"
        raise InputError(f"cannot load {path} as weights alone ({reason}): {remedy}") from error
    if not averaged:
        raise InputError(f"--use-ema: {path} has no averaged weights: drop the flag")
    if others := [key for key, value in weights.items() if not isinstance(value, torch.Tensor)]:
        raise InputError(f"{path} holds no weights by name, but {some(list(map(str, others)))}")
    return weights


def _has_ema(file):
    """Whether a training checkpoint of timm's layout has averaged weights."""
    if file.suffix == ".safetensors":
        return False
    with torch.serialization.safe_globals([argparse.Namespace]):  # as timm's checkpoints have
        content = torch.load(file, map_location="meta", weights_only=True)
    return any(content.get(key) is not None for key in ("state_dict_ema", "model_ema"))


def check_hub(repo: str) -> None:
    """Create the Hub's repository, if need be, before training.

    Raises:
        InputError: not logged in, no right to write there, or no network.
    """
    if huggingface_hub.get_token() is None:
        login = "run `hf auth login` with a token that may write"
        raise InputError(f"--push-to-hub {repo} needs a login: {login}")
    try:
        huggingface_hub.create_repo(repo, exist_ok=True)
    except Exception as error:  # httpx's errors and the Hub's own have no common base
        raise InputError(f"cannot write to the Hub's {repo}: {error}") from error


def push(repo: str, folder: Path, settings: dict, results: dict) -> None:
    """Upload a model of timm's layout with a card that states its settings and accuracies.

    Raises:
        InputError: the Hub does not take it.
    """
    config = json.loads((folder / "config.json").read_text())
    trained = f"trained on {settings['dataset']} with `--method {settings['method']}` of sam-obf"
    card = {
        "description": f"{config['architecture']} {trained}",
        "details": {
            "Top-1 accuracy": {split: f"{top1:.2%}" for split, top1 in results.items()},
            "Settings": {key: value for key, value in settings.items() if value is not None},
            "Paper": PAPER,
        },
        "usage": f'```python\nmodel = timm.create_model("hf-hub:{repo}", pretrained=True)\n```',
    }
    names = {"label_names": config.get("label_names")}
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    try:
        push_to_hf_hub(model, repo, model_config=names, model_card=card, safe_serialization=True)
    except Exception as error:  # httpx's errors and the Hub's own have no common base
        where = f"{folder} to the Hub's {repo}"
        raise InputError(f"cannot upload {where}, but all is saved here: {error}") from error
