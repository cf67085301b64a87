"""One update of the training scripts, beside the same written out in explicit loops over examples and parameters."""

import math
from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState

from common import build, device, loop, run, settings

K, LR, MOMENTUM, DECAY = 5, 0.3, 0.7, 0.01


@pytest.fixture
def accelerator():
    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    return Accelerator(cpu=True)


def network():
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, K)).double()


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
    """Mean over examples of cross-entropy, or of binary cross-entropies summed over classes; timm's smoothings."""
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


CASES = {  # flags, the ascent's objective by hand, where |theta| enters, GSAM's alpha and whether g is normalised
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
    "gsam+obf": ("--rho 0.4 --gsam-alpha 0.2", {"gamma": 1.0, "lam": 1 / K, "link": "sigmoid"}, None, 0.2, False),
}  # fmt: skip
LOSSES = {"ce": ("", "ce", 0.0), "ce smoothed": ("--smoothing 0.3", "ce", 0.3), "bce": ("--loss bce", "bce", 0.0),
          "bce smoothed": ("--loss bce --smoothing 0.3", "bce", 0.3)}  # fmt: skip


def norm(tensors):
    return math.sqrt(sum((t**2).sum().item() for t in tensors))


def update_by_hand(params, velocity, micro_batches, case, loss, clip):
    """Change params and velocity in place; return the mean loss and the gradient's norm before clipping."""
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
            rise = (lambda z: loss_by_hand(z, y, *loss)) if ascent == "loss" else lambda z: obf_by_hand(z, y, **ascent)
            g = gradient(params, x, rise)[0]
            ahead = [p.abs() * gi for p, gi in zip(params, g)] if adaptive in ("before", "both") else g
            behind = [p.abs() * gi for p, gi in zip(params, ahead)] if adaptive in ("after", "both") else ahead
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


@pytest.mark.parametrize("name, loss", [(name, "ce") for name in CASES] + [("sam", name) for name in LOSSES])
def test_update_is_that_written_out_by_hand(accelerator, name, loss):
    """Two micro-batches of each of three loader batches, with a clipping that shortens some gradients."""
    m, accumulation, updates, clip = 2, 3, 4, {"ce": 0.6, "bce": 1.0}[LOSSES[loss][1]]
    torch.manual_seed(0)
    images, labels = 2 * torch.randn(updates * accumulation * 2 * m, 6).double(), torch.randint(0, K, (48,))
    flags = f"--method {name.split(' ')[0].strip(',')} --clip-grad {clip} {CASES[name][0]} {LOSSES[loss][0]}"
    job = prepared(accelerator, flags, m=m, accumulation=accumulation)
    params = [p.detach().clone() for p in job.model.parameters()]
    velocity, lengths = [torch.zeros_like(p) for p in params], []
    loaded = iter([{"image": x, "label": y} for x, y in zip(images.split(2 * m), labels.split(2 * m))])
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
    assert min(lengths) < clip < max(lengths), "clipping must shorten some gradients here, and not all"


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
    loop.update(job, iter([{"image": torch.randn(4, 6).double(), "label": torch.tensor([0, 1, 2, 3])}]))
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
    """Of all steps, not of an epoch's."""
    asked = []
    monkeypatch.setattr(loop, "update", lambda job, batches, perturb: asked.append(perturb) or torch.zeros(()))
    job = prepared(accelerator, "--method sam --perturb-interval 3", m=4, accumulation=1)
    job.batches.steps, job.batches.train, job.schedule = 4, lambda epoch, step: iter([]), lambda update: None
    progress = run.Progress(epoch=first // 4, updates=first)
    job.args.checkpoint_interval = None
    loop.train_epoch(job, progress, lambda loss: None)
    assert asked == [step % 3 == 0 for step in range(first, first + 4)]


def test_a_compiled_model_is_not_compiled_at_every_update_for_a_share_of_the_micro_batch(accelerator):
    AcceleratorState._reset_state(True)
    accelerator = build.build_accelerator(Namespace(log_with=None, output=None, torchcompile="eager"))
    job = prepared(accelerator, "--method sam --perturb-fraction 0.5", m=8, accumulation=1)
    torch._dynamo.reset()
    graphs = []
    for _ in range(5):
        torch._dynamo.utils.counters.clear()
        images, labels = torch.randn(16, 6).double(), torch.randint(0, K, (16,))
        loop.update(job, iter([{"image": images, "label": labels}]))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] > 0 and graphs[1:] == [0, 0, 0, 0]


def test_a_model_is_compiled_by_one_backend(accelerator, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    with pytest.raises(settings.InputError, match="--torchcompile eager and Accelerate's --dynamo_backend inductor"):
        build.build_accelerator(Namespace(log_with=None, output=None, torchcompile="eager"))


def test_fast_kernels_are_for_a_gpu(monkeypatch):
    matmul, cudnn = Namespace(allow_tf32=False), Namespace(benchmark=False)
    monkeypatch.setattr(torch.backends.cuda, "matmul", matmul)
    monkeypatch.setattr(torch.backends, "cudnn", cudnn)
    device.use_fast_kernels(torch.device("cpu"))
    assert not matmul.allow_tf32 and not cudnn.benchmark
    device.use_fast_kernels(torch.device("cuda"))
    assert matmul.allow_tf32 and cudnn.benchmark


def test_momentum_needs_an_optimizer_that_has_it(accelerator):
    with pytest.raises(settings.InputError, match="method momentum does not go with opt momentum"):
        prepared(accelerator, "--method momentum --opt momentum --momentum 0", m=4, accumulation=1)


def test_schedules_equal_their_closed_forms():
    """Warm-up is linear from warmup_lr to lr; then lr falls to min_lr linearly, as half a cosine, or not."""
    lr, low, first, warmup, total, steps = 0.8, 0.2, 0.1, 2, 6, 10
    fall = {
        "poly": lambda part: lr + (low - lr) * part,
        "cosine": lambda part: low + (lr - low) * (1 + math.cos(math.pi * part)) / 2,
        "constant": lambda part: lr,
    }
    for sched, after in fall.items():
        flags = f"--lr {lr} --min-lr {low} --warmup-lr {first} --warmup-epochs {warmup} --epochs {total}".split()
        flags += ["--sched", sched, "--method", "base", "--output", "nowhere"]
        args = settings.parse(settings.parser("", ""), flags)
        optimizer = build.build_optimizer(args, network())
        schedule = build.build_schedule(args, optimizer, steps)
        for update in (0, 1, 13, 19, 20, 21, 33, 59):
            schedule(update)
            part = (update - warmup * steps) / ((total - warmup) * steps)
            expected = first + (lr - first) * update / (warmup * steps) if part < 0 else after(part)
            assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-9), (sched, update)


@pytest.mark.parametrize("opt", ["sgd", "momentum", "adamw", "lookahead_adam"])
def test_fused_kernels_give_the_weights_of_the_plain_ones(opt):
    weights = []
    for fused in (True, False):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.GELU(), torch.nn.Conv2d(4, 5, 2)).double()
        model = model.to(memory_format=torch.channels_last)
        flags = ["--opt", opt, "--opt-kwargs", f"fused={fused}", "--method", "sam", "--weight-decay", "0.1"]
        optimizer = build.build_optimizer(settings.parse(settings.parser("", ""), [*flags, "--output", "x"]), model)
        assert all(group["fused"] is fused for group in optimizer.param_groups)
        for _ in range(8):
            x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
            with optimizer.perturbed(lambda: model(x).square().mean()):
                model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append([p.detach() for p in model.parameters()])
    for fused, plain in zip(*weights, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-12, atol=1e-13)


def test_the_base_optimizer_gets_its_own_settings():
    flags = ["--opt", "adamw", "--opt-kwargs", "betas=(0.5,0.6)", "eps=0.125", "--method", "sam", "--output", "nowhere"]
    args = settings.parse(settings.parser("", ""), flags)
    optimizer = build.build_optimizer(args, network())
    assert type(optimizer.base_optimizer) is torch.optim.AdamW
    assert optimizer.param_groups[0]["betas"] == (0.5, 0.6) and optimizer.param_groups[0]["eps"] == 0.125
