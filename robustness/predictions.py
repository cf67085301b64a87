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
                table = pq.read_table(folder / f"{protocol}.parquet").to_pydict()
                tables[protocol] = {key: np.asarray(values) for key, values in table.items()}
    except (OSError, ValueError, KeyError, TypeError):
        return None, None, None
    return tables, record, []


def protocols(which: Pass, corrupted: bool) -> list[Protocol]:
    """All protocols that a pass may have."""
    kinds = [(which.corruption, which.severity)]
    if corrupted:
        kinds += itertools.product(corruptions.CORRUPTIONS, map(str, corruptions.SEVERITIES))
    nothing = {"label": [], "path": []}
    rows = [name for b in which.serves for name, *_ in right_answers(b, nothing)]
    return [Protocol(name, *kind) for name in rows for kind in kinds]


def save(folder: Path, which: Pass, request: dict, tables: dict, unreadable: list[str]) -> dict:
    """Write each protocol's columns as Parquet, and last the record that the pass is finished."""
    folder.mkdir(parents=True, exist_ok=True)
    record_file = folder / f"{which}.json"
    record_file.unlink(missing_ok=True)  # it speaks for the tables, which are about to change
    for protocol, table in tables.items():
        pq.write_table(pa.table(table), folder / f"{protocol}.parquet")
    names = [str(protocol) for protocol in tables]
    record = {"request": request, "protocols": names, "unreadable": unreadable}
    record_file.write_text(json.dumps(record, indent=2) + "\n")
    return record
