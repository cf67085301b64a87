"""The Hessian's largest eigenvalue and trace, against the explicit Hessian and closed forms."""

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy

from robustness import flatness

ROOT = Path(__file__).parent.parent


def small_network(norm=None, act=torch.nn.ReLU):
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 4, 3), norm(4) if norm else torch.nn.Identity(), act()]
    model = torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(16, 3)).double()
    return model.eval() if norm is None else _with_statistics(model)


def _with_statistics(model):
    model.train()(torch.randn(64, 3, 4, 4, dtype=torch.float64) * 2 + 1)
    return model.eval()


def examples(count):
    return torch.randn(count, 3, 4, 4, dtype=torch.float64), torch.arange(count) % 3


def batches_of(x, y, size=5):
    return lambda start, stop: list(zip(x[start:stop].split(size), y[start:stop].split(size)))


def explicit_hessian(model, criterion, x, y):
    names, params = zip(*model.named_parameters())

    def loss(flat):
        parts = torch.split(flat, [p.numel() for p in params])
        named = {name: part.reshape(p.shape) for name, part, p in zip(names, parts, params)}
        return criterion(torch.func.functional_call(model, named, (x,)), y)

    flat = torch.cat([p.detach().flatten() for p in params])
    return torch.autograd.functional.hessian(loss, flat)


@pytest.mark.parametrize(
    "model",
    [small_network(), small_network(torch.nn.BatchNorm2d), small_network(act=torch.nn.SiLU)],
    ids=["plain", "norm", "silu"],  # SiLU has no forward derivative
)
@pytest.mark.parametrize(
    "criterion", [LabelSmoothingCrossEntropy(0.1), BinaryCrossEntropy(0.0, sum_classes=True)]
)
@pytest.mark.parametrize("size", [12, 5])
def test_products_and_largest_eigenvalue_are_those_of_the_explicit_hessian(model, criterion, size):
    x, y = examples(12)
    hessian = explicit_hessian(model, criterion, x, y)
    found = flatness.curvature(model, criterion, batches_of(x, y, size), 12)
    expected = torch.linalg.eigvalsh(hessian)[-1].item()
    assert found["lambda_max"] == pytest.approx(expected, rel=1e-4)
    vectors = torch.randn(2, len(hessian), dtype=torch.float64)
    params, batches = list(model.parameters()), batches_of(x, y, size)(0, 12)
    for vector, product in zip(
        vectors, flatness.products(model, criterion, params, batches, vectors)
    ):
        assert torch.allclose(product, hessian @ vector)


def test_the_eigenvalue_is_that_of_all_examples_although_the_search_starts_from_few(monkeypatch):
    monkeypatch.setattr(flatness, "FIRST", 60)
    x, y = examples(400)
    model, criterion = small_network(), torch.nn.functional.cross_entropy
    expected = torch.linalg.eigvalsh(explicit_hessian(model, criterion, x, y))[-1].item()
    few = torch.linalg.eigvalsh(explicit_hessian(model, criterion, x[:60], y[:60]))[-1].item()
    found = flatness.curvature(model, criterion, batches_of(x, y), 400)["lambda_max"]
    assert found == pytest.approx(expected, rel=0.01) and few != pytest.approx(expected, rel=0.02)
    assert found <= expected * (1 + 1e-9)


def least_squares(size, seed):
    """A linear model whose loss has the Hessian X'X / size, of Gaussian X, and that Hessian."""
    x = torch.randn(size, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x *= torch.tensor([2.0, 1.2, 1.0, 0.8, 0.5, 0.3], dtype=torch.float64)

    def loss(outputs, _):
        return outputs.square().mean() / 2

    model = torch.nn.Linear(6, 1, bias=False).double()
    return (model, loss, batches_of(x, torch.zeros(size), 64), size), x.T @ x / size


def test_standard_errors_are_how_much_other_examples_would_change_the_figures():
    found, eigenvalues, traces = [], [], []
    for seed in range(60):
        problem, hessian = least_squares(400, seed)
        found.append(flatness.curvature(*problem, seed))
        eigenvalues.append(torch.linalg.eigvalsh(hessian)[-1].item())
        traces.append(hessian.trace().item())
    columns = {key: np.array([one[key] for one in found]) for key in found[0]}
    assert columns["lambda_max"] == pytest.approx(eigenvalues, rel=1e-3)
    spread = np.sqrt((columns["lambda_max_se"] ** 2).mean())
    assert spread == pytest.approx(np.std(eigenvalues), rel=0.25)
    assert spread == pytest.approx(4 * np.sqrt(2 / 400), rel=0.15)  # of a variance of 4
    # The trace's spread is of the examples and of Hutchinson's signs.
    truth = np.square([2.0, 1.2, 1.0, 0.8, 0.5, 0.3]).sum()
    errors = columns["trace"] - truth
    assert abs(errors.mean()) < 3 * errors.std() / np.sqrt(60)
    assert np.sqrt((columns["trace_se"] ** 2).mean()) == pytest.approx(errors.std(), rel=0.25)


def test_the_trace_of_a_diagonal_hessian_is_exact():
    model, eye = torch.nn.Linear(3, 3, bias=False).double(), torch.eye(3, dtype=torch.float64)

    def saddle(logits, _):
        return (logits**2 @ torch.tensor([1.0, -5.0, 2.0], dtype=torch.float64)).mean()

    found = flatness.curvature(model, saddle, lambda *_: [(eye, torch.arange(3))], 3)
    assert found["lambda_max"] == pytest.approx(2 * 2 / 3)  # not that of largest magnitude
    assert found["trace"] == pytest.approx(3 * 2 / 3 * (1 - 5 + 2))
    assert found["trace_se"] == pytest.approx(0, abs=1e-9)


def test_examples_count_alike_although_subsets_differ_in_their_number():
    """Each example's Hessian is diagonal, so the trace is exact whatever the signs are."""
    size = flatness.SUBSETS + 3
    lengths = torch.arange(1, size + 1, dtype=torch.float64)
    x = torch.eye(3, dtype=torch.float64)[torch.arange(size) % 3] * lengths[:, None]
    model = torch.nn.Linear(3, 2, bias=False).double()

    def quadratic(logits, _):
        return (logits**2 @ torch.tensor([1.0, 3.0], dtype=torch.float64)).mean()

    problem = (model, quadratic, batches_of(x, torch.zeros(size), 2), size)
    found = flatness.curvature(*problem)["trace"]
    assert found == pytest.approx((2 * (1 + 3) * lengths**2).mean().item())


def test_signs_depend_on_the_seed_and_the_eigenvalue_does_not():
    problem, _ = least_squares(64, 0)
    one, same, other = (flatness.curvature(*problem, seed) for seed in (0, 0, 1))
    assert one == same and one["trace"] != other["trace"]
    assert one["lambda_max"] == pytest.approx(other["lambda_max"])


def test_subsets_are_disjoint_and_hold_all_examples_once(monkeypatch):
    asked, problem = [], least_squares(21, 0)[0]
    model, loss, batches, size = problem

    def recorded(start, stop):
        asked.append((start, stop))
        return batches(start, stop)

    flatness.curvature(model, loss, recorded, size)
    whole = sorted(set(asked) - {(0, 21)})
    assert len(whole) == flatness.SUBSETS and whole[0][0] == 0 and whole[-1][1] == 21
    assert all(one[1] == other[0] for one, other in itertools.pairwise(whole))


def test_a_single_example_has_no_standard_error():
    found = flatness.curvature(*least_squares(1, 0)[0])
    assert found["lambda_max_se"] is None and found["trace_se"] is None


def test_a_loss_without_curvature_has_no_largest_eigenvalue():
    model, batch = torch.nn.Linear(3, 2), (torch.zeros(4, 3), torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match="no largest eigenvalue of the Hessian"):
        flatness.curvature(model, lambda logits, _: logits.mean(), lambda *_: [batch], 4)


@pytest.mark.slow
def test_a_measurement_prints_no_warning_that_a_user_cannot_act_on():
    code = (
        "import torch; from robustness import flatness; model = torch.nn.Linear(3, 2);"
        "batch = (torch.randn(4, 3), torch.tensor([0, 1, 0, 1]));"
        "loss = torch.nn.functional.cross_entropy;"
        "flatness.curvature(model, loss, lambda *_: [batch], 4)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
