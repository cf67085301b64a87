"""Perturbations that cost less than two passes, and rho's schedule, against brute force."""

import contextlib
import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from brute_force import (
    BASES,
    OBJECTIVES,
    assert_close,
    assert_same,
    batches,
    brute_force_gradient,
    network,
    weights,
)

from sam_obf import SAM, momentum_perturbation, proportional_rho, random_perturbation


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_random_perturbation_is_standard_normal_and_new_each_time():
    big = torch.nn.Parameter(torch.randn(100_000, dtype=torch.float64))
    (draw,) = torch.autograd.grad(random_perturbation([big]), big)
    (other,) = torch.autograd.grad(random_perturbation([big]), big)
    for moment, value in (
        (draw.mean(), 0),
        (draw.square().mean(), 1),
        (draw.pow(3).mean(), 0),
        (draw.pow(4).mean(), 3),
    ):
        assert abs(moment.item() - value) < 0.1
    assert not torch.equal(draw, other)


def momentum_of(optimizer, params):
    """SGD's momentum or Adam's first moment of each parameter, or None before the first step."""
    states = [optimizer.state[p] for p in params]
    return [state.get("momentum_buffer", state.get("exp_avg")) for state in states]


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("base", [*BASES, "lion"])
def test_momentum_perturbation_equals_brute_force(base, scaled):
    """MSAM: the gradient at theta - rho v / ||v||, v of before, each group with its rho."""
    if base == "lion":
        make = functools.partial(pytest.importorskip("timm.optim").Lion, lr=0.02)
    else:
        make = BASES[base]
    model, rhos = network(), [0.5, 0.5, 0.2, 0.2]
    groups = lambda m: [{"params": list(m[i].parameters())} for i in (0, 2)]  # noqa: E731
    reference = copy.deepcopy(model)
    optimizer, plain = SAM(make(groups(model)), model), make(groups(reference))
    optimizer.param_groups[0]["rho"], optimizer.param_groups[1]["rho"] = 0.5, 0.2
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=scaled)
    for step, (x, y) in enumerate(batches(6)):
        start = weights(model)
        with optimizer.perturbed(
            lambda: momentum_perturbation(optimizer.base_optimizer), grad_scaler=scaler
        ):
            moved = weights(model)
            scaler.scale(F.cross_entropy(model(x), y)).backward()
        assert_same(weights(model), start)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

        params = list(reference.parameters())
        before, momentum = weights(reference), momentum_of(plain, params)
        if step:
            norm = sum((v**2).sum() for v in momentum).sqrt() + 1e-12
            assert_close(moved, [p - rho * v / norm for p, v, rho in zip(before, momentum, rhos)])
            with torch.no_grad():
                for p, v, rho in zip(params, momentum, rhos):
                    p.sub_(rho * v / norm)
        else:
            assert_close(moved, before)
        F.cross_entropy(reference(x), y).backward()
        with torch.no_grad():
            for p, b in zip(params, before):
                p.copy_(b)
        plain.step()
        plain.zero_grad()
        assert_close(weights(model), weights(reference))


def test_momentum_perturbation_makes_one_forward_pass_which_moves_the_statistics_once():
    model, calls = network(batch_norm=True), []
    model.register_forward_hook(lambda *_: calls.append(1))
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model, rho=0.3)
    for x, y in batches(4):
        seen = copy.deepcopy(model)
        with optimizer.perturbed(lambda: momentum_perturbation(optimizer)):
            for a, b in zip(seen.parameters(), model.parameters()):
                a.data.copy_(b)
            F.cross_entropy(model(x), y).backward()
        seen(x)
        assert_close(model.buffers(), seen.buffers())
        optimizer.step()
        optimizer.zero_grad()
    assert (
        model[1].num_batches_tracked == 4 and len(calls) == 2 * 4
    )  # the copies have the hook, too


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.Adagrad(p),
        lambda p: torch.optim.RMSprop(p),
    ],
)
def test_momentum_perturbation_refuses_optimizers_without(make):
    with pytest.raises(
        ValueError, match="keeps no momentum to perturb along: use Adam, or SGD with momentum > 0"
    ):
        momentum_perturbation(make(network().parameters()))


def test_a_perturbation_every_third_step():
    """A block every k-th step: gradients are those at perturbed weights then, and else plain."""
    model, k = network(), 3
    reference = copy.deepcopy(model)
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.3)
    plain = torch.optim.SGD(reference.parameters(), lr=0.1)
    for step, (x, y) in enumerate(batches(2 * k)):
        block = (
            optimizer.perturbed(lambda: F.cross_entropy(model(x), y))
            if step % k == 0
            else contextlib.nullcontext()
        )
        with block:
            F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

        rhos = [0.3 if step % k == 0 else 0.0] * 4
        gradient, _ = brute_force_gradient(reference, x, y, OBJECTIVES["sam"][1], rhos)
        for p, g in zip(reference.parameters(), gradient):
            p.grad = g
        plain.step()
    assert_close(weights(model), weights(reference))


def test_a_perturbation_from_a_part_of_the_batch():
    model, (x, y) = network(), batches(1)[0]
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.3)
    with optimizer.perturbed(lambda: F.cross_entropy(model(x[:3]), y[:3])):
        F.cross_entropy(model(x), y).backward()
    part = torch.autograd.grad(F.cross_entropy(model(x[:3]), y[:3]), list(model.parameters()))
    expected, _ = brute_force_gradient(model, x, y, None, [0.3] * 4, g=part)
    assert_close([p.grad for p in model.parameters()], expected)


def test_normalisation_layers_only():
    """SAM-ON (Mueller et al. 2023): rho is the length over these layers; others are as they are."""
    model, (x, y) = network(), batches(1)[0]
    model.insert(1, torch.nn.LayerNorm(8).double())
    norms = [
        p for m in model.modules() if isinstance(m, torch.nn.LayerNorm) for p in m.parameters()
    ]
    others = [p for p in model.parameters() if not any(p is q for q in norms)]
    groups = [{"params": norms}, {"params": others, "rho": 0.0}]
    optimizer = SAM(torch.optim.SGD(groups, lr=0.1), model, rho=0.3)
    rhos, g = [], []
    for p, gi in zip(
        model.parameters(),
        torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters())),
    ):
        rhos.append(0.3 if any(p is q for q in norms) else 0.0)
        g.append(gi if rhos[-1] else torch.zeros_like(gi))
    expected, eps = brute_force_gradient(model, x, y, None, rhos, g=g)
    start = weights(model)
    with optimizer.perturbed(lambda: F.cross_entropy(model(x), y)):
        assert_close([b - a for a, b in zip(start, weights(model))], eps)
        F.cross_entropy(model(x), y).backward()
    assert_close([p.grad for p in model.parameters()], expected)
    torch.testing.assert_close(sum(e.square().sum() for e in eps).sqrt().item(), 0.3)


def test_proportional_rho_is_linear_in_lr_and_constant_outside():
    model = network()
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.3)
    for lr, rho in ((0.1, 0.2), (1.1, 0.7), (0.6, 0.45), (0.35, 0.325), (0.0, 0.2), (9.0, 0.7)):
        optimizer.param_groups[0]["lr"] = lr
        proportional_rho(optimizer, rho_min=0.2, rho_max=0.7, lr_min=0.1, lr_max=1.1)
        assert optimizer.param_groups[0]["rho"] == pytest.approx(rho, rel=1e-12)


@pytest.mark.parametrize("ranges", [(0.5, 0.1, 0, 1), (-0.1, 0.1, 0, 1), (0.1, 0.5, 1, 1)])
def test_proportional_rho_refuses(ranges):
    model = network()
    names = ("rho_min", "rho_max", "lr_min", "lr_max")
    with pytest.raises(ValueError, match="lr_min < lr_max"):
        proportional_rho(torch.optim.SGD(model.parameters(), lr=0.1), **dict(zip(names, ranges)))
