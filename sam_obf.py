# Copyright 2026 The sam-obf authors. Licensed under the Apache License, Version 2.0.
"""Sharpness-aware minimization as perturbed forgetting, in one file: torch 2.5 or newer.

"The paper" is "Forget Sharpness: Perturbed Forgetting of Model Biases Within SAM Dynamics" (Vani et
al., ICML 2024, arXiv 2406.06700). Each training step makes two passes over a micro-batch:

    g = grad P(theta)                    ascent pass: P is what the perturbation ascends
    gp = grad L(theta + rho g / ||g||)   descent pass: what the optimizer applies at theta

Usage::

    optimizer = SAM(torch.optim.AdamW(model.parameters(), lr=3e-3), model, rho=0.6)
    forget = OutputBiasForgetting(gamma=1.0)
    for x, y in loader:
        with optimizer.perturbed(lambda: forget(model(x), y)):  # ascent pass
            loss_fn(model(x), y).backward()  # descent pass: in the block, the weights are perturbed
        optimizer.step()
        optimizer.zero_grad()

What the closure returns is P: the training loss (SAM, Foret et al. 2021), ``OutputBiasForgetting``
(OBF, the paper), ``random_perturbation`` (RandSAM) or ``momentum_perturbation`` (MSAM, Becker et
al. 2024). Arguments of ``SAM`` turn on ASAM (Kwon et al. 2021) and GSAM (Zhuang et al. 2022). After
the block the weights are those of before. A backward pass through a graph made in the block, or
before it, then fails with "modified by an inplace operation": call ``backward()`` inside.
"""

import contextlib
import functools
import inspect
import itertools
import math
import numbers
import types
import warnings

import torch
from torch.distributed.tensor import DTensor, Partial
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize
from torch.optim.optimizer import register_optimizer_step_pre_hook

__all__ = [
    "SAM",
    "OutputBiasForgetting",
    "momentum_perturbation",
    "proportional_rho",
    "random_perturbation",
]

# Messages that are needed twice.
INSIDE = (
    "a step() inside perturbed(), or in a hook of its backward pass, would update the perturbed "
    "weights: call it after the block"
)
PRIVATE = (
    "SAM cannot make Opacus' per-sample gradients private: those of both passes would be added up, "
    "and the perturbation would not be private"
)


class OutputBiasForgetting:
    """The output bias forgetting objective to ascend (the paper, section 4).

    Per example, its gradient with respect to the logits is ``u - alpha p - (1 - alpha) y``, where p
    is the prediction, y the target, u = 1/K uniform, p_y = <y, p>, and the constant ``alpha = gamma
    max(0, (1 - lam / p_y) / (1 - lam))``. That is the gradient of ``(1 - alpha) CE(p, y) - CE(p,
    u)``. The paper's y is one-hot; any distribution (mixup, smoothed labels) is an extension of it.
    The returned value itself has no meaning.

    Args:
        gamma: in [0, 1]. 1 pushes confident predictions towards uniform. Towards 0, the target's
            logit falls and all others rise alike, so that no wrong prediction is ever sharpened.
        lam: in [0, 1), the prediction p_y up to which alpha is 0; None is the paper's 1/K.
        link: "sigmoid" (the paper) or "softmax", from logits to predictions.
        ignore_index: the class index of examples to leave out.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        gamma: float = 1.0,
        lam: float | None = None,
        link: str = "sigmoid",
        ignore_index: int = -100,
    ):
        if not 0 <= gamma <= 1:
            raise ValueError(f"gamma is {gamma}; it must lie in [0, 1]")
        if lam is not None and not 0 <= lam < 1:
            raise ValueError(f"lam is {lam}; it must lie in [0, 1), or be None for 1/K")
        if link not in ("sigmoid", "softmax"):
            raise ValueError(f"link is {link!r}; choose 'sigmoid' or 'softmax'")
        self.gamma, self.lam, self.link, self.ignore_index = gamma, lam, link, ignore_index

    def __call__(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return a scalar, the mean over the examples that are not ignored.

        Args:
            logits: (K,), (N, K) or (N, K, d1, ...), as ``torch.nn.functional.cross_entropy`` takes
                them, K at least 2.
            target: class indices, shaped like the logits without K; or probabilities, shaped like
                the logits, that sum to 1 over K.

        Raises:
            ValueError: the shapes do not fit.
        """
        dim = 1 if logits.dim() > 1 else 0
        soft = target.is_floating_point()
        expected = logits.shape if soft else logits.shape[:dim] + logits.shape[dim + 1 :]
        if logits.dim() == 0 or logits.shape[dim] < 2 or target.shape != expected:
            raise ValueError(
                "OBF takes what cross_entropy takes: logits (N, K, ...), K >= 2, and class indices "
                "(N, ...) or probabilities (N, K, ...); it got logits "
                f"{tuple(logits.shape)} and a target {tuple(target.shape)} of {target.dtype}. "
                "Classes in the last dimension? Write forget(logits.movedim(-1, 1), target)"
            )
        # 1/K beside a confident prediction needs more than half precision.
        logits, uniform = logits.to(_wide(logits)), 1 / logits.shape[dim]
        lam = uniform if self.lam is None else self.lam
        with torch.no_grad():
            p = logits.sigmoid() if self.link == "sigmoid" else logits.softmax(dim)
            if soft:
                p_y = (target * p).sum(dim, keepdim=True)
            else:
                target = target.long()  # of which uint8 has no -100
                kept = target != self.ignore_index
                index = target.where(kept, 0).unsqueeze(dim)
                p_y = p.gather(dim, index)
            p_y = p_y.clamp_min(torch.finfo(p.dtype).tiny)
            alpha = self.gamma * ((1 - lam / p_y) / (1 - lam)).clamp_min(0)
            coefficients = uniform - alpha * p
            if soft:
                coefficients -= (1 - alpha) * target
            else:
                coefficients.scatter_add_(dim, index, alpha - 1)
                coefficients.masked_fill_(~kept.unsqueeze(dim), 0)  # even times NaN, no gradient
        objectives = (coefficients * logits).sum(dim)
        return objectives.mean() if soft else objectives.where(kept, 0).sum() / kept.sum()


def random_perturbation(parameters) -> torch.Tensor:
    """Return a scalar whose gradient is a new draw from N(0, I): RandSAM, a baseline of the paper.

    Batch norm's statistics then move in the descent pass, unless ``model(x)`` runs here too. Seed
    each process differently.
    """
    reals = [_real(p) for p in parameters if p.requires_grad]
    return _without_forward(sum((p * torch.randn_like(p)).sum() for p in reals))


def momentum_perturbation(optimizer) -> torch.Tensor:
    """Return a scalar whose gradient is -v, v the momentum: MSAM (Becker et al., arXiv 2401.12033).

    The perturbation is ``-rho v / ||v||`` (algorithm 1): v accumulates gradients, and MSAM looks
    ahead to where the momentum is about to carry the weights, not back. v is SGD's
    ``momentum_buffer`` or Adam's ``exp_avg``, not divided by the second moment. There is no second
    forward and backward pass, so a step costs little more than a plain one and batch norm's
    statistics move in the descent pass. The first step, without momentum yet, is plain. The
    authors' rho is about 3, for SGD and for AdamW.

    Args:
        optimizer: the ``SAM``, or its base optimizer; the momentum may be in one that it wraps.

    Raises:
        ValueError: the optimizer keeps no momentum, or keeps it compressed (8-bit states), or each
            process keeps that of some parameters only.
    """
    holders = [optimizer]
    for holder in holders:  # grows: timm's Lookahead and others wrap optimizers
        inner = (v for v in vars(holder).values() if isinstance(v, torch.optim.Optimizer))
        holders += [v for v in inner if v not in holders]
    name = type(holders[-1]).__name__
    if any(type(holder).__name__ == "ZeroRedundancyOptimizer" for holder in holders):
        raise ValueError(
            "ZeroRedundancyOptimizer keeps the momentum of other parameters elsewhere: use FSDP2 "
            "or plain DDP"
        )
    terms, missing = [], []
    for group in optimizer.param_groups:
        for p in filter(lambda p: p.requires_grad, group["params"]):
            states = [state for holder in holders if (state := holder.state.get(p))]
            keys = itertools.product(states, ("momentum_buffer", "exp_avg"))
            v = next((state[key] for state, key in keys if state.get(key) is not None), None)
            if v is None and (states or group.get("momentum") == 0):
                other = f"use Adam, or SGD with momentum > 0 (it keeps {list(*states[:1])})"
                raise ValueError(f"{name} keeps no momentum to perturb along: {other}")
            if v is None:
                missing.append((_real(p) * 0).sum())
            elif type(v) not in (torch.Tensor, type(p.data)) or v.shape != p.shape:
                raise ValueError(
                    f"{name} keeps its momentum compressed, as {type(v).__name__}: use one that "
                    "keeps tensors like the weights"
                )
            else:
                # SAM descends where the base optimizer maximizes.
                terms.append((_real(p) * _real(v)).sum() * (1 if group.get("maximize") else -1))
    if not terms and any(isinstance(holder, SAM) and holder._run.stepped for holder in holders):
        raise ValueError(f"{name} keeps no momentum where others keep it: use Adam or SGD")
    return _without_forward(sum(terms or missing))


def _without_forward(perturbation):
    """Mark a scalar for whose sake no state of the model has moved."""
    if isinstance(perturbation, torch.Tensor):
        perturbation.without_forward = True
    return perturbation


def proportional_rho(
    optimizer, *, rho_min: float, rho_max: float, lr_min: float, lr_max: float
) -> None:
    """Set each group's rho by its lr: linear from (lr_min, rho_min) to (lr_max, rho_max).

    Outside, it is constant. Call it before the first step and after each ``scheduler.step()``. The
    schedule is that of Zhuang et al. 2022.

    Raises:
        ValueError: a range is empty or negative.
    """
    if not (0 <= rho_min <= rho_max and lr_min < lr_max):
        raise ValueError(
            f"rho cannot follow lr from ({lr_min}, {rho_min}) to ({lr_max}, {rho_max}): it needs "
            "lr_min < lr_max and 0 <= rho_min <= rho_max"
        )
    for group in optimizer.param_groups:
        fraction = (group["lr"] - lr_min) / (lr_max - lr_min)
        group["rho"] = rho_min + (rho_max - rho_min) * min(max(fraction, 0.0), 1.0)


def _of_base(name):
    """An attribute that is the base optimizer's, to read and to assign."""
    return property(
        lambda self: getattr(self.base_optimizer, name),
        lambda self, value: setattr(self.base_optimizer, name, value),
    )


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimization around any optimizer, whose place it takes everywhere.

    ``param_groups``, ``state``, ``state_dict`` and hooks are the base optimizer's. rho is in
    ``param_groups`` like lr. A group with rho 0 is trained, not perturbed; one with
    ``maximize=True`` is perturbed downwards, where what it maximizes is worse. With ||.|| the L2
    norm over all perturbed parameters together, the perturbation is

        adaptive=None       rho g / ||g||                        Foret et al. 2021, eq. 2
        adaptive="before"   rho |theta| g / || |theta| g ||      the paper's ResNets
        adaptive="after"    rho |theta| g / ||g||                the paper's ViTs
        adaptive="both"     rho theta^2 g / || |theta| g ||      Kwon et al. 2021, eq. 8

    Where this has |theta|, Kwon's code (SamsungLabs/ASAM) has |theta| + 0.01 for weights and 1 for
    biases. ``gsam_alpha`` turns gp into ``gp - gsam_alpha (g - <g, gp> gp / ||gp||^2)`` (Zhuang et
    al. 2022). At the second backward SAM holds one parameter-sized buffer; GSAM two, and three
    while gradients accumulate.

    Under ``DistributedDataParallel``, wrapped by whomever, each process perturbs with its own
    micro-batch: g is never exchanged. Gradients are averaged once, for GSAM after the block.

    Args:
        base_optimizer: applies the gradient. Its groups that have a "rho" keep it.
        model: all modules that the closure trains: a ``ModuleList`` if there are several. State
            that the ascent pass moves, as batch norm's statistics, moves only there.
        rho: at least 0, the perturbation's L2 norm in units of the weights (ASAM: relative to
            them).
        adaptive: None, "before", "after" or "both".
        gsam_alpha: at least 0.
        gsam_normalize: scale g to unit norm before GSAM uses it.

    Raises:
        ValueError: an argument is out of its range, or the optimizer has a rho of its own, a step()
            that needs a closure, or no parameter of the model; or it is one that SAM cannot follow.
    """

    # A fused base optimizer unscales on its own, told through attributes that GradScaler would set
    # here, not there.
    _step_supports_amp_scaling = False
    state, param_groups, defaults = map(_of_base, ("state", "param_groups", "defaults"))

    def __init__(
        self,
        base_optimizer,
        model,
        rho=0.05,
        *,
        adaptive=None,
        gsam_alpha=0.0,
        gsam_normalize=False,
        **unknown,
    ):
        _check_kinds(base_optimizer, model, unknown)
        if adaptive is True:
            raise ValueError('adaptive is True; davda54/sam\'s adaptive=True is adaptive="both"')
        if adaptive not in (None, "before", "after", "both"):
            raise ValueError(f"adaptive is {adaptive!r}; choose None, 'before', 'after' or 'both'")
        if not 0 <= gsam_alpha < math.inf:
            raise ValueError(f"gsam_alpha is {gsam_alpha}; it must be at least 0")
        if adaptive and gsam_alpha:
            both = f"adaptive={adaptive!r} (ASAM) and gsam_alpha={gsam_alpha} (GSAM)"
            raise ValueError(f"{both} contradict: drop one")
        if gsam_normalize and not gsam_alpha:
            raise ValueError(
                "gsam_normalize=True does nothing without GSAM: set gsam_alpha > 0, or drop it"
            )
        _check_rho({"rho": rho}, *({"rho": rho, **group} for group in base_optimizer.param_groups))
        held = {id(p) for group in base_optimizer.param_groups for p in group["params"]}
        if held.isdisjoint(map(id, model.parameters())):
            raise ValueError(
                "base_optimizer holds none of model's parameters: build it from model.parameters()"
            )
        # No super().__init__(): what an optimizer holds, the base optimizer holds, and
        # __getattr__ finds it there.
        self.base_optimizer, self.model = base_optimizer, model
        self.adaptive, self.gsam_alpha, self.gsam_normalize = adaptive, gsam_alpha, gsam_normalize
        self._run = _new_run()
        base_optimizer.defaults["rho"] = rho  # for groups that are added later
        for group in base_optimizer.param_groups:
            group.setdefault("rho", rho)

    @property
    def ascending(self) -> bool:
        """True when the closure of ``step(closure)`` is to return OBF's objective."""
        return self._run.ascending

    def perturbed(self, closure, *, loss_weight: float = 1.0, grad_scaler=None):
        """Run the ascent pass, then the ``with`` body at the perturbed weights, then restore these.

        The weights come back bit for bit. The body's gradients add to those in ``.grad``; g never
        does. If g is not finite, the body runs at the weights as they are; finding out takes no
        host synchronisation. With a ``grad_scaler``, a gradient becomes NaN then: the scaler skips
        the step and lowers its scale, else it might never perturb again. Dropout draws another mask
        in each pass; for the same one, call the model under ``torch.random.fork_rng()`` in the
        closure.

        Args:
            closure: returns the scalar to ascend; called once.
            loss_weight: what the body multiplies its loss by, this micro-batch's share of the
                examples of one step. Only GSAM depends on it.
            grad_scaler: the ``torch.amp.GradScaler`` that the body scales its loss with: so is the
                ascent's, then.

        Raises:
            TypeError: the closure is no function.
            ValueError: the closure returns no scalar tensor, a rho is negative, or ``loss_weight``
                is not finite.
            RuntimeError: nested in itself; the closure's loss depends on no perturbed parameter, or
                on some that SAM does not know; or an optimizer steps inside.

        Warns:
            UserWarning: the body leaves no gradient.
        """
        if not callable(closure):
            raise TypeError(
                f"perturbed() takes a function that returns a loss, not {type(closure).__name__}: "
                "`with optimizer.perturbed(lambda: loss_fn(model(x), y)):`"
            )
        if not math.isfinite(loss_weight):
            share = "this micro-batch's share of one step()"
            raise ValueError(f"loss_weight is {loss_weight}; it must be finite: {share}")

        def ascend():
            loss = closure()
            if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
                got = getattr(loss, "shape", type(loss).__name__)
                raise ValueError(
                    f"the closure must return a loss, a tensor with one element; it returned {got}"
                )
            if not loss.requires_grad:
                raise RuntimeError(
                    "the closure's loss needs no gradient: compute it without no_grad() or detach()"
                )
            (loss if grad_scaler is None else grad_scaler.scale(loss)).backward()
            return loss

        self._run.unentered = True
        return self._two_passes(ascend, loss_weight, grad_scaler)

    def step(self, closure=None):
        """Step the base optimizer; with a closure, make both passes first.

        That is for frameworks that own the loop, and for one perturbation of a whole batch whose
        gradient comes from several micro-batches.

        Args:
            closure: as for ``torch.optim.LBFGS``: calls this optimizer's ``zero_grad()``, computes
                the loss, calls its ``backward()`` and returns it. It runs twice; there is no
                ``GradScaler`` in this form.

        Returns:
            The closure's loss in the ascent pass, or without a closure what the base optimizer
            returns.

        Raises:
            RuntimeError: called inside ``perturbed``, or after one without ``with``; the closure
                leaves no gradient; or Lightning has a ``GradScaler``, and so keeps the closure.

        Warns:
            UserWarning: ten steps with gradients and not one block before; or the closure adds to
                gradients of others.
        """
        run = self._run
        if run.inside:
            raise RuntimeError(INSIDE)
        if run.unentered:
            run.unentered = False
            write = "`with optimizer.perturbed(closure):`"
            raise RuntimeError(f"perturbed() alone does nothing: write {write}")
        given = closure.args if isinstance(closure, functools.partial) else ()
        if any(getattr(value, "__name__", "") == "do_nothing_closure" for value in given):
            closure = closure()  # of step() in Lightning's manual optimization: it runs hooks
        losses = []

        def ascend():
            losses.append(closure())
            return losses[0]

        if closure is not None:
            with torch.enable_grad(), self._two_passes(ascend):
                if run.accumulated:
                    warnings.warn(
                        "step(closure) adds to gradients that no block perturbed: to accumulate, "
                        "write one `with optimizer.perturbed(closure):` for each micro-batch "
                        "(Lightning: manual optimization)",
                        stacklevel=2,
                    )
                closure()
        if any(p.grad is not None for group in self.param_groups for p in group["params"]):
            self._warn_if_plain()
            run.stepped = True
        result = self.base_optimizer.step()
        return losses[0] if losses else result

    def zero_grad(self, set_to_none: bool = True):
        self.base_optimizer.zero_grad(set_to_none)

    def _warn_if_plain(self):
        """Tell a loop that steps and never perturbs."""
        if self._run.blocks:
            return
        automatic = getattr(self.model, "automatic_optimization", False)
        if automatic and getattr(self.model, "_trainer", None):
            raise RuntimeError(
                "Lightning with a GradScaler gives step() no closure, so there are no two passes: "
                "use precision='bf16-mixed' or '32-true', or automatic_optimization=False and "
                "`with optimizer.perturbed(closure, "
                "grad_scaler=self.trainer.precision_plugin.scaler):`"
            )
        self._run.plain_steps += 1
        if self._run.plain_steps == 10:
            base = type(self.base_optimizer).__name__
            warnings.warn(
                f"ten steps and no perturbation: so far this is {base} alone. Write `with "
                "optimizer.perturbed(lambda: loss_fn(model(x), y)):` around each backward pass, or "
                "step(closure)",
                stacklevel=3,
            )

    def add_param_group(self, param_group):
        self.base_optimizer.add_param_group(param_group)

    def state_dict(self):
        return self.base_optimizer.state_dict()

    def load_state_dict(self, state_dict):
        """Load a state of SAM, or of a bare base optimizer: then rho stays as it is.

        For a bare optimizer's, ``torch.distributed.checkpoint.load`` needs
        ``planner=DefaultLoadPlanner(allow_partial_load=True)``.

        Raises:
            ValueError: it is that of davda54/sam's optimizer.
        """
        if any("adaptive" in group for group in state_dict["param_groups"]):
            raise ValueError(
                "this is a state of davda54/sam's optimizer, which leaves out that of its base "
                "optimizer: load the model's weights alone, and set lr and rho here"
            )
        rhos = [group["rho"] for group in self.param_groups]
        self.base_optimizer.load_state_dict(state_dict)
        for group, rho in zip(self.param_groups, rhos, strict=True):
            group.setdefault("rho", rho)

    def __getstate__(self):
        # A scheduler puts a step() of its own on the optimizer, which belongs to this one alone.
        return {key: value for key, value in vars(self).items() if key not in ("_run", "step")}

    def __setstate__(self, state):
        vars(self).update(state, _run=_new_run())

    def __getattr__(self, name):
        if name == "base_optimizer":  # an object that is being copied does not have it yet
            raise AttributeError(name)
        if name in ("first_step", "second_step"):
            raise AttributeError(
                f"{name}() is davda54/sam's; here write `with optimizer.perturbed(lambda: "
                "loss_fn(model(x), y)):` around the second pass, then step()"
            )
        return getattr(self.base_optimizer, name)

    @contextlib.contextmanager
    def _two_passes(self, ascend, loss_weight=1.0, grad_scaler=None):
        run = self._run
        run.unentered = False
        if run.inside:
            raise RuntimeError(
                "perturbed() is nested in itself: leave the first block before entering the next"
            )
        _check_rho(*self.param_groups)
        run.blocks += 1
        look = run.blocks & (run.blocks - 1) == 0  # more closely, in blocks 1, 2, 4, 8, ...
        modules = list(self.model.modules())
        held = itertools.chain(
            *(m._parameters.values() for m in modules), *(g["params"] for g in self.param_groups)
        )
        params = list({id(p): p for p in held if p is not None}.values())
        undo, moved = [], []
        run.inside = True
        guard = register_optimizer_step_pre_hook(self._refuse_step)
        try:
            copy_moved = _watch(modules, params, run.unseen, look)
            chunks = self._ascend(ascend, params, look)
            moved = copy_moved(run.forward)
            one = torch.ones((), device=next(self.model.parameters()).device)
            scale = one if grad_scaler is None else grad_scaler.scale(one)
            inverse_norm = self._weigh(chunks, scale)
            gsam = self._orthogonal(chunks, scale, inverse_norm, loss_weight)
            overflow = contextlib.nullcontext()
            if grad_scaler is not None and grad_scaler.is_enabled() and chunks:
                overflow = _passed_on(chunks[0][0][0], inverse_norm)
            with gsam if self.gsam_alpha else contextlib.nullcontext(), overflow:
                self._perturb(chunks, inverse_norm, undo)
                _drop_copies_of_weights()
                trained = [p for group in self.param_groups for p in group["params"]]
                before = [_stamp(p.grad) for p in trained]
                yield
                # FSDP2 keeps gradients elsewhere while it accumulates.
                kept = (
                    _stamp(p.grad) == b and not isinstance(p, DTensor)
                    for p, b in zip(trained, before)
                )
                if all(kept):
                    warnings.warn(
                        "the block left no gradient: call backward() in the body of perturbed()",
                        stacklevel=3,
                    )
        finally:
            with torch.no_grad():
                for tensors, copies in undo:
                    torch._foreach_copy_(tensors, copies)
                for owner, name, tensor, copy, surely in moved:
                    if surely or not torch.equal(tensor, copy):
                        tensor.copy_(copy)
                        run.unseen.update(() if surely else [id(tensor)])
                    owner[name] = tensor
            _drop_copies_of_weights()
            guard.remove()
            run.inside = run.ascending = False

    def _refuse_step(self, optimizer, args, kwargs):
        """Called before any optimizer's step in a block, be it in a hook of the backward pass."""
        held = {id(p) for group in self.param_groups for p in group["params"]}
        if any(id(p) in held for group in optimizer.param_groups for p in group["params"]):
            raise RuntimeError(INSIDE)

    def _ascend(self, ascend, params, look):
        """Take g, the gradient that ``ascend`` leaves, in chunks, as ``_chunks`` makes them."""
        run = self._run
        trained = [p for group in self.param_groups for p in group["params"]]
        with _gradients_aside(params, trained, keep_new=False) as settle, _without_exchange([]):
            run.ascending = True
            loss = ascend()
            run.ascending = False
            run.forward = not hasattr(loss, "without_forward")
            run.accumulated = settle()
            chunks = _chunks(self.param_groups)
        if look:
            _check_reach(loss, params)
        if not chunks and any(group["rho"] > 0 for group in self.param_groups):
            raise RuntimeError(
                "the ascent pass left no gradient to perturb along: is the loss SAM's model's?"
            )
        return chunks

    @contextlib.contextmanager
    def _orthogonal(self, chunks, scale, inverse_norm, loss_weight):
        """Leave GSAM's gradient in place of the body's, gp: see ``_subtract_orthogonal``."""
        params, exchanged = [p for params, *_ in chunks for p in params], []
        hidden = _gradients_aside(params, params, keep_new=True)
        with hidden as settle, _without_exchange(exchanged):
            yield
            settle()
            # g and gp are both on the loss scale; a g that was not finite counts as zero.
            length = inverse_norm.sign()
            if self.gsam_normalize:
                length = scale.to(inverse_norm) * inverse_norm
            if chunks:  # there are none if rho is 0
                _subtract_orthogonal(chunks, loss_weight * self.gsam_alpha * length)
        chunks.clear()  # frees g
        for ddp in dict.fromkeys(exchanged):
            _average_gradients(ddp)

    @torch.no_grad()
    def _weigh(self, chunks, scale):
        """Multiply g by ASAM's |theta|; return 1 / norm on the loss scale, or 0 if not finite."""
        squares = []
        for params, grads, *_ in chunks:
            if self.adaptive in ("before", "both"):
                torch._foreach_mul_(grads, torch._foreach_abs(_local(params)))
            norms = torch._foreach_norm(grads, 2, dtype=_wide(grads[0]))
            squares.append(torch.stack(norms).square().sum())
            if self.adaptive in ("after", "both"):
                torch._foreach_mul_(grads, torch._foreach_abs(_local(params)))
        norm = _total(chunks, squares).sqrt() if chunks else scale
        return (1 / (norm + 1e-12 * scale.to(norm))).nan_to_num(nan=0.0)

    @torch.no_grad()
    def _perturb(self, chunks, inverse_norm, undo):
        """Add the perturbation to the weights; what undoes it is in ``undo`` before each change."""
        # Reading it from another device would wait for the device.
        finite = inverse_norm.is_cpu and inverse_norm > 0
        for i, (params, grads, rho, _) in enumerate(chunks):
            if not finite:  # a step of 0 times infinity would be NaN
                grads = [g.nan_to_num_(0.0, 0.0, 0.0) for g in grads]
            params = _local(params)
            wide = grads if grads[0].dtype == _wide(grads[0]) else [g.to(_wide(g)) for g in grads]
            step = torch._foreach_mul(wide, rho * inverse_norm.to(wide[0]))
            # The memory of g, which nobody needs any more, keeps the weights.
            spent = not self.gsam_alpha and grads[0].dtype == params[0].dtype
            copies = grads if spent else [torch.empty_like(p) for p in params]
            torch._foreach_copy_(copies, params)
            undo.append((params, copies))
            torch._foreach_add_(params, step)
            if not self.gsam_alpha:
                chunks[i] = None  # frees g: one parameter-sized buffer is left beside the weights


def _new_run():
    """What changes from block to block.

    It is one object, since the optimizers of Lightning and Fabric pass for a SAM: they read its
    attributes, and keep what is assigned to them.
    """
    return types.SimpleNamespace(
        inside=False,  # a block
        ascending=False,
        forward=True,  # the latest ascent pass has run the model
        unentered=False,  # perturbed() was called, and its block is yet to begin
        accumulated=False,  # the latest ascent pass began with gradients and did not zero them
        blocks=0,
        plain_steps=0,  # steps with gradients before the first block
        stepped=False,
        unseen=set(),  # ids of tensors of which only the contents tell that they have moved
    )


def _check_kinds(base_optimizer, model, unknown):
    """Say what to write instead of davda54/sam's arguments, and refuse what SAM cannot follow."""
    for part in (base_optimizer, *(model.modules() if isinstance(model, torch.nn.Module) else ())):
        name, origins = type(part).__name__, [kind.__module__ for kind in type(part).__mro__]
        # Such gradients are not in .grad, or a process knows its own share of their norm only.
        if any("deepspeed" in o or o.endswith("fully_sharded_data_parallel") for o in origins):
            raise ValueError(
                f"SAM cannot follow the sharding of {name}: use FSDP2 "
                "(torch.distributed.fsdp.fully_shard)"
            )
        if any(origin.split(".")[0] == "opacus" for origin in origins):
            raise ValueError(PRIVATE)
    write = "SAM(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.05)"
    kinds = (base_optimizer, torch.optim.Optimizer), (model, torch.nn.Module)
    if unknown or not all(isinstance(part, kind) for part, kind in kinds):
        parts = [type(part).__name__ for part, _ in kinds] + [f"{name}=..." for name in unknown]
        raise TypeError(
            "SAM takes an optimizer, which has its own settings, and the model: write "
            f"{write}, not SAM({', '.join(parts)})"
        )
    name = type(base_optimizer).__name__
    if "rho" in base_optimizer.defaults:
        raise ValueError(f"{name} has a rho of its own, or a SAM around it: take another")
    closure = inspect.signature(base_optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"{name}.step() needs a closure, for the loss at weights of its own choice: take an "
            "optimizer that steps with the gradients that are there"
        )


def _check_rho(*groups):
    for rho in (group["rho"] for group in groups):
        if not isinstance(rho, (numbers.Real, torch.Tensor)) or not 0 <= rho < math.inf:
            raise ValueError(f"rho is {rho!r}; it must be a finite number of at least 0")


def _check_reach(loss, params):
    """Refuse a loss that leaves g in the gradients of parameters of which SAM does not know."""
    if any(hasattr(p, "grad_sample") for p in params):
        raise RuntimeError(PRIVATE)
    if any(isinstance(p, DTensor) for p in params):  # FSDP2 computes with others
        return
    known, seen, nodes, shapes = set(map(id, params)), set(), [getattr(loss, "grad_fn", None)], []
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, torch.nn.Parameter) and id(leaf) not in known:
            shapes.append(str(tuple(leaf.shape)))
    if shapes:
        raise RuntimeError(
            f"the closure's loss trains parameters that are not SAM's model's, of shape "
            f"{', '.join(shapes[:3])}{', ...' * (len(shapes) > 3)}, and would leave g in their "
            "gradients: write SAM(base_optimizer, torch.nn.ModuleList([model, other_module]))"
        )


def _watch(modules, params, unseen, look):
    """Watch state: buffers, and parameters that need no gradient.

    Return a function that later copies what has moved, as (where it is held, its name there, the
    tensor, the copy, whether it has surely moved). Its argument: whether a forward pass was made.

    Mostly autograd's version counters tell. To find what moves behind their back, by ``.data`` or
    in a kernel, ``look`` compares contents. What it finds goes into ``unseen``, by id.
    """
    owners = [m._buffers for m in modules if m._buffers]
    owners += [{"": p} for p in params if not p.requires_grad]
    stamps = [[_stamp(t) for t in owner.values()] for owner in owners]
    contents = {}
    if look or unseen:
        state = (t for owner in owners for t in owner.values() if look or id(t) in unseen)
        contents = {id(t): number for t in state if (number := _contents(t)) is not None}

    def copy_moved(forward):
        copies = []
        for owner, before in zip(owners, stamps):
            # All buffers of a module: the kernels of batch norm move the statistics unseen, and
            # only their count tells.
            seen = [_stamp(t) for t in owner.values()] != before
            for name, t in owner.items():
                moved = seen
                if not seen and id(t) in contents:
                    moved = _contents(t) != contents[id(t)]
                    unseen.update([id(t)] if moved else [])
                # A forward pass may have written what was there already. Parameters, which have no
                # name here, may be too large to copy for that.
                maybe = forward and (id(t) in unseen or (look and name and id(t) in contents))
                if t is not None and (moved or maybe):
                    copies.append((owner, name, t, t.clone(), moved))
        return copies

    return copy_moved


def _stamp(tensor):
    """Equal again unless the tensor is replaced, or changed in place."""
    if tensor is None:
        return None
    return id(tensor), 0 if tensor.is_inference() else tensor._version, tensor


def _contents(tensor):
    """A number that changes with the bits of a tensor, or None for one of a special kind."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.is_meta:
        return None
    if tensor.layout != torch.strided or tensor.is_quantized:
        return None
    tensor = _real(tensor.detach())
    kind = {1: torch.int8, 2: torch.int16, 4: torch.int32}.get(tensor.element_size(), torch.int64)
    return tensor.view(kind).sum(dtype=torch.int32 if kind == torch.int32 else torch.int64).item()


def _wide(tensor):
    """The type for norms and steps, where half precision has too few digits."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _real(tensor):
    """A complex tensor as real and imaginary parts: it is their inner product that is meant."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _local(tensors):
    """What this process holds of its tensors: all, or under FSDP2 a shard."""
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]


def _drop_copies_of_weights():
    """Weights have moved, and autocast and ``parametrize.cached()`` keep what they were."""
    torch.clear_autocast_cache()
    parametrize._cache.clear()


@contextlib.contextmanager
def _gradients_aside(params, marks, *, keep_new):
    """Hide the gradients of ``params`` from a pass; after it they are back, and with ``keep_new``
    those of the pass are added. Whoever zeroes gradients in the pass drops the hidden ones.

    To see that, the smallest gradient of ``marks`` is replaced by zeros that require a gradient:
    all ways to zero gradients remove such a tensor, or make it require none. Yields a function to
    call after the pass, before its gradients are used; it tells whether the hidden ones are kept.
    """
    hidden, marked = [(p, grad) for p in params if (grad := p.grad) is not None], None
    if hidden:
        marked = min((p for p in marks if p.grad is not None), key=torch.numel, default=None)
    kept = marked is not None
    for p, _ in hidden:
        p.grad = None
    if marked is not None:
        marked.grad = mark = torch.zeros_like(marked, requires_grad=True)
        untouched = _local([mark])[0]._version

    @torch.no_grad()
    def settle():
        nonlocal kept
        if marked is not None:
            kept = marked.grad is mark and mark.requires_grad
            if kept and _local([mark])[0]._version == untouched:
                marked.grad = None
            mark.requires_grad_(False)
        return kept

    try:
        yield settle
    except BaseException:
        keep_new, kept = False, True
        raise
    finally:
        for p in () if keep_new else params:
            p.grad = None
        for p, grad in hidden if kept or marked is None else ():
            p.grad = grad if p.grad is None else grad.add_(p.grad)


@contextlib.contextmanager
def _without_exchange(wanted):
    """Let no ``DistributedDataParallel`` exchange the gradients of a pass.

    ``wanted`` gets those that would have. That is decided in the wrapper's forward pass. SAM may
    hold the bare model, and Accelerate or Lightning the wrapper: hence the class. Hooks on modules
    would make torch.compile compile again.
    """
    if not torch.distributed.is_initialized():
        yield
        return
    forward = DistributedDataParallel.forward

    def alone(ddp, *args, **kwargs):
        if ddp.static_graph:
            raise RuntimeError(
                "DDP(static_graph=True) expects one pass a step, not SAM's two: drop it"
            )
        if ddp.require_backward_grad_sync:
            wanted.append(ddp)
        with ddp.no_sync():
            return forward(ddp, *args, **kwargs)

    # Lightning's manual optimization makes the passes inside the wrapper's forward pass.
    around = DistributedDataParallel._active_ddp_module
    if around is not None and around.require_backward_grad_sync:
        wanted.append(around)
    DistributedDataParallel.forward = alone
    try:
        with contextlib.nullcontext() if around is None else around.no_sync():
            yield
    finally:
        DistributedDataParallel.forward = forward


@torch.no_grad()
def _average_gradients(ddp):
    """Do what the wrapper would have done, had SAM not kept it from exchanging gradients."""
    kinds = {}
    for name, p in ddp.module.named_parameters():
        if p.requires_grad and name not in ddp.parameters_to_ignore:
            kinds.setdefault((p.dtype, p.device), []).append(p)
    for (dtype, device), params in kinds.items():
        used = torch.tensor([p.grad is not None for p in params], dtype=dtype, device=device)
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
        flat = torch.cat([used, *(grad.flatten() for grad in grads)])
        flat /= ddp.process_group.size()
        torch.distributed.all_reduce(flat, group=ddp.process_group)
        used, *means = flat.split([len(params), *(p.numel() for p in params)])
        for i, (p, mean) in enumerate(zip(params, means)):
            if p.grad is not None:
                p.grad.copy_(mean.view_as(p))
            elif used[i]:  # in another process
                p.grad = mean.view_as(p).clone()


@contextlib.contextmanager
def _passed_on(p, inverse_norm):
    """Make p's gradient NaN if g is not finite: there, a ``GradScaler`` looks for overflow."""
    nan = torch.where(inverse_norm > 0, 0.0, math.nan)
    if isinstance(p, DTensor):  # no hook sees its gradient, and g's norm is the same for all shards
        yield
        if p.grad is not None:
            p.grad.to_local().add_(nan)
        return
    # Before DDP's exchange: g is this process's own, and all must skip the same steps.
    hook = p.register_hook(lambda grad: grad + nan.to(grad))
    try:
        yield
    finally:
        hook.remove()


def _chunks(param_groups):
    """List (perturbed parameters, local gradients, rho, sharding), each alike and cache-sized."""
    chunks, latest, sizes, seen = [], {}, {}, set()
    for group in param_groups:
        rho = -group["rho"] if group.get("maximize") else group["rho"]
        for p in group["params"] if rho else ():
            if (grad := p.grad) is None:
                continue
            if grad.layout != torch.strided:
                raise RuntimeError(f"SAM cannot follow {grad.layout} gradients: use sparse=False")
            sharding = (p.device_mesh, p.placements) if isinstance(p, DTensor) else None
            # DDP's next backward pass would write into a view of its bucket.
            if grad._base is not None or id(grad) in seen:
                grad = grad.clone()
            seen.add(id(grad))
            key = (rho, sharding, p.device, p.dtype, grad.dtype)
            if sizes.get(key, 2**18) >= 2**18:
                latest[key], sizes[key] = ([], [], rho, sharding), 0
                chunks.append(latest[key])
            latest[key][0].append(p)
            latest[key][1].append(grad.to_local() if sharding else grad)
            sizes[key] += p.numel()
    return chunks


def _total(chunks, terms):
    """The sum of one scalar per chunk, over the processes too that hold other shards."""
    sums = {}
    for (*_, sharding), term in zip(chunks, terms):
        sums[sharding] = sums.get(sharding, 0) + term.to(terms[0])
    for key in filter(None, sums):
        partial = [Partial() if placement.is_shard() else placement for placement in key[1]]
        sums[key] = DTensor.from_local(sums[key], key[0], partial, run_check=False).full_tensor()
    return sum(sums.values())


@torch.no_grad()
def _subtract_orthogonal(chunks, weight):
    """Replace gp in ``.grad`` by gp - weight (g - <g, gp> gp / ||gp||^2), for chunks with g."""

    def dot(left, right):
        products = []
        for a, b in zip(left, right):
            # In the order of memory: channels_last needs no copy, either.
            order = sorted(range(a.dim()), key=a.stride, reverse=True)
            a, b = (t.permute(order).reshape(-1) for t in (a, b))
            products.append(torch.dot(a.to(_wide(a)), b.to(_wide(b))))
        return sum((product.to(weight) for product in products), start=torch.zeros_like(weight))

    pairs = []
    for params, grads, *_ in chunks:
        kept = [(p.grad, g) for p, g in zip(params, grads) if p.grad is not None]
        gps, gs = _local([gp for gp, _ in kept]), [g for _, g in kept]
        if params[0].is_complex():
            gps, gs = list(map(_real, gps)), list(map(_real, gs))
        pairs.append((gps, gs))
    product = _total(chunks, [dot(gps, gs) for gps, gs in pairs])
    square = _total(chunks, [dot(gps, gps) for gps, _ in pairs])
    # A gp of zero, or one that overflowed, has no direction to project on.
    projection = (weight * product / square).nan_to_num(0.0, 0.0, 0.0)
    for gps, gs in pairs:
        if gps:
            torch._foreach_mul_(gps, (1 + projection).to(gps[0]))
            torch._foreach_sub_(gps, torch._foreach_mul(gs, weight.to(gs[0])))
