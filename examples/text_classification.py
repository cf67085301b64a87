"""Is SAM worth it for my sentences? Fine-tune by each method and compare the accuracies.

    python text_classification.py --dataset SetFit/sst5 --method base sam obf --seeds 0 1 2

Copy this with hf_trainer.py and sam_obf.py; it needs transformers, datasets, accelerate and
scikit-learn. Choose rho by a validation split, not by test: too large a rho learns nothing.
"""

import argparse
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path

from datasets import ClassLabel, DatasetDict, Features, load_dataset
from hf_trainer import SAMTrainer
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    TrainingArguments,
    set_seed,
)

from sam_obf import OutputBiasForgetting

# Small enough for MiniLM on both data sets of experiments/text, with right labels.
RHO = {"base": 0.0, "sam": 0.02, "obf": 0.02, "asam": 0.1}


def parse(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = "sentence-transformers/all-MiniLM-L6-v2"
    p.add_argument("--model", default=default, help="on the Hub or a folder (%(default)s)")
    p.add_argument(
        "--dataset",
        required=True,
        help="on the Hub or a folder: columns text and label, a train split and others",
    )
    p.add_argument("--method", nargs="+", choices=RHO, default=list(RHO), help="(all)")
    p.add_argument("--rho", type=float, help="length of the perturbation (0.02; asam: 0.1)")
    p.add_argument("--gamma", type=float, help="of obf, 0 to 1 (1)")
    p.add_argument("--seeds", nargs="+", type=int, default=[0], help="one run each (0)")
    p.add_argument("--epochs", type=int, default=5, help="(%(default)s)")
    p.add_argument("--lr", type=float, default=1e-4, help="(%(default)s)")
    p.add_argument(
        "--batch-size", type=int, default=32, help="of each update and perturbation (%(default)s)"
    )
    p.add_argument("--max-length", type=int, default=128, help="in tokens (%(default)s)")
    p.add_argument("--output", type=Path, help="save each model there, as METHOD-SEED")
    args = p.parse_args(argv)
    if args.gamma is not None and "obf" not in args.method:
        p.error("--gamma is of --method obf")
    if args.rho is not None and args.method == ["base"]:
        p.error("--rho has no effect on --method base")
    if args.rho is not None and not 0 < args.rho < math.inf:
        p.error(f"--rho {args.rho} must be above 0: --method base has no perturbation")
    if args.gamma is not None and not 0 <= args.gamma <= 1:
        p.error(f"--gamma {args.gamma} must be from 0 to 1")
    for flag in ("epochs", "batch_size", "max_length"):
        if getattr(args, flag) < 1:
            p.error(f"--{flag.replace('_', '-')} {getattr(args, flag)} must be at least 1")
    args.gamma = 1.0 if args.gamma is None else args.gamma
    return args


def load(name: str) -> tuple[DatasetDict, list[str]]:
    """The splits that have labels, from 0 up, and the labels' names."""
    if Path(name).is_file():
        sys.exit(f"{name} is a file: give its folder, with train and others in files of their own")
    splits = load_dataset(name)
    for split, rows in splits.items():
        if not {"text", "label"} <= set(rows.column_names):
            found = ", ".join(rows.column_names)
            sys.exit(f"{name}, {split}: the columns are {found}; rename two to text and label")
    for split in [split for split, rows in splits.items() if not set(rows["label"]) - {None, -1}]:
        print(f"{name}, {split}: not judged, since its rows have no labels (-1 or empty)")
        del splits[split]
    if "train" not in splits or len(splits) < 2:
        sys.exit(f"{name} has the splits {', '.join(splits)}: it needs train, and one to judge by")
    for split, rows in splits.items():
        for column, missing in (("text", {None}), ("label", {None, -1})):
            if there := missing & set(rows[column]):
                value = "is empty" if None in there else "is -1, which is none"
                sys.exit(f"{name}, {split}: the {column} of a row {value}; remove such rows")
    label = splits["train"].features["label"]
    if not isinstance(label, ClassLabel):
        found = sorted(set(splits["train"]["label"]))
        label = ClassLabel(names=[str(one) for one in found])
        numbers = {one: i for i, one in enumerate(found)}
        for split, rows in splits.items():
            if unknown := sorted(set(rows["label"]) - set(found)):
                sys.exit(f"{name}, {split}: train has no label {unknown[0]!r}; remove such rows")
            splits[split] = rows.map(
                lambda row: {"label": numbers[row["label"]]},
                features=Features({**rows.features, "label": label}),
            )
    for split, rows in splits.items():
        if rows.features["label"] != label:
            sys.exit(f"{name}, {split}: its classes are not those of train, in their order")
    return splits, label.names


def fine_tune(
    model: str,
    splits: DatasetDict,
    names: list[str],
    *,
    method: str,
    rho: float,
    gamma: float = 1.0,
    seed: int = 0,
    epochs: int = 5,
    lr: float = 1e-4,
    batch_size: int = 32,
    max_length: int = 128,
    output: Path | None = None,
) -> dict:
    """The accuracy and NLL on every split but train, and the seconds of training."""
    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForSequenceClassification.from_pretrained(
        model, id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)}
    )
    tokens = splits.map(
        lambda rows: tokenizer(rows["text"], truncation=True, max_length=max_length), batched=True
    )
    updates = epochs * -(-len(splits["train"]) // batch_size)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            seed=seed,
            num_train_epochs=epochs,
            learning_rate=lr,
            warmup_steps=updates // 10,
            per_device_train_batch_size=batch_size,
            per_device_eval_batch_size=256,
            weight_decay=0.01,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
        )
        trainer = SAMTrainer(
            network,
            arguments,
            train_dataset=tokens["train"],
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=lambda found: {
                "accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())
            },
            rho=rho,
            adaptive="both" if method == "asam" else None,
            forget=OutputBiasForgetting(gamma, link="softmax") if method == "obf" else None,
        )
        begun = time.perf_counter()
        trainer.train()
        measured = {"seconds": time.perf_counter() - begun}
        for split in splits.keys() - {"train"}:
            found = trainer.evaluate(tokens[split])
            measured[split] = {"accuracy": found["eval_accuracy"], "nll": found["eval_loss"]}
    if output:
        trainer.save_model(output)
        tokenizer.save_pretrained(output)
    return measured


def show(rows: list[dict], splits: list[str]):
    """A line for each method: mean accuracy in percent, ± its standard deviation over seeds."""
    print("method      rho  seeds" + "".join(f"{split:>16}" for split in splits) + "   seconds")
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        line = f"{method:<8}{own[0]['rho']:>7g}{len(own):>7}"
        for split in splits:
            accuracies = [100 * row[split]["accuracy"] for row in own]
            spread = f" ± {statistics.stdev(accuracies):.2f}" if len(own) > 1 else ""
            line += f"{statistics.mean(accuracies):.2f}{spread}".rjust(16)
        print(line + f"{statistics.mean(row['seconds'] for row in own):>10.0f}")


def main(argv=None):
    args = parse(argv)
    splits, names = load(args.dataset)
    rows = []
    for method in args.method:
        rho = RHO[method] if args.rho is None or method == "base" else args.rho
        for seed in args.seeds:
            print(f"{method}, rho {rho:g}, seed {seed}", flush=True)
            measured = fine_tune(
                args.model,
                splits,
                names,
                method=method,
                rho=rho,
                gamma=args.gamma,
                seed=seed,
                epochs=args.epochs,
                lr=args.lr,
                batch_size=args.batch_size,
                max_length=args.max_length,
                output=args.output and args.output / f"{method}-{seed}",
            )
            rows.append({"method": method, "rho": rho, **measured})
    show(rows, [split for split in splits if split != "train"])


if __name__ == "__main__":
    main()
