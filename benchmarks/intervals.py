"""How often the intervals hold the truth and the tests reject it: simulations with the variances of
the project's data.

python benchmarks/intervals.py    # a minute; prints Markdown tables
"""

import argparse
import itertools
import sys
from pathlib import Path

import numpy as np
from scipy.special import expit

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from robustness import calibration, intervals, rank_correlations

# Of differences between two methods on CIFAR-10 (SAM, ASAM and OBF against base; five seeds, 10,000
# images): the variance that an image has for all seeds alike, and that a seed has on one image; the
# standard deviation of a seed's own luck beside these.
IMAGE, NOISE, SEED = 0.001, 0.2, 0.002


def seeds(rng, number: int, images: int, rounds: int) -> float:
    """How often the interval over seeds holds the true difference in accuracy."""
    shared = rng.normal(0, np.sqrt(IMAGE / images), (rounds, 1))
    own = rng.normal(0, np.sqrt(SEED**2 + NOISE / images), (rounds, number))
    found = [intervals.over_seeds(row) for row in 0.004 + shared + own]
    return np.mean([f["low"] < 0.004 < f["high"] for f in found])


def images(rng, gained: float, lost: float, size: int, rounds: int) -> tuple[float, float]:
    """How often Tango's interval holds the true difference; and how often McNemar's test rejects a
    true one of 0.
    """
    held = rejected = 0
    for a, b, _ in rng.multinomial(size, [gained, lost, 1 - gained - lost], rounds):
        found = outcome(a, b, size)
        held += found["low"] < gained - lost < found["high"]
    both = (gained + lost) / 2
    for a, b, _ in rng.multinomial(size, [both, both, 1 - 2 * both], rounds):
        rejected += outcome(a, b, size)["p_value"] < 0.05
    return held / rounds, rejected / rounds


def outcome(gained: int, lost: int, size: int) -> dict:
    """What is found for two models of which one alone is right on so many images."""
    first, other = np.zeros(size, bool), np.zeros(size, bool)
    other[:gained] = True
    first[gained : gained + lost] = True
    return intervals.over_images(first, other)


def calibration_error(rng, too_sure: float, size: int, rounds: int) -> tuple[float, float, float]:
    """The true calibration error if logits are too large by a factor, the one that is measured on
    average, and how often its interval holds the truth.
    """
    logits = rng.normal(1.5, 1.5, 10**6)
    confidence, chance = expit(logits), expit(logits / too_sure)
    truth, held, measured = calibration.calibration_error(confidence, chance)["ece"], 0, 0.0
    for _ in range(rounds):
        drawn = rng.integers(10**6, size=size)
        right = rng.random(size) < chance[drawn]
        found = calibration.calibration_error(confidence[drawn], right)
        held += found["low"] <= truth <= found["high"]
        measured += found["ece"]
    return truth, measured / rounds, held / rounds


def correlation(rng, strength: float, rounds: int, seeds: int = 3) -> dict[str, float]:
    """How often three tests reject, of 20 settings of two methods and their seeds.

    The method explains half of the variance between settings of a quantity, of its rival and of
    accuracy. In what is left the quantity and accuracy are correlated by ``strength``, and so are
    its rival and accuracy: the two tell equally much.
    """
    rejected = dict.fromkeys(("within methods", "ignoring methods", "rival"), 0)
    method, nothing = np.repeat([0, 1], 10), np.zeros(20)
    for _ in range(rounds):
        left = rng.multivariate_normal(
            np.zeros(3), [[1, strength, strength], [strength, 1, 0.5], [strength, 0.5, 1]], 20
        )
        luck = rng.normal(0, np.array([1.0, 0.7, 0.7]) / np.sqrt(seeds), (20, 3))
        y, x, rival = (2.0 * method[:, None] + left + luck).T
        p_values = {
            "within methods": rank_correlations.permutation_test(x, y, method, seed=0),
            "ignoring methods": rank_correlations.permutation_test(x, y, nothing, seed=0),
            "rival": rank_correlations.swap_test(x, rival, y, method, seed=0),
        }
        for name, p in p_values.items():
            rejected[name] += p <= 0.05
    return {name: count / rounds for name, count in rejected.items()}


def main():
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rounds", type=int, default=2000, help="simulations of each case (%(default)s)"
    )
    rounds, rng = parser.parse_args().rounds, np.random.default_rng(0)
    rows = [
        (n, size, f"{seeds(rng, n, size, rounds):.1%}") for n in (5, 20) for size in (2000, 10_000)
    ]
    print_table(
        "Student's interval over paired seeds", ["seeds", "images", "holds the truth"], rows
    )
    cases = [
        (0.01, 0.005, 2000),
        (0.005, 0.002, 2000),
        (0.01, 0.005, 10_000),
        (0.05, 0.04, 2000),
        (0.02, 0.01, 400),
    ]
    rows = [(*case, *(f"{share:.1%}" for share in images(rng, *case, rounds))) for case in cases]
    head = [
        "gained",
        "lost",
        "images",
        "Tango's interval holds the truth",
        "McNemar's test rejects a true 0",
    ]
    print_table("Two models on the same images", head, rows)
    cases = list(itertools.product((1.0, 1.1, 1.3, 2.0), (2000, 10_000)))
    rows = [
        (*case, *(f"{share:.1%}" for share in calibration_error(rng, *case, max(1, rounds // 4))))
        for case in cases
    ]
    head = ["logits too large by", "images", "true ECE", "measured, mean", "holds the truth"]
    print_table("Calibration error", head, rows)
    rows = [
        (s, *(f"{share:.1%}" for share in correlation(rng, s, max(1, rounds // 4)).values()))
        for s in (0.0, 0.4, 0.6)
    ]
    head = [
        "correlation of settings",
        "p below 0.05, within methods",
        "p below 0.05, ignoring methods",
        "p below 0.05 against a rival as good",
    ]
    print_table("Kendall's tau over 20 settings of two methods, three seeds each", head, rows)


def print_table(title, head, rows):
    """A Markdown table under its title."""
    print(f"\n{title}:\n")
    for row in (head, ["---"] * len(head), *rows):
        print(f"| {' | '.join(map(str, row))} |")


if __name__ == "__main__":
    main()
