"""The autograd Functions: a backend's forward and backward functions in pairs, and nothing else.

Each pair exists twice, since the two ways PyTorch has of writing a Function each lack something: the
form with ``ctx`` in ``forward`` is tens of microseconds a call faster, the form with ``setup_context`` is what
``torch.func`` transforms accept. Both share their code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from .backends import available, constants

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

    @staticmethod
    def forward(
        ctx: Any,
        settings: SpectralSettings,
        mask: Tensor | None,
        temperature: Tensor | None,
        *embeddings: Tensor,
    ) -> tuple[Tensor, ...]:
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
        found = _call(call, embeddings, mask, temperature, *options, state, grads[: ctx.outputs], needed[3:])
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


class _Instance(Function):
    """(backend, fixed_temperature, rows, mask, temperature, u) -> (loss, losses)."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = _instance_forward(*inputs)
        _instance_context(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
        if grad is None:
            return (None,) * 6
        backend, fixed, rows = ctx.settings
        mask, temperature, u, losses = ctx.saved_tensors
        needed = ctx.needs_input_grad
        call = available[backend].operators.instance_backward
        h, slope = _call(call, u, mask, temperature, fixed, rows, losses, grad)
        tau = slope.to(temperature.dtype) if needed[4] else None
        return (None, None, None, None, *_final((tau, h if needed[5] else None), temperature, u, grad))


def _instance_forward(
    backend: str, fixed: float, rows: str, mask: Tensor | None, temperature: Tensor | None, u: Tensor
) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = available[backend].operators.instance_forward(u, mask, temperature, fixed, rows)
    return result


def _instance_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.settings = inputs[:3]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[3:], output[1])


class _InstanceTransformed(_ReverseOnly, _Instance):
    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        return _instance_forward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _instance_context(ctx, inputs, output)


class _Modality(Function):
    """(backend, fixed_temperature, mask, temperature, u, *z) -> (loss, losses of both directions)."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        output = _modality_forward(*inputs)
        _modality_context(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
        needed = ctx.needs_input_grad
        if grad is None:
            return (None,) * len(needed)
        backend, fixed = ctx.settings
        mask, temperature, u, *z, forth, back = ctx.saved_tensors
        call = available[backend].operators.modality_backward
        H, h, slope = _call(call, z, u, mask, temperature, fixed, forth, back, grad)
        tau = slope.to(temperature.dtype) if needed[3] else None
        out = [x if want else None for x, want in zip((h, *H), needed[4:], strict=True)]
        return (None, None, None, *_final((tau, *out), temperature, u, *z, grad))


def _modality_forward(
    backend: str, fixed: float, mask: Tensor | None, temperature: Tensor | None, u: Tensor, *z: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    call = available[backend].operators.modality_forward
    result: tuple[Tensor, Tensor, Tensor] = call(z, u, mask, temperature, fixed)
    return result


def _modality_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.settings = inputs[:2]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[2:], *output[1:])


class _ModalityTransformed(_ReverseOnly, _Modality):
    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _modality_forward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _modality_context(ctx, inputs, output)


def _transforming() -> bool:
    """Whether ``torch.func`` transforms are active.

    Raises under ``torch.compile``: there Dynamo inlines a Function whose input does not itself require a
    gradient, finds an operator without a derivative, and the result is zeros.
    """
    active = torch._C._are_functorch_transforms_active()
    if torch.compiler.is_compiling() and (active or torch.autograd.forward_ad._current_level >= 0):
        raise NotImplementedError(_NO_COMPILED_TRANSFORM)
    return active


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
    result: tuple[Tensor, ...] = _Spectral.apply(settings, mask, temperature, *embeddings)
    return result


def instance(
    backend: str, fixed: float, rows: str, mask: Tensor | None, temperature: Tensor | None, u: Tensor
) -> Tensor:
    """The instance contrast of the rows of u (B, d): their mean loss, 0-d."""
    function = _InstanceTransformed if _transforming() else _Instance
    loss: Tensor = function.apply(backend, fixed, rows, mask, temperature, u)[0]
    return loss


def modality(
    backend: str,
    fixed: float,
    mask: Tensor | None,
    temperature: Tensor | None,
    u: Tensor,
    z: tuple[Tensor, ...],
) -> Tensor:
    """The modality contrast of the k tensors z (B, d) with u (B, d): the mean loss, 0-d."""
    function = _ModalityTransformed if _transforming() else _Modality
    loss: Tensor = function.apply(backend, fixed, mask, temperature, u, *z)[0]
    return loss
