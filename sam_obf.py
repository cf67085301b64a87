# Copyright 2026 The sam-obf authors. Licensed under the Apache License, Version 2.0.
"""Sharpness-aware minimization (SAM) as perturbed forgetting, in one file that you can copy: torch 2.5 or newer.

"The paper" is "Forget Sharpness: Perturbed Forgetting of Model Biases Within SAM Dynamics" (Vani et al., ICML 2024,
arXiv 2406.06700). Each training step makes two passes over a micro-batch:

    g = grad P(theta)                    ascent pass: P is what the perturbation ascends, so as to forget it
    gp = grad L(theta + rho g / ||g||)   descent pass: the gradient that the optimizer applies at theta

Usage::

    optimizer = SAM(torch.optim.AdamW(model.parameters(), lr=3e-3), model, rho=0.6)
    forget = OutputBiasForgetting(gamma=1.0)
    for x, y in loader:
        with optimizer.perturbed(lambda: forget(model(x), y)):  # ascent pass; inside, the weights are perturbed
            loss_fn(model(x), y).backward()  # descent pass
        optimizer.step()
        optimizer.zero_grad()

What the closure returns is P: the training loss (SAM, Foret et al. 2021), ``OutputBiasForgetting`` (OBF, the paper),
``random_perturbation`` (RandSAM) or ``momentum_perturbation`` (MSAM, Becker et al. 2024). Arguments of ``SAM`` turn on
ASAM (Kwon et al. 2021) and GSAM (Zhuang et al. 2022). After the block the weights are those of before, and a backward
pass through a graph made in the block, or before it, fails with "modified by an inplace operation": call
``backward()`` inside.
"""

import contextlib
import itertools
import math
import numbers
import warnings

import torch
from torch.distributed.tensor import DTensor, Partial

__all__ = ["SAM", "OutputBiasForgetting", "momentum_perturbation", "proportional_rho", "random_perturbation"]


class OutputBiasForgetting:
    """The output bias forgetting objective to ascend (the paper, section 4).

    Per example, its gradient with respect to the logits is ``u - alpha p - (1 - alpha) y``: prediction p, one-hot
    target y, uniform u = 1/K, and ``alpha = gamma max(0, (1 - lam / p_y) / (1 - lam))``, a constant. That is the
    gradient of ``(1 - alpha) CE(p, y) - CE(p, u)``. The returned value itself has no meaning.

    Args:
        gamma: in [0, 1]. 1 pushes confident predictions towards uniform. Towards 0, the target's logit falls and all
            others rise alike, so that no wrong prediction is ever sharpened.
        lam: in [0, 1), the prediction p_y up to which alpha is 0; None is the paper's 1/K.
        link: "sigmoid" (the paper) or "softmax", from logits to predictions.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(self, gamma: float = 1.0, lam: float | None = None, link: str = "sigmoid"):
        if not 0 <= gamma <= 1:
            raise ValueError(f"gamma is {gamma}; it must lie in [0, 1]")
        if lam is not None and not 0 <= lam < 1:
            raise ValueError(f"lam is {lam}; it must lie in [0, 1), or be None for 1 / number of classes")
        if link not in ("sigmoid", "softmax"):
            raise ValueError(f"link is {link!r}; choose 'sigmoid' or 'softmax'")
        self.gamma, self.lam, self.link = gamma, lam, link

    def __call__(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return a scalar, the mean over examples, for logits (..., K) and class indices (...), K at least 2.

        Raises:
            ValueError: the shapes do not fit, or the target holds probabilities instead of indices.
        """
        num_classes = logits.shape[-1]
        if target.is_floating_point() or target.shape != logits.shape[:-1] or num_classes < 2:
            got = f"logits {tuple(logits.shape)} and a target {tuple(target.shape)} of {target.dtype}"
            raise ValueError(f"OBF takes logits (..., K), K >= 2, and class indices (...); it got {got}")
        logits = logits.to(_wide(logits))  # 1/K beside a confident prediction needs more than half precision
        with torch.no_grad():
            p = logits.sigmoid() if self.link == "sigmoid" else logits.softmax(-1)
            index = target.unsqueeze(-1)
            lam = 1 / num_classes if self.lam is None else self.lam
            p_target = p.gather(-1, index).clamp_min(torch.finfo(p.dtype).tiny)
            alpha = self.gamma * ((1 - lam / p_target) / (1 - lam)).clamp_min(0)
            coefficients = (1 / num_classes - alpha * p).scatter_add_(-1, index, alpha - 1)
        return (coefficients * logits).sum(-1).mean()


def random_perturbation(parameters) -> torch.Tensor:
    """Return a scalar whose gradient is a new draw from N(0, I): RandSAM, a baseline of the paper.

    Batch norm's statistics then move in the descent pass, unless ``model(x)`` runs here too. Seed each process
    differently.
    """
    return sum((p * torch.randn_like(p)).sum() for p in parameters if p.requires_grad)


def momentum_perturbation(base_optimizer) -> torch.Tensor:
    """Return a scalar whose gradient is -v, v the optimizer's momentum: MSAM (Becker et al. 2024, arXiv 2401.12033).

    The perturbation is ``-rho v / ||v||`` (algorithm 1): v accumulates gradients, and MSAM looks ahead to where the
    momentum is about to carry the weights, not back. v is SGD's ``momentum_buffer`` or Adam's ``exp_avg``, not divided
    by the second moment. There is no second forward and backward pass, so a step costs little more than a plain one
    and batch norm's statistics move in the descent pass. The first step, without momentum yet, is plain. The authors'
    rho is about 3, for SGD and for AdamW.

    Raises:
        ValueError: the optimizer keeps no momentum, or each process keeps that of some parameters only.
    """
    if type(base_optimizer).__name__ == "ZeroRedundancyOptimizer":
        raise ValueError(
            "ZeroRedundancyOptimizer keeps the momentum of other parameters elsewhere: use FSDP2 or plain DDP"
        )
    pairs = []
    for group in base_optimizer.param_groups:
        for p in filter(lambda p: p.requires_grad, group["params"]):
            state = base_optimizer.state.get(p, {})
            v = next((state[key] for key in ("momentum_buffer", "exp_avg") if state.get(key) is not None), None)
            if v is None and (state or group.get("momentum") == 0):
                name = type(base_optimizer).__name__
                raise ValueError(f"{name} keeps no momentum to perturb along: use Adam, or SGD with momentum > 0")
            pairs.append((p, v))
    if all(v is None for _, v in pairs):
        return sum((p * 0).sum() for p, _ in pairs)
    return -sum((p * v).sum() for p, v in pairs if v is not None)


def proportional_rho(optimizer, *, rho_min: float, rho_max: float, lr_min: float, lr_max: float) -> None:
    """Set each group's rho by its lr: linear from (lr_min, rho_min) to (lr_max, rho_max), constant outside.

    Call it before the first step and after each ``scheduler.step()``. The schedule is that of Zhuang et al. 2022.

    Raises:
        ValueError: a range is empty or negative.
    """
    if not (0 <= rho_min <= rho_max and lr_min < lr_max):
        span = f"from ({lr_min}, {rho_min}) to ({lr_max}, {rho_max})"
        raise ValueError(f"rho cannot follow lr {span}: it needs lr_min < lr_max and 0 <= rho_min <= rho_max")
    for group in optimizer.param_groups:
        fraction = (group["lr"] - lr_min) / (lr_max - lr_min)
        group["rho"] = rho_min + (rho_max - rho_min) * min(max(fraction, 0.0), 1.0)


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimization around any optimizer, whose place it takes for schedulers, scalers and Accelerate.

    ``param_groups``, ``state``, ``state_dict`` and hooks are the base optimizer's. rho is in ``param_groups`` like lr;
    a group with rho 0 is trained, not perturbed. With ||.|| the L2 norm over all perturbed parameters together, the
    perturbation is

        adaptive=None       rho g / ||g||                        Foret et al. 2021, eq. 2
        adaptive="before"   rho |theta| g / || |theta| g ||      the paper's ResNets
        adaptive="after"    rho |theta| g / ||g||                the paper's ViTs
        adaptive="both"     rho theta^2 g / || |theta| g ||      Kwon et al. 2021, eq. 8

    and ``gsam_alpha`` turns the gradient gp into ``gp - gsam_alpha (g - <g, gp> gp / ||gp||^2)`` (Zhuang et al. 2022).
    At the second backward it holds one parameter-sized buffer; GSAM two, and three while gradients accumulate.

    Args:
        base_optimizer: applies the gradient. Its groups that have a "rho" keep it.
        model: the module in training. Buffers that the ascent pass moves, as batch norm's statistics, move only there.
        rho: at least 0, the perturbation's L2 norm in units of the weights (ASAM: relative to them).
        adaptive: None, "before", "after" or "both".
        gsam_alpha: at least 0.
        gsam_normalize: scale g to unit norm before GSAM uses it.

    Attributes:
        ascending: True in the ascent pass: the time for the closure of ``step(closure)`` to return OBF's objective.

    Raises:
        ValueError: an argument is out of its range, or the optimizer has a rho of its own or no parameter of the model.
    """

    # A fused base optimizer unscales on its own, told through attributes that GradScaler would set here, not there.
    _step_supports_amp_scaling = False

    def __init__(
        self, base_optimizer, model, rho=0.05, *, adaptive=None, gsam_alpha=0.0, gsam_normalize=False, **unknown
    ):
        _check_kinds(base_optimizer, model, unknown)
        if adaptive is True:
            raise ValueError('adaptive is True; davda54/sam\'s adaptive=True is adaptive="both"')
        if adaptive not in (None, "before", "after", "both"):
            raise ValueError(f"adaptive is {adaptive!r}; choose None, 'before', 'after' or 'both'")
        if not 0 <= gsam_alpha < math.inf:
            raise ValueError(f"gsam_alpha is {gsam_alpha}; it must be at least 0")
        if adaptive and gsam_alpha:
            raise ValueError(f"adaptive={adaptive!r} (ASAM) and gsam_alpha={gsam_alpha} (GSAM) contradict: drop one")
        if gsam_normalize and not gsam_alpha:
            raise ValueError("gsam_normalize=True does nothing without GSAM: set gsam_alpha > 0, or drop it")
        if "rho" in base_optimizer.defaults:
            raise ValueError(f"{type(base_optimizer).__name__} has a rho of its own, or a SAM around it: take another")
        _check_rho({"rho": rho}, *({"rho": rho, **group} for group in base_optimizer.param_groups))
        held = {id(p) for group in base_optimizer.param_groups for p in group["params"]}
        if held.isdisjoint(map(id, model.parameters())):
            raise ValueError("base_optimizer holds none of model's parameters: build it from model.parameters()")
        # No super().__init__(): what an optimizer holds, the base optimizer holds; __getattr__ finds it there.
        self.base_optimizer, self.model = base_optimizer, model
        self.adaptive, self.gsam_alpha, self.gsam_normalize = adaptive, gsam_alpha, gsam_normalize
        self.ascending, self._inside, self._set_aside = False, False, []
        self._unentered, self._plain_steps = False, 0  # None: there has been a block
        base_optimizer.defaults["rho"] = rho  # for groups that are added later
        for group in base_optimizer.param_groups:
            group.setdefault("rho", rho)

    def perturbed(self, closure, *, loss_weight: float = 1.0, grad_scaler=None):
        """Run the ascent pass, then the ``with`` body at the perturbed weights; restore the weights bit for bit.

        The body's gradients add to those in ``.grad``; g never does. If g is not finite, the body runs at the weights
        as they are; finding out takes no host synchronisation. With a ``grad_scaler``, a gradient becomes NaN then: the
        scaler skips the step and lowers its scale, else it might never perturb again.

        Args:
            closure: returns the scalar to ascend; called once.
            loss_weight: what the body multiplies its loss by, this micro-batch's share of the examples of one step.
                Only GSAM depends on it.
            grad_scaler: the ``torch.amp.GradScaler`` that the body scales its loss with: so is the ascent's, then.

        Raises:
            TypeError: the closure is no function.
            ValueError: the closure returns no scalar tensor, a rho is negative, or ``loss_weight`` is not finite.
            RuntimeError: nested in itself, or the closure's loss depends on no perturbed parameter.

        Warns:
            UserWarning: the body leaves no gradient.
        """
        if not callable(closure):
            write = "`with optimizer.perturbed(lambda: loss_fn(model(x), y)):`"
            raise TypeError(f"perturbed() takes a function that returns a loss, not {type(closure).__name__}: {write}")
        if not math.isfinite(loss_weight):
            raise ValueError(f"loss_weight is {loss_weight}; it must be finite: this micro-batch's share of one step()")

        def ascend():
            loss = closure()
            if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
                got = getattr(loss, "shape", type(loss).__name__)
                raise ValueError(f"the closure must return a loss, a tensor with one element; it returned {got}")
            if not loss.requires_grad:
                raise RuntimeError("the closure's loss needs no gradient: compute it without no_grad() or detach()")
            (loss if grad_scaler is None else grad_scaler.scale(loss)).backward()

        self._unentered = True
        return self._two_passes(ascend, loss_weight, grad_scaler)

    def step(self, closure=None):
        """Step the base optimizer; with a closure, make both passes first, for frameworks that own the loop.

        Args:
            closure: as for ``torch.optim.LBFGS``: calls this optimizer's ``zero_grad()``, computes the loss, calls its
                ``backward()`` and returns it. It runs twice; there is no ``GradScaler`` in this form.

        Returns:
            The closure's loss in the ascent pass, or without a closure what the base optimizer returns.

        Raises:
            RuntimeError: called inside ``perturbed``, or after one without ``with``; the closure leaves no gradient; or
                Lightning has a ``GradScaler``, and so does not hand the closure over.

        Warns:
            UserWarning: ten steps with gradients and not one block before; or the closure adds to gradients of others.
        """
        if self._inside:
            raise RuntimeError("step() inside perturbed() would update the perturbed weights: call it after the block")
        if self._unentered:
            self._unentered = False
            raise RuntimeError("perturbed() alone does nothing: write `with optimizer.perturbed(closure):`")
        if closure is not None and not getattr(self.model, "automatic_optimization", True):
            closure = closure()  # of Lightning's manual optimization: it makes no pass and returns None
        if closure is None:
            self._warn_if_plain()
            return self.base_optimizer.step()
        losses = []

        def ascend():
            losses.append(closure())
            if self._set_aside:
                warnings.warn(
                    "step(closure) adds to gradients that no block perturbed: to accumulate, write one "
                    "`with optimizer.perturbed(closure):` for each micro-batch (Lightning: manual optimization)",
                    stacklevel=2,
                )

        with torch.enable_grad(), self._two_passes(ascend):
            closure()
        self.base_optimizer.step()
        return losses[0]

    def zero_grad(self, set_to_none: bool = True):
        self._set_aside = []
        self.base_optimizer.zero_grad(set_to_none)

    def _warn_if_plain(self):
        """Tell a loop that steps and never perturbs."""
        params = itertools.chain.from_iterable(group["params"] for group in self.param_groups)
        if self._plain_steps is None or all(p.grad is None for p in params):
            return
        if getattr(self.model, "automatic_optimization", False) and getattr(self.model, "_trainer", None):
            raise RuntimeError(
                "Lightning with a GradScaler gives step() no closure, so there are no two passes: use precision="
                "'bf16-mixed' or '32-true', or automatic_optimization=False and `with optimizer.perturbed(closure, "
                "grad_scaler=self.trainer.precision_plugin.scaler):`"
            )
        self._plain_steps += 1
        if self._plain_steps == 10:
            warnings.warn(
                f"ten steps and no perturbation: this is {type(self.base_optimizer).__name__} alone. Write "
                "`with optimizer.perturbed(lambda: loss_fn(model(x), y)):` around each backward pass, or step(closure)",
                stacklevel=3,
            )

    def add_param_group(self, param_group):
        self.base_optimizer.add_param_group(param_group)

    def state_dict(self):
        return self.base_optimizer.state_dict()

    def load_state_dict(self, state_dict):
        """Load a state of SAM, or of a bare base optimizer: then rho stays as it is."""
        rhos = [group["rho"] for group in self.param_groups]
        self.base_optimizer.load_state_dict(state_dict)
        for group, rho in zip(self.param_groups, rhos, strict=True):
            group.setdefault("rho", rho)

    def __getattr__(self, name):
        if name == "base_optimizer":  # an object that is being copied does not have it yet
            raise AttributeError(name)
        if name in ("first_step", "second_step"):
            write = "`with optimizer.perturbed(lambda: loss_fn(model(x), y)):` around the second pass, then step()"
            raise AttributeError(f"{name}() is davda54/sam's; here write {write}")
        return getattr(self.base_optimizer, name)

    @contextlib.contextmanager
    def _two_passes(self, ascend, loss_weight=1.0, grad_scaler=None):
        self._unentered = False
        if self._inside:
            raise RuntimeError("perturbed() is nested in itself: leave the first block before entering the next")
        _check_rho(*self.param_groups)
        modules = list(self.model.modules())
        undo, moved = [], []
        self._inside = self.ascending = True
        try:
            stamps = [(m._buffers, [_stamp(b) for b in m._buffers.values()]) for m in modules if m._buffers]
            chunks = self._ascend(ascend, modules)
            self.ascending = False
            # All buffers of a module: the kernels of batch norm move the statistics unseen, and only their count tells.
            for buffers, before in stamps:
                if [_stamp(b) for b in buffers.values()] != before:
                    moved += [(buffers, name, b, b.clone()) for name, b in buffers.items() if b is not None]
            one = torch.ones((), device=next(self.model.parameters()).device)
            scale = one if grad_scaler is None else grad_scaler.scale(one)
            inverse_norm = self._weigh(chunks, scale)
            gsam = self._orthogonal(chunks, scale, inverse_norm, loss_weight)
            overflow = contextlib.nullcontext()
            if grad_scaler is not None and grad_scaler.is_enabled() and chunks:
                overflow = _passed_on(chunks[0][0][0], inverse_norm)
            with gsam if self.gsam_alpha else contextlib.nullcontext(), overflow:
                self._perturb(chunks, inverse_norm, undo)
                torch.clear_autocast_cache()  # its copies of the weights are of before the move
                params = [p for group in self.param_groups for p in group["params"]]
                before = [_stamp(p.grad) for p in params]
                yield
                self._plain_steps = None
                # FSDP2 keeps gradients elsewhere while it accumulates.
                if all(_stamp(p.grad) == b and not isinstance(p, DTensor) for p, b in zip(params, before)):
                    warnings.warn(
                        "the block left no gradient: call backward() in the body of perturbed()", stacklevel=3
                    )
        finally:
            with torch.no_grad():
                for tensors, copies in undo:
                    torch._foreach_copy_(tensors, copies)
                for buffers, name, buffer, copy in moved:
                    buffers[name] = buffer.copy_(copy)
            torch.clear_autocast_cache()
            self._inside = self.ascending = False

    def _ascend(self, run, modules):
        """Take g, the gradient that ``run`` leaves, as chunks of (parameters, local gradients, rho, sharding)."""
        held = itertools.chain(*(m._parameters.values() for m in modules), *(g["params"] for g in self.param_groups))
        every = {id(p): p for p in held if p is not None}.values()
        with self._gradients_aside(every):
            run()
            chunks = _chunks(self.param_groups)
            for p in every:
                p.grad = None
        if not chunks and any(group["rho"] > 0 for group in self.param_groups):
            raise RuntimeError("the ascent pass left no gradient to perturb along: is the loss that of SAM's model?")
        return chunks

    @contextlib.contextmanager
    def _gradients_aside(self, params):
        """Hide accumulated gradients from the block; ``zero_grad()`` inside drops them."""
        self._set_aside = [(p, grad) for p in params if (grad := p.grad) is not None]
        for p, _ in self._set_aside:
            p.grad = None
        try:
            yield
        except BaseException:
            for p in params:
                p.grad = None
            raise
        finally:
            for p, grad in self._set_aside:
                p.grad = grad if p.grad is None else grad.add_(p.grad)
            self._set_aside = []

    @contextlib.contextmanager
    def _orthogonal(self, chunks, scale, inverse_norm, loss_weight):
        """GSAM: replace the gradient gp that the block leaves by gp - gsam_alpha (g - <g, gp> gp / ||gp||^2)."""
        with self._gradients_aside([p for params, *_ in chunks for p in params]):
            yield
            # g and gp are both on the loss scale; a g that was not finite counts as zero.
            length = scale.to(inverse_norm) * inverse_norm if self.gsam_normalize else inverse_norm.sign()
            if chunks:  # there are none if rho is 0
                _subtract_orthogonal(chunks, loss_weight * self.gsam_alpha * length)

    @torch.no_grad()
    def _weigh(self, chunks, scale):
        """Multiply g by ASAM's |theta|; return 1 / norm on the loss scale, or 0 where the norm is not finite."""
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
        finite = inverse_norm.is_cpu and inverse_norm > 0  # reading it from another device would wait for the device
        for i, (params, grads, rho, _) in enumerate(chunks):
            if not finite:
                grads = [g.nan_to_num_(0.0, 0.0, 0.0) for g in grads]  # a step of 0 does not erase inf and nan
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


@contextlib.contextmanager
def _passed_on(p, inverse_norm):
    """Make p's gradient NaN if g is not finite: a ``GradScaler`` looks for overflow in ``.grad`` alone."""
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


def _check_kinds(base_optimizer, model, unknown):
    """Say what to write instead of davda54/sam's arguments, and refuse what SAM cannot follow."""
    for part in (base_optimizer, *(model.modules() if isinstance(model, torch.nn.Module) else ())):
        origins = [kind.__module__ for kind in type(part).__mro__]
        # Such gradients are not in .grad, or a process knows its own share of their norm only.
        if any("deepspeed" in origin or origin.endswith("fully_sharded_data_parallel") for origin in origins):
            name = type(part).__name__
            raise ValueError(
                f"SAM cannot follow the sharding of {name}: use FSDP2 (torch.distributed.fsdp.fully_shard)"
            )
    if unknown or not isinstance(base_optimizer, torch.optim.Optimizer) or not isinstance(model, torch.nn.Module):
        got = ", ".join([type(base_optimizer).__name__, type(model).__name__, *(f"{name}=..." for name in unknown)])
        write = "SAM(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.05)"
        raise TypeError(
            f"SAM takes an optimizer, which has its own settings, and the model: write {write}, not SAM({got})"
        )


def _check_rho(*groups):
    for rho in (group["rho"] for group in groups):
        if not isinstance(rho, (numbers.Real, torch.Tensor)) or not 0 <= rho < math.inf:
            raise ValueError(f"rho is {rho!r}; it must be a finite number of at least 0")


def _stamp(tensor):
    """Equal again unless the tensor is replaced, or changed in place."""
    return tensor if tensor is None else (id(tensor), 0 if tensor.is_inference() else tensor._version, tensor)


def _wide(tensor):
    """The type for norms and steps, where half precision has too few digits."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _local(tensors):
    """What this process holds of its tensors: all, or under FSDP2 a shard."""
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]


def _chunks(param_groups):
    """The perturbed parameters and their gradients, in lists alike and small enough for a CPU's cache."""
    chunks, latest, sizes, seen = [], {}, {}, set()
    for rho, p in ((group["rho"], p) for group in param_groups for p in group["params"]):
        if rho == 0 or (grad := p.grad) is None:
            continue
        if grad.layout != torch.strided:
            raise RuntimeError(f"SAM cannot follow {grad.layout} gradients: use sparse=False")
        sharding = (p.device_mesh, p.placements) if isinstance(p, DTensor) else None
        if grad._base is not None or id(grad) in seen:  # DDP's next backward pass would write into a view of its bucket
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
    """The sum of one scalar per chunk, over the processes too that hold the chunks' other shards."""
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
            order = sorted(range(a.dim()), key=a.stride, reverse=True)  # of memory: channels_last needs no copy, either
            a, b = (t.permute(order).reshape(-1) for t in (a, b))
            products.append(torch.dot(a.to(_wide(a)), b.to(_wide(b))))
        return sum((product.to(weight) for product in products), start=torch.zeros_like(weight))

    pairs = []
    for params, grads, *_ in chunks:
        kept = [(p.grad, g) for p, g in zip(params, grads) if p.grad is not None]
        pairs.append((_local([gp for gp, _ in kept]), [g for _, g in kept]))
    product = _total(chunks, [dot(gps, gs) for gps, gs in pairs])
    square = _total(chunks, [dot(gps, gps) for gps, _ in pairs])
    # A gp of zero, or one that overflowed, has no direction to project on.
    projection = (weight * product / square).nan_to_num(0.0, 0.0, 0.0)
    for gps, gs in pairs:
        if gps:
            torch._foreach_mul_(gps, (1 + projection).to(gps[0]))
            torch._foreach_sub_(gps, torch._foreach_mul(gs, weight.to(gs[0])))
