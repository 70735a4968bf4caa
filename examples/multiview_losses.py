"""The losses of multiview_study.py: the package's, and its rivals in plain PyTorch.

Each takes k embeddings (B, d), a mask (B, k), True = present, or None, and the temperature τ₂ of its
contrast. The rivals take masks as well, but for the volume, which is defined for whole instances only.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from multiview_digits import volume_contrast
from torch import Tensor
from torch.nn.functional import normalize

from pmrl_kernels import pmrl_loss

Loss = Callable[[list[Tensor], Tensor | None, float], Tensor]

HIDDEN_LOGIT = -1e4  # of what is absent; finite, so that a row without candidates has finite gradients


def info_nce(
    a: Tensor, b: Tensor, temperature: float, has_a: Tensor | None = None, has_b: Tensor | None = None
) -> Tensor:
    """Symmetric InfoNCE between unit rows (n, B, d), n problems at once, whose rows exist where (n, B) says so.

    The mean over the rows that both sides have; candidates are all that exist on the other side. Either side
    may have n = 1, and is then that of all problems.
    """
    logits = a @ b.mT / temperature
    own = logits.diagonal(dim1=1, dim2=2)
    if has_a is None or has_b is None:
        return ((logits.logsumexp(2) + logits.logsumexp(1)) / 2 - own).mean()
    among_b = logits.masked_fill(~has_b[:, None, :], HIDDEN_LOGIT).logsumexp(2)
    among_a = logits.masked_fill(~has_a[:, :, None], HIDDEN_LOGIT).logsumexp(1)
    both = has_a & has_b
    return ((among_b + among_a) / 2 - own)[both].sum() / both.sum().clamp_min(1)


def unit_rows(embeddings: list[Tensor], mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(k, B, d) unit rows, and which of them exist, (k, B)."""
    return normalize(torch.stack(embeddings), dim=2), None if mask is None else mask.T


def anchor(embeddings: list[Tensor], mask: Tensor | None, temperature: float) -> Tensor:
    """Every other view against the first: k - 1 similarity matrices."""
    z, has = unit_rows(embeddings, mask)
    if has is None:
        return info_nce(z[1:], z[:1], temperature)
    return info_nce(z[1:], z[:1], temperature, has[1:], has[:1])


def centroid(embeddings: list[Tensor], mask: Tensor | None, temperature: float) -> Tensor:
    """Every view against the mean of the instance's views, as CentroBind does (arXiv 2410.02086)."""
    z, has = unit_rows(embeddings, mask)
    if has is None:
        return info_nce(z, normalize(z.mean(0, keepdim=True), dim=2), temperature)
    mean = normalize((z * has[..., None]).sum(0, keepdim=True), dim=2)
    return info_nce(z, mean, temperature, has, has.any(0, keepdim=True))


def volume(embeddings: list[Tensor], mask: Tensor | None, temperature: float) -> Tensor:
    if mask is not None:
        raise ValueError("the volume of an instance that lacks views is that of another dimension")
    return volume_contrast(embeddings, None, temperature)


def ours(
    contrast: str,
    *,
    temperature: float = 1.0,
    alignment: float = 1.0,
    alignment_with_gaps: float | None = None,
) -> Loss:
    """The package's loss with that contrast, τ₁ and weight of the alignment term, which may differ with a mask."""

    def loss(embeddings: list[Tensor], mask: Tensor | None, instance_temperature: float) -> Tensor:
        return pmrl_loss(
            embeddings,
            temperature=temperature,
            instance_temperature=instance_temperature,
            contrast=contrast,
            mask=mask,
            alignment_weight=alignment if mask is None or alignment_with_gaps is None else alignment_with_gaps,
        )

    return loss


@dataclass(frozen=True)
class Contender:
    """A loss, with τ₂ chosen by validation or as given."""

    loss_name: str
    label: str
    loss: Loss
    colour: str
    temperature: float | None = None
    takes_gaps: bool = True

    @property
    def name(self) -> str:
        return self.loss_name if self.temperature is None else f"{self.loss_name}_{self.temperature:g}"


# From the Okabe-Ito palette, which colour-blind readers can tell apart.
LEAVE_ONE_OUT, MODALITY, PAPER, RIVAL, VOLUME = "#0072B2", "#009E73", "#D55E00", "#777777", "#CC79A7"

modality = ours("modality")
CONTENDERS = (
    Contender("pairs", "InfoNCE, all pairs", ours("pairs", alignment=0), "#000000"),
    Contender("leave_one_out", "leave-one-out", ours("leave_one_out", alignment_with_gaps=0), LEAVE_ONE_OUT),
    Contender("modality", "modality", modality, MODALITY),
    Contender("modality", "modality, τ₂ = 0.1", modality, MODALITY, 0.1),
    Contender("modality", "modality, τ₂ = 0.2", modality, MODALITY, 0.2),
    Contender("anchor", "InfoNCE to one anchor", anchor, RIVAL),
    Contender("centroid", "InfoNCE to the centroid", centroid, "#E69F00"),
    Contender("paper", "paper's terms, τ₁ = 1", ours("leading"), PAPER),
    Contender("paper_sharp", "paper's terms, τ₁ = 0.05", ours("leading", temperature=0.05), PAPER),
    Contender("volume", "GRAM's volume", volume, VOLUME, takes_gaps=False),
)
BASELINE = CONTENDERS[0]
# For the figure: the contrast's floor is plain to see where no alignment term holds the views together.
MODALITY_ALONE = Contender("modality_alone", "modality, no alignment", ours("modality", alignment=0), "#56B4E9")


def temperature_floor(k: int, batch: int) -> float:
    """The τ₂ below which views that do not agree at all satisfy a contrast with their instance's leading vector.

    They are part of it: of k orthogonal ones each has the cosine 1/√k with it. Where that of the negatives is
    about 0, a row's loss log1p((B - 1)·exp(-1/(√k·τ₂))) is log 2 at this τ₂ and soon nothing below it.
    """
    return 1 / (math.sqrt(k) * math.log(batch - 1))
