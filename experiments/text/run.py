"""The runs of plan.md, one JSON file each: tuning on held-out sentences, then the seeds.

    python -m experiments.text.run --model MODEL --trec TREC --sst5 SST5 --output outputs/text

Start it again to go on, and as often as there are cores: the workers share the output folder. Runs
that are in data/ are not made again.
``--stop-after SETTING`` ends after that setting.
"""

import argparse
import contextlib
import fcntl
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import transformers
from datasets import ClassLabel, Dataset, load_dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    TrainingArguments,
    set_seed,
)

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(__file__).resolve().parent / "data"
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
from hf_trainer import SAMTrainer  # noqa: E402

from common import allocator  # noqa: E402
from sam_obf import OutputBiasForgetting  # noqa: E402

# In this order. "tuned_on": the setting whose lr and rho are taken over.
SETTINGS = {
    "trec-1000-wrong": {"data": "trec", "examples": 1000, "noise": 0.4, "epochs": 5, "seeds": 10},
    "trec-1000": {"data": "trec", "examples": 1000, "noise": 0.0, "epochs": 5, "seeds": 10},
    "sst5-2000": {"data": "sst5", "examples": 2000, "noise": 0.0, "epochs": 2, "seeds": 5},
    "trec-5452": {
        **{"data": "trec", "examples": 5452, "noise": 0.0, "epochs": 2, "seeds": 5},
        "tuned_on": "trec-1000",
    },
    "trec-5452-wrong": {
        **{"data": "trec", "examples": 5452, "noise": 0.4, "epochs": 2, "seeds": 5},
        "tuned_on": "trec-1000-wrong",
    },
}
LR = [2e-5, 5e-5, 1e-4, 2e-4, 5e-4]
RHO, ASAM_RHO = [0.01, 0.02, 0.05, 0.1, 0.2], [0.1, 0.2, 0.5, 1.0, 2.0]
# What is tuned and from which values; how often the epochs; SAMTrainer's arguments but rho.
ROWS = {
    "base": ("lr", LR, 1, {}),
    "base, twice the epochs": ("lr", LR, 2, {}),
    "SAM": ("rho", RHO, 1, {}),
    "OBF, gamma 1": ("rho", RHO, 1, {"forget": OutputBiasForgetting(1.0, link="softmax")}),
    "OBF, gamma to 0": ("rho", RHO, 1, {"forget": OutputBiasForgetting(1e-12, link="softmax")}),
    "ASAM": ("rho", ASAM_RHO, 1, {"adaptive": "both"}),
}
HELD_OUT, TUNING_SEED, MOST_TRIES = 1000, 1000, 8
FIRST_SEEDS = 5  # of every setting, before any setting has more
BATCH, MAX_LENGTH = 32, 64


# --------------------------------------------------------------------------------------------------
# Which runs there are


def file_of(output: Path, point: dict) -> Path:
    """Where a run's result is."""
    row = point["row"].replace(", ", "-").replace(" ", "-").lower()
    name = f"{row}-lr{point['lr']:g}-rho{point['rho']:g}-seed{point['seed']}.json"
    return output / point["setting"] / point["part"] / name


def result_of(output: Path, point: dict) -> dict | None:
    """A run's result, if it is made."""
    file = file_of(output, point)
    return json.loads(file.read_text()) if file.exists() else None


def restore(output: Path, data: Path = DATA):
    """Write the results that are in data/, since their folder may have been on another machine."""
    for part in ("tune", "seeds"):
        rows = pd.read_csv(data / f"{part}.csv").to_dict("records")
        for result in rows:
            result = {key: value for key, value in result.items() if not pd.isna(value)}
            file = file_of(output, result | {"part": part})
            if not file.exists():
                write_result(file, result | {"part": part})


def write_result(file: Path, result: dict):
    """Write a run's result whole or not at all: other workers read it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.replace(file)


def next_value(values: list[float], up: bool) -> float:
    """The value beyond a grid's end, on the scale 1, 2, 5."""
    steps = [1, 2, 5]
    exponent = int(np.floor(np.log10(values[-1 if up else 0]) + 1e-9))
    digit = round(values[-1 if up else 0] / 10**exponent)
    place = steps.index(digit) + (1 if up else -1)
    return float(f"{steps[place % 3]}e{exponent + place // 3}")


def tuning(
    output: Path, setting: str, row: str, lr: float | None
) -> tuple[list[dict], dict | None]:
    """The tries of a row, and once all are made the best: of equals, that of the least value.

    While the best lies on the grid's edge, the grid gets the next value there.
    """
    tuned, values, *_ = ROWS[row]
    while True:
        points = []
        for value in values:
            chosen = {"lr": value, "rho": 0.0} if tuned == "lr" else {"lr": lr, "rho": value}
            points.append(
                {"setting": setting, "part": "tune", "row": row, "seed": TUNING_SEED, **chosen}
            )
        results = [result_of(output, point) for point in points]
        if None in results:
            return points, None
        best = int(np.argmax([result["accuracy"] for result in results]))
        if 0 < best < len(values) - 1 or len(values) >= MOST_TRIES:
            return points, points[best]
        values = (
            [next_value(values, up=False), *values]
            if best == 0
            else [*values, next_value(values, up=True)]
        )


def chosen(output: Path, setting: str) -> tuple[list[dict], dict[str, dict]]:
    """All tries of a setting that are known by now, and each row's best that is known."""
    points, best = [], {}
    for row in ROWS:
        lr = best["base"]["lr"] if "base" in best else None
        if ROWS[row][0] == "rho" and lr is None:
            continue
        tries, winner = tuning(output, setting, row, lr)
        points += tries
        if winner:
            best[row] = winner
    return points, best


def points_of(output: Path, setting: str) -> list[dict]:
    """The runs of a setting that are known by now, in the order in which they are to be made."""
    source = SETTINGS[setting].get("tuned_on", setting)
    points, best = chosen(output, source)
    if source != setting:
        points = []
    if len(best) < len(ROWS):
        return points
    for seed in range(SETTINGS[setting]["seeds"]):
        for winner in best.values():
            points.append({**winner, "setting": setting, "part": "seeds", "seed": seed})
    return points


def to_make(output: Path, settings: list[str]) -> list[dict]:
    """The runs that are known by now and not made, in order."""
    points = [point for setting in settings for point in points_of(output, setting)]
    points.sort(key=lambda point: point["part"] == "seeds" and point["seed"] >= FIRST_SEEDS)
    return [point for point in points if not file_of(output, point).exists()]


# --------------------------------------------------------------------------------------------------
# One run


def sentences(source: str, setting: dict, part: str, seed: int) -> tuple[Dataset, Dataset]:
    """What a run trains on, with column ``wrong``, and what it is judged by: held out, or test."""
    splits = load_dataset(source)
    train = splits["train"]
    if not isinstance(train.features["label"], ClassLabel):
        sys.exit(f"{source}: the column label must have the classes' names (datasets.ClassLabel)")
    if "validation" in splits:
        held_out = splits["validation"]
    elif setting["examples"] < len(train):
        order = np.random.default_rng(0).permutation(len(train))
        held_out, train = train.select(order[:HELD_OUT]), train.select(order[HELD_OUT:])
    draw = np.random.default_rng(seed)
    train = train.select(draw.permutation(len(train))[: setting["examples"]])
    labels, classes = np.array(train["label"]), train.features["label"].num_classes
    wrong = draw.permutation(len(train)) < round(setting["noise"] * len(train))
    labels = np.where(wrong, (labels + draw.integers(1, classes, len(train))) % classes, labels)
    train = train.remove_columns("label").add_column("label", labels).add_column("wrong", wrong)
    return train, splits["test"] if part == "seeds" else held_out


def tokenized(tokenizer, ds: Dataset) -> Dataset:
    """Sorted by length, so that batches of an evaluation have little padding."""
    ds = ds.map(
        lambda rows: tokenizer(rows["text"], truncation=True, max_length=MAX_LENGTH), batched=True
    )
    ds = ds.add_column("length", [len(ids) for ids in ds["input_ids"]])
    return ds.sort("length")


def run(args, point: dict) -> dict:
    """Fine-tune, and judge the last weights."""
    setting = SETTINGS[point["setting"]]
    _, _, factor, options = ROWS[point["row"]]
    source = getattr(args, setting["data"])
    train, judged = sentences(source, setting, point["part"], point["seed"])
    classes = judged.features["label"].num_classes
    set_seed(point["seed"])
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    # In bf16 on a CPU, torch's fused attention takes most of a backward pass.
    model = AutoModelForSequenceClassification.from_pretrained(
        args.model, num_labels=classes, attn_implementation="eager"
    )
    train, judged = tokenized(tokenizer, train), tokenized(tokenizer, judged)
    epochs = factor * setting["epochs"]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            seed=point["seed"],
            num_train_epochs=epochs,
            learning_rate=point["lr"],
            warmup_steps=epochs * -(-len(train) // BATCH) // 10,
            weight_decay=0.01,
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=BATCH,
            train_sampling_strategy="group_by_length",
            save_strategy="no",
            report_to="none",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            bf16=True,
            dataloader_pin_memory=False,
        )
        trainer = SAMTrainer(
            model,
            arguments,
            train_dataset=train,
            data_collator=DataCollatorWithPadding(tokenizer),
            rho=point["rho"],
            **options,
        )
        wall, cpu = time.perf_counter(), time.process_time()
        trainer.train()
        spent = {
            "seconds": time.perf_counter() - wall,
            "cpu_seconds": time.process_time() - cpu,
        }

        def judge(ds):
            found = trainer.predict(ds)
            right = found.predictions.argmax(-1) == found.label_ids
            return float(right.mean()), float(found.metrics["test_loss"])

        accuracy, nll = judge(judged)
        measured = {"accuracy": accuracy, "nll": nll}
        if point["part"] == "seeds":
            measured["fitted"] = judge(train.filter(lambda row: not row["wrong"]))[0]
            if setting["noise"]:
                measured["fitted_wrong"] = judge(train.filter(lambda row: row["wrong"]))[0]
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {**point, **measured, **spent, "updates": trainer.state.global_step, **versions}


# --------------------------------------------------------------------------------------------------
# A worker


@contextlib.contextmanager
def locked(file: Path):
    """Whether this worker holds the lock; a worker that ends or is killed lets go of it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def make_one(args, todo: list[dict]) -> bool:
    """Make the first run of these that no other worker makes; False if there is none."""
    for point in todo:
        file = file_of(args.output, point)
        with locked(file.with_suffix(".lock")) as free:
            if not free or file.exists():
                continue
            result = run(args, point)
            write_result(file, result)
            print(
                f"{file.relative_to(args.output)}: {result['accuracy']:.2%}, "
                f"{result['cpu_seconds']:.0f} s of CPU",
                flush=True,
            )
            return True
    return False


def main(argv=None):
    """Run as from the command line."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = "sentence-transformers/all-MiniLM-L6-v2"
    p.add_argument("--model", default=default, help="MiniLM (%(default)s)")
    p.add_argument("--trec", required=True, help="folder or name on the Hub: columns text, label")
    p.add_argument("--sst5", required=True, help="the same, with a validation split")
    p.add_argument("--output", type=Path, default=Path("outputs/text"), help="(%(default)s)")
    p.add_argument("--stop-after", choices=SETTINGS, default=list(SETTINGS)[-1])
    args = p.parse_args(argv)
    torch.set_num_threads(1)
    allocator.keep_freed_memory()
    transformers.logging.set_verbosity_error()
    restore(args.output)
    settings = list(SETTINGS)[: list(SETTINGS).index(args.stop_after) + 1]
    while todo := to_make(args.output, settings):
        if not make_one(args, todo):
            time.sleep(10)  # others are at work on what the next runs depend on


if __name__ == "__main__":
    main()
