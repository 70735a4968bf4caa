"""The autograd Function of every op: what is differentiated is a *call*, one object that knows its arithmetic.

A call is an object with

* ``forward(tensors) -> (outputs, saved)``: from the tensors given to ``apply`` (or None in their places) to a tuple of
  outputs, and a list of further tensors that its backward pass reads;
* ``backward(tensors, saved, grads, needed) -> gradients``: of each of the tensors, None for those that have none. The
  incoming ``grads`` are one for each output, None where nothing comes in; ``needed`` says which gradients are wanted;
* ``outputs(tensors) -> int``: how many outputs there are.

Both passes run outside of any graph. There are two Functions, since the two ways PyTorch has of writing one each lack
something: the form with ``ctx`` in ``forward`` is tens of microseconds a call faster, the form with ``setup_context``
is what ``torch.func`` transforms accept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._C._functorch import unwrap_if_dead
from torch.autograd import Function

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

Tensors = Sequence[Any]
"""Each a tensor or None."""


class Call(Protocol):
    """What ``apply`` differentiates."""

    def forward(self, tensors: Tensors) -> tuple[tuple[Tensor, ...], Sequence[Tensor]]: ...

    def backward(self, tensors: Tensors, saved: Sequence[Any], grads: Tensors, needed: Sequence[bool]) -> Tensors: ...

    def outputs(self, tensors: Tensors) -> int: ...


def apply(call: Call, tensors: Tensors) -> tuple[Tensor, ...]:
    """The call's outputs, differentiable with respect to the tensors.

    Raises NotImplementedError for what is not implemented: forward mode, vmap, second derivatives, and transforms under
    ``torch.compile``. (There Dynamo inlines a Function whose input does not itself require a gradient, finds an
    operator without a derivative, and the result would be zeros.)
    """
    result: tuple[Tensor, ...]
    transforming = torch._C._are_functorch_transforms_active()
    if torch.compiler.is_compiling():
        if transforming or torch.autograd.forward_ad._current_level >= 0:
            raise NotImplementedError(_NO_COMPILED_TRANSFORM)
        result = PMRLOp.apply(call, *_distinct(tensors))
    elif transforming:
        result = tuple(_Transformed.apply(call, *tensors)[: call.outputs(tensors)])
    else:
        result = _apply(call, *[x if x is None else unwrap_if_dead(x) for x in tensors])
    return result


class PMRLOp(Function):
    """(call, *tensors) -> the outputs."""

    # (With *inputs, since Dynamo leaves ctx out where a Function is given as many inputs as forward has parameters.)

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        call, *tensors = inputs
        outputs, saved = call.forward(tensors)
        _save(ctx, call, tensors, len(outputs), saved)
        return outputs  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        call, inputs, outputs = ctx.call
        tensors = ctx.saved_tensors
        saved, needed = tensors[inputs:], ctx.needs_input_grad[1:]
        tensors, incoming = tensors[:inputs], _plain(grads[:outputs])
        if torch.is_grad_enabled():  # the backward pass is to be differentiated, or compiled
            with torch.no_grad():
                found = call.backward(tensors, saved, incoming, needed)
            return (None, *_final(found, *tensors, *grads))
        return (None, *call.backward(tensors, saved, incoming, needed))


_apply = super(Function, PMRLOp).apply
"""What ``PMRLOp.apply`` comes to where no transform is active, without the two microseconds in which it finds that
out. What it does first is to unwrap tensors that have outlived a transform."""


def _save(ctx: Any, call: Call, tensors: Tensors, outputs: int, saved: Sequence[Tensor]) -> None:
    ctx.call = call, len(tensors), outputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *saved)


class _ReverseOnly:
    """What a Function tells ``torch.func``; left alone, ``torch.func.jvp`` returns zeros without a word.

    Only for the form used under transforms: Dynamo traces no Function that defines ``jvp``, and outside transforms
    forward-mode differentiation raises by itself.
    """

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(_NO_JVP)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        raise NotImplementedError(_NO_VMAP)


class _Transformed(_ReverseOnly, PMRLOp):
    """The same with what is saved as further outputs: ``setup_context`` sees nothing else of the forward pass."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        call, *tensors = inputs
        outputs, saved = call.forward(tensors)
        return (*outputs, *saved)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        call, *tensors = inputs
        outputs = call.outputs(tensors)
        ctx.mark_non_differentiable(*output[outputs:])
        _save(ctx, call, tensors, outputs, output[outputs:])


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


def _final(grads: Tensors, *sources: Tensor | None) -> Tensors:
    """``grads``, refusing a second differentiation. (While compiling, PyTorch itself refuses it.)"""
    if torch.compiler.is_compiling():
        return grads
    result: Tensors = _Final.apply(len(grads), *grads, *sources)
    return result


def _plain(grads: Tensors) -> Tensors:
    """Incoming gradients as memory holds them.

    A gradient that PyTorch has negated without touching memory (``.imag`` of a conjugate), or a zero without memory,
    is made an ordinary tensor for an operator's plain arguments, but not for those in a list.
    """
    if torch.compiler.is_compiling():
        return grads
    for g in grads:
        if g is not None and (g.is_neg() or g._is_zerotensor()):
            return [_ordinary(x) for x in grads]
    return grads


def _ordinary(g: Tensor | None) -> Tensor | None:
    if g is not None and g._is_zerotensor():
        return torch.zeros(g.shape, dtype=g.dtype, device=g.device)
    return g if g is None else g.resolve_neg()


def _distinct(tensors: Tensors) -> Tensors:
    """What goes to a Function: Dynamo takes no tensor twice, so repeats become views."""
    found: list[Tensor | None] = []
    for x in tensors:
        found.append(x.view_as(x) if x is not None and any(x is other for other in tensors[: len(found)]) else x)
    return found
