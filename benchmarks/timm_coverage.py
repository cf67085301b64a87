# Copyright 2026 The sam-obf authors. Licensed under the Apache License, Version 2.0.
"""An update with SAM and OBF on the smallest models of every family of timm's, and with every
optimizer of timm's.

Each is compared with an update without SAM: the gradient of the loss at weights moved by hand, on a
copy of the model. It passes if the weights come back bit for bit, the gradients are finite and
those of the copy, and so is the update, made eight times, since some optimizers only gather
statistics at first. Optimizers of other packages are named by their place: ``torch.optim.Muon``,
``schedulefree.AdamWScheduleFree``.

    # All: about 30 minutes on two cores
    python benchmarks/timm_coverage.py
    python benchmarks/timm_coverage.py --models resnet18 --optimizers adamw torch.optim.Muon
"""

import argparse
import copy
import gc
import importlib
import os
import resource
import sys
import time
import warnings
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2, list_optimizers
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from sam_obf import SAM, OutputBiasForgetting

PER_FAMILY = 2
OTHER_OPTIMIZERS = [
    "torch.optim.Muon", "muon.SingleDeviceMuon", "schedulefree.AdamWScheduleFree",
    "schedulefree.RAdamScheduleFree", "schedulefree.SGDScheduleFree",
]  # fmt: skip
RHO = 0.05
STEPS = 8
TOLERANCE = 1e-6  # of the largest value


def smallest_models() -> list[str]:
    """The names of the smallest models of each of timm's families, by numbers of parameters."""
    names = []
    for family in tqdm(timm.list_modules(), desc="families", leave=False):
        sizes = {}
        for name in timm.list_models(module=family):
            try:
                with torch.device("meta"):
                    sizes[name] = sum(p.numel() for p in timm.create_model(name).parameters())
            except Exception:  # some need real tensors to be built
                continue
        names += sorted(sizes, key=sizes.get)[:PER_FAMILY]
    return names


def batch_for(model, examples=2):
    """Random images of the size and type that the model takes, and labels."""
    channels, *size = model.pretrained_cfg.get("input_size", (3, 224, 224))
    if not model.pretrained_cfg.get("fixed_input_size", False):
        size = model.pretrained_cfg.get("min_input_size", (channels, *size))[1:]
    dtype = next(model.parameters()).dtype
    return torch.randn(examples, channels, *size, dtype=dtype), torch.arange(examples)


def create_optimizer(model, name):
    """An optimizer of timm's, or of another package: Muon there takes matrices only."""
    options = {"lr": 1e-3, "weight_decay": 0.01}
    if "." not in name:
        return create_optimizer_v2(model, name, **options)
    module, kind = name.rsplit(".", 1)
    matrices_only = kind.endswith("Muon")
    params = [
        p for p in model.parameters() if p.requires_grad and (p.ndim == 2 or not matrices_only)
    ]
    return getattr(importlib.import_module(module), kind)(params, **options)


def gradients_by_hand(model, optimizer, x, y, forget):
    """The gradients of the descent pass without SAM."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    torch.manual_seed(1)
    grads = torch.autograd.grad(forget(model(x), y), params, allow_unused=True)
    norm = torch.stack([g.square().sum() for g in grads if g is not None]).sum().sqrt()
    with torch.no_grad():
        start = [p.clone() for p in params]
        for p, g in zip(params, grads):
            if g is not None:
                p += RHO * g / norm
    F.cross_entropy(model(x), y).backward()
    with torch.no_grad():
        for p, s in zip(params, start):
            p.copy_(s)
    return [p.grad for p in model.parameters()]


def difference(one, two):
    """The largest difference over the largest value; infinite if that is 0, or not finite, or only
    one is there.
    """
    if any(
        (a is None) != (b is None) or (a is not None and not a.isfinite().all())
        for a, b in zip(one, two)
    ):
        return float("inf")
    pairs = [(a, b) for a, b in zip(one, two) if a is not None]
    scale = max(b.abs().max().item() for _, b in pairs)
    return max((a - b).abs().max().item() for a, b in pairs) / scale if scale else float("inf")


def try_update(model, optimizer_name, x, y):
    """Make the update both ways; returns whether the weights came back, and differences in
    gradients and weights.
    """
    twin, forget = copy.deepcopy(model), OutputBiasForgetting()
    sam = SAM(create_optimizer(model, optimizer_name), model, rho=RHO)
    base = create_optimizer(twin, optimizer_name)
    for optimizer in (sam, base):
        if hasattr(optimizer, "train"):  # schedule-free optimizers
            optimizer.train()
    start = [p.detach().clone() for p in model.parameters()]
    torch.manual_seed(1)
    with sam.perturbed(lambda: forget(model(x), y)):
        F.cross_entropy(model(x), y).backward()
    restored = all(torch.equal(p, s) for p, s in zip(model.parameters(), start))
    gradients = difference(
        [p.grad for p in model.parameters()], gradients_by_hand(twin, base, x, y, forget)
    )
    # From the same gradients: the sign of one that is zero but for rounding, which some take, means
    # nothing.
    for p, q in zip(twin.parameters(), model.parameters()):
        p.grad = None if q.grad is None else q.grad.clone()
    for optimizer in (sam, base):
        torch.manual_seed(2)
        for _ in range(STEPS):
            optimizer.step()
    moved = [p.detach() - s for p, s in zip(model.parameters(), start)]
    wanted = [p.detach() - s for p, s in zip(twin.parameters(), start)]
    return restored, gradients, difference(moved, wanted)


def build(name):
    """A model in double precision, in which rounding does not move an activation past a kink."""
    return timm.create_model(name, num_classes=10).double().train()


def row(name, model, optimizer):
    """A line of the report, and whether it passed."""
    gc.collect()  # or models before this one that refer to themselves would keep their memory
    begin = time.perf_counter()
    try:
        model = build(model)
        size = sum(p.numel() for p in model.parameters())
        restored, gradients, weights = try_update(model, optimizer, *batch_for(model))
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
        if "can't allocate memory" in str(error):
            reason = "out of memory: it would hold eight copies in double precision"
        return False, f"| {name} | | FAILS: {reason} | | | |"
    passed = restored and max(gradients, weights) <= TOLERANCE
    verdict = "ok" if passed else "DIFFERS" if restored else "NOT RESTORED"
    figures = f"{gradients:.1e} | {weights:.1e} | {time.perf_counter() - begin:.1f} s"
    return passed, f"| {name} | {size / 1e6:.1f} M | {verdict} | {figures} |"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="*", help="timm names (the smallest of each family)")
    parser.add_argument(
        "--optimizers", nargs="*", help="timm names, or MODULE.CLASS (all of timm's, and a few)"
    )
    parser.add_argument("--report", help="Markdown file to write (the terminal only)")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # A model too large just fails
    resource.setrlimit(resource.RLIMIT_AS, (int(0.9 * memory), resource.RLIM_INFINITY))
    torch.manual_seed(0)
    models = smallest_models() if args.models is None else args.models
    optimizers = (
        list_optimizers() + OTHER_OPTIMIZERS if args.optimizers is None else args.optimizers
    )
    pairs = [(name, name, "sgd") for name in models] + [
        (name, "test_vit", name) for name in optimizers
    ]
    lines = [
        f"timm {timm.__version__}, torch {torch.__version__}\n",
        "| model or optimizer | weights | verdict | gradients | update | time |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    print("\n".join(lines))
    passes = 0
    for name, model, optimizer in pairs:
        passed, line = row(name, model, optimizer)
        passes += passed
        lines.append(line)
        print(line, flush=True)
    lines.append(
        f"\n{passes} of {len(pairs)} pass: {len(models)} models, {len(optimizers)} optimizers"
    )
    print(lines[-1])
    if args.report:
        Path(args.report).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
