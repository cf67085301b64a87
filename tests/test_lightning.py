"""Lightning, automatic and manual, in each precision: the same weights as a plain loop."""

import copy
import functools
import itertools
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from sam_obf import SAM, OutputBiasForgetting

lightning = pytest.importorskip(
    "lightning", reason="needs lightning: pip install -r examples/requirements.txt"
)
from lightning.pytorch.plugins.precision import (  # noqa: E402
    DoublePrecision,
    HalfPrecision,
    MixedPrecision,
    Precision,
)

STEPS, SIZE = 4, 12
forget = OutputBiasForgetting()


class Module(lightning.LightningModule):
    def __init__(self, manual=False, **options):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 5)
        )
        self.automatic_optimization = not manual
        self.options = {"rho": 0.5, **options}

    def configure_optimizers(self):
        return SAM(torch.optim.SGD(self.parameters(), lr=0.5), self, **self.options)

    def training_step(self, batch, index):
        x, y = batch
        if not self.automatic_optimization:
            return self.manual_step(x, y)
        if self.optimizers().optimizer.ascending:
            return forget(self.layers(x), y)
        return F.cross_entropy(self.layers(x).float(), y)

    def manual_step(self, x, y):
        optimizer = self.optimizers()
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        with optimizer.optimizer.perturbed(lambda: forget(self.layers(x), y), grad_scaler=scaler):
            self.manual_backward(F.cross_entropy(self.layers(x).float(), y))
        optimizer.step()
        optimizer.zero_grad()


def data():
    return [(torch.randn(SIZE, 6), torch.randint(0, 5, (SIZE,))) for _ in range(STEPS)]


def fit(module, batches, **options):
    options = {"max_epochs": 1, "accelerator": "cpu", "devices": 1, "logger": False, **options}
    quiet = {
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    lightning.Trainer(**options, **quiet).fit(
        module, torch.utils.data.DataLoader(batches, batch_size=None)
    )
    return [p.detach().double() for p in module.parameters()]


def plain_loop(module, batches, dtype=None, mixed=None, scaled=False):
    module.to(dtype)
    optimizer, scaler = module.configure_optimizers(), torch.amp.GradScaler("cpu", enabled=scaled)
    for x, y in batches:
        x = x if dtype is None else x.to(dtype)

        def ascent(x=x, y=y):
            with torch.autocast("cpu", mixed, enabled=mixed is not None):
                return forget(module.layers(x), y)

        with optimizer.perturbed(ascent, grad_scaler=scaler):
            with torch.autocast("cpu", mixed, enabled=mixed is not None):
                loss = F.cross_entropy(module.layers(x).float(), y)
            scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return [p.detach().double() for p in module.parameters()]


def without_scaler():
    return {
        "32-true": (Precision(), {}),
        "64-true": (DoublePrecision(), {"dtype": torch.float64}),
        "bf16-true": (HalfPrecision("bf16-true"), {"dtype": torch.bfloat16}),
        "16-true": (HalfPrecision("16-true"), {"dtype": torch.float16}),
        "bf16-mixed": (MixedPrecision("bf16-mixed", "cpu"), {"mixed": torch.bfloat16}),
    }


@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize("precision", without_scaler())
def test_lightning_equals_a_plain_loop(precision, manual):
    plugin, options = without_scaler()[precision]
    module, batches = Module(manual), data()
    reference = copy.deepcopy(module)
    ours = fit(module, batches, plugins=plugin)
    tolerance = 1e-5 if precision in ("32-true", "64-true") else 2e-2
    for a, b in zip(ours, plain_loop(reference, batches, **options)):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def with_scaler():
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))


def test_lightnings_scaler_under_automatic_optimization_is_an_error_that_says_what_to_use():
    with pytest.raises(
        RuntimeError, match=r"'bf16-mixed'.*automatic_optimization=False.*_plugin\.scaler"
    ):
        fit(Module(), data(), plugins=with_scaler())


def test_lightnings_scaler_under_manual_optimization_equals_a_plain_loop():
    module, batches = Module(manual=True), data()
    reference = copy.deepcopy(module)
    ours = fit(module, batches, plugins=with_scaler())
    for a, b in zip(ours, plain_loop(reference, batches, mixed=torch.float16, scaled=True)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_lightnings_accumulation_is_told_of_what_it_does_not_perturb():
    with pytest.warns(UserWarning, match="no block perturbed.*manual optimization"):
        fit(Module(), data(), accumulate_grad_batches=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*no block perturbed")
        fit(Module(), data())


class OwnClosure(Module):
    """Manual optimization by ``optimizer.step(closure)``."""

    def __init__(self, returns, **options):
        super().__init__(manual=True, **options)
        self.returns, self.calls = returns, 0

    def manual_step(self, x, y):
        optimizer = self.optimizers()

        def closure():
            self.calls += 1
            optimizer.zero_grad()
            ascending = optimizer.optimizer.ascending
            loss = forget(self.layers(x), y) if ascending else F.cross_entropy(self.layers(x), y)
            self.manual_backward(loss)
            return loss if self.returns else None

        optimizer.step(closure)


@pytest.mark.parametrize("gsam_alpha", [0.0, 0.4])
@pytest.mark.parametrize("returns", [False, True])
def test_a_closure_of_ones_own_under_manual_optimization_makes_both_passes(returns, gsam_alpha):
    module, batches = OwnClosure(returns, gsam_alpha=gsam_alpha), data()
    reference = copy.deepcopy(module)
    ours = fit(module, batches)
    assert module.calls == 2 * STEPS
    for a, b in zip(ours, plain_loop(reference, batches)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


class Submodule(Module):
    """SAM around a part of the module, which knows nothing of Lightning."""

    def configure_optimizers(self):
        return SAM(torch.optim.SGD(self.layers.parameters(), lr=0.5), self.layers, **self.options)


@pytest.mark.parametrize("gsam_alpha", [0.0, 0.4])
@pytest.mark.parametrize("manual", [False, True])
def test_sam_around_a_submodule(manual, gsam_alpha):
    module, batches = Submodule(manual, gsam_alpha=gsam_alpha), data()
    reference = copy.deepcopy(module)
    ours = fit(module, batches)
    for a, b in zip(ours, plain_loop(reference, batches)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


class ThroughWrapper(Module):
    """All through Lightning's own optimizer object, which passes for a SAM."""

    def manual_step(self, x, y):
        optimizer = self.optimizers()
        with optimizer.perturbed(lambda: forget(self.layers(x), y)):
            self.manual_backward(F.cross_entropy(self.layers(x), y))
            with pytest.raises(RuntimeError, match="call it after the block"):
                optimizer.step()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("gsam_alpha", [0.0, 0.4])
def test_lightnings_optimizer_object_in_place_of_sam(gsam_alpha):
    module, batches = ThroughWrapper(manual=True, gsam_alpha=gsam_alpha), data() * 4
    reference = copy.deepcopy(module)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*no perturbation")
        ours = fit(module, batches)
    for a, b in zip(ours, plain_loop(reference, batches)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["with", "step"])
@pytest.mark.parametrize("gsam_alpha", [0.0, 0.4])
def test_fabrics_optimizer_object_in_place_of_sam(gsam_alpha, form):
    found, batches = [], data() * 4
    for wrapped in (False, True):
        torch.manual_seed(1)
        module = Module(gsam_alpha=gsam_alpha)
        model, optimizer = module.layers, module.configure_optimizers()
        if wrapped:
            fabric = lightning.Fabric(accelerator="cpu", devices=1)
            model, optimizer = fabric.setup(module.layers, optimizer)

        def closure():
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*perturb")
            for x, y in batches:
                if form == "step":
                    optimizer.step(closure)
                    continue
                with optimizer.perturbed(lambda: forget(model(x), y)):
                    F.cross_entropy(model(x), y).backward()
                    with pytest.raises(RuntimeError, match="call it after the block"):
                        optimizer.step()
                optimizer.step()
                optimizer.zero_grad()
        found.append([p.detach().clone() for p in module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_what_is_logged_is_the_mean_of_both_passes_unless_one_is_chosen():
    class Logging(Module):
        def training_step(self, batch, index):
            loss = F.cross_entropy(self.layers(batch[0]), batch[1])
            self.log("both", loss, on_epoch=True, on_step=False)
            if not self.optimizers().optimizer.ascending:
                self.log("descent", loss, on_epoch=True, on_step=False)
            self.losses.append(loss.item())
            return loss

    module, trainer_options = Logging(), {"max_epochs": 1, "accelerator": "cpu", "devices": 1}
    module.losses = []
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "logger": False}
    trainer = lightning.Trainer(**trainer_options, **quiet, enable_model_summary=False)
    trainer.fit(module, torch.utils.data.DataLoader(data(), batch_size=None))
    mean = torch.tensor(module.losses).mean()
    torch.testing.assert_close(trainer.callback_metrics["both"], mean)
    descent = torch.tensor(module.losses[1::2]).mean()
    torch.testing.assert_close(trainer.callback_metrics["descent"], descent)


DDP_KINDS = list(itertools.product([False, True], [0.0, 0.4]))  # manual, gsam_alpha


def in_two_processes(folder):
    """One of two processes of DDP: trains each kind on data of its own, and saves the weights."""
    rank, found = int(os.environ["RANK"]), {}
    for manual, gsam_alpha in DDP_KINDS:
        torch.manual_seed(0)
        module = Module(manual, gsam_alpha=gsam_alpha)
        torch.manual_seed(1 + rank)
        options = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False}
        found[manual, gsam_alpha] = fit(module, data(), **options)
    torch.save(found, folder / str(rank))


@pytest.mark.slow
def test_under_ddp_gradients_are_the_mean_of_what_each_process_does_alone(tmp_path):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, *launch, __file__, str(tmp_path)]
    run = functools.partial(subprocess.run, capture_output=True, text=True, timeout=300)
    done = run(command, env=environment)
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / str(rank), weights_only=True) for rank in (0, 1))
    for manual, gsam_alpha in DDP_KINDS:
        torch.manual_seed(0)
        module = Module(manual, gsam_alpha=gsam_alpha)
        optimizer, shares = module.configure_optimizers(), []
        for rank in (0, 1):
            torch.manual_seed(1 + rank)
            shares.append(data())
        for batches in zip(*shares):
            for x, y in batches:
                with optimizer.perturbed(lambda: forget(module.layers(x), y), loss_weight=0.5):
                    (F.cross_entropy(module.layers(x), y) / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
        trained = first[manual, gsam_alpha], second[manual, gsam_alpha]
        for a, b, p in zip(*trained, module.parameters()):
            assert torch.equal(a, b)
            torch.testing.assert_close(a, p.detach().double(), rtol=1e-5, atol=1e-5)


if __name__ == "__main__":
    in_two_processes(Path(sys.argv[1]))
