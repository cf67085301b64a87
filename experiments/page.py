"""What the experiments' scripts share: data files, numbers as text, tables on pages."""

import argparse
import functools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import timm
import torch
import yaml
from timm.data import create_transform, resolve_data_config

from common import data, report
from common.images import decode
from robustness.intervals import holm, over_seeds

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = (
    "lr",
    "rho",
    "gamma",
    "perturb_fraction",
)  # that are text: as the sweep wrote them, or ""


def read(file: Path) -> pd.DataFrame:
    """A data file: a row for each run, or for each measurement of one."""
    frame = pd.read_csv(file, dtype=dict.fromkeys(SETTINGS, str))
    return frame.fillna({name: "" for name in SETTINGS if name in frame})


def write(file: Path, rows: pd.DataFrame | list[dict]):
    """Write a data file, and say how many rows it has: a sweep may not have ended."""
    frame = pd.DataFrame(rows)
    file.parent.mkdir(exist_ok=True)
    frame.to_csv(file, index=False)
    print(f"{file.name}: {len(frame)} rows")


def update(file: Path, rows: list[dict], keys: list[str], order: list[str]):
    """Write a data file anew, but keep what it has of runs that are not among ``rows``.

    So an experiment may go on where the folders of its earlier runs are lost.

    Args:
        keys: the columns by which runs are told apart and sorted; ``row`` is one of them.
        order: the rows' names, as they are sorted.
    """
    frame = pd.DataFrame(rows).round(6)
    if file.exists():
        frame = pd.concat([frame, pd.read_csv(file)]).drop_duplicates(keys)
    at = {name: i for i, name in enumerate(order)}
    write(file, frame.sort_values(keys, key=lambda own: own.map(at) if own.name == "row" else own))


def finished(sweep: Path) -> Iterator[tuple[Path, dict, dict]]:
    """The folder, settings and results of each run of a sweep that has ended."""
    for file in sorted(sweep.glob("runs/*/results.json")):
        settings = yaml.safe_load((file.parent / "settings.yaml").read_text())
        yield file.parent, settings, json.loads(file.read_text())


def lines_of(sweep: Path, row_of: Callable, keys: list[str]) -> Iterator[tuple[Path, dict, dict]]:
    """The folder, settings and line of a data file of each run of a sweep that has ended.

    Args:
        row_of: the name of a run's row, from its settings.
        keys: "row", and the settings that the line has besides accuracy and seconds.
    """
    for run, settings, results in finished(sweep):
        line = {"row": row_of(settings)} | {key: settings[key] for key in keys if key != "row"}
        seconds = sum(epoch["seconds"] for epoch in report.read_metrics(run))
        yield run, settings, line | results["last"] | {"seconds": seconds}


def relative_time(runs: pd.DataFrame) -> pd.Series:
    """By row: the time of its training in units of base's, each by its fastest seed.

    Other work may have run beside the others.
    """
    seconds = runs.groupby("row")["seconds"].min()
    return seconds / seconds["base"]


def training_images(settings: dict):
    """What a run trained on, with the right labels."""
    return _split(*(settings[key] for key in ("dataset", "validation_share", "train_share")))


@functools.cache  # the runs of a sweep share it
def _split(dataset: str, validation_share: float | None, train_share: float | None):
    return data.load(dataset, False, validation_share, train_share)["train"]


def predicted(model: Path, images: list[dict]) -> torch.Tensor:
    """The class that a model predicts for each image, without augmentation."""
    opened = timm.create_model(f"local-dir:{model}", pretrained=True).eval()
    transform = create_transform(**resolve_data_config(model=opened))
    classes = []
    for start in range(0, len(images), 256):
        inputs = [transform(decode(image)) for image in images[start : start + 256]]
        with torch.no_grad():
            classes.append(opened(torch.stack(inputs)).argmax(-1))
    return torch.cat(classes)


def spread(values, factor: float = 1.0) -> str:
    """Mean ± standard deviation over seeds."""
    values = factor * np.asarray(values, dtype=float)
    return f"{values.mean():.2f} ± {values.std(ddof=1):.2f}"


def interval(found: dict, factor: float = 1.0) -> str:
    """An estimate with its interval, from ``mean``, ``low`` and ``high``."""
    mean, low, high = (factor * found[key] for key in ("mean", "low", "high"))
    return f"{mean:+.2f} ({low:+.2f} to {high:+.2f})"


def p_value(p: float) -> str:
    """A p value as text."""
    return f"p {p:.2f}" if p >= 0.01 else "p < 0.01"


def difference(runs: pd.DataFrame, row: str, rival: str) -> dict:
    """How many points of accuracy on test a row is above another, over the seeds that both have.

    Args:
        runs: a line a run, with the columns ``row``, ``seed`` and ``test``, a share.
    """
    by_seed = 100 * runs.pivot(index="seed", columns="row", values="test")
    return over_seeds((by_seed[row] - by_seed[rival]).dropna())


def compared(runs: pd.DataFrame, pairs: list[tuple[str, str]]) -> dict[tuple[str, str], dict]:
    """By pair of rows: ``difference``, with ``holm``, its p value among all of the pairs."""
    return corrected({pair: difference(runs, *pair) for pair in pairs})


def decisions(runs: pd.DataFrame, pairs: list[tuple[str, str]], size: float) -> list[dict]:
    """The table of the comparisons that decide; ``size`` is that of ``verdict``."""
    return [
        {
            "comparison": f"{row} against {rival}",
            "points": interval(found),
            "Holm": p_value(found["holm"]),
            "verdict": verdict(found, size),
        }
        for (row, rival), found in compared(runs, pairs).items()
    ]


def corrected(differences: dict) -> dict:
    """The same differences by the same keys, each with ``holm``, its p value among them all."""
    ps = holm([one["p_value"] for one in differences.values()])
    return {key: {**one, "holm": p} for (key, one), p in zip(differences.items(), ps)}


def verdict(found: dict, size: float) -> str:
    """What a plan says of a difference in points, where ``size`` would matter.

    Its p value, ``holm``, is corrected.
    """
    if found["holm"] < 0.05:
        worse = " worse" if found["mean"] < 0 else ""
        return f"shown{worse}, and it matters" if abs(found["mean"]) >= size else f"shown{worse}"
    if max(-found["low"], found["high"]) < size:
        return "too small to matter"
    return "not shown"


def best_in_bold(shares: pd.Series, others: pd.Series | None = None) -> str:
    """What was tried as "value: share, ...", shares in %; ``others`` stand in parentheses."""
    cells = []
    for value, share in shares.items():
        cell = f"{value:g}: {100 * share:.1f}"
        cell += "" if others is None else f" ({100 * others[value]:.1f})"
        cells.append(f"**{cell}**" if value == shares.idxmax() else cell)
    return ", ".join(cells)


def tried(tries: pd.DataFrame, key: str) -> list[dict]:
    """The table of what each row was tried with, by the mean over seeds on held-out images."""
    return [
        {"row": row, f"{key}: held out, %": best_in_bold(own.groupby(key)["validation"].mean())}
        for row, own in tries.groupby("row", sort=False)
    ]


def tried_together(tries: pd.DataFrame, key: str, other: str) -> list[dict]:
    """The table of two settings that were tried together, a line for each value of ``key``."""
    means = 100 * tries.groupby([key, other])["validation"].mean()
    lines = []
    for value, own in means.unstack().iterrows():
        line = {f"{key}, held out, %": f"{value:g}"}
        for another, mean in own.items():
            text = "" if np.isnan(mean) else f"{mean:.1f}"
            best = (value, another) == means.idxmax()
            line[f"{other} {another:g}"] = f"**{text}**" if best else text
        lines.append(line)
    return lines


def markdown(rows: list[dict]) -> str:
    """A table with a column for each key; a row may lack some."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns)]
    lines += [[str(row.get(column, "")) for column in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def fill(page: Path, script: str, tables: dict[str, Callable[[], list[dict]]]):
    """Write tables to their places on a page, each between two comments.

    A place is ``<!-- SCRIPT: NAME -->``, then whatever stands there now, then ``<!-- end -->``.

    Args:
        page: the file.
        script: how the script is called, as in the comment.
        tables: functions that return a table's rows, by name.

    Raises:
        SystemExit: a table has no place on the page, or a place no table.
    """
    text = page.read_text()
    place = re.compile(rf"(<!-- {re.escape(script)}: (\w+) -->\n).*?(?=<!-- end -->)", re.DOTALL)
    differing = {found[2] for found in place.finditer(text)} ^ tables.keys()
    if differing:
        raise SystemExit(
            f"{page}: it and {script} differ in their tables: {', '.join(sorted(differing))}"
        )
    page.write_text(
        place.sub(lambda found: f"{found[1]}\n{markdown(tables[found[2]]())}\n\n", text)
    )


def remake(module_doc: str, page: Path, script: str, tables: dict, collect: Callable, argv=None):
    """Run a page's script as from the command line: ``fill``, after ``--collect`` if asked to."""
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=module_doc, formatter_class=raw)
    p.add_argument("--collect", type=Path, metavar="OUTPUTS", help="make data/ from the runs there")
    args = p.parse_args(argv)
    if args.collect:
        collect(args.collect)
    fill(page, script, tables)
