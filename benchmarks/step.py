# Copyright 2026 The sam-obf authors. Licensed under the Apache License, Version 2.0.
"""Measure what one step of SAM, OBF, ASAM and GSAM costs, in time and memory.

The yardstick ("limit") is what no two-pass method can beat: two forward-backward passes and the
base optimizer's step. The peer is ``pip install pytorch_optimizer``, an optional dependency of this
script alone. Every round runs all of them once, in random order; a ratio compares two times of the
same round, so that a machine's slow drift cancels out. A median above its target is missed if a
sign test over the rounds says that it is no accident (p < 0.05). Extra memory is counted from the
allocator's own events (``torch.profiler``), over each contestant's whole life.

On a CPU the script restarts itself so that malloc keeps the memory that it is given back. By
default glibc returns it to the kernel, and whoever allocates next pays for getting it again, page
by page; by chance, that is one contestant or another. A GPU's allocator, jemalloc and tcmalloc keep
it too.

    # All models on a GPU if there is one, else on the CPU
    python benchmarks/step.py
    python benchmarks/step.py --models resnet50 --batch-size 8 --rounds 5
    python benchmarks/step.py --device cuda --batch-size 64 --amp bf16 --compile
"""

import argparse
import copy
import itertools
import json
import os
import random
import statistics
import sys
import time
from pathlib import Path

import scipy.stats
import timm
import torch
import torch.nn.functional as F
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from sam_obf import SAM, OutputBiasForgetting

try:
    import pytorch_optimizer as peer
except ImportError:
    peer = None

# Of the MLP, whose 1,000 small tensors show what each costs by itself
CLASSES, LAYERS, WIDTH = 1000, 500, 64
SGD = (torch.optim.SGD, {"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-3})
MODELS = {  # batch size, shape of an input, base optimizer and its options
    "vit_small_patch32_224": (
        32,
        (3, 224, 224),
        torch.optim.AdamW,
        {"lr": 1e-4, "weight_decay": 0.3},
    ),
    "vit_small_patch16_224": (
        32,
        (3, 224, 224),
        torch.optim.AdamW,
        {"lr": 1e-4, "weight_decay": 0.3},
    ),
    "resnet50": (32, (3, 160, 160), *SGD),
    "mlp": (1024, (WIDTH,), *SGD),
}
# Name: SAM's arguments
OURS = {"SAM": {}, "OBF": {}, "ASAM": {"adaptive": "both"}, "GSAM": {"gsam_alpha": 0.4}}
PEER_OF = {"SAM": "peer SAM", "OBF": "peer SAM", "ASAM": "peer ASAM", "GSAM": "peer GSAM"}
KEEP_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "MALLOC_TOP_PAD_": str(2**28),
}
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
RHO = 0.05
USUAL = {
    "cpu": ["vit_small_patch32_224", "resnet50", "mlp"],
    "cuda": ["vit_small_patch16_224", "resnet50"],
}
MAX_RATIO_TO_LIMIT = {"cpu": 1.03, "cuda": 1.02}
MAX_RATIO_TO_PEER, MAX_RATIO_TO_PLAIN = 1.00, 1.30
MAX_COPIES = {"SAM": 1, "OBF": 1, "ASAM": 1, "GSAM": 2}


def build(name):
    if name != "mlp":
        return timm.create_model(name, num_classes=CLASSES)
    layers = [
        torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.ReLU())
        for _ in range(LAYERS - 1)
    ]
    return torch.nn.Sequential(*layers, torch.nn.Linear(WIDTH, CLASSES))


def make_step(name, model, x, y, base, options, amp):
    """Return a function that makes one step of contestant ``name`` on (x, y) and leaves no
    gradient.
    """

    autocast = torch.autocast(x.device.type, TYPES.get(amp), enabled=amp is not None)
    scaler = torch.amp.GradScaler(x.device.type, enabled=amp == "fp16")

    def loss(part=1.0):
        examples = round(part * len(x))
        with autocast:
            return F.cross_entropy(model(x[:examples]), y[:examples])

    def forward_backward():
        value = scaler.scale(loss())
        with record_function("backward"):  # count_memory() looks at the last one of a step
            value.backward()

    def update():
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    if name == "limit":
        optimizer = base(model.parameters(), **options)

        def step():
            forward_backward()
            optimizer.zero_grad()
            forward_backward()
            update()

    elif name == "plain":
        optimizer = base(model.parameters(), **options)

        def step():
            forward_backward()
            update()

    elif name in ("peer SAM", "peer ASAM"):
        optimizer = peer.SAM(
            model.parameters(), base, rho=RHO, adaptive=name == "peer ASAM", **options
        )

        def closure():
            optimizer.zero_grad()
            forward_backward()

        def step():
            closure()
            optimizer.step(closure)
            optimizer.zero_grad()

    elif name == "peer GSAM":
        inner = base(model.parameters(), **options)
        lr_scheduler = torch.optim.lr_scheduler.ConstantLR(inner, factor=1.0)
        rho_scheduler = peer.lr_scheduler.ProportionScheduler(
            lr_scheduler, max_lr=options["lr"], max_value=RHO, min_value=RHO
        )
        optimizer = peer.GSAM(
            model.parameters(), inner, model, rho_scheduler, alpha=OURS["GSAM"]["gsam_alpha"]
        )

        def closure():  # what its set_closure() makes, with our forward_backward()
            inner.zero_grad()
            with torch.enable_grad():
                forward_backward()
            return None, None

        def step():
            optimizer.step(closure)
            lr_scheduler.step()
            optimizer.update_rho_t()
            inner.zero_grad()

    else:
        optimizer = SAM(base(model.parameters(), **options), model, RHO, **OURS.get(name, {}))
        forget = OutputBiasForgetting()

        def forget_loss():
            with autocast:
                return forget(model(x), y)

        ascents = {"OBF": forget_loss, "SAM 1/4": lambda: loss(0.25)}

        def step():
            with optimizer.perturbed(ascents.get(name, loss), grad_scaler=scaler):
                forward_backward()
            update()

    return step


def host_times(model, device, rounds):
    """The host's share of a block: microseconds per tensor, by contestant, one for each round.

    Every weight has one element and both passes are empty but for the gradients that they set,
    which are timed by themselves and subtracted; the base optimizer stands still. What is left is
    Python and dispatch.
    """
    model = copy.deepcopy(model)
    for p in model.parameters():
        p.data = torch.ones(1, device=device)
    params = list(model.parameters())

    class Still(torch.optim.SGD):
        def step(self):
            pass

    def passes():
        for p in params:
            p.grad = torch.ones(1, device=device)

    def seconds(function):
        for p in params:
            p.grad = None
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    optimizers = {
        name: SAM(Still(params, lr=0.0), model, RHO, **options) for name, options in OURS.items()
    }
    times = {name: [] for name in OURS}
    for _ in range(rounds):
        for name, optimizer in optimizers.items():
            empty = seconds(passes) + seconds(passes)
            times[name].append(
                1e6 * (seconds(lambda: optimizer.step(passes)) - empty) / len(params)
            )
            if device.type == "cuda":
                torch.cuda.synchronize()
    return times


def count_memory(make, device):
    """Make a contestant and run two steps; return its step function and its live bytes in the
    second step.

    Everything that it has allocated since before it existed counts: weights, optimizer state,
    activations, gradients and what it keeps from step to step. The bytes are those at the start, at
    the end and at the peak of the second backward, and at the peak of the whole step; only their
    differences between contestants have a meaning.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step = make()
        step()
        with record_function("step"):
            step()
    events = profiler.profiler.kineto_results.events()
    kind = DeviceType.CUDA if device.type == "cuda" else DeviceType.CPU
    changes = [
        (e.start_ns(), e.nbytes())
        for e in events
        if e.name() == "[memory]" and e.device_type() == kind
    ]
    times, live = [], [0]
    for when, nbytes in sorted(changes, key=lambda change: change[0]):
        times.append(when)
        live.append(live[-1] + nbytes)  # live[i]: before the i-th change

    def during(span):  # the live bytes on entry and after each change inside
        first = sum(t < span.start_ns() for t in times)
        last = sum(t <= span.start_ns() + span.duration_ns() for t in times)
        return live[first : last + 1]

    backward = during(
        max((e for e in events if e.name() == "backward"), key=lambda e: e.start_ns())
    )
    whole = during(next(e for e in events if e.name() == "step"))
    return step, {
        "start": backward[0],
        "end": backward[-1],
        "peak": max(backward),
        "step": max(whole),
    }


def measure(model_name, names, args, device):
    """Return one row per contestant."""
    batch_size, shape, base, options = MODELS[model_name]
    batch_size = args.batch_size or batch_size
    torch.manual_seed(0)
    model = build(model_name).to(device).train()
    x = torch.randn(batch_size, *shape, device=device)
    y = torch.randint(CLASSES, (batch_size,), device=device)
    parameter_bytes = sum(p.nbytes for p in model.parameters())

    def make(name):
        own = copy.deepcopy(model)
        return make_step(
            name, torch.compile(own) if args.compile else own, x, y, base, options, args.amp
        )

    make("limit")()  # what libraries allocate once (workspaces, caches) is nobody's extra
    steps, memory = {}, {}
    for name in tqdm(names, f"{model_name}: memory", leave=False):
        steps[name], memory[name] = count_memory(lambda: make(name), device)

    times = {name: [] for name in names}
    order = random.Random(0)
    for i in tqdm(range(args.warmup + args.rounds), f"{model_name}: rounds", leave=False):
        for name in order.sample(names, len(names)):
            start = time.perf_counter()
            steps[name]()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if i >= args.warmup:
                times[name].append(time.perf_counter() - start)

    host = host_times(model, device, max(args.rounds, 31))
    rows = []
    for name in names:
        extra = {key: memory[name][key] - memory["limit"][key] for key in memory[name]}
        row = {
            "model": model_name,
            "contestant": name,
            "examples": batch_size,
            "seconds": times[name],
        }
        row["to_limit"] = [a / b for a, b in zip(times[name], times["limit"])]
        if name in host:
            row["host"] = host[name]
        if name == "SAM 1/4":
            row["to_plain"] = [a / b for a, b in zip(times[name], times["plain"])]
        if PEER_OF.get(name) in names:
            row["to_peer"] = [a / b for a, b in zip(times[name], times[PEER_OF[name]])]
        row["extra_copies"] = max(extra["start"], extra["end"], extra["peak"]) / parameter_bytes
        row["peak_extra_mib"] = extra["step"] / 2**20
        rows.append(row)
    return rows


def print_table(rows, max_ratio_to_limit):
    def spread(ratios):
        return (
            f"{statistics.median(ratios):.3f} ({min(ratios):.2f}-{max(ratios):.2f})"
            if ratios
            else "-"
        )

    def verdict(ratios, target):
        above = sum(ratio > target for ratio in ratios)
        chance = scipy.stats.binomtest(above, len(ratios), alternative="greater").pvalue
        missed = "MISSED" if chance < 0.05 else "within noise"
        return (
            f"<= {target:.2f} {'ok' if round(statistics.median(ratios), 3) <= target else missed}"
        )

    def count(copies, target):
        return f"<= {target} {'ok' if round(copies, 2) <= target else 'MISSED'}"

    heads = [
        "contestant",
        "ms/step",
        "examples/s",
        "ratio to limit",
        "target",
        "ratio to peer",
        "target",
    ]
    lines = [[*heads, "extra copies", "target", "peak extra MiB"]]
    for row in rows:
        name, to_limit, to_peer, copies = (
            row["contestant"],
            row["to_limit"],
            row.get("to_peer"),
            row["extra_copies"],
        )
        ours = name in OURS
        lines.append(
            [
                name,
                f"{1e3 * statistics.median(row['seconds']):.1f}",
                f"{row['examples'] / statistics.median(row['seconds']):.0f}",
                spread(to_limit),
                verdict(to_limit, max_ratio_to_limit) if ours else "",
                spread(to_peer),
                verdict(to_peer, MAX_RATIO_TO_PEER) if to_peer else "",
                f"{copies:.2f}",
                count(copies, MAX_COPIES[name]) if ours else "",
                f"{row['peak_extra_mib']:.1f}",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())
    shares = ", ".join(
        f"{row['contestant']} {statistics.median(row['host']):.1f}" for row in rows if "host" in row
    )
    print(f"the host's share of a block, Python and dispatch, microseconds per tensor: {shares}")
    to_plain = next(row["to_plain"] for row in rows if "to_plain" in row)
    target = verdict(to_plain, MAX_RATIO_TO_PLAIN) if rows[0]["model"].startswith("vit") else ""
    print(
        "SAM with a quarter of the examples in the ascent pass, ratio to a plain step: "
        f"{spread(to_plain)}  {target}"
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, help=f"{USUAL}")
    parser.add_argument("--batch-size", type=int, help="examples (32 images, 1024 vectors)")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--warmup", type=int, default=1, help="rounds that are not counted")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--amp", choices=TYPES, help="autocast; fp16 scales the loss")
    parser.add_argument("--compile", action="store_true", help="torch.compile the models")
    parser.add_argument("--json", type=Path, help="write every time and ratio to this file")
    args = parser.parse_args()

    names = ["limit", *OURS, "plain", "SAM 1/4", *dict.fromkeys(PEER_OF.values())]
    if peer is None or args.amp == "fp16":  # the peers take no GradScaler
        print(
            "No peer to compare with"
            + (": pip install pytorch_optimizer" if peer is None else " takes a GradScaler")
        )
        names = ["limit", *OURS, "plain", "SAM 1/4"]
    device = torch.device(args.device)
    if device.type == "cpu" and not KEEP_MEMORY.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP_MEMORY})
    where = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    speed = f"{args.amp or 'fp32'}, {'compiled' if args.compile else 'eager'}"
    setup = f"torch {torch.__version__}, {where}, {speed}, {args.rounds} rounds"
    rows = []
    for model_name in args.models or USUAL[device.type]:
        rows.append(measure(model_name, names, args, device))
        batch_size, shape, base, _ = MODELS[model_name]
        batch = f"batch {args.batch_size or batch_size} of {shape}"
        print(f"\n{model_name}, {batch}, {base.__name__}; {setup}; median (min-max)")
        print_table(rows[-1], MAX_RATIO_TO_LIMIT[device.type])
    if args.json:
        args.json.write_text(
            json.dumps({"setup": setup, "rows": list(itertools.chain(*rows))}, indent=2)
        )


if __name__ == "__main__":
    main()
