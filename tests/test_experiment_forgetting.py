"""experiments/forgetting: its tables on invented data, and whether its page is up to date."""

import itertools

import numpy as np
import pandas as pd
import pytest

from experiments import page
from experiments.forgetting import tables
from robustness import rank_correlations


def measurements(seeds, kinds, forgetting) -> list[dict]:
    """Rows of runs whose accuracy, lambda_max and gap rise with rho and m.

    Forgetting is a function of accuracy, perturbation and epoch.
    """
    rows = []
    for method, rho, m, seed in itertools.product(
        ("sam", "obf"), (0.05, 0.1), (16, 32, 64, 128), seeds
    ):
        accuracy = 0.5 + rho + m / 1000 + (method == "obf") / 50 + seed / 500
        run = {"run": f"{method},{rho},{m},{seed}", "setting": f"{method},{rho},{m}", "seed": seed}
        run |= {"method": method, "trained_m": m, "trained_rho": rho}
        run |= {"accuracy": accuracy, "measured_accuracy": 3 * accuracy}
        for epoch, kind in itertools.product((10, 20), kinds):
            row = run | {"epoch": epoch, "perturbation": kind, "rho": rho, "m": m}
            row |= {"sam_gap": accuracy, "lambda_max": accuracy}
            row |= {"relevant_change": -accuracy, "information": 3.0}
            rows.append(row | {"forgetting": forgetting(accuracy, kind, epoch)})
    return rows


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Data in which own forgetting goes with accuracy after the last epoch, and obf's is double."""
    monkeypatch.setattr(tables, "DATA", tmp_path)
    monkeypatch.setattr(tables.rank_correlations, "DRAWS", 99)

    def usual(accuracy, kind, epoch):
        return accuracy * (2 if kind == "obf" else 1) if epoch == 20 else -3 * accuracy

    files = {split: measurements(range(2), ("own", "sam"), usual) for split in tables.SPLITS}
    files[tables.OTHERS] = measurements(range(2), ("obf", "random"), usual)
    common = measurements(range(2), ("sam",), lambda accuracy, *_: 1 - accuracy)
    files[tables.COMMON] = [row | {"lambda_max": 7.0} for row in common if row["epoch"] == 20]
    for variant in tables.VARIANTS:
        sign = -1 if variant == "softmax" else 1
        files[variant] = measurements(range(1), ("own", "sam"), lambda a, *_, sign=sign: sign * a)
    files["random"] = [
        {"method": "random", "m": 128, "rho": rho, "run": f"{rho},{seed}", "seed": seed}
        | {"test": 0.4 + rho + seed / 100}
        for rho in (0.05, 0.1)
        for seed in range(3)
    ]
    for name, rows in files.items():
        page.write(tmp_path / f"{name}.csv", rows)
    forget_cache()
    yield tmp_path
    forget_cache()


def forget_cache():
    tables.measured.cache_clear()
    tables.taus.cache_clear()


def cells(rows, name) -> list[str]:
    """The cells of a row after its name."""
    return next(list(row.values())[1:] for row in rows if next(iter(row.values())) == name)


def test_correlations(data):
    own, flat = "forgetting, the run's own", "flatness, -lambda_max"
    on_accuracy, on_gap = (tables.correlations_table("train", t) for t in ("accuracy", "-gap"))

    def numbers(rows, name):
        return [float(cell.split()[0]) if cell else None for cell in cells(rows, name)]

    # All pairs, three times some fixed, above flatness', mean over epochs, above, single models. In
    # the mean over epochs forgetting falls with accuracy, as flatness does.
    assert numbers(on_accuracy, own) == [1, 1, 1, 1, 2, -1, 0, 1]
    assert numbers(on_accuracy, flat) == [-1, -1, -1, -1, None, -1, None, -1]
    # The gap rises with accuracy.
    assert numbers(on_gap, own) == [-1, -1, -1, -1, -2, 1, 0, -1]
    # Of one epoch there is no mean; flatness is that of the other measurement, not of this one.
    row = next(row for row in on_accuracy if "forgetting, the same for all" in row.values())
    assert "mean over epochs" not in row and row["above flatness'"].startswith("+0.00")
    assert row["all pairs"] == "-1.00 (p 0.01)"  # the least that 99 draws can tell


def test_what_settings_explain(data):
    rows = {row["quantity"]: row for row in tables.explained_table()}
    values = pd.DataFrame(measurements(range(2), ("own",), lambda a, *_: a)).query("epoch == 20")
    share = rank_correlations.explained(values["accuracy"], values["setting"])
    for name in ("accuracy on test", "forgetting, the run's own", "lambda_max"):
        assert rows[name]["share of variance"] == f"{share:.0%}"
    highest = rows["lambda_max"]["highest τ with single models"]
    assert highest == f"{rank_correlations.ceiling(share):.2f}"


@pytest.mark.pictures
@pytest.mark.parametrize("draw", [tables.draw_scatter, tables.draw_taus, tables.draw_epochs])
def test_pictures_are_drawn(data, draw):
    draw(data / "picture.png")
    assert (data / "picture.png").stat().st_size > 10_000


def test_another_estimate_is_compared_over_the_runs_that_it_has(data):
    table = tables.estimates_table("own")
    of_seed = measurements(range(1), ("own",), lambda a, *_: a)
    bits = np.mean([row["forgetting"] for row in of_seed if row["epoch"] == 20])
    assert cells(table, "as above") == [f"{bits:+.3f}", "+1.00", "+1.00", "-1.00"]
    assert cells(table, "softmax") == [f"{-bits:+.3f}", "-1.00", "-1.00", "+1.00"]


def test_perturbations_of_equal_rho_are_compared_on_the_same_weights(data):
    rows = pd.DataFrame(measurements(range(2), ("own",), lambda *_: 0))
    rows = rows.query("epoch == 20 and trained_rho == 0.1 and trained_m == 128")
    bits, twice = page.spread(rows["accuracy"]), page.spread(2 * rows["accuracy"])
    ends = [page.spread(rows.query(f"method == '{m}'")["accuracy"], 100) for m in ("sam", "obf")]
    expected = [bits, twice, bits, *ends, "51.00 ± 1.00"]
    assert cells(tables.equal_rho_table(), "0.1") == expected


def test_other_predictors_take_the_place_of_flatness(data, monkeypatch):
    rows = [row for row in measurements(range(2), ("own",), lambda *_: 0) if row["epoch"] == 20]
    out = ("sam", 32, 0.1)
    for row in rows:  # the method decides accuracy, then m and rho; one setting forgets the less
        inside = row["trained_rho"] + row["trained_m"] / 1000
        row["accuracy"] = {"sam": 2, "obf": 1}[row["method"]] + inside
        sign = -1 if (row["method"], row["trained_m"], row["trained_rho"]) == out else 1
        row["forgetting"] = sign * row["accuracy"]
    monkeypatch.setattr(tables, "OUTLYING", out)
    page.write(data / "train.csv", rows)
    page.write(data / "test.csv", [row | {"lambda_max": row["accuracy"]} for row in rows])
    forget_cache()
    table = tables.references_table()
    # Of the 120 pairs of settings 64 differ in method.
    alone = cells(table, "the method alone: SAM above OBF")
    assert float(alone[0].split()[0]) == pytest.approx((64 / 120) ** 0.5, abs=0.01)
    assert alone[1] == "-"
    flat = cells(table, "flatness, on test images")
    assert flat[0].startswith("-1.00") and flat[1].startswith("-1.00")
    own = float(alone[0].split()[0]) + float(alone[2].split()[0])  # the same whatever is beside it
    assert own == pytest.approx(-1 + float(flat[2].split()[0]), abs=0.02) and 0 < own < 1
    rest = cells(table, "forgetting, the run's own, on 30 models")
    assert rest[0].startswith("+1.00") and rest[2] == ""


@pytest.mark.slow
@pytest.mark.parametrize("name", tables.TABLES)
def test_the_page_has_the_tables_of_the_data(name):
    text = (tables.HERE / "README.md").read_text()
    assert page.markdown(tables.TABLES[name]()) in text, f"run {tables.SCRIPT}"
