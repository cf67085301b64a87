"""sam_obf.py against brute force: explicit loops over parameters in float64, with no call into the code under test."""

import contextlib
import copy
import itertools
import shutil
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from sam_obf import SAM, OutputBiasForgetting, momentum_perturbation, proportional_rho, random_perturbation

K = 5  # classes


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def network(batch_norm=False, dtype=torch.float64):
    layers = [torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, K)]
    if batch_norm:
        layers.insert(1, torch.nn.BatchNorm1d(8))
    return torch.nn.Sequential(*layers).to(dtype)


def batches(n, size=12, dtype=torch.float64):
    return [(torch.randn(size, 6, dtype=dtype), torch.randint(0, K, (size,))) for _ in range(n)]


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def assert_same(a, b):
    for left, right in zip(a, b, strict=True):
        assert torch.equal(left, right)


def assert_close(a, b, tolerance=1e-11):
    for left, right in zip(a, b, strict=True):
        torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


# ----------------------------------------------------------------------------------------------------------------------
# Brute force. The ascent objectives are written as their definitions, with autograd taking the gradient.


def obf_by_definition(logits, y, gamma=1.0, lam=None, link="sigmoid"):
    """(1 - alpha) CE(p, y) - CE(p, u), written out example by example with alpha a Python number."""
    k = logits.shape[1]
    lam = 1 / k if lam is None else lam
    total = 0
    for z, label in zip(logits, y):
        p = torch.sigmoid(z) if link == "sigmoid" else torch.softmax(z, 0)
        p_y = p[label].item()
        alpha = gamma * max(0.0, (1 - lam / p_y) / (1 - lam)) if p_y > 0 else 0.0
        cross_entropies = []
        for q in (torch.eye(k, dtype=z.dtype)[label], torch.full((k,), 1 / k, dtype=z.dtype)):
            if link == "softmax":
                cross_entropies.append(-(q * torch.log(p)).sum())
            else:
                cross_entropies.append(-(q * torch.log(p) + (1 - q) * torch.log(1 - p)).sum())
        total = total + (1 - alpha) * cross_entropies[0] - cross_entropies[1]
    return total / len(y)


OBJECTIVES = {
    "sam": (lambda z, y: F.cross_entropy(z, y),) * 2,
    "obf": (OutputBiasForgetting(), obf_by_definition),
    "obf-gamma-0": (OutputBiasForgetting(gamma=0.0), lambda z, y: obf_by_definition(z, y, gamma=0.0)),
    "obf-softmax": (
        OutputBiasForgetting(0.7, 0.1, "softmax"),
        lambda z, y: obf_by_definition(z, y, 0.7, 0.1, "softmax"),
    ),
    "random": None,
}


def brute_force_gradient(model, x, y, objective, rhos, adaptive=None, gsam_alpha=0.0, gsam_normalize=False, g=None):
    """The gradient that one micro-batch contributes, and the perturbation, as lists over parameters."""
    params = list(model.parameters())
    if g is None:
        g = list(torch.autograd.grad(objective(model(x), y), params))
    before = [p.detach().clone() for p in params]
    weighted = []
    for p, gi in zip(before, g):
        weighted.append(gi * p.abs() if adaptive in ("before", "both") else gi)
    norm = sum((w**2).sum() for w in weighted).sqrt() + 1e-12
    eps = []
    for p, w, rho in zip(before, weighted, rhos):
        eps.append(rho * (w * p.abs() if adaptive in ("after", "both") else w) / norm)
    for p, e in zip(params, eps):
        p.data = p.data + e
    gp = list(torch.autograd.grad(F.cross_entropy(model(x), y), params))
    for p, b in zip(params, before):
        p.data = b
    if gsam_alpha:
        if gsam_normalize:
            length = sum((gi**2).sum() for gi in g).sqrt() + 1e-12
            g = [gi / length for gi in g]
        c = sum((gi * gpi).sum() for gi, gpi in zip(g, gp)) / sum((gpi**2).sum() for gpi in gp)
        gp = [gpi - gsam_alpha * (gi - c * gpi) for gi, gpi in zip(g, gp)]
    return gp, eps


BASES = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.02, weight_decay=0.1),
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True),
}
VARIANTS = {
    "plain": {},
    "asam-before": {"adaptive": "before"},
    "asam-after": {"adaptive": "after"},
    "asam-both": {"adaptive": "both"},
    "gsam": {"gsam_alpha": 0.4},
    "gsam-normalize": {"gsam_alpha": 0.4, "gsam_normalize": True},
}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("steps", [1, 10])
def test_steps_equal_brute_force(base, variant, objective, steps):
    ours, theirs = OBJECTIVES[objective] or (lambda z, y: random_perturbation(model.parameters()), None)
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
        gradient, _ = brute_force_gradient(reference, x, y, theirs, [0.3] * 4, g=noise, **VARIANTS[variant])
        for p, g in zip(reference.parameters(), gradient):
            p.grad = g
        reference_optimizer.step()
    assert_close(weights(model), weights(reference))
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(weights(model), start))


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


@pytest.mark.parametrize("variant", [v for v in VARIANTS if "gsam" not in v])
def test_perturbation_has_length_rho(variant):
    model = network()
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.3, **VARIANTS[variant])
    x, y = batches(1)[0]
    start = weights(model)
    g = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    with optimizer.perturbed(lambda: F.cross_entropy(model(x), y)):
        eps = [b - a for a, b in zip(start, weights(model))]
    norm = lambda tensors: sum((t**2).sum() for t in tensors).sqrt()  # noqa: E731
    measured = {
        "plain": norm(eps),
        "asam-before": norm(eps),  # || |theta| g || normalises it
        "asam-after": norm([e / p.abs() for e, p in zip(eps, start)]),  # without |theta|, the length is rho
        "asam-both": norm([e / p.abs() for e, p in zip(eps, start)]),
    }[variant]
    torch.testing.assert_close(measured, torch.tensor(0.3, dtype=torch.float64), rtol=1e-9, atol=0)
    assert sum((e * gi).sum() for e, gi in zip(eps, g)) > 0  # it ascends


def test_gsam_removes_only_what_is_orthogonal():
    model, (x, y) = network(), batches(1)[0]
    gradients = {}
    for alpha in (0.0, 0.4):
        optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.3, gsam_alpha=alpha)
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


# ----------------------------------------------------------------------------------------------------------------------
# Output bias forgetting


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
        moved = (ours.grad * 64 - 1 / K).abs() > 1e-13  # a wrong class moves by other than u exactly where alpha > 0
        assert moved[0][wrong[0]].logical_not().all() and moved[1][wrong[1]].logical_not().all()
        assert moved[2][wrong[2]].all() or gamma < 1e-9


def test_obf_at_gamma_zero_lowers_the_target_and_lifts_all_others_alike():
    logits = torch.randn(7, K, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, K, (7,))
    OutputBiasForgetting(gamma=0.0)(logits, target).backward()
    expected = (torch.full((7, K), 1 / K, dtype=torch.float64) - F.one_hot(target, K)) / 7
    torch.testing.assert_close(logits.grad, expected)


def test_obf_is_finite_at_extreme_logits_and_in_half_precision():
    for dtype, lam in itertools.product((torch.float16, torch.bfloat16, torch.float32), (None, 0.0)):
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
    assert ((half.grad.double() - double.grad).abs() <= rounding + 1e-4 * double.grad.abs().mean()).all()


def test_obf_takes_any_leading_dimensions():
    logits, target = torch.randn(4, 3, 2, K, dtype=torch.float64), torch.randint(0, K, (4, 3, 2))
    a, b = logits.clone().requires_grad_(), logits.reshape(-1, K).clone().requires_grad_()
    OutputBiasForgetting()(a, target).backward()
    OutputBiasForgetting()(b, target.reshape(-1)).backward()
    assert torch.equal(a.grad.reshape(-1, K), b.grad)


# ----------------------------------------------------------------------------------------------------------------------
# Invariants


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("raises", [False, True])
def test_weights_are_restored_bit_for_bit_and_gradients_survive(dtype, variant, raises):
    model = network(dtype=dtype)
    with torch.no_grad():
        model[0].weight[0, 0], model[0].weight[0, 1] = -0.0, 1e-40  # bits that arithmetic would lose
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.5, **VARIANTS[variant])
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
@pytest.mark.parametrize("variant, where", [("plain", "closure"), ("gsam", "closure"), ("gsam", "body")])
def test_an_exception_leaves_the_gradients_of_before(variant, where, accumulated):
    model, (x, y) = network(), batches(1)[0]
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.5, **VARIANTS[variant])
    for p in model.parameters():
        p.grad = torch.randn_like(p) if accumulated else None
    before = [p.grad for p in model.parameters()]
    copies = [None if g is None else g.clone() for g in before]

    def backward_and_raise():
        F.cross_entropy(model(x), y).backward()
        raise Interrupted

    with pytest.raises(Interrupted):
        with optimizer.perturbed(backward_and_raise if where == "closure" else lambda: F.cross_entropy(model(x), y)):
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
    assert_close([p.grad for p in inside], torch.autograd.grad(F.cross_entropy(model(x), y), inside), 1e-15)
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


class OwnForwardBatchNorm(torch.nn.BatchNorm1d):
    """A subclass that ignores track_running_stats, as some do."""

    def forward(self, x):
        self.num_batches_tracked.add_(1)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, True, 0.3, self.eps)


class ReplacedBuffer(torch.nn.Module):
    """Statistics that a forward pass replaces, twice, instead of changing them in place."""

    def __init__(self, features):
        super().__init__()
        self.register_buffer("scale", torch.zeros(features))

    def forward(self, x):
        for _ in range(2):
            self.scale = 0.9 * self.scale + 0.1 * x.detach().abs().mean(0)
        return x / (1 + self.scale)


def _tracked_instance_norm(n):
    norm = torch.nn.InstanceNorm1d(1, affine=True, track_running_stats=True)
    return torch.nn.Sequential(torch.nn.Unflatten(1, (1, n)), norm, torch.nn.Flatten())


def _timm(name):
    def layer(n):
        timm_layer = getattr(pytest.importorskip("timm.layers", reason="timm is not installed"), name)(n)
        return torch.nn.Sequential(torch.nn.Unflatten(1, (n, 1, 1)), timm_layer, torch.nn.Flatten())

    return layer


@pytest.mark.parametrize(
    "layer",
    [
        torch.nn.BatchNorm1d,
        lambda n: torch.nn.BatchNorm1d(n, momentum=None),
        torch.nn.SyncBatchNorm,
        OwnForwardBatchNorm,
        _tracked_instance_norm,
        lambda n: torch.nn.utils.parametrizations.spectral_norm(torch.nn.Linear(n, n)),
        ReplacedBuffer,
        *map(_timm, ["BatchNormAct2d", "SplitBatchNorm2d", "EvoNorm2dB0", "EvoNorm2dB1", "EvoNorm2dB2"]),
    ],
    ids="torch cumulative sync own-forward instance spectral replaced batch-act split evo-b0 evo-b1 evo-b2".split(),
)
@pytest.mark.parametrize("variant", ["plain", "gsam"])
def test_buffers_are_those_of_the_clean_passes_alone(layer, variant):
    model = network()
    model.insert(1, layer(8).double())
    clean, start = copy.deepcopy(model), [buffer.clone() for buffer in model.buffers()]
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.0), model, rho=0.5, **VARIANTS[variant])
    for x, y in batches(4):
        with optimizer.perturbed(lambda: F.cross_entropy(model(x), y)):
            F.cross_entropy(model(x), y).backward()
        clean(x)
    assert_same(model.buffers(), clean.buffers())
    assert any(not torch.equal(a, b) for a, b in zip(clean.buffers(), start))


@pytest.mark.parametrize("compiled", [False, True])
def test_without_a_forward_pass_in_the_closure_statistics_move_in_the_descent_pass(compiled):
    model = network(batch_norm=True)
    forward = torch.compile(model, backend="aot_eager") if compiled else model
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.0), forward, rho=0.5)
    for x, y in batches(3):
        clean = copy.deepcopy(model)
        with optimizer.perturbed(lambda: random_perturbation(model.parameters())):
            clean.load_state_dict(model.state_dict() | dict(clean.named_buffers()))
            F.cross_entropy(forward(x), y).backward()
        clean(x)
        assert_close(model.buffers(), clean.buffers())
    assert model[1].num_batches_tracked == 3


def test_buffers_that_do_not_move_are_not_copied():
    class Clones(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            sizes.extend([args[0].numel()] if function is torch.ops.aten.clone.default else [])
            return function(*args, **(kwargs or {}))

    model, (x, y), sizes = network(batch_norm=True), batches(1)[0], []
    model.register_buffer("table", torch.zeros(10_007))
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.0), model, rho=0.5)
    with Clones(), optimizer.perturbed(lambda: F.cross_entropy(model(x), y)):
        F.cross_entropy(model(x), y).backward()
    assert 8 in sizes and 10_007 not in sizes


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
        terms.append(brute_force_gradient(reference, xs, ys, OBJECTIVES["sam"][1], [0.3] * 4, **VARIANTS[variant])[0])
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
        gradient, _ = brute_force_gradient(model, xs, ys, OBJECTIVES["sam"][1], [0.3] * 4, gsam_alpha=0.4)
        gradient = [g * len(xs) / 10 for g in gradient]
        expected = gradient if expected is None else [a + b for a, b in zip(expected, gradient)]
    for xs, ys in zip(x.split(4), y.split(4)):
        with optimizer.perturbed(lambda: F.cross_entropy(model(xs), ys), loss_weight=len(xs) / 10):
            (F.cross_entropy(model(xs), ys) * len(xs) / 10).backward()
    assert_close([p.grad for p in model.parameters()], expected)


class Awkward(torch.nn.Module):
    """Frozen, unused and tied parameters, two that get one gradient tensor, and one whose gradient is expanded."""

    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(6, 6), torch.nn.Linear(6, 6)
        self.b.weight = self.a.weight
        self.head, self.frozen, self.unused = torch.nn.Linear(6, K), torch.nn.Linear(6, 6), torch.nn.Linear(6, 6)
        self.p, self.q = torch.nn.Parameter(torch.randn(12, 6)), torch.nn.Parameter(torch.randn(12, 6))
        self.s = torch.nn.Parameter(torch.randn(12, 1).expand(12, 6).contiguous())
        self.frozen.requires_grad_(False)

    def forward(self, x):
        return (
            self.head(torch.tanh(self.b(torch.tanh(self.frozen(self.a(x)) + (self.p + self.q))))) + 0.1 * self.s.sum()
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
    optimizer = SAM(torch.optim.AdamW(model.parameters(), lr=0.1), model, rho=0.3, **VARIANTS[variant])
    with optimizer.perturbed(lambda: mixed(model(x), y)):
        F.cross_entropy(model(x), y).backward()
    assert_close([p.grad for p in used], expected)
    assert_same(weights(model), start)
    assert all(p.grad is None for p in (*model.frozen.parameters(), *model.unused.parameters()))


def test_groups_with_different_rho_share_one_norm():
    model, (x, y) = network(), batches(1)[0]
    groups = [{"params": list(model[0].parameters()), "rho": 0.5}, {"params": list(model[2].parameters())}]
    optimizer = SAM(torch.optim.SGD(groups, lr=0.1), model, rho=0.1)
    expected, eps = brute_force_gradient(model, x, y, OBJECTIVES["sam"][1], [0.5, 0.5, 0.1, 0.1])
    start = weights(model)
    with optimizer.perturbed(lambda: F.cross_entropy(model(x), y)):
        assert_close([b - a for a, b in zip(start, weights(model))], eps)
        F.cross_entropy(model(x), y).backward()
    assert_close([p.grad for p in model.parameters()], expected)


def test_a_group_with_rho_zero_is_trained_and_not_part_of_the_norm():
    model, (x, y) = network(), batches(1)[0]
    groups = [{"params": list(model[0].parameters()), "rho": 0.0}, {"params": list(model[2].parameters())}]
    optimizer = SAM(torch.optim.SGD(groups, lr=0.1), model, rho=0.2)
    start = weights(model)
    with optimizer.perturbed(lambda: F.cross_entropy(model(x), y)):
        eps = [b - a for a, b in zip(start, weights(model))]
        F.cross_entropy(model(x), y).backward()
    assert_same(eps[:2], [torch.zeros_like(e) for e in eps[:2]])
    torch.testing.assert_close(sum(e.square().sum() for e in eps).sqrt().item(), 0.2)
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("base", BASES)
def test_state_dict_round_trip_continues_identically(base, tmp_path):
    data = batches(10)

    def new():
        torch.manual_seed(1)
        model = network()
        return model, SAM(BASES[base](model.parameters()), model, rho=0.3, adaptive="after")

    def train(model, optimizer, data):
        for x, y in data:
            with optimizer.perturbed(lambda: F.cross_entropy(model(x), y)):
                F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()

    model, optimizer = new()
    train(model, optimizer, data[:5])
    for group in optimizer.param_groups:
        group["rho"] = 0.2  # as a schedule would
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    train(model, optimizer, data[5:])

    resumed, resumed_optimizer = new()
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.load_state_dict(state["model"])
    resumed_optimizer.load_state_dict(state["optimizer"])
    assert [group["rho"] for group in resumed_optimizer.param_groups] == [0.2]
    train(resumed, resumed_optimizer, data[5:])
    assert_same(weights(resumed), weights(model))


def test_state_of_a_bare_optimizer_loads_and_rho_stays():
    model = network()
    bare = torch.optim.AdamW(model.parameters(), lr=0.5)
    optimizer = SAM(torch.optim.AdamW(model.parameters(), lr=0.1), model, rho=0.3)
    optimizer.load_state_dict(bare.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.5 and optimizer.param_groups[0]["rho"] == 0.3


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e300])
def test_non_finite_ascent_gradient_means_no_perturbation(variant, bad):
    model, (x, y) = network(), batches(1)[0]
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.3, **VARIANTS[variant])
    start = weights(model)
    # 1e300 is finite, but the square of the gradient's norm is not.
    with optimizer.perturbed(lambda: F.cross_entropy(model(x), y) + bad * model[2].bias[0] + model[0].weight.sum()):
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
    optimizers = [SAM(BASES["adamw"](m.parameters()), m, rho=0.3, **VARIANTS[variant]) for m in models]
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
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.0), model, rho=0.3, **VARIANTS[variant])
    plain = torch.autograd.grad(F.cross_entropy(model(first[0]), first[1]), list(model.parameters()))
    F.cross_entropy(model(first[0]), first[1]).backward()

    def closure():
        loss = F.cross_entropy(model(second[0]), second[1])
        loss.backward()
        return loss

    optimizer.step(closure)
    own, _ = brute_force_gradient(model, *second, OBJECTIVES["sam"][1], [0.3] * 4, **VARIANTS[variant])
    assert_close([p.grad for p in model.parameters()], [a + b for a, b in zip(plain, own)])


@pytest.mark.parametrize("variant", ["plain", "asam-both", "gsam", "gsam-normalize"])
def test_loss_scale_changes_nothing(variant):
    """With a GradScaler, both passes are scaled; .grad is the scaled gradient of the unscaled computation."""
    model, (x, y) = network(), batches(1)[0]
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.3, **VARIANTS[variant])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    expected, eps = brute_force_gradient(model, x, y, OBJECTIVES["sam"][1], [0.3] * 4, **VARIANTS[variant])
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
@pytest.mark.parametrize("steps", [[[1e36], [1.0]], [[1e36, 1.0], [1.0, 1.0]], [[1.0, 1e36], [1.0, 1.0]]])
def test_an_overflow_of_one_ascent_skips_the_step_and_lowers_the_scale(variant, steps):
    """Else the scale would grow until the descent overflows, and every step before would be unperturbed."""
    model, (x, y) = network(dtype=torch.float32), batches(1, dtype=torch.float32)[0]
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.3, **VARIANTS[variant])
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
    optimizers = [SAM(BASES["adamw"](m.parameters()), m, rho=0.3, **VARIANTS[variant]) for m in (compiled, eager)]
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
    """Autocast's low-precision copies of the weights outlive a pass, unless each pass has an autocast of its own."""
    model, data = network(dtype=torch.float32), batches(3, dtype=torch.float32)
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=2.0, **VARIANTS[variant])
    autocast = lambda: torch.autocast("cpu", torch.bfloat16)  # noqa: E731

    def gradients(around):
        losses = []
        with autocast() if around == "loop" else contextlib.nullcontext():
            for x, y in data:

                def loss(x=x, y=y):
                    with autocast() if around == "pass" else contextlib.nullcontext():
                        losses.append(F.cross_entropy(model(x), y))
                    return losses[-1]

                with autocast() if around == "block" else contextlib.nullcontext(), optimizer.perturbed(loss):
                    loss().backward()
        taken = [p.grad for p in model.parameters()]
        model.zero_grad()
        return losses, taken

    (losses, expected), (others, taken) = gradients("pass"), gradients(where)
    assert abs(losses[0] - losses[1]) > 0.1  # the perturbation shows
    assert_same(others, losses)
    assert_same(taken, expected)


# ----------------------------------------------------------------------------------------------------------------------
# What costs less than two passes


def momentum_of(optimizer, params):
    """SGD's momentum or Adam's first moment of each parameter, or None before the first step."""
    states = [optimizer.state[p] for p in params]
    return [state.get("momentum_buffer", state.get("exp_avg")) for state in states]


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("base", [*BASES, "lion"])
def test_momentum_perturbation_equals_brute_force(base, scaled):
    """MSAM: the gradient at theta - rho v / ||v||, v from before the step, with a rho of each group's own."""
    lion = lambda groups: pytest.importorskip("timm.optim", reason="needs timm").Lion(groups, lr=0.02)  # noqa: E731
    make = BASES.get(base, lion)
    model, rhos = network(), [0.5, 0.5, 0.2, 0.2]
    groups = lambda m: [{"params": list(m[0].parameters())}, {"params": list(m[2].parameters())}]  # noqa: E731
    reference = copy.deepcopy(model)
    optimizer, plain = SAM(make(groups(model)), model), make(groups(reference))
    optimizer.param_groups[0]["rho"], optimizer.param_groups[1]["rho"] = 0.5, 0.2
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=scaled)
    for step, (x, y) in enumerate(batches(6)):
        start = weights(model)
        with optimizer.perturbed(lambda: momentum_perturbation(optimizer.base_optimizer), grad_scaler=scaler):
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
    assert model[1].num_batches_tracked == 4 and len(calls) == 2 * 4  # the copies have the hook, too


@pytest.mark.parametrize(
    "make", [lambda p: torch.optim.SGD(p, lr=0.1), lambda p: torch.optim.Adagrad(p), lambda p: torch.optim.RMSprop(p)]
)
def test_momentum_perturbation_refuses_optimizers_without(make):
    with pytest.raises(ValueError, match="keeps no momentum to perturb along: use Adam, or SGD with momentum > 0"):
        momentum_perturbation(make(network().parameters()))


def test_a_perturbation_every_third_step():
    """A block every k-th step, else none: the gradients are those at perturbed weights, else the plain ones."""
    model, k = network(), 3
    reference = copy.deepcopy(model)
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.3)
    plain = torch.optim.SGD(reference.parameters(), lr=0.1)
    for step, (x, y) in enumerate(batches(2 * k)):
        block = optimizer.perturbed(lambda: F.cross_entropy(model(x), y)) if step % k == 0 else contextlib.nullcontext()
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
    """SAM-ON (Mueller et al. 2023): the norm's length is rho over these layers; the others are trained as they are."""
    model, (x, y) = network(), batches(1)[0]
    model.insert(1, torch.nn.LayerNorm(8).double())
    norms = [p for m in model.modules() if isinstance(m, torch.nn.LayerNorm) for p in m.parameters()]
    others = [p for p in model.parameters() if not any(p is q for q in norms)]
    groups = [{"params": norms}, {"params": others, "rho": 0.0}]
    optimizer = SAM(torch.optim.SGD(groups, lr=0.1), model, rho=0.3)
    rhos, g = [], []
    for p, gi in zip(model.parameters(), torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))):
        rhos.append(0.3 if any(p is q for q in norms) else 0.0)
        g.append(gi if rhos[-1] else torch.zeros_like(gi))
    expected, eps = brute_force_gradient(model, x, y, None, rhos, g=g)
    start = weights(model)
    with optimizer.perturbed(lambda: F.cross_entropy(model(x), y)):
        assert_close([b - a for a, b in zip(start, weights(model))], eps)
        F.cross_entropy(model(x), y).backward()
    assert_close([p.grad for p in model.parameters()], expected)
    torch.testing.assert_close(sum(e.square().sum() for e in eps).sqrt().item(), 0.3)


# ----------------------------------------------------------------------------------------------------------------------
# Clipping: after the blocks, and after unscaling


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("variant", ["plain", "asam-both", "gsam", "gsam-normalize"])
def test_clipping_after_the_blocks(variant, scaled):
    model, data = network(), batches(2)
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=1.0), model, rho=0.3, **VARIANTS[variant])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=scaled)
    start, expected = weights(model), None
    for x, y in data:
        part, _ = brute_force_gradient(model, x, y, OBJECTIVES["sam"][1], [0.3] * 4, **VARIANTS[variant])
        expected = part if expected is None else [(a + b) / 2 for a, b in zip(expected, part)]
    length = sum((g**2).sum() for g in expected).sqrt()
    limit = 0.5 * length.item()
    for x, y in data:
        with optimizer.perturbed(lambda: F.cross_entropy(model(x), y), loss_weight=0.5, grad_scaler=scaler):
            scaler.scale(0.5 * F.cross_entropy(model(x), y)).backward()
    scaler.unscale_(optimizer)
    total = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
    scaler.step(optimizer)
    scaler.update()
    torch.testing.assert_close(total, length)
    moved = [a - b for a, b in zip(start, weights(model))]
    assert_close(moved, [g * limit / length for g in expected], 1e-5)
    torch.testing.assert_close(sum((m**2).sum() for m in moved).sqrt().item(), limit, rtol=1e-5, atol=0)


# ----------------------------------------------------------------------------------------------------------------------
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
    """As DDP's are with gradient_as_bucket_view: the second pass writes where the first has written."""
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

        optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.3, **VARIANTS[variant])
        for x, y in batches(3):
            optimizer.zero_grad()
            optimizer.step(lambda: backward(x, y) or torch.zeros(()))
        results.append(weights(model))
    assert_same(*results)


class Views(torch.nn.Module):
    """A weight whose transpose is kept, two parameters in one memory, and two gradients in one tensor."""

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
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.3, **VARIANTS[variant])
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
    optimizer, moved = SAM(torch.optim.SGD(model.parameters(), lr=1.0), model, rho=0.3, adaptive=adaptive), []
    start, g = weights(model), torch.randn(4).double()

    def closure():
        moved.append(weights(model))
        model[0].grad = model[1].grad = g.clone()
        return g.sum()

    optimizer.step(closure)
    scale = [p.abs() for p in start]
    weighted = [g * s if adaptive in ("before", "both") else g for s in scale]
    norm = sum(w.square().sum() for w in weighted).sqrt()
    eps = [0.3 * (w * s if adaptive in ("after", "both") else w) / norm for w, s in zip(weighted, scale)]
    assert_close(moved[1], [p + e for p, e in zip(start, eps)])


@pytest.mark.parametrize("made, used", [("before", "inside"), ("before", "after"), ("inside", "after")])
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
    optimizers = [SAM(BASES["sgd"](m.parameters()), m, rho=0.5, **VARIANTS[variant]) for m in (compiled, eager)]
    for x, y in batches(4, dtype=torch.float32):
        for forward, optimizer in zip((compiled, eager), optimizers):
            with optimizer.perturbed(lambda: F.cross_entropy(forward(x), y)):
                F.cross_entropy(forward(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_close(weights(model), weights(eager), 1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_what_changes_between_blocks_is_seen():
    """Nothing that a block finds out may outlive it: modules, groups, frozen parameters, missing gradients, rho."""
    model = network()
    model.append(torch.nn.Linear(K, K).double())
    optimizer = SAM(torch.optim.SGD(model[0].parameters(), lr=0.0), model, rho=0.3)

    def check(rhos, used):
        (x, y), params = batches(1)[0], list(model.parameters())
        g = torch.autograd.grad(F.cross_entropy(used(x), y), params, allow_unused=True, materialize_grads=True)
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
        assert all(p.dtype == torch.float32 and not torch.equal(p, s) for p, s in zip(model.parameters(), start))
        F.cross_entropy(model(x), y).backward()
    assert_same(weights(model), start)
    for p in model[2].parameters():
        p.requires_grad_(False)
    with optimizer.perturbed(lambda: F.cross_entropy(model(x), y)):
        moved = [not torch.equal(p, s) for p, s in zip(model.parameters(), start)]
        F.cross_entropy(model(x), y).backward()
    assert moved == [True] * 2 + [False] * 2 + [True] * 2


# ----------------------------------------------------------------------------------------------------------------------
# Memory format


def convolutions(layout, dtype=torch.float64):
    layers = [torch.nn.Conv2d(3, 7, 3, bias=False), torch.nn.BatchNorm2d(7), torch.nn.Tanh(), torch.nn.Conv2d(7, K, 3)]
    model = torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()).to(dtype)
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
                    assert layout is torch.contiguous_format or all(map(is_channels_last, model.parameters()))
                    F.cross_entropy(model(x), labels).backward()
            grads = [p.grad for p in model.parameters()]
            optimizer.step()
            optimizer.zero_grad()
        kept = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
        assert layout is torch.contiguous_format or all(map(is_channels_last, [*model.parameters(), *grads, *kept]))
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
            [t for t in torch.utils._pytree.tree_leaves(tree) if isinstance(t, torch.Tensor)] for tree in (out, args)
        )
        known = {t.untyped_storage().data_ptr() for t in given}
        new = [t for t in results if t.untyped_storage().data_ptr() not in known]  # and no view
        self.count += sum(t.is_contiguous() and not is_channels_last(t) for t in new)
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_block_makes_no_tensor_of_another_format(variant, dtype):
    """g, its copies, the weights that are kept and those that move; the gradients here are drawn at random."""
    model = convolutions(torch.channels_last, dtype)
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.3, **VARIANTS[variant])
    with Contiguous() as contiguous:
        for _ in range(2):
            with optimizer.perturbed(lambda: random_perturbation(model.parameters())):
                for p in model.parameters():
                    p.grad = torch.randn_like(p) if p.grad is None else p.grad + torch.randn_like(p)
        assert contiguous.count == 0
        torch.empty(2, 3, 4, 4)
    assert contiguous.count == 1


# ----------------------------------------------------------------------------------------------------------------------
# As an optimizer


def test_scheduler_hooks_and_new_groups_reach_the_base_optimizer():
    model, (x, y) = network(), batches(1)[0]
    base = torch.optim.SGD(model[0].parameters(), lr=1.0)
    optimizer = SAM(base, model, rho=0.3)
    optimizer.add_param_group({"params": list(model[2].parameters()), "lr": 2.0})
    assert [group["rho"] for group in base.param_groups] == [0.3, 0.3]
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    handle = register_optimizer_step_pre_hook(lambda *_: calls.append(2))
    start = weights(model)
    with optimizer.perturbed(lambda: F.cross_entropy(model(x), y)):
        F.cross_entropy(model(x), y).backward()
    grads = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    handle.remove()
    scheduler.step()
    assert calls == [2, 1]
    assert [group["lr"] for group in base.param_groups] == [0.5, 1.0]
    assert_close(weights(model), [p - lr * g for p, lr, g in zip(start, (1, 1, 2, 2), grads)])
    assert optimizer.state is base.state and optimizer.param_groups is base.param_groups


def test_proportional_rho_is_linear_in_lr_and_constant_outside():
    model = network()
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.3)
    for lr, rho in ((0.1, 0.2), (1.1, 0.7), (0.6, 0.45), (0.35, 0.325), (0.0, 0.2), (9.0, 0.7)):
        optimizer.param_groups[0]["lr"] = lr
        proportional_rho(optimizer, rho_min=0.2, rho_max=0.7, lr_min=0.1, lr_max=1.1)
        assert optimizer.param_groups[0]["rho"] == pytest.approx(rho, rel=1e-12)


# ----------------------------------------------------------------------------------------------------------------------
# Bad input


def test_optimizers_with_a_rho_of_their_own_are_refused():
    """Adadelta's rho is a decay: taken for SAM's, it would be a perturbation of length 0.9."""
    model = network()
    adadelta, wrapped = torch.optim.Adadelta(model.parameters()), torch.optim.SGD(model.parameters(), lr=0.1)
    SAM(wrapped, model)
    for base in (adadelta, wrapped):
        with pytest.raises(ValueError, match="has a rho of its own, or a SAM around it"):
            SAM(base, model, rho=0.05)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"rho": -0.1}, "rho is -0.1"),
        ({"rho": float("nan")}, "rho is nan"),
        ({"adaptive": "elementwise"}, "'elementwise'"),
        ({"gsam_alpha": -1.0}, "gsam_alpha is -1.0"),
        ({"gsam_normalize": True}, "gsam_alpha > 0"),
        ({"gsam_alpha": 0.4, "adaptive": "both"}, "contradict"),
    ],
)
def test_sam_refuses(options, words):
    model = network()
    with pytest.raises(ValueError, match=words):
        SAM(torch.optim.SGD(model.parameters(), lr=0.1), model, **options)


def test_sam_refuses_another_models_optimizer():
    with pytest.raises(ValueError, match="none of model's parameters"):
        SAM(torch.optim.SGD(network().parameters(), lr=0.1), network())


@pytest.mark.parametrize(
    "options, words",
    [({"gamma": 1.1}, "1.1"), ({"gamma": -1}, "-1"), ({"lam": 1.0}, "1.0"), ({"link": "tanh"}, "'tanh'")],
)
def test_obf_refuses_arguments(options, words):
    with pytest.raises(ValueError, match=words):
        OutputBiasForgetting(**options)


@pytest.mark.parametrize("target", [torch.zeros(3, K), torch.zeros(3), torch.zeros(4, dtype=torch.int64)])
def test_obf_refuses_targets(target):
    with pytest.raises(ValueError, match="class indices"):
        OutputBiasForgetting()(torch.zeros(3, K), target)


@pytest.mark.parametrize("ranges", [(0.5, 0.1, 0, 1), (-0.1, 0.1, 0, 1), (0.1, 0.5, 1, 1)])
def test_proportional_rho_refuses(ranges):
    model = network()
    names = ("rho_min", "rho_max", "lr_min", "lr_max")
    with pytest.raises(ValueError, match="lr_min < lr_max"):
        proportional_rho(torch.optim.SGD(model.parameters(), lr=0.1), **dict(zip(names, ranges)))


@pytest.mark.parametrize(
    "closure, error, words",
    [
        (lambda model, x: None, ValueError, "NoneType"),
        (lambda model, x: model(x), ValueError, r"\[12, 5\]"),
        (lambda model, x: model(x).sum().detach(), RuntimeError, "needs no gradient"),
        (lambda model, x: torch.ones((), requires_grad=True) * 1, RuntimeError, "SAM's model"),
    ],
)
def test_perturbed_refuses_closures_before_any_weight_moves(closure, error, words):
    model, (x, y) = network(), batches(1)[0]
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.3)
    F.cross_entropy(model(x), y).backward()
    start, accumulated = weights(model), [p.grad.clone() for p in model.parameters()]
    with pytest.raises(error, match=words):
        with optimizer.perturbed(lambda: closure(model, x)):
            pytest.fail("the body ran")
    assert_same(weights(model), start)
    assert_same([p.grad for p in model.parameters()], accumulated)


def test_perturbed_refuses_nesting_stepping_inside_and_a_bad_weight():
    model, (x, y) = network(), batches(1)[0]
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.3)
    loss = lambda: F.cross_entropy(model(x), y)  # noqa: E731
    start = weights(model)
    with pytest.raises(RuntimeError, match="nested"):
        with optimizer.perturbed(loss), optimizer.perturbed(loss):
            pytest.fail("the body ran")
    assert_same(weights(model), start)
    for closure in (None, loss):
        with pytest.raises(RuntimeError, match="after the block"):
            with optimizer.perturbed(loss):
                optimizer.step(closure)
        assert_same(weights(model), start)
    with pytest.raises(ValueError, match="loss_weight is nan"):
        with optimizer.perturbed(loss, loss_weight=float("nan")):
            pytest.fail("the body ran")
    optimizer.param_groups[0]["rho"] = -1.0
    with pytest.raises(ValueError, match=r"rho is -1\.0"):
        with optimizer.perturbed(loss):
            pytest.fail("the body ran")
    assert_same(weights(model), start)


def plain_steps(model, optimizer, n):
    for x, y in batches(n):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_ten_steps_without_a_block_warn_once_and_say_what_to_write():
    model, (x, y) = network(), batches(1)[0]
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model)
    for _ in range(12):
        optimizer.step()  # without gradients
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain_steps(model, optimizer, 9)
    with pytest.warns(UserWarning, match=r"SGD alone.*with optimizer\.perturbed\(lambda") as caught:
        plain_steps(model, optimizer, 30)
    assert len(caught) == 1 and caught[0].filename == __file__

    rarely = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain_steps(model, rarely, 9)
        with rarely.perturbed(lambda: F.cross_entropy(model(x), y)):
            F.cross_entropy(model(x), y).backward()
        plain_steps(model, rarely, 30)


def test_perturbed_without_with_is_an_error_at_the_next_step():
    model, (x, y) = network(), batches(1)[0]
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model)
    optimizer.perturbed(lambda: F.cross_entropy(model(x), y))
    F.cross_entropy(model(x), y).backward()
    start = weights(model)
    with pytest.raises(RuntimeError, match=r"`with optimizer\.perturbed"):
        optimizer.step()
    assert_same(weights(model), start)
    block = optimizer.perturbed(lambda: F.cross_entropy(model(x), y))
    with block:
        F.cross_entropy(model(x), y).backward()
    optimizer.step()


@pytest.mark.parametrize("accumulated", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("variant", ["plain", "gsam"])
def test_a_body_that_leaves_no_gradient_says_so_at_once(variant, scaled, accumulated):
    model, (x, y) = network(), batches(1)[0]
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model, **VARIANTS[variant])
    scaler = torch.amp.GradScaler("cpu", enabled=scaled)
    loss = lambda: F.cross_entropy(model(x), y)  # noqa: E731
    if accumulated:
        loss().backward()
    with pytest.warns(UserWarning, match="left no gradient") as caught:
        with optimizer.perturbed(loss, grad_scaler=scaler):
            model(x)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with optimizer.perturbed(loss, grad_scaler=scaler):
            scaler.scale(loss()).backward()
        with optimizer.perturbed(loss, grad_scaler=scaler):
            scaler.scale(loss() * float("inf")).backward()  # the scaler's business


def test_step_with_closure_tells_of_gradients_that_were_accumulated_unperturbed():
    model, (x, y) = network(), batches(1)[0]
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model)

    def closure():
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(closure)
    with pytest.warns(UserWarning, match="no block perturbed"):
        optimizer.step(closure)  # on top of the gradients of the last


@pytest.mark.parametrize(
    "write, error, words",
    [
        (lambda m, b: SAM(m.parameters(), torch.optim.SGD, rho=0.05, lr=0.1), TypeError, r"SGD\(model\.par.*lr=\.\.\."),
        (lambda m, b: SAM(m.parameters(), torch.optim.SGD), TypeError, r"write SAM\(torch\.optim\.SGD\(model\.param"),
        (lambda m, b: SAM(torch.optim.SGD, m), TypeError, r"write SAM\(torch\.optim\.SGD\(model\.param"),
        (lambda m, b: SAM(b, m.parameters()), TypeError, r"write SAM\(torch\.optim\.SGD\(model\.param.*generator"),
        (lambda m, b: SAM(b, m, weight_decay=0.1), TypeError, r"has its own settings.*weight_decay=\.\.\."),
        (lambda m, b: SAM(b, m, adaptive=True), ValueError, 'adaptive="both"'),
        (lambda m, b: SAM(b, m, rho="0.05"), ValueError, "rho is '0.05'"),
        (lambda m, b: SAM(b, m, rho=None), ValueError, "rho is None"),
        (lambda m, b: SAM(b, m).first_step(zero_grad=True), AttributeError, r"davda54.*with optimizer\.perturbed"),
        (lambda m, b: SAM(b, m).second_step(zero_grad=True), AttributeError, r"davda54.*then step\(\)"),
        (lambda m, b: SAM(b, m).perturbed(m(torch.zeros(1, 6).double()).sum()), TypeError, r"lambda.*\(model\(x\)"),
    ],
)  # fmt: skip
def test_davda54s_way_and_usual_slips_get_the_line_to_write(write, error, words):
    model = network()
    with pytest.raises(error, match=words):
        write(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert not hasattr(SAM(torch.optim.SGD(model.parameters(), lr=0.1), model), "third_step")


@pytest.mark.parametrize("module", ["deepspeed.runtime.engine", "torch.distributed.fsdp.fully_sharded_data_parallel"])
def test_sharding_that_sam_cannot_follow_is_refused_at_construction(module):
    model = network()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    kind = type("Sharded", (torch.nn.Sequential,), {"__module__": module})
    with pytest.raises(ValueError, match="sharding of Sharded: use FSDP2"):
        SAM(base, torch.nn.Sequential(kind(*model)))
    with pytest.raises(ValueError, match="sharding of Optimizer: use FSDP2"):
        SAM(type("Optimizer", (), {"__module__": module})(), model)


def test_sparse_gradients_are_refused():
    model = torch.nn.Sequential(torch.nn.EmbeddingBag(10, K, sparse=True, mode="sum"))
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.3)
    with pytest.raises(RuntimeError, match="sparse=False"):
        with optimizer.perturbed(lambda: model(torch.tensor([[1, 2]])).sum()):
            pytest.fail("the body ran")
