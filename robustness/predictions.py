"""What models predicted in passes that are finished, on the disk."""

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from robustness import corruptions
from robustness.labels import right_answers
from robustness.sets import Pass, Protocol

# What a pass knows of each image, beside names; "file", "true" and "predicted" are on the disk.
# Images as they are have also SCALED, the confidence after temperature scaling.
COLUMNS = ("key", "label", "prediction", "top1", "top5", "nll", "confidence")
SCALED = "scaled"


def folder_of(output: str, model_name: str) -> Path:
    """Where a model's predictions are kept."""
    return Path(output) / "predictions" / re.sub(r"[^\w.-]+", "_", model_name)


def finished(folder: Path, which: Pass, request: dict):
    """A pass that an earlier run finished.

    Returns:
        Its columns by protocol, its record, and what its request had otherwise. Columns are None if
        that is anything, and all three if there is no such pass.
    """
    try:
        record = json.loads((folder / f"{which}.json").read_text())
        old = record["request"]
        changed = sorted(key for key in {*old, *request} if old.get(key) != request.get(key))
        if changed:
            return None, record, changed
        tables = {}
        for protocol in protocols(which, corrupted=bool(request["corrupt"])):
            if str(protocol) in record["protocols"]:
                file = folder / f"{protocol}.parquet"
                wanted = [*COLUMNS, SCALED] if not protocol.corruption else [*COLUMNS]
                if not set(wanted) <= set(pq.read_schema(file).names):
                    return None, record, ["what is measured"]
                table = pq.read_table(file, columns=wanted).to_pydict()
                tables[protocol] = {key: np.asarray(values) for key, values in table.items()}
                record["classes"][protocol.name]  # older passes have none
    except (OSError, ValueError, KeyError, TypeError):
        return None, None, None
    return tables, record, []


def protocols_of(record_file: Path) -> list[str]:
    """The protocols of a finished pass; none if there is no such record."""
    try:
        return json.loads(record_file.read_text())["protocols"]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def protocols(which: Pass, corrupted: bool) -> list[Protocol]:
    """All protocols that a pass may have."""
    kinds = [(which.corruption, which.severity)]
    if corrupted:
        kinds += itertools.product(corruptions.CORRUPTIONS, map(str, corruptions.SEVERITIES))
    nothing = {"label": [], "path": []}
    rows = [name for b in which.serves for name, *_ in right_answers(b, nothing)]
    return [Protocol(name, *kind) for name in rows for kind in kinds]


def without_names(tables: dict) -> dict:
    """A pass's tables without names, since those of many images are long."""
    return {
        protocol: {key: table[key] for key in (*COLUMNS, SCALED) if key in table}
        for protocol, table in tables.items()
    }


def as_arrow(table: dict, root: str | None) -> pa.Table:
    """A protocol's columns for Parquet: files below ``root``, each class's name stored once."""
    columns = dict(table)
    if "file" in table:
        below = f"{Path(root).expanduser()}/" if root else ""
        files = [file and str(file).removeprefix(below) for file in table["file"].tolist()]
        columns["file"] = pa.array(files, pa.string())
    for name in {"true", "predicted"} & set(table):
        columns[name] = pa.array(table[name].tolist(), pa.string()).dictionary_encode()
    return pa.table(columns)


def save(
    folder: Path, which: Pass, request: dict, tables: dict, unreadable: list[str],
    classes: dict[str, list[str]], root: str | None = None,
) -> dict:  # fmt: skip
    """Write each protocol's columns as Parquet, and last the record that the pass is finished.

    What an earlier request of the pass left is removed, its pictures too.

    Args:
        classes: their names by the protocol's.
        root: the folder that holds the images; files are named below it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    record_file = folder / f"{which}.json"
    earlier = protocols_of(record_file)
    record_file.unlink(missing_ok=True)  # it speaks for the tables, which are about to change
    for name in earlier:
        for file in (f"{name}.parquet", f"mistakes-{name}.png", f"confusion-{name}.png"):
            (folder / file).unlink(missing_ok=True)
    names = [str(protocol) for protocol in tables]
    for other in folder.glob("*.json"):  # as of a set called test, and of the digits
        if set(names) & set(protocols_of(other)):
            other.unlink()
    for protocol, table in tables.items():
        pq.write_table(as_arrow(table, root), folder / f"{protocol}.parquet")
    record = {"request": request, "protocols": names, "unreadable": unreadable}
    record["classes"] = classes
    record_file.write_text(json.dumps(record, indent=2) + "\n")
    return record
