"""Rank correlations of measured quantities with accuracy: closed forms, brute force, simulation."""

import itertools
import math
import warnings

import numpy as np
import pandas as pd
import pytest
from scipy.stats import kendalltau

from robustness import rank_correlations, report

TARGETS = rank_correlations.TARGETS


def one_run(run, setting, seed, epoch=1, **values):
    """A row of ``table_of``."""
    usual = {
        "forgetting": 0.0,
        "relevant_change": 0.0,
        "lambda_max": 0.0,
        "sam_gap": 0.0,
        "measured_accuracy": 1.0,
    }
    names = {
        "run": run,
        "setting": setting,
        "seed": seed,
        "epoch": epoch,
        "perturbation": "sam",
        "method": "sam",
    }
    return names | {"trained_m": 8, "trained_rho": 0.1, "accuracy": 0.5} | usual | values


def test_kendall_is_scipys_also_with_ties_and_for_many_draws_at_once():
    x, y = np.random.default_rng(0).integers(0, 6, (2, 3, 40))
    found = rank_correlations.kendall(x, y, np.ones((40, 40), bool))
    assert found == pytest.approx([kendalltau(a, b).statistic for a, b in zip(x, y)])


def test_kendall_counts_the_pairs_that_are_asked_for_one_by_one():
    rng = np.random.default_rng(1)
    x, y, settings, strata = rng.integers(0, 9, (4, 30))
    equal = rank_correlations.equal
    found = rank_correlations.kendall(x, y, equal(strata.astype(str)) & ~equal(settings))
    pairs = [
        (i, j)
        for i, j in itertools.combinations(range(30), 2)
        if settings[i] != settings[j] and strata[i] == strata[j]
    ]
    signs = np.array([(np.sign(x[i] - x[j]), np.sign(y[i] - y[j])) for i, j in pairs])
    expected = signs.prod(1).sum() / np.sqrt((signs**2).sum(0).prod())
    assert found == pytest.approx(expected)


def runs_of(x, y, strata=None, seeds=2, luck=0.0) -> pd.DataFrame:
    """Runs of settings whose forgetting is x and accuracy y; their seeds' luck cancels in means."""
    rows = []
    for i, (forgotten, accuracy) in enumerate(zip(x, y)):
        for seed in range(seeds):
            by = luck * (seed - (seeds - 1) / 2)
            values = {"forgetting": forgotten + by, "accuracy": accuracy - by}
            values["method"] = "sam" if strata is None else strata[i]
            rows.append(one_run(f"{i}-{seed}", str(i), seed, **values))
    return pd.DataFrame(rows)


def test_tau_is_of_the_means_of_settings_and_that_of_runs_of_pairs_of_different_settings():
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(2, 9))
    runs = runs_of(x, y, luck=0.7)
    found = rank_correlations.correlate(runs, TARGETS["accuracy"], 0)["forgetting"]
    assert found["tau"] == pytest.approx(kendalltau(x, y).statistic)
    pairs = [p for p in itertools.combinations(range(18), 2) if p[0] // 2 != p[1] // 2]
    signs = [
        np.sign(runs[key][i] - runs[key][j]) for i, j in pairs for key in ("forgetting", "accuracy")
    ]
    assert found["tau_runs"] == pytest.approx(np.reshape(signs, (-1, 2)).prod(1).mean())
    assert found["tau_runs"] != pytest.approx(found["tau"])


def test_seeds_that_tell_nothing_new_change_nothing():
    x, y = np.random.default_rng(3).normal(size=(2, 12))
    once, thrice = (
        rank_correlations.correlate(runs_of(x, y, seeds=seeds), TARGETS["accuracy"], 0)
        for seeds in (1, 3)
    )
    assert once["forgetting"] == pytest.approx(thrice["forgetting"], abs=1e-9, nan_ok=True)


@pytest.mark.parametrize("strata", [(0, 0, 0, 0, 0), (0, 1, 0, 1, 0)])
def test_the_p_value_is_that_of_all_permutations_within_strata(strata):
    x, y = [1.0, 2.0, 3.0, 4.0, 5.0], [1.0, 3.0, 2.0, 5.0, 4.0]
    pairs = rank_correlations.equal(strata)
    tau = rank_correlations.kendall(x, y, pairs)
    taus = []
    for order in itertools.permutations(range(5)):
        if all(strata[i] == strata[j] for i, j in enumerate(order)):
            taus.append(rank_correlations.kendall(np.array(x)[list(order)], y, pairs))
    exact = np.mean(np.abs(taus) >= abs(tau) - 1e-12)
    assert 0.01 < exact < 0.99
    found = rank_correlations.permutation_test(x, y, strata, seed=0)
    assert found == pytest.approx(exact, abs=0.03)


@pytest.mark.parametrize("strata", [(0, 0, 0, 0, 0, 0), (0, 1, 0, 1, 0, 1)])
def test_the_p_value_of_a_difference_is_that_of_all_swaps_of_ranks(strata):
    y = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    x, rival = np.array([1.0, 2.0, 4.0, 3.0, 5.0, 6.0]), np.array([20.0, 50, 10, 60, 40, 30])
    pairs, ranks = rank_correlations.equal(strata), []
    for values in (x, rival):
        ranks.append(pd.Series(values).groupby(list(strata)).rank().to_numpy())
    differences = []
    for swapped in itertools.product((False, True), repeat=6):
        first, other = np.where(swapped, ranks[1], ranks[0]), np.where(swapped, *ranks)
        taus = [rank_correlations.kendall(v, y, pairs) for v in (first, other)]
        differences.append(taus[0] - taus[1])
    exact = np.mean(np.abs(differences) >= abs(differences[0]) - 1e-12)
    assert 0.01 < exact < 0.99
    found = rank_correlations.swap_test(x, rival, y, strata, seed=0)
    assert found == pytest.approx(exact, abs=0.03)
    assert rank_correlations.swap_test(rival, x, y, strata, seed=0) == pytest.approx(found)


def test_what_the_method_alone_explains_is_not_found_within_methods(monkeypatch):
    monkeypatch.setattr(rank_correlations, "DRAWS", 199)
    rng, rejected = np.random.default_rng(4), {"method": 0, "nothing": 0}
    method = np.repeat([0, 1], 10)
    for _ in range(60):
        x, y = 3 * method + rng.normal(size=(2, 20))
        for name, strata in (("method", method), ("nothing", 0 * method)):
            rejected[name] += rank_correlations.permutation_test(x, y, strata, 0) <= 0.05
    assert rejected["method"] <= 6 and rejected["nothing"] > 30


def test_variance_explained_and_the_ceiling_of_tau_are_those_of_simulated_settings():
    rng = np.random.default_rng(5)
    settings, luck = rng.normal(size=4000), 0.8 * rng.normal(size=(4000, 3))
    values = (settings[:, None] + luck).ravel()
    share = rank_correlations.explained(values, np.repeat(np.arange(4000), 3))
    assert share == pytest.approx(1 / 1.64, abs=0.02)
    tau = kendalltau(settings, settings + luck[:, 0]).statistic
    assert rank_correlations.ceiling(share) == pytest.approx(tau, abs=0.02)
    assert rank_correlations.ceiling(1.0) == 1 and rank_correlations.ceiling(0.0) == 0


def test_variance_explained_has_the_closed_form_of_two_runs_a_setting():
    # Shrout and Fleiss' ICC(1): (MSB - MSW) / (MSB + MSW), here of mean squares 18 and 2.
    values, settings = [0.0, 2.0, 4.0, 6.0, 6.0, 8.0], ["a", "a", "b", "b", "c", "c"]
    between = 2 * np.var([1, 5, 7], ddof=1)
    assert rank_correlations.explained(values, settings) == pytest.approx(
        (between - 2) / (between + 2)
    )
    assert math.isnan(rank_correlations.explained([1.0, 2.0], ["a", "b"]))
    assert math.isnan(rank_correlations.explained([1.0, 2.0], ["a", "a"]))


@pytest.mark.parametrize("accuracy", ["equal", "ties"])
def test_equal_values_have_no_tau_without_a_warning(accuracy):
    values = [0.5] * 6 if accuracy == "equal" else [i // 2 for i in range(6)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runs = runs_of(range(6), values)
        found = rank_correlations.correlate(runs, TARGETS["accuracy"], 0)
    own, flat = found["forgetting"], found["flatness"]
    assert math.isnan(own["tau"]) == math.isnan(own["p_value"]) == (accuracy == "equal")
    assert all(math.isnan(value) for value in flat.values())
    assert math.isnan(own["above_rival"]) and math.isnan(own["above_p"])


def test_a_run_counts_with_its_last_epoch_and_with_the_mean_over_epochs():
    made = [(1, 9, 0), (2, 0, 8), (3, 6, 6), (4, 1, 9)]  # accuracy, and forgetting after two epochs
    rows = [
        one_run(f"run{a}", str(a), 0, epoch, accuracy=a, forgetting=value, lambda_max=-a, sam_gap=a)
        for a, *values in made for epoch, value in enumerate(values, 1)
    ]  # fmt: skip
    found = {
        (c["epochs"], c["quantity"]): c["tau"]
        for c in rank_correlations.table(rows, 0) if c["target"] == "accuracy"
    }  # fmt: skip
    accuracy = [a for a, _, _ in made]
    assert found["last", "forgetting"] == pytest.approx(
        kendalltau([0, 8, 6, 9], accuracy).statistic
    )
    assert found["last", "forgetting"] != pytest.approx(
        kendalltau([9, 0, 6, 1], accuracy).statistic
    )  # the first
    assert found["mean", "forgetting"] == pytest.approx(
        kendalltau([4.5, 4, 6, 5], accuracy).statistic
    )
    assert found["mean", "forgetting"] != pytest.approx(
        kendalltau([9, 8, 6, 9], accuracy).statistic
    )  # the maximum
    assert found["mean", "forgetting"] != pytest.approx(found["last", "forgetting"])
    assert found["last", "-sam_gap"] == pytest.approx(-1)
    assert found["last", "flatness"] == pytest.approx(1)


def test_the_gap_is_that_after_the_last_epoch_to_the_images_measured_on():
    made = [(0.5, 0.9), (0.6, 0.8), (0.7, 1.0), (0.8, 0.9)]  # accuracy on test, and in training
    rows = [
        one_run(
            str(i), str(i), 0, epoch, accuracy=test, measured_accuracy=train * epoch / 2,
            forgetting=i,
        )
        for i, (test, train) in enumerate(made) for epoch in (1, 2)
    ]  # fmt: skip
    gaps = [train - test for test, train in made]
    expected = kendalltau(range(4), np.negative(gaps)).statistic
    assert expected != kendalltau(range(4), [test for test, _ in made]).statistic
    found = [c for c in rank_correlations.table(rows, 0) if c["quantity"] == "forgetting"]
    assert [c["tau"] for c in found if c["target"] == "-gap"] == pytest.approx([expected] * 2)
    assert {c["target"] for c in rank_correlations.table(rows, 0, gap=False)} == {"accuracy"}


# Whether better models have more of what was measured, or less, if the measure is right.
BETTER = dict.fromkeys(("forgetting", "relevant_change"), 1) | dict.fromkeys(
    ("lambda_max", "trace", "average_sharpness", "worst_sharpness", "sam_gap", "feature_rank"), -1
)
BETTER |= {"measured_loss": -1}


@pytest.mark.parametrize("measure", BETTER)
def test_every_measure_ranks_models_in_its_direction(measure):
    usual = dict.fromkeys(BETTER, 0.0)
    rows = [
        one_run(str(i), str(i), 0, **usual | {"accuracy": i / 10, measure: BETTER[measure] * i})
        for i in range(4)
    ]
    found = {
        one["quantity"]: one["tau"]
        for one in rank_correlations.table(rows, 0, gap=False)
        if one["epochs"] == "last" and not one["fixed"]
    }
    assert [tau for tau in found.values() if not math.isnan(tau)] == [1.0]
    assert len(found) == len(BETTER)


def test_what_a_tau_of_runs_can_reach_is_that_of_its_own_target():
    """Settings tell everything about accuracy, and half of the gap."""
    rows = [
        one_run(
            f"{i}, {seed}", str(i), seed, accuracy=i / 10, forgetting=seed,
            measured_accuracy=i / 10 + 0.1 * i + 0.2 * seed,
        )
        for i in range(4) for seed in (0, 1)
    ]  # fmt: skip
    found = rank_correlations.table(rows, 0)
    gaps = [-0.1 * i - 0.2 * seed for i in range(4) for seed in (0, 1)]
    share = rank_correlations.explained(gaps, np.repeat(range(4), 2))
    assert 0.1 < share < 0.9
    expected = {"accuracy": 1.0, "-gap": 2 / math.pi * math.asin(math.sqrt(share))}
    reachable = {(c["target"], c["fixed"]): c["reachable"] for c in found}
    for target, most in expected.items():
        assert reachable[target, None] == pytest.approx(most)


def test_what_varies_is_fixed_in_turn():
    rows = []
    for i, (m, rho) in enumerate(itertools.product((8, 16), (0.1, 0.2, 0.4))):
        rows.append(
            one_run(
                str(i),
                str(i),
                0,
                trained_m=m,
                trained_rho=rho,
                forgetting=rho * 10 + m,
                accuracy=rho - m,
            )
        )
    found = {
        c["fixed"]: c["tau"] for c in rank_correlations.table(rows, 0)
        if (c["epochs"], c["target"], c["quantity"]) == ("last", "accuracy", "forgetting")
    }  # fmt: skip
    assert set(found) == {None, "m", "rho"} and found["m"] == 1 and found["rho"] == -1


def test_a_perturbation_of_runs_that_differ_in_less_has_a_place_in_the_table(capsys):
    """Base has no rho, and no perturbation of its own."""
    rows = []
    for i in range(8):
        method = {"method": "base", "trained_rho": None} if i % 2 else {"trained_rho": 0.1}
        run = one_run(str(i), str(i), 0, forgetting=i, accuracy=i, **method)
        rows += [{**run, "perturbation": kind} for kind in (["sam"] if i % 2 else ["sam", "own"])]
    report.show_correlations(rank_correlations.table(rows, 0))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    own, sam = ([line for line in lines if line[:1] == [kind]] for kind in ("own", "sam"))
    assert own and sam and all(line.count("-") > 1 for line in own)
