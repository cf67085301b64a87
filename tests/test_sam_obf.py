"""Both passes against brute force, and what must hold around them."""

import contextlib
import copy
import shutil
import warnings

import pytest
import torch
import torch.nn.functional as F
from brute_force import (
    BASES,
    OBJECTIVES,
    VARIANTS,
    K,
    assert_close,
    assert_same,
    batches,
    brute_force_gradient,
    network,
    weights,
)
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

from sam_obf import SAM, OutputBiasForgetting, random_perturbation


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("steps", [1, 10])
def test_steps_equal_brute_force(base, variant, objective, steps):
    ours, theirs = OBJECTIVES[objective] or (
        lambda z, y: random_perturbation(model.parameters()),
        None,
    )
    model = network()
    start, reference = weights(model), copy.deepcopy(model)
    optimizer = SAM(BASES[base](model.parameters()), model, rho=0.3, **VARIANTS[variant])
    reference_optimizer = BASES[base](reference.parameters())
    for x, y in batches(steps):
        rng = torch.get_rng_state()
        with optimizer.perturbed(lambda: ours(model(x), y)):
            F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

        torch.set_rng_state(rng)
        noise = None if theirs else [torch.randn_like(p) for p in reference.parameters()]
        gradient, _ = brute_force_gradient(
            reference, x, y, theirs, [0.3] * 4, g=noise, **VARIANTS[variant]
        )
        for p, g in zip(reference.parameters(), gradient):
            p.grad = g
        reference_optimizer.step()
    assert_close(weights(model), weights(reference))
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(weights(model), start))


@pytest.mark.parametrize("variant", [v for v in VARIANTS if "gsam" not in v])
def test_perturbation_has_length_rho(variant):
    model = network()
    optimizer = SAM(
        torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.3, **VARIANTS[variant]
    )
    x, y = batches(1)[0]
    start = weights(model)
    g = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    with optimizer.perturbed(lambda: F.cross_entropy(model(x), y)):
        eps = [b - a for a, b in zip(start, weights(model))]
    norm = lambda tensors: sum((t**2).sum() for t in tensors).sqrt()  # noqa: E731
    measured = {
        "plain": norm(eps),
        "asam-before": norm(eps),  # || |theta| g || normalises it
        "asam-after": norm(
            [e / p.abs() for e, p in zip(eps, start)]
        ),  # without |theta|, the length is rho
        "asam-both": norm([e / p.abs() for e, p in zip(eps, start)]),
    }[variant]
    torch.testing.assert_close(measured, torch.tensor(0.3, dtype=torch.float64), rtol=1e-9, atol=0)
    assert sum((e * gi).sum() for e, gi in zip(eps, g)) > 0  # it ascends


def test_gsam_removes_only_what_is_orthogonal():
    model, (x, y) = network(), batches(1)[0]
    gradients = {}
    for alpha in (0.0, 0.4):
        optimizer = SAM(
            torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.3, gsam_alpha=alpha
        )
        with optimizer.perturbed(lambda: F.cross_entropy(model(x), y)):
            F.cross_entropy(model(x), y).backward()
        gradients[alpha] = torch.cat([p.grad.flatten() for p in model.parameters()])
        model.zero_grad()
    gp, difference = gradients[0.0], gradients[0.0] - gradients[0.4]
    assert difference.norm() > 1e-3
    assert abs(difference @ gp) < 1e-12 * difference.norm() * gp.norm() + 1e-14


def test_gsam_where_the_descent_gradient_is_zero_subtracts_all_of_g():
    model, (x, y) = network(), batches(1)[0]
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.3, gsam_alpha=0.4)
    g = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    with optimizer.perturbed(lambda: F.cross_entropy(model(x), y)):
        (0 * F.cross_entropy(model(x), y)).backward()
    assert_close([p.grad for p in model.parameters()], [-0.4 * gi for gi in g])


# --------------------------------------------------------------------------------------------------
# Invariants


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("raises", [False, True])
def test_weights_are_restored_bit_for_bit_and_gradients_survive(dtype, variant, raises):
    model = network(dtype=dtype)
    with torch.no_grad():
        model[0].weight[0, 0], model[0].weight[0, 1] = (
            -0.0,
            1e-40,
        )  # bits that arithmetic would lose
    optimizer = SAM(
        torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.5, **VARIANTS[variant]
    )
    x, y = batches(1, dtype=dtype)[0]
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    start, accumulated = weights(model), [p.grad.clone() for p in model.parameters()]
    seen = []

    def body():
        with optimizer.perturbed(lambda: F.cross_entropy(model(x), y)):
            seen.extend(weights(model))
            if raises:
                F.cross_entropy(model(x), y)
                raise Interrupted

    if raises:
        with pytest.raises(Interrupted):
            body()
    else:
        body()
    as_bits = {torch.float64: torch.int64, torch.float32: torch.int32}.get(dtype, torch.int16)
    assert_same([p.view(as_bits) for p in weights(model)], [p.view(as_bits) for p in start])
    assert any(not torch.equal(a, b) for a, b in zip(seen, start))
    assert_same([p.grad for p in model.parameters()], accumulated)
    optimizer.step()  # not stuck inside


@pytest.mark.parametrize("accumulated", [False, True])
@pytest.mark.parametrize(
    "variant, where", [("plain", "closure"), ("gsam", "closure"), ("gsam", "body")]
)
def test_an_exception_leaves_the_gradients_of_before(variant, where, accumulated):
    model, (x, y) = network(), batches(1)[0]
    optimizer = SAM(
        torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.5, **VARIANTS[variant]
    )
    for p in model.parameters():
        p.grad = torch.randn_like(p) if accumulated else None
    before = [p.grad for p in model.parameters()]
    copies = [None if g is None else g.clone() for g in before]

    def backward_and_raise():
        F.cross_entropy(model(x), y).backward()
        raise Interrupted

    with pytest.raises(Interrupted):
        with optimizer.perturbed(
            backward_and_raise if where == "closure" else lambda: F.cross_entropy(model(x), y)
        ):
            backward_and_raise()
    assert all(p.grad is g for p, g in zip(model.parameters(), before))
    assert not accumulated or all(torch.equal(g, copy) for g, copy in zip(before, copies))


def test_ascent_gradient_never_reaches_grad():
    model, (x, y) = network(), batches(1)[0]
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.0)
    outside = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
    model.register_parameter("outside", outside)  # in the model, but not the optimizer's
    with optimizer.perturbed(lambda: 1e6 * outside * F.cross_entropy(model(x), y)):
        F.cross_entropy(model(x), y).backward()
    inside = [p for p in model.parameters() if p is not outside]
    assert_close(
        [p.grad for p in inside], torch.autograd.grad(F.cross_entropy(model(x), y), inside), 1e-15
    )
    assert outside.grad is None


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_rho_zero_equals_the_base_optimizer_bit_for_bit(base, batch_norm, variant):
    model = network(batch_norm)
    reference = copy.deepcopy(model)
    optimizer = SAM(BASES[base](model.parameters()), model, rho=0.0, **VARIANTS[variant])
    reference_optimizer = BASES[base](reference.parameters())
    for x, y in batches(5):
        with optimizer.perturbed(lambda: F.cross_entropy(model(x), y)):
            F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        F.cross_entropy(reference(x), y).backward()
        reference_optimizer.step()
        reference_optimizer.zero_grad()
    assert_same(model.state_dict().values(), reference.state_dict().values())


@pytest.mark.parametrize("variant", VARIANTS)
def test_accumulation_equals_one_larger_batch(variant):
    m, accumulated = 3, network()
    at_once = copy.deepcopy(accumulated)
    data = batches(1, size=24)[0]

    def micro_batches(model, optimizer, x, y, share):
        for xs, ys in zip(x.split(m), y.split(m)):
            weight = share * len(xs) / len(x)
            with optimizer.perturbed(lambda: F.cross_entropy(model(xs), ys), loss_weight=weight):
                (weight * F.cross_entropy(model(xs), ys)).backward()

    one = SAM(BASES["adamw"](at_once.parameters()), at_once, rho=0.3, **VARIANTS[variant])
    four = SAM(BASES["adamw"](accumulated.parameters()), accumulated, rho=0.3, **VARIANTS[variant])
    micro_batches(at_once, one, *data, share=1.0)
    for x, y in zip(data[0].chunk(4), data[1].chunk(4)):
        micro_batches(accumulated, four, x, y, share=0.25)

    # Brute force: the mean over the eight micro-batches of what each contributes.
    reference = network()
    reference.load_state_dict(at_once.state_dict())
    terms = []
    for xs, ys in zip(data[0].split(m), data[1].split(m)):
        terms.append(
            brute_force_gradient(
                reference, xs, ys, OBJECTIVES["sam"][1], [0.3] * 4, **VARIANTS[variant]
            )[0]
        )
    mean = [sum(parts) / len(parts) for parts in zip(*terms)]
    assert_close([p.grad for p in at_once.parameters()], mean)
    assert_close([p.grad for p in accumulated.parameters()], mean)
    one.step(), four.step()
    assert_close(weights(accumulated), weights(at_once))


def test_unequal_micro_batches_weigh_by_their_examples():
    model, (x, y) = network(), batches(1, size=10)[0]
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.3, gsam_alpha=0.4)
    expected = None
    for xs, ys in zip(x.split(4), y.split(4)):  # 4, 4 and 2
        gradient, _ = brute_force_gradient(
            model, xs, ys, OBJECTIVES["sam"][1], [0.3] * 4, gsam_alpha=0.4
        )
        gradient = [g * len(xs) / 10 for g in gradient]
        expected = gradient if expected is None else [a + b for a, b in zip(expected, gradient)]
    for xs, ys in zip(x.split(4), y.split(4)):
        with optimizer.perturbed(lambda: F.cross_entropy(model(xs), ys), loss_weight=len(xs) / 10):
            (F.cross_entropy(model(xs), ys) * len(xs) / 10).backward()
    assert_close([p.grad for p in model.parameters()], expected)


class Awkward(torch.nn.Module):
    """Frozen, unused and tied parameters, two of one gradient tensor, one with an expanded one."""

    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(6, 6), torch.nn.Linear(6, 6)
        self.b.weight = self.a.weight
        self.head, self.frozen, self.unused = (
            torch.nn.Linear(6, K),
            torch.nn.Linear(6, 6),
            torch.nn.Linear(6, 6),
        )
        self.p, self.q = (
            torch.nn.Parameter(torch.randn(12, 6)),
            torch.nn.Parameter(torch.randn(12, 6)),
        )
        self.s = torch.nn.Parameter(torch.randn(12, 1).expand(12, 6).contiguous())
        self.frozen.requires_grad_(False)

    def forward(self, x):
        return (
            self.head(torch.tanh(self.b(torch.tanh(self.frozen(self.a(x)) + (self.p + self.q)))))
            + 0.1 * self.s.sum()
        )


@pytest.mark.parametrize("variant", VARIANTS)
def test_frozen_unused_tied_and_aliased_parameters(variant):
    model = Awkward().double()
    used = [p for n, p in model.named_parameters() if not n.startswith(("frozen", "unused"))]
    x, y = batches(1)[0]
    mixed = lambda z, y: F.cross_entropy(z, y) + z.square().mean()  # noqa: E731

    class Used(torch.nn.Module):  # what brute force sees: only the parameters that take part
        parameters = staticmethod(lambda: iter(used))
        forward = staticmethod(lambda x: model(x))

    expected, _ = brute_force_gradient(Used(), x, y, mixed, [0.3] * len(used), **VARIANTS[variant])
    start = weights(model)
    optimizer = SAM(
        torch.optim.AdamW(model.parameters(), lr=0.1), model, rho=0.3, **VARIANTS[variant]
    )
    with optimizer.perturbed(lambda: mixed(model(x), y)):
        F.cross_entropy(model(x), y).backward()
    assert_close([p.grad for p in used], expected)
    assert_same(weights(model), start)
    assert all(p.grad is None for p in (*model.frozen.parameters(), *model.unused.parameters()))


def test_groups_with_different_rho_share_one_norm():
    model, (x, y) = network(), batches(1)[0]
    groups = [
        {"params": list(model[0].parameters()), "rho": 0.5},
        {"params": list(model[2].parameters())},
    ]
    optimizer = SAM(torch.optim.SGD(groups, lr=0.1), model, rho=0.1)
    expected, eps = brute_force_gradient(model, x, y, OBJECTIVES["sam"][1], [0.5, 0.5, 0.1, 0.1])
    start = weights(model)
    with optimizer.perturbed(lambda: F.cross_entropy(model(x), y)):
        assert_close([b - a for a, b in zip(start, weights(model))], eps)
        F.cross_entropy(model(x), y).backward()
    assert_close([p.grad for p in model.parameters()], expected)


def test_a_group_with_rho_zero_is_trained_and_not_part_of_the_norm():
    model, (x, y) = network(), batches(1)[0]
    groups = [
        {"params": list(model[0].parameters()), "rho": 0.0},
        {"params": list(model[2].parameters())},
    ]
    optimizer = SAM(torch.optim.SGD(groups, lr=0.1), model, rho=0.2)
    start = weights(model)
    with optimizer.perturbed(lambda: F.cross_entropy(model(x), y)):
        eps = [b - a for a, b in zip(start, weights(model))]
        F.cross_entropy(model(x), y).backward()
    assert_same(eps[:2], [torch.zeros_like(e) for e in eps[:2]])
    torch.testing.assert_close(sum(e.square().sum() for e in eps).sqrt().item(), 0.2)
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("factor", [1.0, float("nan"), float("inf")])
def test_a_scaler_that_is_disabled_is_as_none(variant, factor):
    """It would skip no step, so no gradient may become NaN for its sake."""
    model, (x, y) = network(), batches(1)[0]
    optimizer = SAM(
        torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.3, **VARIANTS[variant]
    )
    gradients = []
    for scaler in (None, torch.amp.GradScaler("cpu", enabled=False)):
        ascend = lambda: factor * F.cross_entropy(model(x), y)  # noqa: E731
        with optimizer.perturbed(ascend, grad_scaler=scaler):
            F.cross_entropy(model(x), y).backward()
        gradients.append([p.grad for p in model.parameters()])
        optimizer.zero_grad()
    assert_same(*gradients)
    assert all(grad.isfinite().all() for grad in gradients[1])


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_of_the_optimizer_outside_the_model_are_as_those_inside(variant):
    """Those of a loss, say: they are perturbed, keep what was accumulated, and get no g."""
    gradients, perturbed = [], []
    for inside in (True, False):
        torch.manual_seed(0)
        model, head = network(), torch.nn.Linear(K, K).double()
        modules = torch.nn.ModuleList([model, head])
        base = torch.optim.SGD(modules.parameters(), lr=0.1)
        optimizer = SAM(base, modules if inside else model, rho=0.3, **VARIANTS[variant])
        start = weights(modules)
        for x, y in batches(2):  # which accumulate
            loss = lambda x=x, y=y: F.cross_entropy(head(model(x)), y)  # noqa: E731
            with optimizer.perturbed(loss):
                perturbed.append(weights(modules))
                loss().backward()
            assert_same(weights(modules), start)
        gradients.append([p.grad for p in modules.parameters()])
    assert_same(*gradients)
    assert_same(perturbed[0], perturbed[2])
    assert not torch.equal(perturbed[3][-1], start[-1])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e300])
def test_non_finite_ascent_gradient_means_no_perturbation(variant, bad):
    model, (x, y) = network(), batches(1)[0]
    optimizer = SAM(
        torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.3, **VARIANTS[variant]
    )
    start = weights(model)
    # 1e300 is finite, but the square of the gradient's norm is not.
    with optimizer.perturbed(
        lambda: F.cross_entropy(model(x), y) + bad * model[2].bias[0] + model[0].weight.sum()
    ):
        assert_same(weights(model), start)
        F.cross_entropy(model(x), y).backward()
    assert_close(
        [p.grad for p in model.parameters()],
        torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters())),
    )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("stale", [False, True])
def test_step_with_closure_equals_the_with_form(variant, stale):
    models = [network(batch_norm=True), network(batch_norm=True)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [
        SAM(BASES["adamw"](m.parameters()), m, rho=0.3, **VARIANTS[variant]) for m in models
    ]
    forget = OutputBiasForgetting()
    for x, y in batches(4):
        with optimizers[0].perturbed(lambda: forget(models[0](x), y)):
            F.cross_entropy(models[0](x), y).backward()
        optimizers[0].step()
        optimizers[0].zero_grad()

        def closure(x=x, y=y):
            optimizers[1].zero_grad()
            logits = models[1](x)
            loss = forget(logits, y) if optimizers[1].ascending else F.cross_entropy(logits, y)
            loss.backward()
            return loss

        clean = forget(copy.deepcopy(models[1])(x), y)
        with torch.no_grad():
            assert torch.equal(optimizers[1].step(closure), clean)
        if not stale:
            optimizers[1].zero_grad()
    assert_close(models[0].state_dict().values(), models[1].state_dict().values())


@pytest.mark.parametrize("variant", VARIANTS)
def test_step_with_closure_keeps_what_was_accumulated_if_the_closure_does(variant):
    model, (first, second) = network(), batches(2)
    optimizer = SAM(
        torch.optim.SGD(model.parameters(), lr=0.0), model, rho=0.3, **VARIANTS[variant]
    )
    plain = torch.autograd.grad(
        F.cross_entropy(model(first[0]), first[1]), list(model.parameters())
    )
    F.cross_entropy(model(first[0]), first[1]).backward()

    def closure():
        loss = F.cross_entropy(model(second[0]), second[1])
        loss.backward()
        return loss

    optimizer.step(closure)
    own, _ = brute_force_gradient(
        model, *second, OBJECTIVES["sam"][1], [0.3] * 4, **VARIANTS[variant]
    )
    assert_close([p.grad for p in model.parameters()], [a + b for a, b in zip(plain, own)])


@pytest.mark.parametrize("variant", ["plain", "asam-both", "gsam", "gsam-normalize"])
def test_loss_scale_changes_nothing(variant):
    """With a GradScaler, both passes are scaled: .grad is the scaled gradient, else as without."""
    model, (x, y) = network(), batches(1)[0]
    optimizer = SAM(
        torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.3, **VARIANTS[variant]
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    expected, eps = brute_force_gradient(
        model, x, y, OBJECTIVES["sam"][1], [0.3] * 4, **VARIANTS[variant]
    )
    start = weights(model)
    losses = []

    def ascent():
        loss = F.cross_entropy(model(x), y)
        loss.register_hook(lambda grad: losses.append(grad.item()))
        return loss

    with optimizer.perturbed(ascent, grad_scaler=scaler, loss_weight=0.5):
        assert_close([b - a for a, b in zip(start, weights(model))], eps)
        scaler.scale(0.5 * F.cross_entropy(model(x), y)).backward()
    assert losses == [2.0**12]
    assert_close([p.grad / 2**11 for p in model.parameters()], expected)
    scaler.step(optimizer)
    assert_close(weights(model), [p - 0.1 * g / 2 for p, g in zip(start, expected)])


@pytest.mark.parametrize("variant", ["plain", "asam-both", "gsam"])
@pytest.mark.parametrize(
    "steps", [[[1e36], [1.0]], [[1e36, 1.0], [1.0, 1.0]], [[1.0, 1e36], [1.0, 1.0]]]
)
def test_an_overflow_of_one_ascent_skips_the_step_and_lowers_the_scale(variant, steps):
    """Else the scale would grow until the descent overflows, with no perturbation before that."""
    model, (x, y) = network(dtype=torch.float32), batches(1, dtype=torch.float32)[0]
    optimizer = SAM(
        torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.3, **VARIANTS[variant]
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    start, loss = weights(model), lambda: F.cross_entropy(model(x), y)
    for overflows, factors in zip((True, False), steps):
        for factor in factors:
            with optimizer.perturbed(lambda factor=factor: factor * loss(), grad_scaler=scaler):
                still = all(torch.equal(a, b) for a, b in zip(start, weights(model)))
                assert still is (factor > 1)  # times the scale, it is more than float32 holds
                scaler.scale(loss()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert all(torch.equal(a, b) for a, b in zip(start, weights(model))) is overflows
        assert scaler.get_scale() == 2.0**11


@pytest.mark.parametrize("overflow", [False, True])
def test_grad_scaler_unscales_for_a_fused_base_optimizer_and_skips_overflow(overflow):
    model, (x, y) = network(dtype=torch.float32), batches(1, dtype=torch.float32)[0]
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1, fused=True), model, rho=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    start, loss = weights(model), lambda: F.cross_entropy(model(x), y)
    with optimizer.perturbed(loss, grad_scaler=scaler):
        scaler.scale(loss() * (float("inf") if overflow else 1.0)).backward()
    gradient = torch.autograd.grad(loss(), list(model.parameters()))
    scaler.step(optimizer)
    scaler.update()
    expected = start if overflow else [p - 0.1 * g for p, g in zip(start, gradient)]
    assert_close(weights(model), expected, 1e-6)
    assert scaler.get_scale() == (2.0**11 if overflow else 2.0**12)


@pytest.mark.parametrize("scaled", [False, True])
def test_a_vanishing_gradient_perturbs_less_than_rho(scaled):
    """1e-12 stands beside ||g||, not beside the norm of the scaled gradient."""
    model, (x, y) = network(), batches(1)[0]
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.3)
    vanishing = lambda z, y: 1e-12 * F.cross_entropy(z, y)  # noqa: E731
    _, eps = brute_force_gradient(model, x, y, vanishing, [0.3] * 4)
    assert 0.01 < sum(e.square().sum() for e in eps).sqrt() < 0.25
    start = weights(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12) if scaled else None
    with optimizer.perturbed(lambda: vanishing(model(x), y), grad_scaler=scaler):
        assert_close([b - a for a, b in zip(start, weights(model))], eps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_move_as_in_float64_then_rounded(dtype):
    model = torch.nn.Linear(500, 1, bias=False, dtype=dtype)
    g = (30000 * torch.rand_like(model.weight) + 1000).detach()  # the norm is beyond fp16's range
    with torch.no_grad():
        model.weight.zero_()
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.3)
    with optimizer.perturbed(lambda: (model.weight.double() * g.double()).sum()):
        exact = 0.3 * g.double() / g.double().norm()
        rounding = 0.51 * torch.finfo(dtype).eps * exact  # half a unit in the last place
        assert ((model.weight.detach().double() - exact).abs() <= rounding).all()


@pytest.mark.parametrize("variant", ["plain", "gsam"])
def test_compiled_model_equals_eager(variant):
    model = network(batch_norm=True)
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager")
    optimizers = [
        SAM(BASES["adamw"](m.parameters()), m, rho=0.3, **VARIANTS[variant])
        for m in (compiled, eager)
    ]
    for x, y in batches(3):
        for forward, optimizer in zip((compiled, eager), optimizers):
            with optimizer.perturbed(lambda: F.cross_entropy(forward(x), y)):
                F.cross_entropy(forward(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_close(model.state_dict().values(), eager.state_dict().values())


@pytest.mark.parametrize("where", ["block", "loop"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_autocast_may_stand_anywhere(where, variant):
    """Autocast's copies of the weights outlive a pass, unless each pass has its own autocast."""
    model, data = network(dtype=torch.float32), batches(3, dtype=torch.float32)
    optimizer = SAM(
        torch.optim.SGD(model.parameters(), lr=0.1), model, rho=2.0, **VARIANTS[variant]
    )
    autocast = lambda: torch.autocast("cpu", torch.bfloat16)  # noqa: E731

    def gradients(around):
        losses = []
        with autocast() if around == "loop" else contextlib.nullcontext():
            for x, y in data:

                def loss(x=x, y=y):
                    with autocast() if around == "pass" else contextlib.nullcontext():
                        losses.append(F.cross_entropy(model(x), y))
                    return losses[-1]

                with (
                    autocast() if around == "block" else contextlib.nullcontext(),
                    optimizer.perturbed(loss),
                ):
                    loss().backward()
        taken = [p.grad for p in model.parameters()]
        model.zero_grad()
        return losses, taken

    (losses, expected), (others, taken) = gradients("pass"), gradients(where)
    assert abs(losses[0] - losses[1]) > 0.1  # the perturbation shows
    assert_same(others, losses)
    assert_same(taken, expected)


# --------------------------------------------------------------------------------------------------
# Clipping: after the blocks, and after unscaling


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("variant", ["plain", "asam-both", "gsam", "gsam-normalize"])
def test_clipping_after_the_blocks(variant, scaled):
    model, data = network(), batches(2)
    optimizer = SAM(
        torch.optim.SGD(model.parameters(), lr=1.0), model, rho=0.3, **VARIANTS[variant]
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=scaled)
    start, expected = weights(model), None
    for x, y in data:
        part, _ = brute_force_gradient(
            model, x, y, OBJECTIVES["sam"][1], [0.3] * 4, **VARIANTS[variant]
        )
        expected = part if expected is None else [(a + b) / 2 for a, b in zip(expected, part)]
    length = sum((g**2).sum() for g in expected).sqrt()
    limit = 0.5 * length.item()
    for x, y in data:
        with optimizer.perturbed(
            lambda: F.cross_entropy(model(x), y), loss_weight=0.5, grad_scaler=scaler
        ):
            scaler.scale(0.5 * F.cross_entropy(model(x), y)).backward()
    scaler.unscale_(optimizer)
    total = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
    scaler.step(optimizer)
    scaler.update()
    torch.testing.assert_close(total, length)
    moved = [a - b for a, b in zip(start, weights(model))]
    assert_close(moved, [g * limit / length for g in expected], 1e-5)
    torch.testing.assert_close(
        sum((m**2).sum() for m in moved).sqrt().item(), limit, rtol=1e-5, atol=0
    )


# --------------------------------------------------------------------------------------------------
# The memory of g keeps the weights during a block


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_weights_stay_where_they_are_in_memory(variant, dtype):
    """CUDA graphs, views and DDP's buckets know addresses."""
    model = Awkward().to(dtype)
    optimizer = SAM(BASES["adamw"](model.parameters()), model, rho=0.3, **VARIANTS[variant])
    addresses, start = [p.data_ptr() for p in model.parameters()], weights(model)
    for x, y in batches(2, dtype=dtype):
        with optimizer.perturbed(lambda: F.cross_entropy(model(x), y)):
            assert [p.data_ptr() for p in model.parameters()] == addresses
            assert any(not torch.equal(p, q) for p, q in zip(weights(model), start))
            F.cross_entropy(model(x), y).backward()
        assert [p.data_ptr() for p in model.parameters()] == addresses
        assert_same(weights(model), start)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_that_are_views_of_one_buffer_may_be_written_again(variant):
    """As DDP's are with gradient_as_bucket_view: the second pass writes where the first has."""
    results = []
    for flat in (False, True):
        torch.manual_seed(0)
        model = network()
        buffer = torch.zeros(sum(p.numel() for p in model.parameters())).double()

        def backward(x, y, flat=flat, model=model, buffer=buffer):
            grads = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
            views = buffer.split([p.numel() for p in model.parameters()])
            for p, g, view in zip(model.parameters(), grads, views):
                p.grad = view.view_as(p).copy_(g) if flat else g.clone()

        optimizer = SAM(
            torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.3, **VARIANTS[variant]
        )
        for x, y in batches(3):
            optimizer.zero_grad()
            optimizer.step(lambda: backward(x, y) or torch.zeros(()))
        results.append(weights(model))
    assert_same(*results)


class Views(torch.nn.Module):
    """A weight whose transpose is kept, two parameters in one memory."""

    def __init__(self):
        super().__init__()
        self.first, self.last = torch.nn.Linear(6, 8, bias=False), torch.nn.Linear(8, K, bias=False)
        self.transposed = self.first.weight.detach().t()
        flat = torch.randn(16)
        self.p, self.q = torch.nn.Parameter(flat[:8]), torch.nn.Parameter(flat[8:])

    def forward(self, x):
        one = self.first.weight
        straight = x @ self.transposed  # follows the weight, though autograd does not know
        return self.last(torch.tanh(F.linear(x, one) + straight + self.p + self.q))


@pytest.mark.parametrize("variant", VARIANTS)
def test_views_of_the_weights_see_the_perturbation(variant):
    model, (x, y) = Views(), batches(1, dtype=torch.float32)[0]
    start = weights(model)
    optimizer = SAM(
        torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.3, **VARIANTS[variant]
    )
    with optimizer.perturbed(lambda: F.cross_entropy(model(x), y)):
        assert torch.equal(model.transposed, model.first.weight.t())
        assert not torch.equal(model.first.weight, start[0])
        F.cross_entropy(model(x), y).backward()
    assert torch.equal(model.transposed, model.first.weight.t())
    assert_same(weights(model), start)


@pytest.mark.parametrize("adaptive", [None, "before", "after", "both"])
def test_one_gradient_tensor_for_two_parameters(adaptive):
    """As a closure of step() may set them."""
    model = torch.nn.ParameterList([torch.nn.Parameter(torch.randn(4).double()) for _ in range(2)])
    optimizer, moved = (
        SAM(torch.optim.SGD(model.parameters(), lr=1.0), model, rho=0.3, adaptive=adaptive),
        [],
    )
    start, g = weights(model), torch.randn(4).double()

    def closure():
        moved.append(weights(model))
        model[0].grad = model[1].grad = g.clone()
        return g.sum()

    optimizer.step(closure)
    scale = [p.abs() for p in start]
    weighted = [g * s if adaptive in ("before", "both") else g for s in scale]
    norm = sum(w.square().sum() for w in weighted).sqrt()
    eps = [
        0.3 * (w * s if adaptive in ("after", "both") else w) / norm
        for w, s in zip(weighted, scale)
    ]
    assert_close(moved[1], [p + e for p, e in zip(start, eps)])


@pytest.mark.parametrize(
    "made, used", [("before", "inside"), ("before", "after"), ("inside", "after")]
)
def test_a_graph_made_at_other_weights_raises(made, used):
    model, (x, y) = network(), batches(1)[0]
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.3)
    loss = lambda: F.cross_entropy(model(x), y)  # noqa: E731
    graph = loss() if made == "before" else None
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        with optimizer.perturbed(loss):
            graph = graph or loss()
            (graph if used == "inside" else loss()).backward()
        graph.backward()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("variant", ["plain", "asam-both", "gsam"])
def test_compiled_models_are_perturbed_without_compiling_again(variant, backend):
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor needs a compiler")
    eager = network(dtype=torch.float32)
    model = copy.deepcopy(eager)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, backend=backend)
    optimizers = [
        SAM(BASES["sgd"](m.parameters()), m, rho=0.5, **VARIANTS[variant])
        for m in (compiled, eager)
    ]
    for x, y in batches(4, dtype=torch.float32):
        for forward, optimizer in zip((compiled, eager), optimizers):
            with optimizer.perturbed(lambda: F.cross_entropy(forward(x), y)):
                F.cross_entropy(forward(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_close(weights(model), weights(eager), 1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_what_changes_between_blocks_is_seen():
    """No block may rely on what one before has seen: modules, groups, what is frozen, rho."""
    model = network()
    model.append(torch.nn.Linear(K, K).double())
    optimizer = SAM(torch.optim.SGD(model[0].parameters(), lr=0.0), model, rho=0.3)

    def check(rhos, used):
        (x, y), params = batches(1)[0], list(model.parameters())
        g = torch.autograd.grad(
            F.cross_entropy(used(x), y), params, allow_unused=True, materialize_grads=True
        )
        g = [gi if rho else torch.zeros_like(gi) for gi, rho in zip(g, rhos)]
        _, eps = brute_force_gradient(model, x, y, None, rhos, g=g)
        start = weights(model)
        with optimizer.perturbed(lambda: F.cross_entropy(used(x), y)):
            assert_close([b - a for a, b in zip(start, weights(model))], eps)
            F.cross_entropy(used(x), y).backward()
        assert_same(weights(model), start)
        optimizer.zero_grad()

    check([0.3] * 2 + [0.0] * 4, model)
    optimizer.add_param_group({"params": [*model[2].parameters(), *model[3].parameters()]})
    check([0.3] * 6, model)
    check([0.3] * 4 + [0.0] * 2, model[:3])  # the last layer has no gradient this time
    optimizer.param_groups[1]["rho"] = 0.1
    check([0.3] * 2 + [0.1] * 4, model)
    model[1] = torch.nn.Sequential(torch.nn.BatchNorm1d(8, affine=False).double(), torch.nn.Tanh())
    check([0.3] * 2 + [0.1] * 4, model)
    assert model[1][0].num_batches_tracked == 3  # check() itself makes two more forward passes
    model[1] = torch.nn.Tanh()
    model[0].weight.data = torch.randn(8, 6).double()
    check([0.3] * 2 + [0.1] * 4, model)
    model.to(torch.float32)
    x, y = batches(1, dtype=torch.float32)[0]
    start = weights(model)
    with optimizer.perturbed(lambda: F.cross_entropy(model(x), y)):
        assert all(
            p.dtype == torch.float32 and not torch.equal(p, s)
            for p, s in zip(model.parameters(), start)
        )
        F.cross_entropy(model(x), y).backward()
    assert_same(weights(model), start)
    for p in model[2].parameters():
        p.requires_grad_(False)
    with optimizer.perturbed(lambda: F.cross_entropy(model(x), y)):
        moved = [not torch.equal(p, s) for p, s in zip(model.parameters(), start)]
        F.cross_entropy(model(x), y).backward()
    assert moved == [True] * 2 + [False] * 2 + [True] * 2


# --------------------------------------------------------------------------------------------------
# Memory format


def convolutions(layout, dtype=torch.float64):
    layers = [
        torch.nn.Conv2d(3, 7, 3, bias=False),
        torch.nn.BatchNorm2d(7),
        torch.nn.Tanh(),
        torch.nn.Conv2d(7, K, 3),
    ]
    model = torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()).to(
        dtype
    )
    return model.to(memory_format=layout)


def is_channels_last(tensor):
    return tensor.dim() != 4 or tensor.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_channels_last_gives_the_weights_of_the_contiguous_format(variant, base):
    trained, y = [], torch.randint(0, K, (2, 4))
    images = torch.randn(2, 4, 3, 9, 9, dtype=torch.float64)
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(1)
        model = convolutions(layout)
        optimizer = SAM(BASES[base](model.parameters()), model, rho=0.3, **VARIANTS[variant])
        for _ in range(3):
            for x, labels in zip(images, y):  # the second one adds to the gradients of the first
                x = x.contiguous(memory_format=layout)
                with optimizer.perturbed(lambda: F.cross_entropy(model(x), labels)):
                    assert layout is torch.contiguous_format or all(
                        map(is_channels_last, model.parameters())
                    )
                    F.cross_entropy(model(x), labels).backward()
            grads = [p.grad for p in model.parameters()]
            optimizer.step()
            optimizer.zero_grad()
        kept = [
            t
            for state in optimizer.state.values()
            for t in state.values()
            if isinstance(t, torch.Tensor)
        ]
        assert layout is torch.contiguous_format or all(
            map(is_channels_last, [*model.parameters(), *grads, *kept])
        )
        trained.append([*weights(model), *model.buffers()])
    assert_close(*trained)


class Contiguous(TorchDispatchMode):
    """Counts new tensors that are not channels_last."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        results, given = (
            [t for t in torch.utils._pytree.tree_leaves(tree) if isinstance(t, torch.Tensor)]
            for tree in (out, args)
        )
        known = {t.untyped_storage().data_ptr() for t in given}
        new = [t for t in results if t.untyped_storage().data_ptr() not in known]  # and no view
        self.count += sum(t.is_contiguous() and not is_channels_last(t) for t in new)
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_block_makes_no_tensor_of_another_format(variant, dtype):
    """g, its copies, the weights that are kept and those that move; gradients are random here."""
    model = convolutions(torch.channels_last, dtype)
    optimizer = SAM(
        torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.3, **VARIANTS[variant]
    )
    with Contiguous() as contiguous:
        for _ in range(2):
            with optimizer.perturbed(lambda: random_perturbation(model.parameters())):
                for p in model.parameters():
                    p.grad = torch.randn_like(p) if p.grad is None else p.grad + torch.randn_like(p)
        assert contiguous.count == 0
        torch.empty(2, 3, 4, 4)
    assert contiguous.count == 1


# --------------------------------------------------------------------------------------------------
# What others keep, hold or do meanwhile


@pytest.mark.parametrize("where", ["head", "two blocks"])
@pytest.mark.parametrize("form", ["with", "step"])
def test_g_in_the_gradients_of_others_is_refused(where, form):
    """ArcFace's weights with an optimizer of their own, or a second network with its own SAM."""
    (model, head), (x, y) = (network(), torch.nn.Linear(K, K).double()), batches(1)[0]
    first = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model)
    second = SAM(torch.optim.SGD(head.parameters(), lr=0.1), head)
    start = weights(model)

    def closure():
        loss = F.cross_entropy(head(model(x)), y)
        if form == "step":
            loss.backward()
        return loss

    with pytest.raises(RuntimeError, match=r"\(5, 5\).*ModuleList\(\[model, other_module\]\)"):
        if form == "step":
            first.step(closure)
        elif where == "head":
            with first.perturbed(closure):
                pytest.fail("the body ran")
        else:
            with first.perturbed(closure), second.perturbed(closure):
                pytest.fail("the body ran")
    assert_same(weights(model), start)


@pytest.mark.parametrize("late", [False, True])
def test_g_in_the_gradients_of_others_is_found_later_too(late):
    model, head, data = network(), torch.nn.Linear(K, K).double(), batches(16)
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model)
    head.requires_grad_(False)
    with pytest.raises(RuntimeError, match="ModuleList") if late else contextlib.nullcontext():
        for i, (x, y) in enumerate(data):
            head.requires_grad_(late and i > 8)

            def loss(x=x, y=y):
                return F.cross_entropy(head(model(x)), y)

            with optimizer.perturbed(loss):
                loss().backward()


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("variant", ["plain", "gsam"])
def test_two_networks_held_as_one_module(variant, nested):
    """What the error says to write: g reaches neither's gradients."""
    (model, head), (x, y) = (network(), torch.nn.Linear(K, K).double()), batches(1)[0]
    both = torch.nn.ModuleList([model, head])
    first = SAM(torch.optim.SGD(model.parameters(), lr=0.1), both, 0.3, **VARIANTS[variant])
    second = SAM(torch.optim.SGD(head.parameters(), lr=0.1), both, 0.3, **VARIANTS[variant])

    def loss():
        return F.cross_entropy(head(model(x)), y)

    with first.perturbed(loss), second.perturbed(loss) if nested else contextlib.nullcontext():
        moved = weights(both)
        gp = torch.autograd.grad(loss(), list(both.parameters()))
        loss().backward()
    perturbed = [not torch.equal(a, b) for a, b in zip(moved, weights(both))]
    assert perturbed == [True] * 4 + [nested] * 2
    ours = [p.grad for p in both.parameters()]
    if variant == "plain":
        assert_close(ours, gp)
    elif not nested:
        assert_close(ours[4:], gp[4:])


@pytest.mark.parametrize(
    "how", ["model", "model, to zeros", "by hand", "base", "sam", "sam, zeros"]
)
@pytest.mark.parametrize("form", ["closure", "body", "step"])
@pytest.mark.parametrize("variant", ["plain", "gsam"])
def test_gradients_may_be_zeroed_inside_in_any_way(variant, form, how):
    """Gradients of the last step are still there; who zeroes them means them, hidden or not."""
    model, (x, y) = network(), batches(1)[0]
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model, 0.3, **VARIANTS[variant])
    expected, _ = brute_force_gradient(model, x, y, F.cross_entropy, [0.3] * 4, **VARIANTS[variant])
    for p in model.parameters():
        p.grad = torch.randn_like(p)

    def zero():
        if how == "by hand":
            for p in model.parameters():
                p.grad = None
        else:
            owner = {"model": model, "base": optimizer.base_optimizer, "sam": optimizer}
            owner[how.split(",")[0]].zero_grad(set_to_none="zeros" not in how)

    def closure(zeroes=True):
        if zeroes:
            zero()
        loss = F.cross_entropy(model(x), y)
        if form == "step":
            loss.backward()
        return loss

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if form == "step":
            optimizer.step(closure)
        else:
            with optimizer.perturbed(lambda: closure(form == "closure")):
                closure(form == "body").backward()
    assert_close([p.grad for p in model.parameters()], expected)


@pytest.mark.parametrize("variant", ["plain", "gsam", "gsam-normalize", "asam-both"])
def test_complex_weights_are_pairs_of_real_ones(variant):
    def run(real):
        torch.manual_seed(3)
        model = torch.nn.Module()
        w = torch.randn(5, dtype=torch.complex128)
        a = torch.randn(7, 5, dtype=torch.complex128)
        model.w = torch.nn.Parameter(torch.view_as_real(w).clone() if real else w)
        options = VARIANTS[variant]
        optimizer = SAM(torch.optim.SGD([model.w], lr=0.1), model, rho=0.3, **options)

        def loss():
            w = torch.view_as_complex(model.w) if real else model.w
            return (a @ w).abs().pow(1.5).sum() + w.real.sum().sin()

        with optimizer.perturbed(loss):
            loss().backward()
        return model.w.grad if real else torch.view_as_real(model.w.grad)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = run(real=False)
    if variant == "asam-both":  # |theta| is the modulus, for both parts
        assert ours.isfinite().all()
    else:
        torch.testing.assert_close(ours, run(real=True), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("base", ["adamw", "sgd"])
def test_maximizing_a_reward_is_minimizing_its_negative(base, variant):
    steps = {}
    for maximize in (False, True):
        torch.manual_seed(0)
        model = network()
        kind = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[base]
        sgd = kind(model.parameters(), lr=0.1, maximize=maximize)
        optimizer = SAM(sgd, model, rho=0.3, **VARIANTS[variant])
        sign = -1 if maximize else 1
        for x, y in batches(4):
            with optimizer.perturbed(lambda: sign * F.cross_entropy(model(x), y)):
                (sign * F.cross_entropy(model(x), y)).backward()
            optimizer.step()
            optimizer.zero_grad()
        steps[maximize] = weights(model)
    assert_close(steps[True], steps[False])


@pytest.mark.parametrize("kind", ["own", "weight norm", "spectral norm"])
def test_cached_parametrizations_follow_the_weights(kind):
    class Symmetric(torch.nn.Module):
        def forward(self, x):
            return x.triu() + x.triu(1).T

    def gradients(around):
        torch.manual_seed(1)
        model = torch.nn.Linear(6, 6).double()
        if kind == "own":
            parametrize.register_parametrization(model, "weight", Symmetric())
        elif kind == "weight norm":
            torch.nn.utils.parametrizations.weight_norm(model)
        else:
            torch.nn.utils.parametrizations.spectral_norm(model)
        optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=1.0)
        with parametrize.cached() if around else contextlib.nullcontext():
            for x, y in data:
                with optimizer.perturbed(lambda: F.cross_entropy(model(x), y)):
                    F.cross_entropy(model(x), y).backward()
        return [p.grad for p in model.parameters()]

    data = batches(2)
    assert_same(gradients(around=True), gradients(around=False))


@pytest.mark.parametrize("pass_", ["ascent", "descent"])
@pytest.mark.parametrize("steps", ["sam", "base", "one each"])
def test_a_step_in_a_hook_of_the_backward_pass_is_refused_before_weights_move(steps, pass_):
    """Layer-wise optimizers step as soon as a gradient is there."""
    model, (x, y) = network(), batches(1)[0]
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model)
    each = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}
    start = weights(model)

    def hook(p):
        if optimizer.ascending is (pass_ == "ascent"):
            {"sam": optimizer, "base": optimizer.base_optimizer}.get(steps, each[p]).step()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(hook)
    with pytest.raises(RuntimeError, match="in a hook of its backward pass"):
        with optimizer.perturbed(lambda: F.cross_entropy(model(x), y)):
            F.cross_entropy(model(x), y).backward()
    assert_same(weights(model), start)


def test_other_optimizers_may_step_inside():
    (model, other), (x, y) = (network(), network()), batches(1)[0]
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model)
    plain = torch.optim.SGD(other.parameters(), lr=0.1)
    with optimizer.perturbed(lambda: F.cross_entropy(model(x), y)):
        F.cross_entropy(other(x), y).backward()
        plain.step()
        F.cross_entropy(model(x), y).backward()


def test_one_mask_of_dropout_for_both_passes():
    model, (x, y), seen = network(), batches(1)[0], []
    model.insert(1, torch.nn.Dropout(0.5))
    model[1].register_forward_hook(lambda module, args, out: seen.append(out == 0))
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model)

    def ascent():
        with torch.random.fork_rng():
            return F.cross_entropy(model(x), y)

    for closure in (ascent, lambda: F.cross_entropy(model(x), y)):
        with optimizer.perturbed(closure):
            F.cross_entropy(model(x), y).backward()
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[2], seen[3])


def test_one_perturbation_of_a_whole_batch_in_micro_batches():
    model, (x, y) = network(), batches(1, size=24)[0]
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.0), model, rho=0.3)
    expected, _ = brute_force_gradient(model, x, y, F.cross_entropy, [0.3] * 4)

    def closure():
        optimizer.zero_grad()
        total = 0
        for xs, ys in zip(x.split(6), y.split(6)):
            loss = F.cross_entropy(model(xs), ys) / 4
            loss.backward()
            total += loss.detach()
        return total

    torch.testing.assert_close(optimizer.step(closure), F.cross_entropy(model(x), y).detach())
    assert_close([p.grad for p in model.parameters()], expected)
