"""Calibration errors and temperature scaling: definitions, brute force, simulated coverage."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.special import expit

from robustness import calibration


def test_calibration_error_equals_a_loop_over_bins():
    rng = np.random.default_rng(0)
    confidence = rng.random(500)
    right = rng.random(500) < 1 - confidence  # too sure in some bins, not sure enough in others
    expected = 0.0
    for low in range(15):
        inside = (confidence * 15 >= low) & (confidence * 15 < low + 1)
        if inside.any():
            expected += inside.mean() * abs(confidence[inside].mean() - right[inside].mean())
    found = calibration.calibration_error(confidence, right)
    assert found["ece"] == pytest.approx(expected)
    assert 0 < found["low"] < found["ece"] < found["high"]


@pytest.mark.parametrize("too_sure, images", [(1.0, 2000), (1.3, 10_000), (2.0, 2000)])
def test_the_interval_of_the_calibration_error_holds_the_truth(too_sure, images):
    rng, rounds = np.random.default_rng(1), 80
    logits = rng.normal(1.5, 1.5, 10**6)
    confidence, chance = expit(logits), expit(logits / too_sure)
    truth = calibration.calibration_error(confidence, chance)["ece"]  # right in this share of cases
    held, estimates = 0, []
    for _ in range(rounds):
        drawn = rng.integers(10**6, size=images)
        right = rng.random(images) < chance[drawn]
        found = calibration.calibration_error(confidence[drawn], right)
        held += found["low"] <= truth <= found["high"]
        estimates.append(found["ece"])
    assert 0.86 < held / rounds
    assert np.mean(estimates) > truth  # which is why the interval is not symmetric


def test_a_model_as_sure_as_it_should_be_may_have_no_error():
    confidence = np.repeat([0.55, 0.75, 0.95], 100)
    right = np.concatenate([np.arange(100) < n for n in (57, 74, 95)])
    found = calibration.calibration_error(confidence, right)
    assert found["ece"] == pytest.approx((0.02 + 0.01) / 3) and found["low"] == 0


def test_confidence_and_likelihood_at_a_temperature_are_those_of_divided_logits():
    logits = 3 * torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    right = torch.zeros(20, 6, dtype=torch.bool)
    right[:, 2] = right[:5, 4] = True  # five have two right answers
    found = calibration.at_temperatures(logits, right)
    for i in (0, 20, 48):
        p = (logits.double() / calibration.TEMPERATURES[i]).softmax(-1)
        assert found["confidence"][:, i] == pytest.approx(p.amax(-1).numpy(), rel=1e-4)
        likelihood = -(p * right).sum(-1).log().numpy()
        assert found["nll"][:, i] == pytest.approx(likelihood, rel=1e-4, abs=1e-5)


def drawn(factor, size=20_000):
    """Logits that are too large by a factor, and the labels that the right ones would draw."""
    generator = torch.Generator().manual_seed(2)
    true = 2 * torch.randn(size, 5, generator=generator)
    labels = torch.multinomial(true.softmax(-1), 1, generator=generator)[:, 0]
    return factor * true, torch.nn.functional.one_hot(labels, 5).bool()


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_scaling_undoes_a_factor_of_all_logits(factor):
    logits, right = drawn(factor)
    scaled = calibration.scaled_confidence(*calibration.at_temperatures(logits, right).values())
    true = (logits / factor).softmax(-1).amax(-1).numpy()
    assert np.abs(scaled - true).mean() < 0.005
    was_right = right.gather(1, logits.argmax(-1, keepdim=True))[:, 0].numpy()
    assert calibration.calibration_error(scaled, was_right)["low"] == 0
    own = calibration.calibration_error(logits.softmax(-1).amax(-1).numpy(), was_right)
    assert (own["low"] == 0) == (factor == 1)


def test_no_example_has_a_part_in_its_own_temperature():
    (sure, right), (unsure, _) = drawn(3.0, 40), drawn(0.5, 40)
    logits = torch.where(torch.arange(40)[:, None] % 2 == 0, sure, unsure)
    columns = calibration.at_temperatures(logits, right)
    scaled = calibration.scaled_confidence(**columns)
    # Those that are too sure get the temperature of those that are not sure enough.
    for half, others in ((0, 1), (1, 0)):
        best = columns["nll"][others::2].mean(0).argmin()
        near = columns["confidence"][half::2, best - 1 : best + 2]
        assert ((near.min(1) <= scaled[half::2]) & (scaled[half::2] <= near.max(1))).all()
    assert columns["nll"][0::2].mean(0).argmin() > columns["nll"][1::2].mean(0).argmin()


def test_one_image_alone_keeps_its_confidence():
    logits, right = drawn(1.0, 1)
    scaled = calibration.scaled_confidence(**calibration.at_temperatures(logits, right))
    assert scaled == pytest.approx(logits.softmax(-1).amax(-1).numpy(), abs=1e-6)


@pytest.mark.parametrize("temperature", [0.9, 1.0, 1.04, 2.5])
def test_the_temperature_is_that_of_the_least_likelihood_between_those_of_the_grid(temperature):
    logits, right = drawn(temperature)
    columns = calibration.at_temperatures(logits, right)
    scaled = calibration.scaled_confidence(**columns)
    for half in (0, 1):
        z, y = logits[1 - half :: 2], right[1 - half :: 2].float().argmax(-1)

        def likelihood(log_t, z=z, y=y):
            return torch.nn.functional.cross_entropy(z / np.exp(log_t), y).item()

        best = np.exp(minimize_scalar(likelihood, bounds=(-1, 2), method="bounded").x)
        expected = (logits[half::2] / best).softmax(-1).amax(-1).numpy()
        assert np.abs(scaled[half::2] - expected).max() < 0.002
