"""A PMRL-style model, and its loss twice: as the authors write it, and by one call of pmrl_kernels.

Four modalities, as in VAST and its descendants: each has a backbone of its own (here its features are given) and a
head that projects them into the common space. docs/migrating.md goes through the lines that change.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from pmrl_kernels import PMRLComponents, pmrl_loss

WIDTHS = {"text": 96, "video": 160, "audio": 80, "subtitle": 96}
DIM = 64
TAU = 0.05  # of the singular values, as for fine-tuning
CONTRAST_TAU = 0.1
CONTRAST_WEIGHT = 1.0


class Heads(nn.Module):
    """{name: features (B, width)} -> {name: embeddings (B, DIM)}, not normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Linear(width, DIM, bias=False) for name, width in WIDTHS.items()})

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: head(features[name]) for name, head in self.heads.items()}


def authors_loss(embeddings: dict[str, Tensor], oriented: bool = False) -> PMRLComponents:
    """PMRL in plain PyTorch: an SVD for every instance of a (B, d, k) stack, and two cross entropies.

    LAPACK leaves the sign of every u_i open. ``oriented`` settles it as pmrl_kernels does, which is not part of the
    authors' formulation, but makes the two comparable.
    """
    Z = torch.stack([normalize(x, dim=-1) for x in embeddings.values()], dim=2)
    U, sigma, Vh = torch.linalg.svd(Z, full_matrices=True)
    u = U[:, :, 0]
    if oriented:
        u = u * Vh[:, 0].sum(1).sign()[:, None]
    everyone = torch.arange(len(Z), device=Z.device)
    alignment = cross_entropy(sigma / TAU, torch.zeros_like(everyone))
    instance = cross_entropy(u @ u.T / CONTRAST_TAU, everyone)
    return PMRLComponents(alignment + CONTRAST_WEIGHT * instance, alignment, instance)


def kernels_loss(embeddings: dict[str, Tensor], mask: dict[str, Tensor] | None = None) -> PMRLComponents:
    """The same objective by pmrl_kernels; ``mask`` says who has which modality, {name: bool (B,)}."""
    return pmrl_loss(
        embeddings,
        temperature=TAU,
        instance_temperature=CONTRAST_TAU,
        instance_weight=CONTRAST_WEIGHT,
        mask=mask,
        return_components=True,
    )
