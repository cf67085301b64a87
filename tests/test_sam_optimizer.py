"""SAM in the place of the optimizer that it holds: state, hooks, copies, and what it refuses."""

import collections
import contextlib
import copy
import io
import pickle
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from brute_force import BASES, VARIANTS, K, assert_close, assert_same, batches, network, weights
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.optim.optimizer import register_optimizer_step_pre_hook

from sam_obf import SAM


@pytest.mark.parametrize("flags", [(), (True,), (False,)])
def test_zero_grad_leaves_what_the_base_optimizers_does(flags):
    model, other = network(), network()
    for p in (*model.parameters(), *other.parameters()):
        p.grad = torch.ones_like(p)
    SAM(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.3).zero_grad(*flags)
    torch.optim.SGD(other.parameters(), lr=0.1).zero_grad(*flags)
    for p, q in zip(model.parameters(), other.parameters()):
        assert p.grad is q.grad is None or torch.equal(p.grad, q.grad)


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
    torch.save(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt"
    )
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


def test_optimizers_with_a_rho_of_their_own_are_refused():
    """Adadelta's rho is a decay: taken for SAM's, it would be a perturbation of length 0.9."""
    model = network()
    adadelta, wrapped = (
        torch.optim.Adadelta(model.parameters()),
        torch.optim.SGD(model.parameters(), lr=0.1),
    )
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
        (
            lambda m, b: SAM(m.parameters(), torch.optim.SGD, rho=0.05, lr=0.1),
            TypeError,
            r"SGD\(model\.par.*lr=",
        ),
        (
            lambda m, b: SAM(m.parameters(), torch.optim.SGD),
            TypeError,
            r"write SAM\(torch\.optim\.SGD\(mod",
        ),
        (lambda m, b: SAM(torch.optim.SGD, m), TypeError, r"write SAM\(torch\.optim\.SGD\(mod"),
        (lambda m, b: SAM(b, m.parameters()), TypeError, r"write SAM\(torch.*generator"),
        (
            lambda m, b: SAM(b, m, weight_decay=0.1),
            TypeError,
            r"has its own settings.*weight_decay=\.\.\.",
        ),
        (lambda m, b: SAM(b, m, adaptive=True), ValueError, 'adaptive="both"'),
        (lambda m, b: SAM(b, m, rho="0.05"), ValueError, "rho is '0.05'"),
        (lambda m, b: SAM(b, m, rho=None), ValueError, "rho is None"),
        (
            lambda m, b: SAM(b, m).first_step(zero_grad=True),
            AttributeError,
            r"davda54.*with optimizer\.perturbed",
        ),
        (
            lambda m, b: SAM(b, m).second_step(zero_grad=True),
            AttributeError,
            r"davda54.*then step\(\)",
        ),
        (
            lambda m, b: SAM(b, m).perturbed(m(torch.zeros(1, 6).double()).sum()),
            TypeError,
            r"lambda.*\(model\(x\)",
        ),
    ],
)
def test_davda54s_way_and_usual_slips_get_the_line_to_write(write, error, words):
    model = network()
    with pytest.raises(error, match=words):
        write(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert not hasattr(SAM(torch.optim.SGD(model.parameters(), lr=0.1), model), "third_step")


@pytest.mark.parametrize(
    "module", ["deepspeed.runtime.engine", "torch.distributed.fsdp.fully_sharded_data_parallel"]
)
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


# --------------------------------------------------------------------------------------------------
# Copies, assignments, checkpoints of others


def training(optimizer, model, data):
    for x, y in data:
        with optimizer.perturbed(lambda: F.cross_entropy(model(x), y)):
            F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return weights(model)


def saved_and_loaded(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing)), saved_and_loaded],
    ids=["deepcopy", "pickle", "torch.save"],
)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("scheduled", [False, True])
def test_a_copy_goes_on_as_the_original_and_changes_no_other(copied, base, scheduled):
    data, model = batches(6), network()
    optimizer = SAM(BASES[base](model.parameters()), model, rho=0.3, adaptive="after")
    if scheduled:  # puts a step() of its own on the optimizer
        torch.optim.lr_scheduler.StepLR(optimizer, 100)
    training(optimizer, model, data[:3])
    other_model, other = copied((model, optimizer))
    assert other.model is other_model and other.base_optimizer is not optimizer.base_optimizer
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    assert_same(training(other, other_model, data[3:]), training(optimizer, model, data[3:]))
    assert calls == [1] * 3
    lone = copied(optimizer)  # has a copy of the model
    training(lone, lone.model, data[:1])


@pytest.mark.parametrize("name", ["state", "param_groups", "defaults"])
def test_what_is_assigned_reaches_the_base_optimizer(name):
    model = network()
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = SAM(base, model)
    value = copy.copy(getattr(base, name))
    setattr(optimizer, name, value)
    assert getattr(base, name) is value and getattr(optimizer, name) is value


@pytest.mark.parametrize("what", ["state", "param_groups"])
def test_after_an_assignment_steps_are_those_of_the_bare_optimizer(what):
    runs, data = [], batches(6)
    for bare in (True, False):
        torch.manual_seed(0)
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        if not bare:
            optimizer = SAM(optimizer, model, rho=0.0)
        for i, (x, y) in enumerate(data):
            if i == 3 and what == "state":
                optimizer.state = collections.defaultdict(dict)
            elif i == 3:
                optimizer.param_groups = [{**g, "lr": 0.5} for g in optimizer.param_groups]
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        runs.append(weights(model))
    assert_same(*runs)


def test_a_state_of_davda54s_optimizer_says_what_to_do():
    """It holds its own state, not that of its base optimizer, which then misses it."""
    model = network()
    state = torch.optim.SGD(model.parameters(), lr=0.5).state_dict()
    state["param_groups"][0] |= {"rho": 2.0, "adaptive": True}
    state["state"] = {0: {"old_p": torch.zeros(8, 6)}}
    optimizer = SAM(torch.optim.AdamW(model.parameters(), lr=0.1), model, rho=0.3)
    with pytest.raises(ValueError, match=r"davda54/sam's.*load the model's weights alone"):
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 0.1 and optimizer.param_groups[0]["rho"] == 0.3


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("bare", [False, True])
def test_distributed_checkpoints(tmp_path, bare, flat):
    """Of SAM as they are; of a bare optimizer with the planner that load_state_dict() names."""
    data = batches(6)
    options = StateDictOptions(flatten_optimizer_state_dict=flat)

    def new(rho):
        torch.manual_seed(1)
        model = network()
        return model, SAM(BASES["adamw"](model.parameters()), model, rho=rho)

    model, optimizer = new(0.3)
    saved = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1) if bare else optimizer
    for x, y in data[:3]:
        with contextlib.nullcontext() if bare else saved.perturbed(lambda: model(x).square().sum()):
            F.cross_entropy(model(x), y).backward()
        saved.step()
        saved.zero_grad()
    model_state, state = get_state_dict(model, saved, options=options)
    dcp.save({"model": model_state, "optimizer": state}, checkpoint_id=tmp_path, no_dist=True)

    other, resumed = new(0.7)
    model_state, state = get_state_dict(other, resumed, options=options)
    both = {"model": model_state, "optimizer": state}
    planner = dcp.DefaultLoadPlanner(allow_partial_load=True) if bare else None
    dcp.load(both, checkpoint_id=tmp_path, planner=planner, no_dist=True)
    states = {"model_state_dict": both["model"], "optim_state_dict": both["optimizer"]}
    set_state_dict(other, resumed, **states, options=options)
    assert resumed.param_groups[0]["rho"] == (0.7 if bare else 0.3)
    assert_same(weights(other), weights(model))
    for a, b in zip(model.parameters(), other.parameters()):
        assert torch.equal(saved.state[a]["exp_avg"], resumed.state[b]["exp_avg"])


# --------------------------------------------------------------------------------------------------
# More that cannot be followed


class NeedsClosure(torch.optim.SGD):
    """As schedule-free's variants that evaluate the loss themselves."""

    def step(self, closure):
        return super().step(closure)


@pytest.mark.parametrize("make", [torch.optim.LBFGS, NeedsClosure])
def test_optimizers_whose_step_needs_a_closure_are_refused(make):
    model = network()
    with pytest.raises(ValueError, match=rf"{make.__name__}\.step\(\) needs a closure"):
        SAM(make(model.parameters()), model)


def test_per_sample_gradients_are_refused():
    """Opacus wraps the model, and puts a gradient for each example beside ``.grad``."""
    model, (x, y) = network(), batches(1)[0]
    wrapper = type("GradSampleModule", (torch.nn.Sequential,), {"__module__": "opacus.grad_sample"})
    with pytest.raises(ValueError, match="per-sample gradients private"):
        SAM(torch.optim.SGD(model.parameters(), lr=0.1), wrapper(*model))
    private = type("DPOptimizer", (torch.optim.SGD,), {"__module__": "opacus.optimizers.optimizer"})
    with pytest.raises(ValueError, match="per-sample gradients private"):
        SAM(private(model.parameters(), lr=0.1), model)
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model)
    model[0].weight.grad_sample = None  # wrapped later
    with pytest.raises(RuntimeError, match="per-sample gradients private"):
        with optimizer.perturbed(lambda: F.cross_entropy(model(x), y)):
            pytest.fail("the body ran")
