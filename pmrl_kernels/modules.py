"""The losses as ``nn.Module``s, with temperatures that can be learned."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from . import inputs
from .inputs import Embeddings, Mask
from .joint import joint_contrastive_loss
from .losses import INSTANCE_TEMPERATURES, PMRLComponents, dominant_sv_loss, pmrl_loss
from .ops import check_name
from .ops.joint.spec import NAMES

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Self

_CPU = torch.device("cpu")
_LARGEST_RHO = 30.0


class Temperature(nn.Module):
    r"""A temperature above a least value: a constant, or learned as :math:`\tau = \tau_{min} + e^{\rho}`.

    The parameter ρ can take any value and τ stays positive. The least value matters: the alignment loss
    falls whenever its temperature does (and so does the contrast of leading vectors), so without one a
    learned τ drifts towards 0. See docs/recipes.md, also on weight decay and on sharding.

    ρ has the shape (1,), since what shards parameters (FSDP) takes none without dimensions. States in which it has
    none, as earlier versions saved it, load.

    Args:
        initial: τ at the start, a float above ``minimum``, if it is learned by e⁻³⁰ to e³⁰.
        learnable: make ρ a parameter; else τ is a plain float.
        minimum: τ_min >= 0.
        name: what errors call ``initial``.

    Returns:
        Called without arguments, τ: a 0-d tensor if it is learned, else a float.

    Raises:
        TypeError, ValueError: a bad argument, when the module is made.
        RuntimeError: when called where only a shard of ρ is at hand.

    Example:
        >>> tau = Temperature(0.05, learnable=True)
        >>> round(tau().item(), 4), [name for name, _ in tau.named_parameters()]
        (0.05, ['log_excess'])
    """

    def __init__(
        self, initial: float, learnable: bool = False, minimum: float = 0.01, name: str = "temperature"
    ) -> None:
        super().__init__()
        if isinstance(initial, Tensor):
            raise TypeError(f"{name}: got a tensor, wanted a float, the initial value if it is learned")
        self.initial = inputs.temperature(initial, name, _CPU)[1]
        self.minimum = inputs.weight(minimum, "minimum")
        if inputs.flag(learnable, "learnable"):
            if not self.minimum < self.initial:
                raise ValueError(f"{name}: got {initial!r}, wanted more than the least value {minimum!r}")
            if not math.exp(-_LARGEST_RHO) <= self.initial - self.minimum <= math.exp(_LARGEST_RHO):
                raise ValueError(
                    f"{name}: got {initial!r} with a least value of {minimum!r}, wanted a difference of "
                    f"{math.exp(-_LARGEST_RHO):.1e} to {math.exp(_LARGEST_RHO):.1e} of a temperature that is learned"
                )
            self.log_excess = nn.Parameter(torch.empty(1))
            self.reset_parameters()
        else:
            self.register_parameter("log_excess", None)

    def reset_parameters(self) -> None:
        """τ as at the start. What makes models on the meta device calls this once there is memory."""
        if self.log_excess is not None:
            nn.init.constant_(self.log_excess, math.log(self.initial - self.minimum))

    def forward(self) -> Tensor | float:
        """τ: a 0-d tensor if it is learned, else a float. RuntimeError where only a shard of ρ is at hand."""
        if self.log_excess is None:
            return self.initial
        # A DTensor, or what is left of a parameter where FSDP1 keeps it elsewhere.
        if hasattr(self.log_excess, "full_tensor") or self.log_excess.numel() != 1:
            raise RuntimeError(
                "log_excess: got a shard of it, wanted the whole parameter; call the loss within the forward pass of "
                "the module that fully_shard was given, or give it the loss too (docs/recipes.md, Learned temperatures)"
            )
        # Where the bounds bite, the loss is flat in ρ already; without them τ could become Inf, or 0. A
        # float16 module's exp would overflow long before.
        rho = self.log_excess.to(torch.promote_types(self.log_excess.dtype, torch.float32))
        return self.minimum + rho.reshape(()).clamp(-_LARGEST_RHO, _LARGEST_RHO).exp()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # Earlier versions had a parameter without dimensions. (The other way round PyTorch sees to it.)
        saved = state_dict.get(f"{prefix}log_excess")
        if isinstance(saved, Tensor) and saved.dim() == 0:
            state_dict[f"{prefix}log_excess"] = saved.reshape(1)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        learned = f", learnable=True, minimum={self.minimum}" if self.log_excess is not None else ""
        return f"{self.initial}{learned}"


class DominantSVLoss(nn.Module):
    r"""Module form of :func:`~pmrl_kernels.dominant_sv_loss`; formula, shapes and gradient rules are there.

    Args:
        temperature: τ, a float; with ``learnable_temperature`` its initial value.
        learnable_temperature: learn τ, kept above ``min_temperature`` (see :class:`~pmrl_kernels.modules.Temperature`).
        min_temperature: least value of a learned τ, >= 0.
        normalize, reduction, objective, backend: as in the function.

    Raises:
        TypeError, ValueError: a bad argument, when the module is made.

    Source: PMRL (arXiv 2507.17343), section 3; docs/mathematics.md.

    Example:
        >>> import torch
        >>> loss = DominantSVLoss(temperature=0.1, learnable_temperature=True)
        >>> embeddings = [torch.randn(8, 16) for _ in range(3)]
        >>> loss(embeddings).backward()
        >>> loss.temperature.log_excess.grad is not None
        True
    """

    def __init__(
        self,
        temperature: float = 0.05,
        *,
        learnable_temperature: bool = False,
        min_temperature: float = 0.01,
        normalize: bool = True,
        reduction: str = "mean",
        objective: str = "softmax",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        minimum = inputs.weight(min_temperature, "min_temperature")
        learned = inputs.flag(learnable_temperature, "learnable_temperature")
        self.temperature = Temperature(temperature, learned, minimum)
        self.normalize = inputs.flag(normalize, "normalize")
        self.reduction = inputs.one_of(reduction, "reduction", ("mean", "sum", "none"))
        self.objective = inputs.one_of(objective, "objective", ("softmax", "leading"))
        self.backend = check_name(backend)

    def forward(self, *embeddings: Embeddings, mask: Mask | None = None) -> Tensor:
        """The loss of k tensors (B, d), in any form the function takes."""
        return dominant_sv_loss(
            *embeddings,
            temperature=self.temperature(),
            mask=mask,
            normalize=self.normalize,
            reduction=self.reduction,
            objective=self.objective,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"normalize={self.normalize}, reduction={self.reduction!r}, objective={self.objective!r}"


class _Spread(nn.Module):
    """A loss with a group of processes, which can be copied with it, but not saved."""

    group: ProcessGroup | Literal["world"] | None

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        if self.group is not None:
            memo[id(self.group)] = self.group
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self._state(), memo))
        return twin

    def __copy__(self) -> Self:  # by __getstate__ it would have to be one that can be pickled
        twin = self.__class__.__new__(self.__class__)
        twin.__dict__.update(self._state())
        return twin

    def __getstate__(self) -> dict[str, Any]:
        if not (self.group is None or isinstance(self.group, str)):
            raise pickle.PicklingError(
                "group: got a module with one to pickle, wanted one without, since a group of processes cannot be "
                'saved or sent; save its state_dict() instead, or make it with group="world", which can'
            )
        return self._state()

    def _state(self) -> dict[str, Any]:
        # as nn.Module has it: what `.compile()` left stays behind
        return {name: value for name, value in self.__dict__.items() if name != "_compiled_call_impl"}

    def _of_processes(self) -> str:
        if self.group is None:
            return ""
        return f", group={self.group!r}" if isinstance(self.group, str) else f", group of {self.group.size()}"


class PMRLLoss(_Spread):
    r"""Module form of :func:`~pmrl_kernels.pmrl_loss`; formula, shapes and gradient rules are there.

    Args:
        temperature, instance_temperature: τ₁ and τ₂, floats; initial values where learned. An ``instance_temperature``
            of None is that of the contrast, as in the function.
        learnable_temperature, learnable_instance_temperature: learn τ₁, τ₂, each kept above
            ``min_temperature`` (see :class:`~pmrl_kernels.modules.Temperature`).
        min_temperature: least value of learned temperatures, >= 0.
        instance_weight, alignment_weight, normalize, objective, contrast, group, return_components, backend: as in
            the function, and so is ``local_sizes``, which goes to each call.

    A deep copy shares ``group``. A module with a ``torch.distributed`` group cannot be pickled, one with
    ``group="world"`` can, and can be made before ``init_process_group``; a ``state_dict()`` always can.

    Raises:
        TypeError, ValueError: a bad argument, when the module is made.

    Source: PMRL (arXiv 2507.17343), section 3; docs/mathematics.md.

    Example:
        >>> import torch
        >>> loss = PMRLLoss(temperature=1.0, contrast="leave_one_out")
        >>> text, video, audio = (torch.randn(8, 16) for _ in range(3))
        >>> loss(text, video, audio).shape
        torch.Size([])
    """

    def __init__(
        self,
        temperature: float = 0.05,
        instance_temperature: float | None = None,
        instance_weight: float = 1.0,
        *,
        alignment_weight: float = 1.0,
        learnable_temperature: bool = False,
        learnable_instance_temperature: bool = False,
        min_temperature: float = 0.01,
        normalize: bool = True,
        objective: str = "softmax",
        contrast: str = "leading",
        group: ProcessGroup | Literal["world"] | None = None,
        return_components: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        minimum = inputs.weight(min_temperature, "min_temperature")
        learned = inputs.flag(learnable_temperature, "learnable_temperature")
        self.temperature = Temperature(temperature, learned, minimum)
        name = "instance_temperature"
        learned = inputs.flag(learnable_instance_temperature, f"learnable_{name}")
        self.contrast = inputs.one_of(contrast, "contrast", tuple(INSTANCE_TEMPERATURES))
        initial = INSTANCE_TEMPERATURES[contrast] if instance_temperature is None else instance_temperature
        inputs.temperature(initial, name, _CPU, contrast=True)
        self.instance_temperature = Temperature(initial, learned, minimum, name)
        self.alignment_weight = inputs.weight(alignment_weight, "alignment_weight")
        self.instance_weight = inputs.weight(instance_weight, "instance_weight")
        self.normalize = inputs.flag(normalize, "normalize")
        self.objective = inputs.one_of(objective, "objective", ("softmax", "leading"))
        self.group = inputs.named_group(group)
        self.return_components = inputs.flag(return_components, "return_components")
        self.backend = check_name(backend)

    def forward(
        self, *embeddings: Embeddings, mask: Mask | None = None, local_sizes: Sequence[int] | None = None
    ) -> Tensor | PMRLComponents:
        """The loss of k tensors (B, d), in any form the function takes."""
        components = pmrl_loss(
            *embeddings,
            temperature=self.temperature(),
            instance_temperature=self.instance_temperature(),
            instance_weight=self.instance_weight,
            alignment_weight=self.alignment_weight,
            mask=mask,
            normalize=self.normalize,
            objective=self.objective,
            contrast=self.contrast,
            group=self.group,
            local_sizes=local_sizes,
            return_components=True,
            backend=self.backend,
        )
        return components if self.return_components else components.total

    def extra_repr(self) -> str:
        return (
            f"alignment_weight={self.alignment_weight}, instance_weight={self.instance_weight}, "
            f"normalize={self.normalize}, "
            f"objective={self.objective!r}, contrast={self.contrast!r}{self._of_processes()}"
        )


class JointContrastiveLoss(_Spread):
    r"""Module form of :func:`~pmrl_kernels.joint_contrastive_loss`; formula, shapes and gradient rules are there.

    Args:
        score, label_smoothing, normalize, half_gradient, group, backend: as in the function; ``positives``, ``mask``
            and ``local_sizes`` go to each call.
        temperature: τ, a float; with ``learnable_temperature`` its initial value.
        learnable_temperature: learn τ, kept above ``min_temperature`` (see :class:`~pmrl_kernels.modules.Temperature`).
        min_temperature: least value of a learned τ, >= 0.

    Copies and pickles: as :class:`PMRLLoss`.

    Raises:
        TypeError, ValueError: a bad argument, when the module is made.

    Source: GRAM (arXiv 2412.11959), section 3; docs/mathematics.md, "Joint scores".

    Example:
        >>> import torch
        >>> loss = JointContrastiveLoss("gain", learnable_temperature=True)
        >>> text, video, audio = (torch.randn(8, 16) for _ in range(3))
        >>> loss(text, video, audio).backward()
        >>> loss.temperature.log_excess.grad is not None
        True
    """

    def __init__(
        self,
        score: str = "gain",
        temperature: float = 0.07,
        *,
        learnable_temperature: bool = False,
        min_temperature: float = 0.01,
        label_smoothing: float = 0.0,
        normalize: bool = True,
        half_gradient: bool = False,
        group: ProcessGroup | Literal["world"] | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        minimum = inputs.weight(min_temperature, "min_temperature")
        learned = inputs.flag(learnable_temperature, "learnable_temperature")
        inputs.temperature(temperature, "temperature", _CPU, contrast=True)
        self.temperature = Temperature(temperature, learned, minimum)
        self.score = inputs.one_of(score, "score", NAMES)
        self.label_smoothing = inputs.smoothing(label_smoothing)
        self.normalize = inputs.flag(normalize, "normalize")
        self.half_gradient = inputs.flag(half_gradient, "half_gradient")
        self.group = inputs.named_group(group)
        self.backend = check_name(backend)

    def forward(
        self,
        query: Tensor,
        *candidates: Embeddings,
        positives: Tensor | None = None,
        mask: Mask | None = None,
        local_sizes: Sequence[int] | Sequence[tuple[int, int]] | None = None,
    ) -> Tensor:
        """The loss of queries (Nq, d) and candidates, in any form the function takes."""
        return joint_contrastive_loss(
            query,
            *candidates,
            score=self.score,
            temperature=self.temperature(),
            label_smoothing=self.label_smoothing,
            positives=positives,
            mask=mask,
            normalize=self.normalize,
            half_gradient=self.half_gradient,
            group=self.group,
            local_sizes=local_sizes,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        half = ", half_gradient=True" if self.half_gradient else ""
        return (
            f"{self.score!r}, label_smoothing={self.label_smoothing}, normalize={self.normalize}{half}"
            f"{self._of_processes()}"
        )


class _Published(JointContrastiveLoss):
    """A published contrast, with its score and its values."""

    _score: str

    def __init__(
        self,
        temperature: float = 0.07,
        *,
        learnable_temperature: bool = False,
        min_temperature: float = 0.01,
        label_smoothing: float = 0.1,
        half_gradient: bool = False,
        group: ProcessGroup | Literal["world"] | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            self._score,
            temperature,
            learnable_temperature=learnable_temperature,
            min_temperature=min_temperature,
            label_smoothing=label_smoothing,
            half_gradient=half_gradient,
            group=group,
            backend=backend,
        )


class GRAMLoss(_Published):
    r"""Module form of :func:`~pmrl_kernels.gram_loss`, GRAM's contrast of volumes.

    Args, Raises: as in :class:`JointContrastiveLoss`, without ``score`` and ``normalize``. As published the temperature
    is learned, from 0.07, without a least value: ``learnable_temperature=True, min_temperature=0``.

    Source: GRAM (arXiv 2412.11959), section 3; docs/joint-scores.md has a migration guide.

    Example:
        >>> import torch
        >>> text, video, audio, subtitles = (torch.randn(8, 16) for _ in range(4))
        >>> GRAMLoss(learnable_temperature=True)(text, video, audio, subtitles).shape
        torch.Size([])
    """

    _score = "volume"


class TRIANGLELoss(_Published):
    r"""Module form of :func:`~pmrl_kernels.triangle_loss`, TRIANGLE's contrast of squared areas.

    Args, Raises: as in :class:`JointContrastiveLoss`, without ``score`` and ``normalize``. As published the temperature
    is learned, from 0.07, without a least value: ``learnable_temperature=True, min_temperature=0``.

    Source: TRIANGLE, https://github.com/ispamm/TRIANGLE; docs/joint-scores.md has a migration guide.

    Example:
        >>> import torch
        >>> text, video, audio = (torch.randn(8, 16) for _ in range(3))
        >>> TRIANGLELoss(learnable_temperature=True)(text, video, audio).shape
        torch.Size([])
    """

    _score = "area2"
