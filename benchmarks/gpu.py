# Copyright 2026 The sam-obf authors. Licensed under the Apache License, Version 2.0.
"""Every figure of this project that takes an NVIDIA GPU, each beside its target: in at most 8
minutes, off the network.

(a) gradients on the GPU beside those in float64 on the CPU
(b) times of a step beside two passes over the same micro-batches and a step of the base optimizer
(c) whether an update makes the host wait for the GPU
(d) images per second and memory of the training loop, on images made up
(e) runs on the digits that are killed and resumed
(f) a run of one NCCL process through ``accelerate launch``

A row that fails says why in a line, the others go on, and the exit status is 1. A row whose
packages are missing, or for which no time is left, is left out, and says so.

    bash benchmarks/gpu.sh
    bash benchmarks/gpu.sh --rows a b
    bash benchmarks/gpu.sh --device cpu  # tries the code, at a tiny size: figures without a meaning
"""

import argparse
import contextlib
import functools
import gc
import importlib.util
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from step import OURS, RHO, TYPES

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from sam_obf import SAM, OutputBiasForgetting

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 480  # of all rows; none is begun in the last minute
# Of (d), (e), (f)
PACKAGES = ("accelerate", "datasets", "evaluate", "safetensors", "scipy", "sklearn", "tqdm", "yaml")
# The L2 norm of a gradient's error over that of the gradient, at most.
MAX_ERROR = {"fp32": 1e-4, "bf16": 0.1, "fp16": 0.02}
MAX_RATIO_TO_LIMIT = 1.02
MIN_RATE_TO_BASE = 0.49  # images per second: two passes, 1.02 times
MAX_COPIES = 1.05  # of the weights, more than the base optimizer's loop
MIN_TOP1 = 0.90  # on the digits' test images
# By device: models, with the paper's recipe for each; the batch of (b) in one piece, its
# micro-batches, rounds and seconds; updates that are timed in (d); epochs of (e).
SIZES = {
    "cuda": {
        "models": {"vit_small_patch32_224": "vit_s32", "resnet50": "resnet50"},
        "batch": 128, "m": 64, "pieces": 8, "rounds": 11, "seconds": 12, "updates": 8, "epochs": 20,
    },
    "cpu": {
        "models": {"test_vit": "vit_s32", "test_resnet": "resnet50"},
        "batch": 4, "m": 2, "pieces": 2, "rounds": 2, "seconds": 5, "updates": 1, "epochs": 2,
    },
}  # fmt: skip


def shown(label, figure, target=None, fine=True):
    """Print a figure beside its target."""
    verdict = "" if target is None else f"   target {target} {'ok' if fine else 'MISSED'}"
    print(f"{label:<44} {figure}{verdict}", flush=True)


def build(name, device):
    """A model of timm's and images of its size: a function of their number, which returns them with
    labels.
    """
    model = timm.create_model(name).to(device, memory_format=torch.channels_last).train()
    size = model.pretrained_cfg["input_size"]

    def images(number):
        x = torch.randn(number, *size, device=device).contiguous(memory_format=torch.channels_last)
        return x, torch.randint(1000, (number,), device=device)

    return model, images


def ascent(name, model, x, y):
    """What method ``name`` ascends."""
    return OutputBiasForgetting()(model(x), y) if name == "OBF" else F.cross_entropy(model(x), y)


def gradient(name, device, precision):
    """The gradient that method ``name`` leaves, as one vector in float64 on the CPU; ``precision``
    None is float64.

    Raises:
        ValueError: the weights are not, bit for bit, those of before.
    """
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=10)  # smooth: no kink where rounding decides
    x, y = torch.randn(8, *model.pretrained_cfg["input_size"]), torch.arange(8)
    dtype = torch.float64 if precision is None else torch.float32
    model, x, y = model.to(device, dtype), x.to(device, dtype), y.to(device)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model, RHO, **OURS[name])
    # At torch's own first scale, 65536, the ascent of OBF overflows here: no step, and a lower
    # scale for the next.
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0, enabled=precision == "fp16")
    with torch.autocast(device.type, TYPES.get(precision), enabled=precision in TYPES):
        with optimizer.perturbed(lambda: ascent(name, model, x, y), grad_scaler=scaler):
            scaler.scale(F.cross_entropy(model(x), y)).backward()
    scaler.unscale_(optimizer)
    if not all(torch.equal(p, start) for p, start in zip(model.parameters(), before)):
        raise ValueError("the weights are not those of before the step")
    return torch.cat([p.grad.double().flatten().cpu() for p in model.parameters()])


def gradients(device):
    """(a): a line for each precision."""
    torch.backends.cudnn.allow_tf32 = False  # of the patches' convolution in "fp32"
    exact = {name: gradient(name, torch.device("cpu"), None) for name in OURS}
    for precision, most in MAX_ERROR.items():
        errors = {}
        for name, expected in exact.items():
            errors[name] = (
                (gradient(name, device, precision) - expected).norm() / expected.norm()
            ).item()
        figure = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
        shown(
            f"(a) error of the gradient, {precision}",
            figure,
            f"<= {most}",
            max(errors.values()) <= most,
        )


def make_steps(model, pieces, device):
    """By contestant, a function that makes a step on the micro-batches ``pieces``, in bf16.

    "limit" is what no method of two passes can beat: the gradients of the first pass are not even
    kept.
    """
    params, autocast = (
        list(model.parameters()),
        functools.partial(torch.autocast, device.type, torch.bfloat16),
    )
    optimizers = {"limit": torch.optim.SGD(params, lr=1e-6, momentum=0.9)}
    for name, options in OURS.items():
        optimizers[name] = SAM(
            torch.optim.SGD(params, lr=1e-6, momentum=0.9), model, RHO, **options
        )

    def loss(x, y):
        with autocast():
            return F.cross_entropy(model(x), y) / len(pieces)

    def first_pass(name, x, y):
        with autocast():
            return ascent(name, model, x, y)

    def step(name):
        optimizer = optimizers[name]
        for x, y in pieces:
            if name == "limit":
                torch.autograd.grad(loss(x, y), params)
                loss(x, y).backward()
                continue
            with optimizer.perturbed(
                functools.partial(first_pass, name, x, y), loss_weight=1 / len(pieces)
            ):
                loss(x, y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return {name: functools.partial(step, name) for name in optimizers}


def free_memory(device):
    """Give back what earlier rows have held, and count the peak anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def timed(step, device):
    """Seconds that a step takes, and until the host has handed all of it to the device."""
    start = time.perf_counter()
    step()
    handed = time.perf_counter() - start
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, handed


def step_ratios(device, name, compiled, micro_batches):
    """(b), for one model: each method's ratio to the limit, a median over rounds in which all take
    turns.
    """
    size = SIZES[device.type]
    torch.manual_seed(0)
    model, images = build(name, device)
    pieces = (
        [images(size["m"]) for _ in range(size["pieces"])]
        if micro_batches
        else [images(size["batch"])]
    )
    # Or a second number of examples would compile for any number, which is slower
    torch.compiler.reset()
    steps = make_steps(torch.compile(model) if compiled else model, pieces, device)
    for _, step in itertools.product(range(3), steps.values()):  # compiles, allocates
        step()
    times, start = {contestant: [] for contestant in steps}, time.monotonic()
    for _ in range(size["rounds"]):
        for contestant, step in steps.items():
            times[contestant].append(timed(step, device))
        if time.monotonic() - start > size["seconds"] and len(times["limit"]) >= 3:
            break
    limit = [whole for whole, _ in times["limit"]]
    setup = f"{len(pieces)} x {len(pieces[0][1])}, {'compiled' if compiled else 'eager'}"
    ratios = {
        own: statistics.median(t / at for (t, _), at in zip(times[own], limit)) for own in OURS
    }
    host = statistics.median(handed / whole for whole, handed in times["SAM"])
    figure = ", ".join(f"{own} {ratio:.3f}" for own, ratio in ratios.items())
    detail = f"limit {1e3 * statistics.median(limit):.1f} ms, {len(limit)} rounds; "
    detail += f"the host has handed over SAM's after {host:.0%}"
    fine = max(ratios.values()) <= MAX_RATIO_TO_LIMIT
    shown(f"(b) {name}, {setup}", f"{figure}  ({detail})", f"<= {MAX_RATIO_TO_LIMIT}", fine)


@contextlib.contextmanager
def waiting_is_an_error(device):
    """Whatever makes the host wait for the GPU raises a RuntimeError in this block."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def no_waiting(device):
    """(c), for sam_obf.py by itself."""
    size = SIZES[device.type]
    for name in size["models"]:
        model, images = build(name, device)
        for contestant, step in make_steps(model, [images(size["m"])] * 2, device).items():
            step()
            with waiting_is_an_error(device):
                step()
            shown(f"(c) {name}, {contestant}: a step", "the host waits for nothing", "no wait")


def make_job(device, name, method):
    """A run as train_imagenet.py builds it by the paper's recipe, and a batch of images made up."""
    import train_imagenet
    from common import build, loaders, settings

    size = SIZES[device.type]
    flags = [
        "--recipe",
        str(ROOT / f"recipes/imagenet/{size['models'][name]}-{method}.yaml"),
        "--model",
        name,
    ]
    flags += ["--batch-size", str(size["m"] * size["pieces"]), "--m", str(size["m"]), "--dry-run"]
    args = settings.parse(train_imagenet.parser(), flags)
    torch.manual_seed(0)
    os.environ |= {"ACCELERATE_MIXED_PRECISION": "bf16"} | (
        {"ACCELERATE_USE_CPU": "1"} if device.type == "cpu" else {}
    )
    accelerator = build.build_accelerator(args)
    layout = torch.channels_last
    model = train_imagenet.create_model(args, 1000).to(memory_format=layout).train()
    build.set_head_bias(args, model)
    config = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    to_input = loaders.to_input(config, torch.float32, layout)
    batches = loaders.Batches(None, 100, 1, args.m, {}, to_input, layout, config, label_names=[])
    criterion = build.build_criterion(args)
    optimizer = build.build_optimizer(args, model)
    objective = build.build_objective(args, criterion, optimizer)
    model, optimizer = accelerator.prepare(model, optimizer)
    schedule = build.build_schedule(args, optimizer, batches.updates)
    job = build.Job(
        args, accelerator, model, "", criterion, objective, optimizer, schedule, batches
    )
    images = torch.randint(
        256, (args.batch_size, 3, args.img_size, args.img_size), dtype=torch.uint8, device=device
    )
    labels = torch.randint(1000, (args.batch_size,), device=device)
    return job, {"image": images.contiguous(memory_format=layout), "label": labels}


def training_loop(device, name):
    """(d), and (c) for the training loop: base, SAM and OBF by the paper's recipe, but for a
    smaller batch.
    """
    from common import loop

    rates, peaks = {}, {}
    for method in ("base", "sam", "obf"):
        free_memory(device)
        held = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        job, batch = make_job(device, name, method)
        batches = itertools.repeat(batch)
        for i in range(3):
            job.schedule(i + 1)
            loop.update(job, batches)
        with waiting_is_an_error(device):
            loop.update(job, batches)
        shown(
            f"(c) {name}, {method}: an update of the loop", "the host waits for nothing", "no wait"
        )
        updates = SIZES[device.type]["updates"]
        seconds, _ = timed(
            lambda n=updates, j=job, b=batches: [loop.update(j, b) for _ in range(n)], device
        )
        rates[method] = updates * len(batch["label"]) / seconds
        peaks[method] = torch.cuda.max_memory_allocated() - held if device.type == "cuda" else 0
        weights = sum(p.nbytes for p in job.model.parameters())
        del job, batch, batches
        figure = f"{rates[method]:.0f} images/s, {peaks[method] / 2**30:.2f} GiB"
        if method == "base":
            shown(f"(d) {name}, {method}", figure)
            continue
        rate, copies = rates[method] / rates["base"], (peaks[method] - peaks["base"]) / weights
        figure += f": {rate:.3f} of base, {copies:.2f} copies of the weights more"
        fine = rate >= MIN_RATE_TO_BASE and copies <= MAX_COPIES
        shown(f"(d) {name}, {method}", figure, f">= {MIN_RATE_TO_BASE}, <= {MAX_COPIES}", fine)


def launched(config, output, *flags, **environment):
    """A run on the digits by ``accelerate launch``, in a process group of its own."""
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        f"accelerate_configs/{config}.yaml",
    ]
    command += [
        "--num_processes",
        "1",
        "train_imagenet.py",
        "--recipe",
        "recipes/digits.yaml",
        "--output",
        output,
    ]
    log = Path(f"{output}.txt").open("a")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    options = {"cwd": ROOT, "env": environment, "start_new_session": True}
    return subprocess.Popen([*command, *flags], stdout=log, stderr=subprocess.STDOUT, **options)


def finished(process, output):
    """What a run has printed, and its top-1 on the test images.

    Raises:
        RuntimeError: it failed; with its last line.
    """
    try:
        status = process.wait(timeout=150)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    printed = Path(f"{output}.txt").read_text()
    if status:
        raise RuntimeError(f"a run ended with status {status}: {printed.strip().splitlines()[-1]}")
    return printed, json.loads((Path(output) / "results.json").read_text())["last"]["test"]


def killed_and_resumed(device, config):
    """(e), for one precision."""
    from common import checkpoints

    with tempfile.TemporaryDirectory() as folder:
        output, epochs = f"{folder}/run", SIZES[device.type]["epochs"]
        flags = ["--epochs", str(epochs), "--warmup-epochs", "1", "--checkpoint-interval", "5"]
        run, start = launched(config, output, *flags), time.monotonic()
        try:
            while (
                newest := checkpoints.find("auto", Path(output) / "checkpoints")
            ) is None and run.poll() is None:
                if time.monotonic() - start > 120:
                    break
                time.sleep(0.05)
        finally:
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()
        if newest is None or (Path(output) / "results.json").exists():
            raise RuntimeError(
                f"there was nothing to resume: {Path(f'{output}.txt').read_text().strip()[-200:]}"
            )
        printed, top1 = finished(launched(config, output, *flags, "--resume", "auto"), output)
        if "resuming from" not in printed:
            raise RuntimeError("it began anew")
    figure = f"resumed, then {top1:.2%} on test after {epochs} epochs"
    shown(f"(e) digits, {config}", figure, f">= {MIN_TOP1:.0%}", top1 >= MIN_TOP1)


def one_nccl_process(device):
    """(f); without a GPU, one process without NCCL."""
    config = "multi_gpu" if device.type == "cuda" else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        output = f"{folder}/run"
        flags = ["--epochs", "2", "--warmup-epochs", "1"]
        printed, top1 = finished(launched(config, output, *flags, NCCL_DEBUG="VERSION"), output)
    version = next(
        (line for line in printed.splitlines() if "NCCL version" in line), "without NCCL"
    )
    figure = f"{version.strip()}; {top1:.2%} on test after 2 epochs"
    shown(f"(f) accelerate launch, {config}.yaml", figure, "NCCL", "NCCL version" in version)


def parts_of(device):
    """The rows: letter, and a function that prints one or more lines."""
    models = SIZES[device.type]["models"]
    yield "a", gradients
    yield "c", no_waiting
    for name, micro_batches in itertools.product(models, (False, True)):
        yield (
            "b",
            functools.partial(step_ratios, name=name, compiled=False, micro_batches=micro_batches),
        )
    for name in models:
        yield "d", functools.partial(training_loop, name=name)
    for config in ("gpu_bf16", "gpu_fp16") if device.type == "cuda" else ("cpu",):
        yield "e", functools.partial(killed_and_resumed, config=config)
    yield "f", one_nccl_process
    # Last: compiling takes long
    for name, micro_batches in itertools.product(models, (False, True)):
        yield (
            "b",
            functools.partial(step_ratios, name=name, compiled=True, micro_batches=micro_batches),
        )


def described(row, part):
    options = getattr(part, "keywords", {})
    return f"({row}) " + ", ".join(str(value) for value in options.values())


def main(argv=None):
    """Print all rows; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=SIZES, default="cuda", help="(%(default)s)")
    parser.add_argument("--rows", nargs="+", choices="abcdef", default=list("abcdef"), help="(all)")
    args = parser.parse_args(argv)
    device, start, failed, missing = torch.device(args.device), time.monotonic(), [], []
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error(
            "there is no NVIDIA GPU here, or torch is built without CUDA: "
            "--device cpu tries the code"
        )
    where = (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else "CPU, at a tiny size: no figure has a meaning"
    )
    print(f"torch {torch.__version__}, timm {timm.__version__}, {where}")
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"missing, so (d), (e) and (f) are left out: {', '.join(missing)}; "
            "pip install -r requirements.txt"
        )
    for row, part in parts_of(device):
        if row not in args.rows or (missing and row in "def"):
            continue
        if time.monotonic() - start > SECONDS - 60:
            print(f"{described(row, part)}: left out, no time is left")
            continue
        free_memory(device)
        try:
            part(device)
        except Exception as error:  # whatever it is, the other rows go on
            failed.append(row)
            reason = " ".join(str(error).split())[:300]
            print(f"{described(row, part)}: FAILED: {type(error).__name__}: {reason}")
    print(
        f"{time.monotonic() - start:.0f} s; "
        + (f"FAILED: {', '.join(failed)}" if failed else "no row failed")
    )
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
