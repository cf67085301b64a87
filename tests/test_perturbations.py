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


def test_proportional_rho_is_linear_in_the_lr_of_each_group_and_constant_outside():
    table = ((0.1, 0.2), (1.1, 0.7), (0.6, 0.45), (0.35, 0.325), (0.0, 0.2), (9.0, 0.7))
    groups = [{"params": [torch.nn.Parameter(torch.ones(()))], "lr": lr} for lr, _ in table]
    optimizer = torch.optim.SGD(groups)
    proportional_rho(optimizer, rho_min=0.2, rho_max=0.7, lr_min=0.1, lr_max=1.1)
    assert [group["rho"] for group in optimizer.param_groups] == pytest.approx(
        [rho for _, rho in table], rel=1e-12
    )


@pytest.mark.parametrize("ranges", [(0.5, 0.1, 0, 1), (-0.1, 0.1, 0, 1), (0.1, 0.5, 1, 1)])
def test_proportional_rho_refuses(ranges):
    model = network()
    names = ("rho_min", "rho_max", "lr_min", "lr_max")
    with pytest.raises(ValueError, match="lr_min < lr_max"):
        proportional_rho(torch.optim.SGD(model.parameters(), lr=0.1), **dict(zip(names, ranges)))


class Wrapper(torch.optim.Optimizer):
    """Holds another optimizer, and its state nowhere else."""

    def __init__(self, inner):
        self.hidden = inner
        super().__init__(inner.param_groups, {})

    def step(self, closure=None):
        return self.hidden.step(closure)


def lookahead(inner):
    return pytest.importorskip("timm.optim.lookahead").Lookahead(inner)


@pytest.mark.parametrize("wrap", [lookahead, Wrapper, lambda inner: Wrapper(lookahead(inner))])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("given", ["sam", "base"])
def test_momentum_is_found_in_the_optimizer_that_another_wraps(base, wrap, given):
    model, data = network(), batches(2)
    inner = BASES[base](model.parameters())
    optimizer = SAM(wrap(inner), model, rho=0.3)
    for step, (x, y) in enumerate(data):
        start = weights(model)
        holder = optimizer if given == "sam" else optimizer.base_optimizer
        with optimizer.perturbed(lambda: momentum_perturbation(holder)):
            moved = weights(model)
            F.cross_entropy(model(x), y).backward()
        if step:
            momentum = momentum_of(inner, list(model.parameters()))
            norm = sum((v**2).sum() for v in momentum).sqrt()
            assert_close(moved, [p - 0.3 * v / norm for p, v in zip(start, momentum)])
        else:
            assert_same(moved, start)
        optimizer.step()
        optimizer.zero_grad()


class Hoarder(torch.optim.SGD):
    """Keeps its momentum where nobody looks for it."""

    def step(self, closure=None):
        pass


def test_momentum_that_is_nowhere_to_be_found_is_an_error_after_the_first_step():
    model, (x, y) = network(), batches(1)[0]
    optimizer = SAM(Hoarder(model.parameters(), lr=0.1, momentum=0.9), model)
    for expected in (contextlib.nullcontext(), pytest.raises(ValueError, match="Hoarder keeps no")):
        with expected, optimizer.perturbed(lambda: momentum_perturbation(optimizer)):
            F.cross_entropy(model(x), y).backward()
        optimizer.step()


class Compressed(torch.Tensor):
    """As the 8-bit states of torchao, which pass for tensors of the weights' shape."""


@pytest.mark.parametrize(
    "state, words",
    [
        (
            lambda p: {"step": 1, "state1": torch.zeros(3), "qmap1": None},
            r"\['step', 'state1', 'qmap1'\]",
        ),
        (lambda p: {"exp_avg": torch.zeros_like(p).as_subclass(Compressed)}, "as Compressed"),
        (lambda p: {"exp_avg": torch.zeros(3)}, "compressed"),
    ],
)
def test_compressed_momentum_is_refused(state, words):
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        optimizer.state[p] = state(p)
    with pytest.raises(ValueError, match=f"AdamW keeps .*{words}"):
        momentum_perturbation(optimizer)


@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_momentum_of_what_is_maximized_points_the_same_way(base):
    moved = {}
    for maximize in (False, True):
        torch.manual_seed(0)
        model = network()
        make = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[base]
        options = {"momentum": 0.9} if base == "sgd" else {}
        inner = make(model.parameters(), lr=0.1, maximize=maximize, **options)
        optimizer, sign = SAM(inner, model, rho=0.3), -1 if maximize else 1
        for x, y in batches(3):
            with optimizer.perturbed(lambda: momentum_perturbation(optimizer)):
                moved[maximize] = weights(model)
                (sign * F.cross_entropy(model(x), y)).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_close(moved[True], moved[False])


def test_random_and_momentum_perturbations_of_complex_weights():
    torch.manual_seed(2)
    model = torch.nn.Module()
    model.w = torch.nn.Parameter(torch.randn(50_000, dtype=torch.complex128))
    (draw,) = torch.autograd.grad(random_perturbation(model.parameters()), model.w)
    for part in (draw.real, draw.imag):  # N(0, 1) each
        assert abs(part.mean()) < 0.03 and abs(part.square().mean() - 1) < 0.03
    optimizer = torch.optim.SGD([model.w], lr=0.1, momentum=0.9)
    assert torch.autograd.grad(momentum_perturbation(optimizer), model.w)[0].eq(0).all()
    model.w.grad = torch.randn_like(model.w)
    optimizer.step()
    (gradient,) = torch.autograd.grad(momentum_perturbation(optimizer), model.w)
    torch.testing.assert_close(gradient, -model.w.grad)
