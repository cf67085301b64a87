"""Sharpness relative to the weights, against closed forms."""

import pytest
import torch

from robustness import sharpness


def quadratic():
    """Weights, and a loss that is half of w' A w."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    matrix = root @ root.T
    w = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64))
    return w, matrix, lambda: w @ matrix @ w / 2


def test_average_case_of_a_quadratic_is_its_scaled_trace():
    w, matrix, loss = quadratic()
    before = w.detach().clone()
    found = sharpness.average_case([w], loss, 0.1, 20_000, torch.Generator().manual_seed(1))
    expected = 0.1**2 * (matrix.diag() * before.square()).sum().item() / 2
    assert found == pytest.approx(expected, rel=0.1)
    assert torch.equal(w, before)


def test_worst_case_of_a_linear_loss_is_its_dual_norm():
    w = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
    slope = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    found = sharpness.worst_case([w], lambda: w @ slope, 0.2)
    assert found == pytest.approx(0.2 * (w.abs() * slope.abs()).sum().item())


def test_worst_case_of_a_quadratic_is_at_the_best_corner():
    w, matrix, loss = quadratic()
    before, radius = w.detach().clone(), 0.3
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 4)
    corners = before + radius * before.abs() * signs
    highest = ((corners @ matrix) * corners).sum(-1).max().item() / 2
    assert sharpness.worst_case([w], loss, radius) == pytest.approx(highest - loss().item())
    assert torch.equal(w, before)


@pytest.mark.parametrize("best, steps", [(1.04, 4), (0.97, 4), (1.001, 5)])
def test_worst_case_is_the_highest_on_the_way_and_not_the_last(best, steps):
    """The way oscillates about the maximum, which may be nearly where it began."""
    w, seen = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64)), []

    def loss():
        value = -(w - best).square().sum()
        seen.append(value.item())
        return value

    found = sharpness.worst_case([w], loss, 0.1, steps)
    assert len(seen) == steps + 1 and seen[-1] < max(seen)
    assert found == max(seen) - seen[0] and (found == 0) is (best == 1.001)


def test_neither_depends_on_the_scale_of_a_layer_that_the_next_undoes():
    def rise(scale):
        a = torch.nn.Parameter(scale * torch.tensor([1.0, 2.0], dtype=torch.float64))
        b = torch.nn.Parameter(torch.tensor([3.0, -1.0], dtype=torch.float64) / scale)

        def loss():
            return (a * b).square().sum()

        generator = torch.Generator().manual_seed(0)
        average = sharpness.average_case([a, b], loss, 0.1, 10, generator)
        return average, sharpness.worst_case([a, b], loss, 0.1)

    assert rise(10.0) == pytest.approx(rise(1.0))


def test_normalized_logits_do_not_tell_confidence():
    logits = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]])
    assert torch.allclose(sharpness.normalized(logits), sharpness.normalized(7 * logits))
    assert torch.allclose(sharpness.normalized(logits).std(-1, correction=0), torch.ones(2))


def test_a_weight_that_the_loss_does_not_see_changes_nothing():
    w, _, loss = quadratic()
    unseen = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    assert sharpness.worst_case([w, unseen], loss, 0.1) == sharpness.worst_case([w], loss, 0.1)


def test_the_loss_is_the_cross_entropy_of_normalized_logits():
    model, y = torch.nn.Linear(3, 4), torch.tensor([0, 3])
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    logits = model(x)
    scaled = (logits - logits.mean(-1, keepdim=True)) / logits.std(-1, correction=0, keepdim=True)
    expected = -scaled.log_softmax(-1)[[0, 1], y].mean()
    assert torch.allclose(sharpness.loss_of(model, x, y)(), expected)
