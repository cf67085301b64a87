"""Lightning, automatic and manual, with each of its precision plugins: the same weights as a plain loop."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F

from sam_obf import SAM, OutputBiasForgetting

lightning = pytest.importorskip("lightning", reason="needs lightning: pip install -r examples/requirements.txt")
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision, MixedPrecision, Precision  # noqa: E402

STEPS, SIZE = 4, 12
forget = OutputBiasForgetting()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Module(lightning.LightningModule):
    def __init__(self, manual=False, **options):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 5))
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
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    lightning.Trainer(**options, **quiet).fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
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
    with pytest.raises(RuntimeError, match=r"'bf16-mixed'.*automatic_optimization=False.*_plugin\.scaler"):
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
