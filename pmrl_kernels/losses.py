"""The losses: alignment by singular values, contrast of leading vectors, and both together (PMRL)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, overload

import torch
from torch import Tensor

from . import inputs
from .inputs import Embeddings, Mask
from .ops import function, resolve
from .ops.contrast.spec import RAW, Contrast, RawContrast, kind
from .ops.contrast.spec import op as contrast_op
from .ops.objective import Objective
from .ops.spectral import spec
from .ops.spectral.spec import SPECTRAL, Spectral

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


INSTANCE_TEMPERATURES = {"leading": 0.1, "modality": 0.2, "leave_one_out": 0.1, "pairs": 0.1}
"""By contrast, what ``instance_temperature=None`` means. (docs/recipes.md has the measurements.)"""

_REDUCTIONS = {"mean": spec.ALIGNMENT_MEAN, "sum": spec.ALIGNMENT_SUM, "none": spec.ALIGNMENT}


class PMRLComponents(NamedTuple):
    """What ``pmrl_loss(..., return_components=True)`` returns, 0-d tensors, each differentiable."""

    total: Tensor
    """alignment_weight · alignment + instance_weight · instance."""
    alignment: Tensor
    """Mean alignment term over the instances with at least two modalities; 0 where ``alignment_weight`` is 0."""
    instance: Tensor
    """The contrastive term."""


def dominant_sv_loss(
    *embeddings: Embeddings,
    temperature: float | Tensor = 0.05,
    mask: Mask | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    objective: str = "softmax",
    backend: str | None = None,
) -> Tensor:
    r"""Pushes up the largest singular value of each instance's :math:`d \times k` embedding matrix.

    All k modalities of an instance agree exactly when their matrix :math:`Z_i` of normalised embeddings has
    rank 1. With its singular values :math:`\sigma_1 \ge \sigma_2 \ge \dots`, the loss of instance i is

    * ``objective="softmax"`` (PMRL's): :math:`\log \sum_j \exp((\sigma_j - \sigma_1)/\tau)`, the
      cross-entropy of the singular values as logits against the first. Evaluated as log1p of a sum over
      j >= 2, so that it does not vanish in float32 while its gradient still matters.
    * ``objective="leading"``: :math:`\lVert Z_i\rVert_F - \sigma_1`, which is :math:`\sqrt{k_i} - \sigma_1`
      for normalised embeddings. Needs σ₁ alone, by power iteration; never saturates; has no temperature.

    Args:
        embeddings: k tensors (B, d), one per modality; or one list, tuple or dict of them; or one tensor
            (B, k, d). float32, bfloat16, float16 or float64; 1 <= k <= 32, d >= 1. A (B, d, k) stack, as in
            the PMRL authors' code, is passed as ``Z.transpose(1, 2)``. The modalities' dtypes may differ:
            each is read as it is, and gets its gradient in its own.
        temperature: τ > 0, in the unit of the singular values: a float, or a 0-d tensor on the embeddings'
            device, which gets a gradient if it requires one and is never read by the host. How to choose it:
            docs/recipes.md.
        mask: bool (B, k), True = present (a dict of (B,) where embeddings are a dict). An absent modality is
            no column at all, whatever its buffer holds.
        normalize: divide every embedding by its norm first. With False the columns enter as they are.
        reduction: "mean" over the instances with at least two modalities (0 if there are none), "sum", or
            "none" for (B,).
        objective: "softmax" or "leading".
        backend: "native" (CPUs), "cuda" or "triton" (GPUs), or "reference"; None takes the fastest that works.

    Returns:
        A 0-d tensor, or (B,) with ``reduction="none"``; float32 (float64 if any embedding is float64).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range. A temperature
            *tensor* that is not finite and positive cannot raise without stalling a GPU: it gives NaN, with
            its own gradient and those of all present embeddings, whatever the batch.
        RuntimeError: a backend asked for by name that cannot run.
        NotImplementedError: forward-mode or second derivatives.

    Gradient:
        Finite at full alignment and for orthogonal, missing, zero and repeated modalities, where that of
        ``torch.linalg.svd`` follows arbitrary vectors, or is NaN once singular vectors are used too. A σ_j
        at or below eps32·σ₁ (√(k·eps64)·σ₁ in float64) has weight 0: the minimum-norm subgradient. Where
        the largest value is tied, see :func:`~pmrl_kernels.dominant_singular_triplet`. Absent modalities
        and zero vectors get exact zeros. A NaN or Inf makes its own instance's loss and gradients NaN, no
        other's.

    Source: PMRL (arXiv 2507.17343), section 3; docs/mathematics.md.

    Example:
        >>> import torch
        >>> text, video, audio = torch.eye(3).unbind(0)
        >>> batch = [x[None] for x in (text, video, audio)]
        >>> dominant_sv_loss(batch)  # nothing in common: log 3
        tensor(1.0986)
        >>> dominant_sv_loss(batch[0], batch[0], batch[0]) < 1e-12  # full agreement
        tensor(True)
    """
    batch = inputs.canonical(embeddings, mask)
    tau, fixed = inputs.temperature(temperature, "temperature", batch.device)
    normalize = inputs.flag(normalize, "normalize")
    reduction = inputs.one_of(reduction, "reduction", tuple(_REDUCTIONS))
    spectrum = inputs.one_of(objective, "objective", ("softmax", "leading")) == "softmax"
    pair = resolve(SPECTRAL, backend, batch.device, batch.dtype, batch.k, batch.d)
    call = Spectral(pair, _REDUCTIONS[reduction], spectrum, normalize, fixed)
    return function.apply(call, (batch.mask, tau, *batch.tensors))[0]


def instance_contrastive_loss(
    u: Tensor,
    temperature: float | Tensor = 0.1,
    normalize: bool = True,
    mask: Tensor | None = None,
    group: ProcessGroup | Literal["world"] | None = None,
    local_sizes: Sequence[int] | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Keeps instances apart: each vector of a batch against all the others.

    :math:`\frac1B \sum_i -\log \frac{\exp(u_i^\top u_i/\tau)}{\sum_j \exp(u_i^\top u_j/\tau)}`, which is
    ``cross_entropy(u @ u.T / tau, arange(B))``, evaluated as the log1p of a sum over j ≠ i: no cancellation
    when the loss is small, no B x B matrix at large B.

    Args:
        u: (B, d), one vector per instance, such as the leading singular vectors of
            :func:`~pmrl_kernels.dominant_singular_triplet`.
        temperature: τ > 0, a float or a 0-d tensor (see :func:`dominant_sv_loss`), one of float32's normal
            numbers, 1.2e-38 to 3.4e38, whatever the dtypes.
        normalize: divide every row by its norm first. With False the rows enter as they are.
        mask: bool (B,), True = the row takes part. Rows without a direction (zero vectors, with
            ``normalize=True``) are left out as well, on both sides.
        group, local_sizes: a batch spread over processes, as in :func:`pmrl_loss`.
        backend: "native" (CPUs), "cuda" or "triton" (GPUs), or "reference"; None takes the fastest that works.

    Returns:
        A 0-d tensor, the mean over the rows that take part (0 if there are none); float32 (float64 for
        float64 input).

    Raises:
        TypeError, ValueError, RuntimeError, NotImplementedError: as in :func:`dominant_sv_loss`; ValueError too on
            every process of a group whose processes differ in d, ``normalize`` or dtype, as in :func:`pmrl_loss`.

    Gradient:
        Exact, zero for rows left out. The rows are mixed, so a NaN in one that takes part makes the loss
        and all gradients NaN.

    Source: PMRL (arXiv 2507.17343), section 3; docs/mathematics.md, "Instance term".

    Example:
        >>> import torch
        >>> instance_contrastive_loss(torch.eye(2), temperature=0.5)  # log(1 + exp(-2))
        tensor(0.1269)
    """
    u, mask = inputs.rows(u, mask)
    tau, fixed = inputs.temperature(temperature, "temperature", u.device, contrast=True)
    normalize = inputs.flag(normalize, "normalize")
    name, parts = ("leading", kind("leading", 1)) if normalize else ("raw", RAW)
    problem = backend, u.device, u.dtype, 1, u.shape[1]
    pair = resolve(contrast_op(parts, normalize), *problem)
    column = None if mask is None else mask[:, None]
    batch = inputs.Batch((u,), column, u.shape[0], 1, u.shape[1], u.device, u.dtype)
    spread = inputs.spread_batch(group, local_sizes, batch, name, "u")
    contrast = Contrast(pair, parts, fixed, spread)
    if not normalize:
        return function.apply(RawContrast(contrast), (column, tau, u))[0]
    # A normalised row is the leading vector of an instance of one modality.
    spectral = Spectral(resolve(SPECTRAL, *problem), spec.ALIGNMENT_SUM | spec.U, spectrum=False)
    return function.apply(Objective(spectral, contrast, 1.0, 1.0), (column, None, tau, u))[2]


@overload
def pmrl_loss(
    *embeddings: Embeddings,
    temperature: float | Tensor = ...,
    instance_temperature: float | Tensor | None = ...,
    instance_weight: float = ...,
    alignment_weight: float = ...,
    mask: Mask | None = ...,
    normalize: bool = ...,
    objective: str = ...,
    contrast: str = ...,
    group: ProcessGroup | Literal["world"] | None = ...,
    local_sizes: Sequence[int] | None = ...,
    return_components: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...


@overload
def pmrl_loss(
    *embeddings: Embeddings,
    temperature: float | Tensor = ...,
    instance_temperature: float | Tensor | None = ...,
    instance_weight: float = ...,
    alignment_weight: float = ...,
    mask: Mask | None = ...,
    normalize: bool = ...,
    objective: str = ...,
    contrast: str = ...,
    group: ProcessGroup | Literal["world"] | None = ...,
    local_sizes: Sequence[int] | None = ...,
    return_components: Literal[True],
    backend: str | None = ...,
) -> PMRLComponents: ...


@overload
def pmrl_loss(
    *embeddings: Embeddings,
    temperature: float | Tensor = ...,
    instance_temperature: float | Tensor | None = ...,
    instance_weight: float = ...,
    alignment_weight: float = ...,
    mask: Mask | None = ...,
    normalize: bool = ...,
    objective: str = ...,
    contrast: str = ...,
    group: ProcessGroup | Literal["world"] | None = ...,
    local_sizes: Sequence[int] | None = ...,
    return_components: bool,
    backend: str | None = ...,
) -> Tensor | PMRLComponents: ...


def pmrl_loss(
    *embeddings: Embeddings,
    temperature: float | Tensor = 0.05,
    instance_temperature: float | Tensor | None = None,
    instance_weight: float = 1.0,
    alignment_weight: float = 1.0,
    mask: Mask | None = None,
    normalize: bool = True,
    objective: str = "softmax",
    contrast: str = "leading",
    group: ProcessGroup | Literal["world"] | None = None,
    local_sizes: Sequence[int] | None = None,
    return_components: bool = False,
    backend: str | None = None,
) -> Tensor | PMRLComponents:
    r"""The whole PMRL objective: align the modalities of an instance, keep instances apart.

    ``alignment_weight · alignment + instance_weight · instance``, where alignment is :func:`dominant_sv_loss` and
    instance is

    * ``contrast="leading"`` (PMRL's): :func:`instance_contrastive_loss` of the leading left singular vectors
      u_i. Made for encoders that are already aligned.
    * ``contrast="leave_one_out"`` (ours): every modality's embedding must find in the batch the direction that the
      *other* modalities of its instance share, and be found by it: the mean over (i, m) of
      :math:`\tfrac12[\mathrm{CE}(z_m W_m^\top/\tau_2) + \mathrm{CE}(W_m z_m^\top/\tau_2)]`, rows of :math:`W_m`
      being :math:`w_m = y_m/\lVert y_m\rVert,\ y_m = \sum_{j\ne m} \lvert v_j\rvert z_j`, with the leading right
      singular vector v. Trains encoders from scratch, at the cost of k similarity matrices. At k = 2 it is InfoNCE.
    * ``contrast="pairs"``: InfoNCE over all pairs of modalities, the mean over pairs m < l and the instances that
      have both of :math:`\tfrac12[\mathrm{CE}(z_m Z_l^\top/\tau_2) + \mathrm{CE}(z_l Z_m^\top/\tau_2)]`. The rival of
      the former, at the cost of k (k − 1)/2 similarity matrices.
    * ``contrast="modality"`` (ours): every modality's embedding must find its instance's leading vector in
      the batch and be found by it, the mean over present pairs (i, m) of
      :math:`\tfrac12[\mathrm{CE}(z_m U^\top/\tau_2) + \mathrm{CE}(U z_m^\top/\tau_2)]`. An embedding is part of its
      own target, so below :math:`\tau_2 = 1/(\sqrt k\,\log(B - 1))` no agreement is needed; k similarity matrices.

    Which one, and with which temperatures: docs/recipes.md. From scratch, ``contrast="leave_one_out"`` with
    ``temperature=1.0`` is the place to start.

    Args:
        embeddings, mask, normalize, objective, backend: as in :func:`dominant_sv_loss`.
        temperature: τ₁ of the alignment term (unused with ``objective="leading"``).
        instance_temperature: τ₂ of the contrastive term; a float or a 0-d tensor, as in
            :func:`instance_contrastive_loss`. None: 0.1, and 0.2 with ``contrast="modality"``.
        instance_weight, alignment_weight: weights of the two terms, floats of at least 0 that float32 can hold.
            ``alignment_weight=0`` leaves out the alignment term with its work, and returns 0 for it.
        contrast: "leading", "modality", "leave_one_out" or "pairs".
        group: a ``torch.distributed`` group of processes whose batches together are the batch, or "world" for
            all processes, whose group is looked up by each call; see below. None: this process's batch alone.
            (In ``torch.distributed`` None means all processes.)
        local_sizes: how many rows each process of the group has, in the order of ranks; from all processes or
            from none. Without it the processes tell one another first, which the host waits for.
        return_components: return the named tuple (total, alignment, instance) instead of the total.

    Returns:
        A 0-d tensor or a :class:`PMRLComponents` of three; float32 (float64 if any embedding is float64).

    Raises:
        TypeError, ValueError, RuntimeError, NotImplementedError: as in :func:`dominant_sv_loss`; ValueError too
            for ``group="world"`` before ``torch.distributed.init_process_group``, and on every process of a
            group whose processes differ in what they gather (see below).

    Warns:
        UserWarning: once in a process, where ``contrast="modality"`` is given a Python τ₂ below the temperature that
            a batch of this size needs.

    Gradient:
        Through the singular values, through u, v and the w, and directly into the embeddings, all in one backward
        pass over them. What leaves the contrastive term, on both sides: instances without modalities, or of zero
        vectors only, which have no u; with "leave_one_out" and "pairs" zero vectors, and with "leave_one_out" w_m
        where the others are nothing beside m or cancel, :math:`\lVert y_m\rVert \le 2^{-12} \sum_j \lvert v_j\rvert
        \lVert z_j\rVert`; an embedding without a partner has no loss, but is still one that others must not choose. The
        subgradient of :math:`\lvert v_j\rvert` at 0 is 0. Instances with one modality leave the alignment term. A NaN
        in one instance makes the contrastive term and everyone's gradient NaN, since it mixes instances.

    Over processes:
        Every process of ``group`` calls with its own rows, of any number, 0 included, and with the same
        options; their d and the dtype of results are the same everywhere, and but for ``contrast="leading"`` k is
        too. Where these or ``contrast`` differ, every process raises a ValueError that says which rank has what;
        with ``local_sizes`` nothing is exchanged beforehand, and the gather aborts or hangs. What is contrasted is
        gathered: u, the z, the w. Each process returns W times its share of the loss, W being the number of processes:
        the mean over processes is the loss of the whole batch, and the gradients that ``DistributedDataParallel``
        averages are its gradients, however the batch was split. The backward pass runs no collective. It takes for
        granted that all processes get the same gradient from above, as they do from ``loss.backward()``; do not scale
        the loss by something that differs between them.

    Source: PMRL (arXiv 2507.17343), section 3; docs/mathematics.md.

    Example:
        >>> import torch
        >>> text, video, audio = torch.eye(4), torch.eye(4), torch.eye(4)
        >>> total, alignment, instance = pmrl_loss(text, video, audio, return_components=True)
        >>> print(f"{alignment:.4f} {instance:.4f} {total:.4f}")  # log(1 + 3 exp(-10)) is the instance term
        0.0000 0.0001 0.0001
    """
    batch = inputs.canonical(embeddings, mask)
    tau, fixed = inputs.temperature(temperature, "temperature", batch.device)
    contrast = inputs.one_of(contrast, "contrast", tuple(INSTANCE_TEMPERATURES))
    given = INSTANCE_TEMPERATURES[contrast] if instance_temperature is None else instance_temperature
    tau2, fixed2 = inputs.temperature(given, "instance_temperature", batch.device, contrast=True)
    weights = inputs.weight(alignment_weight, "alignment_weight"), inputs.weight(instance_weight, "instance_weight")
    normalize = inputs.flag(normalize, "normalize")
    spectrum = inputs.one_of(objective, "objective", ("softmax", "leading")) == "softmax"
    return_components = inputs.flag(return_components, "return_components")
    problem = backend, batch.device, batch.dtype, batch.k, batch.d
    parts = kind(contrast, batch.k)
    pairs = resolve(SPECTRAL, *problem), resolve(contrast_op(parts, normalize), *problem)

    spread = inputs.spread_batch(group, local_sizes, batch, contrast)
    if contrast == "modality" and tau2 is None:
        _warn_of_floor(fixed2, batch.k, batch.B if spread is None else sum(spread.sizes))
    wanted = spec.U * parts.u | spec.Z * parts.z | spec.W * parts.w
    if weights[0] > 0:
        wanted |= spec.ALIGNMENT_MEAN if spread is None else spec.ALIGNMENT_SUM
    else:
        spectrum = False  # the leading pair is all there is to find
    call = Objective(
        Spectral(pairs[0], wanted, spectrum, normalize, fixed), Contrast(pairs[1], parts, fixed2, spread), *weights
    )
    total, alignment, instance = function.apply(call, (batch.mask, tau, tau2, *batch.tensors))
    return PMRLComponents(total, alignment, instance) if return_components else total


_warned_of_floor = False


def _warn_of_floor(temperature: float, k: int, B: int) -> None:
    """Says once that the modality contrast asks for no agreement at this temperature. Of the default, which only tiny
    batches have too low, it says nothing."""
    global _warned_of_floor
    if _warned_of_floor or torch.compiler.is_compiling() or B < 3 or temperature == INSTANCE_TEMPERATURES["modality"]:
        return
    floor = 1 / (math.sqrt(k) * math.log(B - 1))
    if temperature < floor:
        _warned_of_floor = True
        warnings.warn(
            f"instance_temperature: got {temperature}, wanted at least 1/(sqrt(k) log(B - 1)) = {floor:.3f} with "
            f'contrast="modality" at k = {k}, B = {B}: an embedding is part of its own instance\'s leading vector, so '
            "below that the contrast is satisfied by modalities that do not agree at all. "
            'contrast="leave_one_out" has no such least temperature.',
            stacklevel=3,
        )
