"""One update and one epoch, beside the same written out in loops over examples and parameters."""

import copy
import math
from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from helpers import ascend_the_loss, make_job
from timm.loss import BinaryCrossEntropy

from common import build, loop, run, settings
from common.methods import METHODS
from sam_obf import SAM

K, LR, MOMENTUM, DECAY = 5, 0.3, 0.7, 0.01


def network():
    torch.manual_seed(1)
    return torch.nn.Sequential(
        torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, K)
    ).double()


def prepared(accelerator, flags, *, m, accumulation, to_input=lambda images: images):
    """A job on a new ``network`` with SGD and the flags of a training script."""
    usual = f"--opt sgd --lr {LR} --momentum {MOMENTUM} --weight-decay {DECAY} --output nowhere"
    args = settings.parse(settings.parser("", ""), f"{usual} {flags}".split())
    model = network()
    criterion = build.build_criterion(args)
    optimizer = build.build_optimizer(args, model)
    objective = build.build_objective(args, criterion, optimizer)
    model, optimizer = accelerator.prepare(model, optimizer)
    batches = Namespace(to_input=to_input, m=m, accumulation=accumulation)
    return build.Job(args, accelerator, model, None, criterion, objective, optimizer, None, batches)


def loss_by_hand(z, y, loss, smoothing):
    """Mean over examples of cross-entropy, or of binary ones summed over classes; timm smooths."""
    one_hot = F.one_hot(y, K).double()
    if loss == "ce":
        target = (1 - smoothing) * one_hot + smoothing / K
        return -(target * torch.log_softmax(z, -1)).sum(-1).mean()
    target = one_hot * (1 - smoothing) + smoothing / K
    p = torch.sigmoid(z)
    return -(target * torch.log(p) + (1 - target) * torch.log(1 - p)).sum(-1).mean()


def obf_by_hand(z, y, gamma, lam, link):
    p = (torch.sigmoid(z) if link == "sigmoid" else torch.softmax(z, -1)).detach()
    rows = []
    for z_i, p_i, y_i in zip(z, p, y):
        alpha = gamma * max(0.0, (1 - lam / p_i[y_i].item()) / (1 - lam))
        target = F.one_hot(y_i, K).double()
        rows.append(((1 / K - alpha * p_i - (1 - alpha) * target) * z_i).sum())
    return sum(rows) / len(rows)


# Flags, the ascent's objective by hand, where |theta| enters, GSAM's alpha and if g is normalised.
CASES = {
    "base": ("", None, None, 0, False),
    "sam": ("--rho 0.4", "loss", None, 0, False),
    "obf": ("--rho 0.4", {"gamma": 1.0, "lam": 1 / K, "link": "sigmoid"}, None, 0, False),
    "obf, its settings": (
        "--rho 0.4 --gamma 0.6 --lam 0.05 --link softmax",
        {"gamma": 0.6, "lam": 0.05, "link": "softmax"}, None, 0, False,
    ),
    "asam before": ("--rho 0.4 --adaptive before", "loss", "before", 0, False),
    "asam after": ("--rho 0.4 --adaptive after", "loss", "after", 0, False),
    "asam": ("--rho 0.4", "loss", "both", 0, False),
    "gsam": ("--rho 0.4 --gsam-alpha 0.7", "loss", None, 0.7, False),
    "gsam normalized": ("--rho 0.4 --gsam-alpha 0.7 --gsam-normalize", "loss", None, 0.7, True),
    "momentum": ("--rho 0.4", "momentum", None, 0, False),
    "gsam+obf": (
        "--rho 0.4 --gsam-alpha 0.2",
        {"gamma": 1.0, "lam": 1 / K, "link": "sigmoid"}, None, 0.2, False,
    ),
}  # fmt: skip


LOSSES = {
    "ce": ("", "ce", 0.0), "ce smoothed": ("--smoothing 0.3", "ce", 0.3),
    "bce": ("--loss bce", "bce", 0.0), "bce smoothed": ("--loss bce --smoothing 0.3", "bce", 0.3),
}  # fmt: skip


def norm(tensors):
    return math.sqrt(sum((t**2).sum().item() for t in tensors))


def update_by_hand(params, velocity, micro_batches, case, loss, clip):
    """Change params and velocity in place; return the mean loss and the gradient's first norm."""
    _, ascent, adaptive, gsam_alpha, gsam_normalize = case
    total, losses = [torch.zeros_like(p) for p in params], []

    def gradient(at, x, objective):
        at = [p.clone().requires_grad_() for p in at]
        z = torch.tanh(x @ at[0].T + at[1]) @ at[2].T + at[3]
        value = objective(z)
        return torch.autograd.grad(value, at), value.item()

    for x, y in micro_batches:
        moved = params
        if ascent == "momentum":
            moved = [p - 0.4 * v / (norm(velocity) or 1) for p, v in zip(params, velocity)]
        elif ascent is not None:
            rise = (
                (lambda z: loss_by_hand(z, y, *loss))
                if ascent == "loss"
                else lambda z: obf_by_hand(z, y, **ascent)
            )
            g = gradient(params, x, rise)[0]
            ahead = (
                [p.abs() * gi for p, gi in zip(params, g)] if adaptive in ("before", "both") else g
            )
            behind = (
                [p.abs() * gi for p, gi in zip(params, ahead)]
                if adaptive in ("after", "both")
                else ahead
            )
            moved = [p + 0.4 * d / norm(ahead) for p, d in zip(params, behind)]
        gp, value = gradient(moved, x, lambda z: loss_by_hand(z, y, *loss))
        losses.append(value)
        if gsam_alpha:
            along = sum((a * b).sum() for a, b in zip(g, gp)) / norm(gp) ** 2
            scale = gsam_alpha / (norm(g) if gsam_normalize else 1)
            gp = [b - scale * (a - along * b) for a, b in zip(g, gp)]
        total = [t + gi / len(micro_batches) for t, gi in zip(total, gp)]
    length = norm(total)
    if clip:
        total = [t * min(1.0, clip / (length + 1e-6)) for t in total]  # the 1e-6 is torch's
    for p, v, t in zip(params, velocity, total):
        t = t + DECAY * p if p.ndim > 1 else t  # none on biases
        v.copy_(MOMENTUM * v + t)
        p -= LR * (t + MOMENTUM * v)  # timm's "sgd" is Nesterov's
    return sum(losses) / len(losses), length


@pytest.mark.parametrize(
    "name, loss", [(name, "ce") for name in CASES] + [("sam", name) for name in LOSSES]
)
def test_update_is_that_written_out_by_hand(accelerator, name, loss):
    """Two micro-batches of each of three loader batches; clipping shortens some gradients."""
    m, accumulation, updates, clip = 2, 3, 4, {"ce": 0.6, "bce": 1.0}[LOSSES[loss][1]]
    torch.manual_seed(0)
    images, labels = (
        2 * torch.randn(updates * accumulation * 2 * m, 6).double(),
        torch.randint(0, K, (48,)),
    )
    method = name.split(" ")[0].strip(",")
    flags = f"--method {method} --clip-grad {clip} {CASES[name][0]} {LOSSES[loss][0]}"
    job = prepared(accelerator, flags, m=m, accumulation=accumulation)
    params = [p.detach().clone() for p in job.model.parameters()]
    velocity, lengths = [torch.zeros_like(p) for p in params], []
    loaded = iter(
        [{"image": x, "label": y} for x, y in zip(images.split(2 * m), labels.split(2 * m))]
    )
    micro_batches = list(zip(images.split(m), labels.split(m)))
    for i in range(updates):
        reported = loop.update(job, loaded)
        own = micro_batches[6 * i : 6 * i + 6]
        value, length = update_by_hand(params, velocity, own, CASES[name], LOSSES[loss][1:], clip)
        lengths.append(length)
        assert reported.item() == pytest.approx(value, rel=1e-9)
        for ours, expected in zip(job.model.parameters(), params):
            torch.testing.assert_close(ours.data, expected, rtol=1e-9, atol=1e-11)
        assert all(p.grad is None for p in job.model.parameters())
    assert min(lengths) < clip < max(lengths), (
        "clipping must shorten some gradients here, and not all"
    )


@pytest.mark.parametrize("method", METHODS)
def test_batch_norm_moves_once_for_each_micro_batch_at_the_weights_as_they_are(
    accelerator, monkeypatch, method
):
    """Momentum has no pass of its own to do that, but its first perturbation is 0."""
    network_with_norm = torch.nn.Sequential(*network()[:1], torch.nn.BatchNorm1d(8).double())
    monkeypatch.setitem(globals(), "network", lambda: copy.deepcopy(network_with_norm))
    flags = f"--method {method}" + (" --rho 0.9" if method != "base" else "")
    job = prepared(accelerator, flags, m=4, accumulation=2)
    images, labels = 2 * torch.randn(16, 6).double() + 1, torch.randint(0, 8, (16,))
    batches = [{"image": images[i : i + 8], "label": labels[i : i + 8]} for i in (0, 8)]
    loop.update(job, iter(batches))
    mean, var = torch.zeros(8).double(), torch.ones(8).double()
    for z in network_with_norm[0](images).detach().split(4):
        mean, var = 0.9 * mean + 0.1 * z.mean(0), 0.9 * var + 0.1 * z.var(0)
    own = job.model[1]
    assert own.num_batches_tracked == 4
    torch.testing.assert_close((own.running_mean, own.running_var), (mean, var))


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("m", [2, 4])
def test_update_is_the_mean_over_micro_batches_of_the_gradient_at_their_own_perturbed_weights(
    accelerator, m, accumulation
):
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 3).double()
    reference = copy.deepcopy(model)
    images, labels = (
        torch.randn(4 * accumulation, 6).double(),
        torch.randint(0, 3, (4 * accumulation,)),
    )

    model, optimizer = accelerator.prepare(
        model, SAM(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.3)
    )
    for i in range(accumulation):
        batch = {"image": images[4 * i : 4 * i + 4], "label": labels[4 * i : 4 * i + 4]}
        job = make_job(
            accelerator, model, optimizer, objective=ascend_the_loss, m=m, accumulation=accumulation
        )
        loop.forward_backward(job, batch, job.objective, sync=i == accumulation - 1)

    params, total = list(reference.parameters()), None
    for x, y in zip(images.split(m), labels.split(m)):
        g = torch.autograd.grad(F.cross_entropy(reference(x), y), params)
        norm = sum((gi**2).sum() for gi in g).sqrt()
        moved = copy.deepcopy(reference)
        for p, gi in zip(moved.parameters(), g):
            p.data += 0.3 * gi / norm
        gp = torch.autograd.grad(F.cross_entropy(moved(x), y), list(moved.parameters()))
        total = gp if total is None else [a + b for a, b in zip(total, gp)]
    for p, gradient in zip(model.parameters(), total):
        torch.testing.assert_close(p.grad, gradient * m / len(images), rtol=1e-10, atol=1e-12)


def test_perturbation_of_a_part_of_the_micro_batch_is_that_of_its_first_examples(accelerator):
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 3).double()
    images, labels = torch.randn(8, 6).double(), torch.randint(0, 3, (8,))
    params = list(model.parameters())
    g = torch.autograd.grad(F.cross_entropy(model(images[:2]), labels[:2]), params)
    norm = sum((gi**2).sum() for gi in g).sqrt()
    moved = copy.deepcopy(model)
    for p, gi in zip(moved.parameters(), g):
        p.data += 0.3 * gi / norm
    gp = torch.autograd.grad(F.cross_entropy(moved(images), labels), list(moved.parameters()))

    model, optimizer = accelerator.prepare(
        model, SAM(torch.optim.SGD(params, lr=0.1), model, rho=0.3)
    )
    args = {"perturb_fraction": 0.25}
    job = make_job(accelerator, model, optimizer, args=args, objective=ascend_the_loss, m=8)
    loop.forward_backward(job, {"image": images, "label": labels}, job.objective, sync=True)
    for p, gradient in zip(params, gp):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("loss", [F.cross_entropy, BinaryCrossEntropy()], ids=["ce", "bce"])
def test_right_answers_are_counted_at_the_weights_of_the_descent_pass(accelerator, loss):
    """A perturbation that changes most predictions, on two micro-batches of two loader batches."""
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 3).double()
    images, labels = torch.randn(16, 6).double(), torch.randint(0, 3, (16,))
    expected, clean = 0, (model(images).argmax(-1) == labels).sum().item()
    for x, y in zip(images.split(4), labels.split(4)):
        g = torch.autograd.grad(loss(model(x), y), list(model.parameters()))
        norm = sum((gi**2).sum() for gi in g).sqrt()
        weight, bias = (p + 5 * gi / norm for p, gi in zip(model.parameters(), g))
        expected += ((x @ weight.T + bias).argmax(-1) == y).sum().item()
    model, optimizer = accelerator.prepare(
        model, SAM(torch.optim.SGD(model.parameters(), lr=0.0), model, rho=5.0)
    )
    job = make_job(
        accelerator, model, optimizer, m=4, accumulation=2, criterion=loss,
        objective=lambda f, x, y: loss(f(x), y),
    )  # fmt: skip
    loop.update(
        job, iter([{"image": images[i : i + 8], "label": labels[i : i + 8]} for i in (0, 8)])
    )
    assert job.right.item() == expected != clean


def test_shrink_and_perturb_pulls_to_the_first_weights_in_proportion_to_lr(accelerator):
    model = torch.nn.Linear(3, 2).double()
    weight = model.weight.detach().clone()
    initial = [torch.full_like(p, 7.0) for p in model.parameters()]
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.05))
    images, labels = torch.randn(4, 3).double(), torch.tensor([0, 1, 1, 0])
    job = make_job(accelerator, model, optimizer, args={"shrink_perturb": 0.01, "lr": 0.2})
    job.initial = initial
    loss = F.cross_entropy(images @ weight.T + model.bias.detach(), labels)
    (g,) = torch.autograd.grad(
        F.cross_entropy(images @ weight.requires_grad_().T + model.bias.detach(), labels), weight
    )
    assert loop.update(job, iter([{"image": images, "label": labels}])).item() == pytest.approx(
        loss.item()
    )
    factor = 0.01 * 0.05 / 0.2
    torch.testing.assert_close(
        model.weight.data, factor * 7 + (1 - factor) * (weight.detach() - 0.05 * g)
    )


def test_shrink_and_perturb_waits_for_a_step_that_was_made(accelerator):
    """After an overflow of fp16 neither the update nor the pull to the first weights is made."""
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    model = torch.nn.Linear(6, K)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    args = Namespace(clip_grad=None, shrink_perturb=0.5, lr=0.1, perturb_fraction=1.0)
    batches = Namespace(to_input=lambda images: images, m=4, accumulation=1)
    job = build.Job(args, accelerator, model, None, F.cross_entropy, None, optimizer, None, batches)
    good, bad = torch.ones(4, 6), torch.full((4, 6), 1e37)
    labels = torch.tensor([0, 1, 1, 0])

    def weights():
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    loop.update(job, iter([{"image": good, "label": labels}]))
    before = weights()
    loop.update(job, iter([{"image": bad, "label": labels}]))
    assert job.optimizer.step_was_skipped and torch.equal(weights(), before)


def test_the_first_weights_of_shrink_and_perturb_are_a_copy(accelerator):
    job = prepared(accelerator, "--method base --shrink-perturb 0.1", m=4, accumulation=1)
    first = [p.detach().clone() for p in network().parameters()]
    loop.update(
        job, iter([{"image": torch.randn(4, 6).double(), "label": torch.tensor([0, 1, 2, 3])}])
    )
    for kept, own, now in zip(job.initial, first, job.model.parameters()):
        assert torch.equal(kept, own) and not torch.equal(kept, now)


def test_an_update_without_perturbation_is_the_base_optimizers(accelerator):
    images, labels = torch.randn(8, 6).double(), torch.randint(0, K, (8,))
    job = prepared(accelerator, "--method sam --rho 0.4", m=4, accumulation=1)
    params = [p.detach().clone() for p in job.model.parameters()]
    velocity = [torch.zeros_like(p) for p in params]
    for perturb, name in ((True, "sam"), (False, "base"), (True, "sam")):
        loop.update(job, iter([{"image": images, "label": labels}]), perturb=perturb)
        own = list(zip(images.split(4), labels.split(4)))
        update_by_hand(params, velocity, own, CASES[name], ("ce", 0.0), None)
        for ours, expected in zip(job.model.parameters(), params):
            torch.testing.assert_close(ours.data, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("first", [0, 4])
def test_every_third_update_of_a_run_perturbs_wherever_it_resumes(accelerator, monkeypatch, first):
    """Of all updates, not of an epoch's."""
    asked = []
    monkeypatch.setattr(
        loop, "update", lambda job, batches, perturb: asked.append(perturb) or torch.zeros(())
    )
    job = prepared(accelerator, "--method sam --perturb-interval 3", m=4, accumulation=1)
    job.batches.updates, job.batches.train, job.schedule = (
        4,
        lambda epoch, first: iter([]),
        lambda update: None,
    )
    progress = run.Progress(epoch=first // 4, updates=first)
    job.args.checkpoint_interval = None
    loop.train_epoch(job, progress, lambda loss: None)
    assert asked == [step % 3 == 0 for step in range(first, first + 4)]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("method", ["base", "sam"])
def test_step_skipped_for_overflow_moves_neither_weights_nor_schedule(accelerator, method, fused):
    """fp16's loss scaling, which works on a CPU too: the second of three updates overflows."""
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    model = torch.nn.Linear(3, 2)
    flags = ["--method", method, "--opt-kwargs", f"fused={fused}", "--output", "nowhere"]
    args = settings.parse(settings.parser("", ""), flags)
    model, optimizer = accelerator.prepare(model, build.build_optimizer(args, model))
    scheduled, weights = [], []
    images = [torch.ones(4, 3), torch.full((4, 3), 1e37), torch.ones(4, 3)]
    labels = torch.tensor([0, 1, 1, 0])
    parts = {"objective": None if method == "base" else ascend_the_loss, "updates": 3}
    parts["train"] = lambda epoch, first: iter([{"image": x, "label": labels} for x in images])
    parts["to_input"] = lambda x: weights.append(model.weight.detach().clone()) or x
    job = make_job(accelerator, model, optimizer, schedule=scheduled.append, **parts)
    progress = run.Progress()
    loop.train_epoch(job, progress, lambda loss: None)
    assert (progress.updates, progress.skipped) == (3, 1)
    assert scheduled == [0, 1, 1]
    assert torch.equal(weights[1], weights[2]) and not torch.equal(weights[0], weights[1])
    assert accelerator.scaler.get_scale() == 2.0**9
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_compiled_model_is_not_compiled_at_every_update_for_a_share_of_the_micro_batch(
    accelerator,
):
    AcceleratorState._reset_state(True)
    accelerator = build.build_accelerator(
        Namespace(log_with=None, output=None, torchcompile="eager", freeze=0)
    )
    job = prepared(accelerator, "--method sam --perturb-fraction 0.5", m=8, accumulation=1)
    torch._dynamo.reset()
    graphs = []
    for _ in range(5):
        torch._dynamo.utils.counters.clear()
        images, labels = torch.randn(16, 6).double(), torch.randint(0, K, (16,))
        loop.update(job, iter([{"image": images, "label": labels}]))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] > 0 and graphs[1:] == [0, 0, 0, 0]


def test_a_run_that_stopped_with_an_epochs_last_update_keeps_its_lr_for_what_comes_after(
    accelerator,
):
    """The optimizer's own, from the checkpoint, is that of the last update."""
    model = torch.nn.Linear(3, 2)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    scheduled = []
    options = {"updates": 4, "schedule": scheduled.append}
    job = make_job(accelerator, model, optimizer, **options)
    progress = run.Progress(epoch=1, epoch_updates=4, updates=8, skipped=1)
    loop.train_epoch(job, progress, None)
    assert scheduled == [] and progress.updates == 8
