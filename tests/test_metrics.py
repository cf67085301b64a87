"""Intervals over seeds and images together."""

import numpy as np
import pytest
from scipy.stats import t

from robustness import statistics


@pytest.mark.parametrize(
    "seeds, luck, least", [(4, 0.02, 0.94), (3, 0.05, 0.91)]
)  # the images' is 0.017
def test_interval_over_seeds_and_images_holds_the_truth_about_as_often_as_it_says(
    seeds, luck, least
):
    rng, held, rounds = np.random.default_rng(0), 0, 1000
    for _ in range(rounds):
        of_seeds, of_images = luck * rng.normal(size=(seeds, 1)), 0.3 * rng.normal(size=(1, 300))
        found = statistics.crossed(
            0.01 + of_seeds + of_images + 0.2 * rng.normal(size=(seeds, 300))
        )
        held += found["low"] < 0.01 < found["high"]
    assert least < held / rounds < 0.99


def test_one_seed_has_no_interval():
    with pytest.raises(ValueError, match="at least two"):
        statistics.crossed(np.ones((1, 10)))


def test_without_images_luck_it_is_students_interval_over_seeds():
    of_seeds = np.array([0.01, 0.03, -0.02])
    found = statistics.crossed(np.repeat(of_seeds[:, None], 50, axis=1))
    half = t.ppf(0.975, 2) * of_seeds.std(ddof=1) / 3**0.5
    assert (found["mean"], found["low"]) == pytest.approx((of_seeds.mean(), of_seeds.mean() - half))


def test_without_seeds_luck_it_is_the_interval_over_images():
    of_images = np.random.default_rng(1).choice([-1.0, 0.0, 1.0], 500)
    found = statistics.crossed(np.repeat(of_images[None], 3, axis=0))
    half = t.ppf(0.975, 499) * of_images.std(ddof=1) / 500**0.5
    assert (found["mean"], found["high"]) == pytest.approx(
        (of_images.mean(), of_images.mean() + half)
    )


def test_methods_that_never_differ_differ_by_nothing():
    assert statistics.crossed(np.zeros((3, 10))) == {"mean": 0.0, "low": 0.0, "high": 0.0}
