"""docs/cifar10_forgetting.py, which makes the page's tables and pictures of forgetting, on invented measurements."""

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
SECTIONS = ("correlations", "correlations_gap", "correlations_held_out", "references", "estimates", "equal_rho")


def measurements(seeds, kinds, forgetting):
    """Rows of runs whose accuracy, lambda_max and gap rise with rho and m; forgetting is a function of the accuracy."""
    rows = []
    for method, rho, m, seed in itertools.product(("sam", "obf"), (0.05, 0.1), (16, 32, 64, 128), seeds):
        accuracy = 0.5 + rho + m / 1000 + (method == "obf") / 50 + seed / 500
        own = {"run": f"{method},{rho},{m},{seed}", "setting": f"{method},{rho},{m}", "seed": seed, "method": method}
        own |= {"trained_m": m, "trained_rho": rho, "accuracy": accuracy, "measured_accuracy": 3 * accuracy}
        for epoch, kind in itertools.product((10, 20), kinds):
            row = own | {"epoch": epoch, "perturbation": kind, "rho": rho, "m": m, "sam_gap": accuracy}
            row |= {"relevant_change": -accuracy, "lambda_max": accuracy, "information": 3.0}
            rows.append(row | {"forgetting": forgetting(accuracy, kind, epoch)})
    return rows


@pytest.fixture
def scripts(tmp_path, monkeypatch):
    """Both scripts, which write to a folder."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    for name in ("cifar10", "cifar10_forgetting"):
        sys.modules.pop(name, None)
    import cifar10
    import cifar10_forgetting as script

    monkeypatch.setattr(cifar10, "PICTURES", tmp_path)
    return script, cifar10


@pytest.fixture
def page(scripts, tmp_path, monkeypatch):
    """The scripts, at home in a folder with such rows: own forgetting goes with accuracy, that of obf is double."""
    script, cifar10 = scripts
    for name, value in {"FILES": tmp_path / "data", "PAGE": tmp_path / "page.md"}.items():
        monkeypatch.setattr(cifar10, name, value)

    def usual(accuracy, kind, epoch):
        return accuracy * (2 if kind == "obf" else 1) if epoch == 20 else -3 * accuracy

    for split in script.SPLITS:
        cifar10.write(f"forgetting_{split}", measurements(range(2), ("own", "sam"), usual))
    cifar10.write(f"forgetting_{script.OTHERS}", measurements(range(2), ("obf", "random"), usual))
    common = measurements(range(2), ("sam",), lambda accuracy, *_: 1 - accuracy)
    cifar10.write(f"forgetting_{script.COMMON}", [{**r, "lambda_max": 7.0} for r in common if r["epoch"] == 20])
    for variant in script.VARIANTS:
        sign = -1 if variant == "softmax" else 1
        rows = measurements(range(1), ("own", "sam"), lambda a, *_, sign=sign: sign * a)
        cifar10.write(f"forgetting_{variant}", rows)
    own = {"m": 128}
    random = [own | {"rho": rho, "test": 0.4 + rho + seed / 100} for rho in (0.05, 0.1) for seed in range(3)]
    cifar10.write("random", random)
    marks = "".join(f"<!-- docs/cifar10_forgetting.py: {name} -->\nold\n<!-- end -->\n" for name in SECTIONS)
    cifar10.PAGE.write_text(marks)
    monkeypatch.setattr(script.correlations, "RESAMPLES", 20)
    script.taus.cache_clear()
    return script, cifar10


def cells(text, row):
    line = next(line for line in text.splitlines() if line.startswith(f"| {row} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


@pytest.mark.slow
def test_the_pages_tables_are_those_of_the_data_files(scripts, tmp_path, monkeypatch):
    script, cifar10 = scripts
    text = cifar10.PAGE.read_text()
    monkeypatch.setattr(cifar10, "PAGE", tmp_path / "page.md")
    cifar10.PAGE.write_text(text)
    script.main([])
    assert cifar10.PAGE.read_text() == text, "run python docs/cifar10_forgetting.py"


def test_tables_and_pictures(page, tmp_path):
    script, cifar10 = page
    script.main([])
    text = cifar10.PAGE.read_text()
    assert "\nold\n" not in text
    one, opposite, nothing = "+1.00 (+1.00 to +1.00)", "-1.00 (-1.00 to -1.00)", "+0.00 (+0.00 to +0.00)"
    twice, less = one.replace("1", "2"), opposite.replace("1", "2")
    own, flat = "forgetting, the run's own", "flatness, -lambda_max"
    # In the mean over epochs forgetting falls with accuracy, as flatness does.
    assert cells(text, own) == [one, twice, one, one, one, opposite, nothing]
    assert cells(text, flat) == [opposite, "", opposite, opposite, opposite, opposite, ""]
    gap = script.correlations_table("train", "-gap")
    assert gap in text
    assert cells(gap, own) == [opposite, less, opposite, opposite, opposite, one, nothing]
    # Of one epoch there is no mean; flatness is that of the other measurement, not of this one.
    assert cells(text, "forgetting, the same for all") == [opposite, nothing, opposite, opposite, opposite, "", ""]
    assert {path.stem for path in tmp_path.glob("*.png")} == {
        f"cifar10_forgetting_{name}" for name in ("scatter", "taus", "epochs")
    }


def test_another_estimate_is_compared_over_the_runs_that_it_has(page):
    script, _ = page
    table = script.estimates_table()
    of_seed = [row for row in measurements(range(1), ("own",), lambda a, *_: a) if row["epoch"] == 20]
    bits = np.mean([row["forgetting"] for row in of_seed])
    assert cells(table, "as above") == [f"{bits:+.3f}", "+1.00", "+1.00", "-1.00"] * 2
    assert cells(table, "softmax") == [f"{-bits:+.3f}", "-1.00", "-1.00", "+1.00"] * 2


def test_perturbations_of_equal_rho_are_compared_on_the_same_weights(page):
    script, cifar10 = page
    rows = measurements(range(2), ("own",), lambda *_: 0)
    rows = [r for r in rows if (r["epoch"], r["trained_rho"], r["trained_m"]) == (20, 0.1, 128)]
    bits = cifar10.spread([row["accuracy"] for row in rows])
    twice = cifar10.spread([2 * row["accuracy"] for row in rows])
    ends = [cifar10.spread([r["accuracy"] for r in rows if r["method"] == m], 100) for m in ("sam", "obf")]
    assert cells(script.equal_rho_table(), "0.1") == [bits, twice, bits, *ends, "51.00 ± 1.00"]


def test_other_predictors_take_the_place_of_flatness(page, monkeypatch):
    script, cifar10 = page
    rows = [row for row in measurements(range(2), ("own",), lambda *_: 0) if row["epoch"] == 20]
    out = ("sam", 32, 0.1)
    for row in rows:  # the method decides accuracy, then the seed; one setting forgets the less
        row["accuracy"] = {"sam": 0.2, "obf": 0.1}[row["method"]] + row["seed"] / 1000
        row["forgetting"] = row["accuracy"] * (-1 if (row["method"], row["m"], row["rho"]) == out else 1)
    monkeypatch.setattr(script, "OUTLYING", out)
    cifar10.write("forgetting_train", rows)
    cifar10.write("forgetting_test", [{**row, "lambda_max": row["accuracy"]} for row in rows])
    table = script.references_table()

    def numbers(row):
        return [float(cell.split()[0]) if cell else None for cell in cells(table, row)[:2]]

    # Of the pairs of different settings 256 differ in method; of the others 112 in seed.
    alone = numbers("the method alone: SAM above OBF")
    others = numbers("test accuracy of the setting's other seeds")
    flat = numbers("flatness, on test images")
    assert alone[0] == pytest.approx((256 / 368) ** 0.5, abs=0.01)
    assert others[0] == pytest.approx((256 - 112) / 368, abs=0.01)
    assert flat[0] == -1
    assert sum(alone) == pytest.approx(sum(others), abs=0.02) == pytest.approx(sum(flat), abs=0.02)
    assert 0 < sum(flat) < 1
    assert numbers("forgetting, the run's own, on 30 models") == [1, None]
