"""The autograd Functions: a backend's forward and backward functions in pairs, and nothing else.

Each pair exists twice, since the two ways PyTorch has of writing a Function each lack something: the
form with ``ctx`` in ``forward`` is tens of microseconds a call faster, the form with ``setup_context`` is what
``torch.func`` transforms accept. Both share their code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from .ops import available, constants, reference

if TYPE_CHECKING:
    from .distributed import Group

_NO_JVP = (
    "pmrl_kernels: forward-mode differentiation (torch.func.jvp, torch.autograd.forward_ad) is not implemented; "
    "use reverse mode (torch.autograd.grad, torch.func.grad or vjp)"
)
_NO_DOUBLE_BACKWARD = (
    "pmrl_kernels: differentiating through the gradient of this function (a gradient penalty, a Hessian) is not "
    "implemented; for such a term use a formulation in plain torch operations"
)
_NO_COMPILED_TRANSFORM = (
    "pmrl_kernels: torch.func transforms and forward-mode differentiation inside torch.compile are not implemented; "
    "use loss.backward() or torch.autograd.grad in compiled code, or the transform outside of it"
)
_NO_VMAP = (
    "pmrl_kernels: torch.vmap is not implemented; the functions are batched already, so reshape the mapped dimension "
    "into the batch dimension B (this also rules out torch.func.hessian and jacobian helpers)"
)


class _ReverseOnly:
    """What a Function tells ``torch.func``; left alone, ``torch.func.jvp`` returns zeros without a word.

    Only for the forms used under transforms: Dynamo traces no Function that defines ``jvp``, and outside
    transforms forward-mode differentiation raises by itself.
    """

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(_NO_JVP)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        raise NotImplementedError(_NO_VMAP)


class _Final(_ReverseOnly, Function):
    """Passes finished gradients on and refuses to be differentiated.

    ``once_differentiable`` does not do: it only raises when the incoming gradient itself requires one,
    so a gradient penalty beside a task loss would silently lose the penalty. Here the gradients hang
    in the graph below everything they were made from.
    """

    @staticmethod
    def forward(count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if x is None else x.view_as(x) for x in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(_NO_DOUBLE_BACKWARD)


def _final(grads: tuple[Tensor | None, ...], *sources: Tensor | None) -> tuple[Tensor | None, ...]:
    """``grads``, refusing a second differentiation where a graph of the backward pass is being made."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        result: tuple[Tensor | None, ...] = _Final.apply(len(grads), *grads, *sources)
        return result
    return grads


def _plain(grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Incoming gradients as memory holds them.

    A gradient that PyTorch has negated without touching memory (``.imag`` of a conjugate), or a zero without memory,
    is made an ordinary tensor for an operator's plain arguments, but not for those in a list.
    """
    if torch.compiler.is_compiling():
        return list(grads)
    found: list[Tensor | None] = []
    for g in grads:
        if g is not None and g.is_neg():
            g = g.resolve_neg()
        elif g is not None and g._is_zerotensor():
            g = torch.zeros(g.shape, dtype=g.dtype, device=g.device)
        found.append(g)
    return found


def _call(operator: Any, *arguments: Any) -> Any:
    """The operator outside of any graph. (A backward pass is so already unless its graph is wanted: 2 µs saved.)"""
    if torch.is_grad_enabled():
        with torch.no_grad():
            return operator(*arguments)
    return operator(*arguments)


class SpectralSettings(NamedTuple):
    """What a spectral call computes, and by which backend."""

    backend: str
    fixed_temperature: float
    normalize: bool
    spectrum: bool
    wanted: int


class _Spectral(Function):
    """(settings, mask, temperature, *embeddings) -> the wanted outputs."""

    # (With *inputs, since Dynamo leaves ctx out where a Function is given as many inputs as forward has parameters.)

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        settings, mask, temperature, *embeddings = inputs
        backend, *options = settings
        call = available[backend].operators.spectral_forward
        outputs, state = call(embeddings, mask, temperature, *options)
        _save_spectral(ctx, settings, mask, temperature, embeddings, len(outputs), state)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        backend, *options = ctx.settings
        mask, temperature, *rest = ctx.saved_tensors
        embeddings, state = rest[: ctx.inputs], rest[ctx.inputs :]
        needed = ctx.needs_input_grad
        call = available[backend].operators.spectral_backward
        found = _call(call, embeddings, mask, temperature, *options, state, _plain(grads[: ctx.outputs]), needed[3:])
        tau = found[-1].to(temperature.dtype) if needed[2] else None
        out = [x if want else None for x, want in zip(found, needed[3:])]  # noqa: B905 (∂τ may follow)
        return (None, None, *_final((tau, *out), temperature, *embeddings, *grads))


def _save_spectral(
    ctx: Any,
    settings: SpectralSettings,
    mask: Tensor | None,
    temperature: Tensor | None,
    embeddings: Sequence[Tensor],
    outputs: int,
    state: Sequence[Tensor],
) -> None:
    ctx.settings, ctx.inputs, ctx.outputs = settings, len(embeddings), outputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(mask, temperature, *embeddings, *state)


class _SpectralTransformed(_ReverseOnly, _Spectral):
    """The same with the state as further outputs: ``setup_context`` sees nothing else of the forward pass."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        (backend, *options), mask, temperature, *embeddings = inputs
        call = available[backend].operators.spectral_forward
        outputs, state = call(embeddings, mask, temperature, *options)
        return (*outputs, *state)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        settings, mask, temperature, *embeddings = inputs
        outputs = _outputs(settings, embeddings)
        state = output[outputs:]
        ctx.mark_non_differentiable(*state)
        _save_spectral(ctx, settings, mask, temperature, embeddings, outputs, state)


def _outputs(settings: SpectralSettings, embeddings: Sequence[Tensor]) -> int:
    """How many outputs a spectral call has."""
    k = embeddings[0].shape[1] if embeddings[0].dim() == 3 else len(embeddings)
    wanted = settings.wanted
    single = (constants.ANY_ALIGNMENT, constants.SIGMA, constants.U, constants.V)
    return sum(bool(wanted & flag) for flag in single) + (k if wanted & constants.Z else 0)


class ObjectiveSettings(NamedTuple):
    """Of an alignment term and a contrast. ``contrast`` is "leading", "modality", or "raw": of the one embedding
    itself, as it is, with no spectral function."""

    spectral: SpectralSettings
    contrast: str
    fixed_temperature: float
    weight: float
    group: Group | None


class _Objective(Function):
    """(settings, mask, temperature, instance_temperature, *embeddings) -> (total, alignment, instance).

    One pass over the embeddings each way: the backward pass takes the gradients of the three together, and the
    contrast's with respect to u and z go into the same coefficients in k-space as the alignment's.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        settings, mask, temperature, instance_temperature, *embeddings = inputs
        found, saved = _objective_forward(settings, mask, temperature, instance_temperature, tuple(embeddings))
        _save_objective(ctx, settings, mask, temperature, instance_temperature, embeddings, saved)
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        needed = ctx.needs_input_grad
        total, alignment, instance = _plain(grads[:3])
        if total is None and alignment is None and instance is None:
            return (None,) * len(needed)
        settings = ctx.settings
        mask, temperature, instance_temperature, *rest = ctx.saved_tensors
        embeddings, saved = tuple(rest[: ctx.inputs]), rest[ctx.inputs :]
        with torch.no_grad():
            if total is not None:
                alignment = total if alignment is None else alignment + total
                weighted = total * settings.weight
                instance = weighted if instance is None else instance + weighted
            tau, tau2, found = _objective_backward(
                settings, mask, temperature, instance_temperature, embeddings, saved, alignment, instance, needed[4:]
            )
            tau = tau.to(temperature.dtype) if needed[2] and tau is not None else None
            tau2 = tau2.to(instance_temperature.dtype) if needed[3] and tau2 is not None else None
        out = [x if want else None for x, want in zip(found, needed[4:], strict=True)]
        sources = (temperature, instance_temperature, *embeddings, *grads[:3])
        return (None, None, *_final((tau, tau2, *out), *sources))


class _Saved(NamedTuple):
    """What an objective's backward pass needs besides its inputs."""

    losses: Tensor  # of the contrast, of all processes
    contrast: Tensor  # the contrast's state
    number: Tensor  # instances with something to align, of all processes; empty without a group
    columns: Tensor  # rows of all processes side by side; empty without a group
    u: Tensor
    z: Sequence[Tensor]
    spectral: Sequence[Tensor]

    @classmethod
    def unflattened(cls, flat: Sequence[Tensor], settings: ObjectiveSettings, embeddings: Sequence[Tensor]) -> _Saved:
        last = 5 + (_outputs(settings.spectral, embeddings) - 2 if settings.contrast == "modality" else 0)
        return cls(flat[0], flat[1], flat[2], flat[3], flat[4], flat[5:last], flat[last:])

    def flattened(self) -> list[Tensor]:
        return [*self[:5], *self.z, *self.spectral]


def _save_objective(
    ctx: Any,
    settings: ObjectiveSettings,
    mask: Tensor | None,
    temperature: Tensor | None,
    instance_temperature: Tensor | None,
    embeddings: Sequence[Tensor],
    saved: Sequence[Tensor],
) -> None:
    ctx.settings, ctx.inputs = settings, len(embeddings)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(mask, temperature, instance_temperature, *embeddings, *saved)


def _contrast_arguments(
    settings: ObjectiveSettings, mask: Tensor | None, u: Tensor, z: Sequence[Tensor], columns: Tensor
) -> tuple[Any, ...]:
    """What the contrast operators take before the temperatures."""
    group = settings.group
    start = 0 if group is None else group.start()
    if settings.contrast == "leading":
        return u, None if group is None else columns[:, : u.shape[1]], start
    raw = settings.contrast == "raw"
    if group is None:
        return z, u, mask, [], None, 0, raw
    d, k = u.shape[1], len(z)
    parts = [columns[:, m * d : (m + 1) * d] for m in range(1 if raw else k + 1)]
    present = columns[:, -1 - k : -1] != 0
    return z, u, mask, parts * 2 if raw else parts, present, start, raw


def _objective_forward(
    settings: ObjectiveSettings,
    mask: Tensor | None,
    temperature: Tensor | None,
    instance_temperature: Tensor | None,
    embeddings: tuple[Tensor, ...],
) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """((total, alignment, instance), what to save)."""
    group, by_modality = settings.group, settings.contrast != "leading"
    backend, *options = settings.spectral
    operators = available[backend].operators
    spectral_state: Sequence[Tensor] = ()
    if settings.contrast == "raw":
        # Raw similarities of norms of 1e20 exceed float32. (And a Function must not return its input.)
        u = embeddings[0].to(torch.float64, copy=True, memory_format=torch.contiguous_format)
        u = u if mask is None else u.masked_fill_(~reference.read_mask(mask), 0.0)
        z: Sequence[Tensor] = (u,)
        alignment = u.new_zeros(())
    else:
        outputs, spectral_state = operators.spectral_forward(embeddings, mask, temperature, *options)
        alignment, u, *z = outputs
    number, columns = u.new_empty((0,)), u.new_empty((0,))
    if group is not None:
        # Every process joins each collective, whatever its arguments or its rows, and none is left for the
        # backward pass: nobody can make another one wait for ever by skipping it.
        k = len(z) or (embeddings[0].shape[1] if embeddings[0].dim() == 3 else len(embeddings))
        present = u.new_ones((len(u), k)) if mask is None else reference.read_mask(mask).to(u.dtype)
        alignable = (present.sum(1, keepdim=True) >= 2).to(u.dtype)
        parts = [u, *(z if settings.contrast == "modality" else ()), *([present] if by_modality else ()), alignable]
        columns = group.gather(torch.cat(parts, 1))
        number = columns[:, -1].sum(dtype=torch.float64).clamp_min(1)
        alignment = (alignment.double() * len(group.sizes) / number).to(alignment.dtype)
    arguments = _contrast_arguments(settings, mask, u, z, columns)
    fixed = settings.fixed_temperature
    call = operators.modality_forward if by_modality else operators.instance_forward
    instance, losses, contrast_state = call(*arguments, instance_temperature, fixed)
    if group is not None:
        instance = instance * len(group.sizes)
        if by_modality:
            losses = group.gather(losses.flatten(0, 1).T).T.unflatten(0, losses.shape[:2])
        else:
            losses = group.gather(losses[:, None])[:, 0]
    if settings.contrast == "raw":
        instance = instance.to(torch.float64 if embeddings[0].dtype == torch.float64 else torch.float32)
        alignment = alignment.to(instance.dtype)
    total = torch.add(alignment, instance, alpha=settings.weight)
    kept = z if settings.contrast == "modality" else ()
    saved = _Saved(losses, contrast_state, number, columns, u, kept, spectral_state)
    return (total, alignment, instance), saved.flattened()


def _objective_backward(
    settings: ObjectiveSettings,
    mask: Tensor | None,
    temperature: Tensor | None,
    instance_temperature: Tensor | None,
    embeddings: tuple[Tensor, ...],
    flat: Sequence[Tensor],
    alignment: Tensor | None,
    instance: Tensor | None,
    needed: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Sequence[Tensor]]:
    """∂/∂τ, ∂/∂τ₂ and the gradients of the embeddings, from the incoming gradients of the two terms."""
    saved = _Saved.unflattened(flat, settings, embeddings)
    backend, *options = settings.spectral
    operators = available[backend].operators
    W = 1 if settings.group is None else len(settings.group.sizes)
    z = (saved.u,) if settings.contrast == "raw" else saved.z
    h: Tensor | None = None
    H: Sequence[Tensor | None] = [None] * len(z)
    slope2 = None
    if instance is not None:
        arguments = _contrast_arguments(settings, mask, saved.u, z, saved.columns)
        instance = instance if W == 1 else instance.double() * W
        rest = instance_temperature, settings.fixed_temperature, saved.losses, saved.contrast, instance
        if settings.contrast == "leading":
            h, slope2 = operators.instance_backward(*arguments, *rest)
        else:
            H, h, slope2 = operators.modality_backward(*arguments, *rest)
    if settings.contrast == "raw":
        assert h is not None  # nothing else than this one term is public
        assert H[0] is not None
        found = h + H[0] if mask is None else (h + H[0]).masked_fill(~reference.read_mask(mask), 0.0)
        return None, slope2, [found.to(embeddings[0].dtype)]
    if alignment is not None and settings.group is not None:
        alignment = (alignment.double() * W / saved.number).to(alignment.dtype)
    grads = [alignment, h, *H]
    call = operators.spectral_backward
    found = call(embeddings, mask, temperature, *options, list(saved.spectral), grads, needed)
    if temperature is None:
        return None, slope2, found
    return found[-1], slope2, found[:-1]


class _ObjectiveTransformed(_ReverseOnly, _Objective):
    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        settings, mask, temperature, instance_temperature, *embeddings = inputs
        found, saved = _objective_forward(settings, mask, temperature, instance_temperature, tuple(embeddings))
        return (*found, *saved)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        settings, mask, temperature, instance_temperature, *embeddings = inputs
        ctx.mark_non_differentiable(*output[3:])
        _save_objective(ctx, settings, mask, temperature, instance_temperature, embeddings, output[3:])


def _transforming() -> bool:
    """Whether ``torch.func`` transforms are active.

    Raises under ``torch.compile``: there Dynamo inlines a Function whose input does not itself require a
    gradient, finds an operator without a derivative, and the result is zeros.
    """
    active = torch._C._are_functorch_transforms_active()
    if torch.compiler.is_compiling() and (active or torch.autograd.forward_ad._current_level >= 0):
        raise NotImplementedError(_NO_COMPILED_TRANSFORM)
    return active


def _distinct(inputs: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """What goes to a Function: Dynamo takes no tensor twice, so while compiling repeats become views."""
    if not torch.compiler.is_compiling():
        return inputs
    found: list[Tensor | None] = []
    for x in inputs:
        found.append(x.view_as(x) if x is not None and any(x is other for other in inputs[: len(found)]) else x)
    return found


def spectral(
    settings: SpectralSettings,
    mask: Tensor | None,
    temperature: Tensor | None,
    embeddings: tuple[Tensor, ...],
) -> tuple[Tensor, ...]:
    """The wanted ones of alignment, sigma (B, min(d, k)) or (B, 1), u (B, d), v (B, k) and the z, k times (B, d)."""
    if _transforming():
        outputs = _SpectralTransformed.apply(settings, mask, temperature, *embeddings)
        return tuple(outputs[: _outputs(settings, embeddings)])
    result: tuple[Tensor, ...] = _Spectral.apply(settings, *_distinct((mask, temperature, *embeddings)))
    return result


def objective(
    settings: ObjectiveSettings,
    mask: Tensor | None,
    temperature: Tensor | None,
    instance_temperature: Tensor | None,
    embeddings: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    """alignment + weight · instance, alignment, instance: 0-d each."""
    function = _ObjectiveTransformed if _transforming() else _Objective
    inputs = _distinct((mask, temperature, instance_temperature, *embeddings))
    total, alignment, instance, *_ = function.apply(settings, *inputs)
    return total, alignment, instance
