"""What the forward pass changes beside activations moves once a step, in the clean pass."""

import copy

import pytest
import torch
import torch.nn.functional as F
from brute_force import VARIANTS, assert_close, assert_same, batches, network
from torch.utils._python_dispatch import TorchDispatchMode

from sam_obf import SAM, random_perturbation


class OwnForwardBatchNorm(torch.nn.BatchNorm1d):
    """A subclass that ignores track_running_stats, as some do."""

    def forward(self, x):
        self.num_batches_tracked.add_(1)
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, True, 0.3, self.eps
        )


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
        timm_layer = getattr(
            pytest.importorskip("timm.layers", reason="timm is not installed"), name
        )(n)
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
        *map(
            _timm,
            ["BatchNormAct2d", "SplitBatchNorm2d", "EvoNorm2dB0", "EvoNorm2dB1", "EvoNorm2dB2"],
        ),
    ],
    ids=[
        *"torch cumulative sync own-forward instance spectral replaced".split(),
        *"batch-act split evo-b0 evo-b1 evo-b2".split(),
    ],
)
@pytest.mark.parametrize("variant", ["plain", "gsam"])
def test_buffers_are_those_of_the_clean_passes_alone(layer, variant):
    model = network()
    model.insert(1, layer(8).double())
    clean, start = copy.deepcopy(model), [buffer.clone() for buffer in model.buffers()]
    optimizer = SAM(
        torch.optim.SGD(model.parameters(), lr=0.0), model, rho=0.5, **VARIANTS[variant]
    )
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
    """But in the first two blocks, and ever more rarely after them."""

    class Clones(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            sizes.extend([args[0].numel()] if function is torch.ops.aten.clone.default else [])
            return function(*args, **(kwargs or {}))

    model, (x, y), sizes = network(batch_norm=True), batches(1)[0], []
    model.register_buffer("table", torch.zeros(10_007))
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.0), model, rho=0.5)
    for _ in range(3):
        sizes.clear()
        with Clones(), optimizer.perturbed(lambda: F.cross_entropy(model(x), y)):
            F.cross_entropy(model(x), y).backward()
    assert 8 in sizes and 10_007 not in sizes


class Data(torch.nn.Module):
    """Statistics that move by ``.data``, of which autograd hears nothing."""

    def __init__(self, features):
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))

    def forward(self, x):
        self.mean.data.lerp_(x.detach().mean(0), 0.1)
        return x - self.mean


class Functional(Data):
    """A batch norm without the count that tells of its kernel's work."""

    def forward(self, x):
        return F.batch_norm(x, self.mean, torch.ones_like(self.mean), training=True)


class KeyEncoder(torch.nn.Module):
    """MoCo's (He et al. 2020): parameters without gradient follow others, before each use."""

    def __init__(self, features, how):
        super().__init__()
        self.how, self.query = how, torch.nn.Linear(features, features)
        self.key = copy.deepcopy(self.query).requires_grad_(False)
        self.key.weight.data.mul_(0.5)

    def forward(self, x):
        with torch.no_grad():
            key, query = self.key.weight, self.query.weight
            if self.how == "replaced":
                key.data = 0.9 * key.data + 0.1 * query.data
            elif self.how == "data":
                key.data.mul_(0.9).add_(query.data, alpha=0.1)
            else:
                key.lerp_(query, 0.1)
        return self.query(x) + self.key(x)


class Quantized(torch.nn.Module):
    """torch's quantization-aware training: a kernel moves the range of activations."""

    def __init__(self, features):
        super().__init__()
        quantization = torch.ao.quantization
        layers = torch.nn.Sequential(torch.nn.Linear(features, features)).train()
        layers.qconfig = quantization.get_default_qat_qconfig("fbgemm")
        self.layers = quantization.prepare_qat(layers)

    def forward(self, x):
        return self.layers(x)


class VectorQuantizer(torch.nn.Module):
    """A codebook of exponential averages (VQ-VAE), as vector-quantize-pytorch keeps it."""

    def __init__(self, features):
        super().__init__()
        self.register_buffer("codes", torch.randn(4, features))
        self.register_buffer("sizes", torch.ones(4))

    def forward(self, x):
        chosen = F.one_hot(torch.cdist(x, self.codes).argmin(1), 4).to(x.dtype)
        self.sizes.data.lerp_(chosen.sum(0), 0.2)
        sums = chosen.T @ x.detach()
        self.codes.data.lerp_(sums / self.sizes.clamp_min(0.1).unsqueeze(1), 0.2)
        return x + (chosen @ self.codes - x).detach()


UNSEEN = {
    "data": Data,
    "functional batch norm": Functional,
    "key encoder, replaced": lambda n: KeyEncoder(n, "replaced"),
    "key encoder, by data": lambda n: KeyEncoder(n, "data"),
    "key encoder, in place": lambda n: KeyEncoder(n, "seen"),
    "quantized": Quantized,
    "codebook": VectorQuantizer,
}


def state(model):
    return [*model.buffers(), *(p for p in model.parameters() if not p.requires_grad)]


def frozen_parameters_too(layer, dtype=torch.float32):
    model = network(dtype=dtype)
    model.insert(1, layer(8).to(dtype))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = SAM(torch.optim.SGD(trained, lr=0.3), model, rho=0.5)
    return model, optimizer


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization:DeprecationWarning")
@pytest.mark.parametrize("layer", UNSEEN)
def test_state_that_moves_unseen_moves_in_the_clean_passes_alone(layer):
    model, optimizer = frozen_parameters_too(UNSEEN[layer])
    start = [t.clone() for t in state(model)]
    for x, y in batches(7, dtype=torch.float32):  # some are watched more closely than others
        clean = copy.deepcopy(model)
        clean(x)
        with optimizer.perturbed(lambda: F.cross_entropy(model(x), y)):
            F.cross_entropy(model(x), y).backward()
        assert_same(state(model), state(clean))
        optimizer.step()
        optimizer.zero_grad()
    assert any(not torch.equal(a, b) for a, b in zip(state(model), start))


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization:DeprecationWarning")
@pytest.mark.parametrize("layer", ["data", "functional batch norm", "quantized", "codebook"])
def test_state_that_rests_in_the_clean_pass_rests(layer):
    """As a range that the batch does not exceed: the ascent pass writes what was there."""
    model, optimizer = frozen_parameters_too(UNSEEN[layer])
    x, y = batches(1, dtype=torch.float32)[0]
    for _ in range(400):
        model(x)
    for _ in range(4):
        clean = copy.deepcopy(model)
        clean(x)
        with optimizer.perturbed(lambda: F.cross_entropy(model(x), y)):
            F.cross_entropy(model(x), y).backward()
        assert_same(state(model), state(clean))


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization:DeprecationWarning")
@pytest.mark.parametrize("layer", UNSEEN)
def test_without_a_forward_pass_in_the_closure_unseen_state_moves_in_the_descent_pass(layer):
    model, optimizer = frozen_parameters_too(UNSEEN[layer])
    for x, y in batches(4, dtype=torch.float32):
        before = [t.clone() for t in state(model)]
        trained = optimizer.param_groups[0]["params"]
        with optimizer.perturbed(lambda: random_perturbation(trained)):
            clean = copy.deepcopy(model)
            clean(x)
            F.cross_entropy(model(x), y).backward()
        assert_same(state(model), state(clean))
        assert any(not torch.equal(a, b) for a, b in zip(state(model), before))


def test_frozen_weights_are_neither_copied_nor_written():
    """They may be a language model's, under adapters."""

    class Large(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.numel() == 10_007:
                called.add(function.overloadpacket._qualified_op_name)
            return out

    model, (x, y), called = network(), batches(1)[0], set()
    model.register_parameter("large", torch.nn.Parameter(torch.zeros(10_007), requires_grad=False))
    optimizer = SAM(torch.optim.SGD([*model[0].parameters()], lr=0.0), model, rho=0.5)
    version = model.large._version
    for _ in range(4):
        with Large(), optimizer.perturbed(lambda: F.cross_entropy(model(x), y)):
            F.cross_entropy(model(x), y).backward()
    assert model.large._version == version
    assert called == {"aten::detach", "aten::view"}


def test_expanded_sparse_and_empty_buffers_are_left_alone():
    model, (x, y) = network(), batches(1)[0]
    model.register_buffer("expanded", torch.ones(1, 5).expand(3, 5))
    model.register_buffer("sparse", torch.eye(3).to_sparse())
    model.register_buffer("empty", torch.zeros(0))
    model.register_buffer("mask", torch.ones(3, dtype=torch.bool))
    model.register_buffer("missing", None)
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.5)
    for _ in range(3):
        with optimizer.perturbed(lambda: F.cross_entropy(model(x), y)):
            F.cross_entropy(model(x), y).backward()
