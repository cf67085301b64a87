"""Random programs of SAM's calls, on random parameters: weights come back, gradients are kept,
errors are clear.
"""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sam_obf import SAM

SHAPES = [(), (0,), (1,), (3,), (2, 3), (4, 1, 2)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
parameters = st.tuples(st.sampled_from(SHAPES), st.sampled_from(DTYPES), st.booleans())
closures = st.sampled_from(
    ["square", "square", "infinite", "nan", "zero", "raise", "detached", "vector", "none"]
)
bodies = st.sampled_from(["square", "square", "twice", "nothing", "raise", "nested", "step"])
actions = st.one_of(
    st.tuples(st.just("perturbed"), closures, bodies),
    st.tuples(st.just("step"), st.none(), st.none()),
    # Its closure serves the descent, too: an infinite loss there is an infinite update.
    st.tuples(
        st.just("step closure"),
        closures.filter(lambda kind: kind not in ("infinite", "nan")),
        st.none(),
    ),
    st.tuples(st.just("zero_grad"), st.booleans(), st.none()),
    st.tuples(st.just("reload"), st.none(), st.none()),
    st.tuples(
        st.just("rho"), st.sampled_from([0.0, 0.1, 5.0, -1.0, math.inf, math.nan]), st.none()
    ),
)
variants = st.sampled_from(
    [{}, {"adaptive": "before"}, {"adaptive": "after"}, {"adaptive": "both"}, {"gsam_alpha": 0.4},
     {"gsam_alpha": 0.4, "gsam_normalize": True}]
)  # fmt: skip


class Interrupted(Exception):
    pass


def ascend(model, kind):
    """What a closure does: a loss, or something that is none."""
    square = sum((p.double() ** 2).sum() for p in model.parameters() if p.requires_grad)
    if kind == "raise":
        raise Interrupted
    if kind == "none" or not isinstance(square, torch.Tensor):
        return None
    factors = {"infinite": math.inf, "nan": math.nan, "zero": 0.0}
    if kind == "vector":
        return torch.stack([square, square])
    return square.detach() if kind == "detached" else square * factors.get(kind, 1.0)


def descend(model, optimizer, kind):
    if kind == "raise":
        raise Interrupted
    if kind == "step":
        optimizer.step()
    if kind == "nested":
        with optimizer.perturbed(lambda: ascend(model, "square")):
            pass
    for _ in range({"square": 1, "twice": 2}.get(kind, 0)):
        loss = ascend(model, "square")
        if loss is not None:
            (loss + sum(p.double().sum() for p in model.parameters() if p.requires_grad)).backward()


def gradients(model):
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def equal(one, two):
    return all(
        (a is None and b is None) or torch.equal(a, b) for a, b in zip(one, two, strict=True)
    )


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.lists(parameters, min_size=1, max_size=4),
    st.integers(1, 2),
    variants,
    st.lists(actions, max_size=8),
)
def test_no_program_leaves_weights_moved_or_gradients_lost(shapes, groups, variant, program):
    torch.manual_seed(0)
    model = torch.nn.ParameterList(
        torch.nn.Parameter(torch.randn(shape).to(dtype), requires_grad=trained)
        for shape, dtype, trained in shapes
    )
    held = list(model)
    options = [{"params": held[i::groups]} for i in range(groups) if held[i::groups]]
    optimizer = SAM(torch.optim.SGD(options, lr=0.01, momentum=0.9), model, rho=0.1, **variant)
    for action, first, second in program:
        start, before = [p.detach().clone() for p in held], gradients(model)
        try:
            if action == "perturbed":
                with optimizer.perturbed(lambda kind=first: ascend(model, kind)):
                    descend(model, optimizer, second)
            elif action == "step":
                optimizer.step()
            elif action == "step closure":

                def closure(kind=first):
                    optimizer.zero_grad()
                    loss = ascend(model, kind)
                    loss.backward()
                    return loss

                optimizer.step(closure)
            elif action == "zero_grad":
                optimizer.zero_grad(first)
            elif action == "reload":
                optimizer.load_state_dict(optimizer.state_dict())
            else:
                optimizer.param_groups[0]["rho"] = first
        except (Interrupted, ValueError, RuntimeError, AttributeError) as error:
            # A closure of step() that returns no loss fails in its own line.
            assert action == "step closure" or not isinstance(error, AttributeError)
            assert action in ("perturbed", "step closure")
            assert equal([p.detach() for p in held], start)
            if action == "perturbed" and second in ("nothing", "raise", "nested", "step"):
                assert equal(gradients(model), before)
            if str(error).startswith("rho is"):
                optimizer.param_groups[0]["rho"] = 0.1
        else:
            if action == "perturbed":
                assert equal([p.detach() for p in held], start)
                if second == "nothing":
                    assert equal(gradients(model), before)
        assert not optimizer.ascending
        assert all(p.isfinite().all() for p in held)
        assert all(g is None or g.isfinite().all() for g in gradients(model))
