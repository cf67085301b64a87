"""Output bias forgetting against its definition in float64; shapes as cross_entropy takes them."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from brute_force import K, obf_by_definition

from sam_obf import OutputBiasForgetting


@pytest.mark.parametrize("link", ["sigmoid", "softmax"])
@pytest.mark.parametrize("lam", [0.0, None, 0.35])
@pytest.mark.parametrize("gamma", [0.0, 1e-12, 0.6, 1.0])
def test_obf_gradient_equals_autograd_of_its_definition(link, lam, gamma):
    target = torch.randint(0, K, (64,))
    logits = torch.randn(64, K, dtype=torch.float64) * 2
    value = 1 / K if lam is None else lam
    if value:  # the first three examples: p_y just below, at and just above lam
        for row, p_y in enumerate((value * 0.9, value, value * 1.1)):
            logits[row] = 0
            odds = p_y / (1 - p_y) * (1 if link == "sigmoid" else K - 1)
            logits[row, target[row]] = torch.log(torch.tensor(odds, dtype=torch.float64))
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    OutputBiasForgetting(gamma, lam, link)(ours, target).backward()
    obf_by_definition(theirs, target, gamma, lam, link).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-14)
    if value and gamma:
        p = torch.sigmoid(logits) if link == "sigmoid" else logits.softmax(-1)
        wrong = torch.ones_like(p).scatter_(1, target[:, None], 0).bool()
        moved = (
            ours.grad * 64 - 1 / K
        ).abs() > 1e-13  # a wrong class moves by other than u exactly where alpha > 0
        assert moved[0][wrong[0]].logical_not().all() and moved[1][wrong[1]].logical_not().all()
        assert moved[2][wrong[2]].all() or gamma < 1e-9


def test_obf_at_gamma_zero_lowers_the_target_and_lifts_all_others_alike():
    logits = torch.randn(7, K, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, K, (7,))
    OutputBiasForgetting(gamma=0.0)(logits, target).backward()
    expected = (torch.full((7, K), 1 / K, dtype=torch.float64) - F.one_hot(target, K)) / 7
    torch.testing.assert_close(logits.grad, expected)


def test_obf_is_finite_at_extreme_logits_and_in_half_precision():
    for dtype, lam in itertools.product(
        (torch.float16, torch.bfloat16, torch.float32), (None, 0.0)
    ):
        logits = torch.tensor([[60000.0, -60000.0], [-60000.0, 60000.0]]).to(dtype).requires_grad_()
        OutputBiasForgetting(lam=lam)(logits, torch.tensor([0, 0])).backward()
        # p_y = 1: u - p for the first; p_y = 0: alpha is 0 (gamma where lam is 0) for the second.
        alpha = 1.0 if lam == 0.0 else 0.0
        second = [0.5 - (1 - alpha), 0.5 - alpha]
        torch.testing.assert_close(logits.grad.float(), torch.tensor([[-0.5, 0.5], second]) / 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_obf_in_half_precision_rounds_only_its_result(dtype):
    logits, target = torch.randn(4, 1000).to(dtype), torch.randint(0, 1000, (4,))
    half, double = logits.clone().requires_grad_(), logits.double().requires_grad_()
    (4096 * OutputBiasForgetting()(half, target)).backward()
    (4096 * OutputBiasForgetting()(double, target)).backward()
    rounding = 0.51 * torch.finfo(dtype).eps * double.grad.abs()  # half a unit in the last place
    assert (
        (half.grad.double() - double.grad).abs() <= rounding + 1e-4 * double.grad.abs().mean()
    ).all()


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("shape", [(K,), (4, K), (4, K, 3), (K, K, K), (2, K, 3, K)])
def test_obf_takes_the_shapes_that_cross_entropy_takes(shape, soft):
    """Classes are dimension 1, even where another is as long; a mean over all examples."""
    dim = min(1, len(shape) - 1)
    logits = torch.randn(shape, dtype=torch.float64)
    target = torch.randint(0, K, shape[:dim] + shape[dim + 1 :])
    if soft:
        target = torch.rand(shape, dtype=torch.float64).softmax(dim)
    F.cross_entropy(logits, target)
    a, b = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    value = OutputBiasForgetting(link="softmax")(a, target)
    value.backward()
    rows = target.movedim(dim, -1).reshape(-1, K) if soft else target.reshape(-1)
    OutputBiasForgetting(link="softmax")(b.movedim(dim, -1).reshape(-1, K), rows).backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-13, atol=0)
    assert value.shape == ()


@pytest.mark.parametrize("ignore_index", [-100, 255, 2])
def test_obf_leaves_out_what_cross_entropy_ignores(ignore_index):
    logits = torch.randn(6, K, 3, dtype=torch.float64)
    target = torch.randint(0, K, (6, 3))
    target[0, 1] = target[4] = ignore_index
    ignored = (target == ignore_index).unsqueeze(1).expand_as(logits)
    logits[ignored] = float("nan")  # what is there must not matter
    all_of_them = logits.clone().requires_grad_()
    value = OutputBiasForgetting(ignore_index=ignore_index)(all_of_them, target)
    value.backward()
    rows = logits.movedim(1, -1)[target != ignore_index].requires_grad_()
    expected = OutputBiasForgetting()(rows, target[target != ignore_index])
    expected.backward()
    torch.testing.assert_close(value, expected)
    assert all_of_them.grad[ignored].eq(0).all()
    kept = all_of_them.grad.movedim(1, -1)[target != ignore_index]
    torch.testing.assert_close(kept, rows.grad, rtol=1e-13, atol=0)


def test_obf_of_ignored_examples_alone_is_nan_as_cross_entropy_is():
    nothing = torch.full((4,), -100)
    assert F.cross_entropy(torch.zeros(4, K), nothing).isnan()
    assert OutputBiasForgetting()(torch.zeros(4, K), nothing).isnan()


@pytest.mark.parametrize("link", ["sigmoid", "softmax"])
@pytest.mark.parametrize("gamma, lam", [(1.0, None), (0.6, 0.1), (0.0, None), (1.0, 0.0)])
def test_obf_with_soft_targets_is_its_closed_form(gamma, lam, link):
    """The gradient u - alpha p - (1 - alpha) y with p_y = <y, p>, example by example."""
    logits = 2 * torch.randn(32, K, dtype=torch.float64)
    target = torch.rand(32, K, dtype=torch.float64) ** 3
    target /= target.sum(1, keepdim=True)
    expected = []
    for z, y in zip(logits.tolist(), target.tolist()):
        exp = [math.exp(v) for v in z]
        p = [e / sum(exp) if link == "softmax" else e / (1 + e) for e in exp]
        p_y = sum(a * b for a, b in zip(y, p))
        bound = 1 / K if lam is None else lam
        alpha = gamma * max(0.0, (1 - bound / p_y) / (1 - bound))
        expected.append([(1 / K - alpha * a - (1 - alpha) * b) / 32 for a, b in zip(p, y)])
    logits.requires_grad_()
    OutputBiasForgetting(gamma, lam, link)(logits, target).backward()
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(logits.grad, expected, rtol=1e-12, atol=1e-15)


def test_obf_with_one_hot_targets_is_that_with_indices():
    logits, target = torch.randn(16, K, 3), torch.randint(0, K, (16, 3))
    a, b = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    OutputBiasForgetting()(a, target).backward()
    OutputBiasForgetting()(b, F.one_hot(target, K).movedim(-1, 1).float()).backward()
    torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"gamma": 1.1}, "1.1"),
        ({"gamma": -1}, "-1"),
        ({"lam": 1.0}, "1.0"),
        ({"link": "tanh"}, "'tanh'"),
    ],
)
def test_obf_refuses_arguments(options, words):
    with pytest.raises(ValueError, match=words):
        OutputBiasForgetting(**options)


@pytest.mark.parametrize(
    "shape, target",
    [
        ((3, K), torch.zeros(3)),
        ((3, K), torch.zeros(4, dtype=torch.int64)),
        ((3, K), torch.zeros(3, K, dtype=torch.int64)),
        (
            (3, 7, K),
            torch.zeros(3, 7, dtype=torch.int64),
        ),  # cross_entropy's classes are in the middle
        ((3, 1), torch.zeros(3, dtype=torch.int64)),
    ],
)
def test_obf_refuses_what_cross_entropy_would_not_take(shape, target):
    with pytest.raises(ValueError, match=r"class indices.*logits\.movedim\(-1, 1\)"):
        OutputBiasForgetting()(torch.zeros(shape), target)


def test_labels_of_one_byte_mean_the_same_classes():
    """-100 in uint8 is 156."""
    logits, labels = torch.randn(4, 200), torch.tensor([156, 156, 3, 5])
    found = [OutputBiasForgetting()(logits, y) for y in (labels, labels.to(torch.uint8))]
    torch.testing.assert_close(*found)
