"""What these examples share: three views of one latent vector, encoders, and how well views find one another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from pmrl_kernels import pmrl_loss, recall_at, retrieval_ranks

WIDTHS = {"text": 48, "video": 80, "audio": 40}
LATENT, DIM = 16, 32
NOISE = 0.3
HELD_OUT = 256  # rows that no example trains on, drawn by a seed of their own: chance finds one in 256
HELD_OUT_SEED = 1_000_003


def latents(count: int, seed: int) -> Tensor:
    """(B, LATENT): what the views of an instance have in common."""
    return torch.randn(count, LATENT, generator=torch.Generator().manual_seed(seed))


def views(count: int, seed: int) -> dict[str, Tensor]:
    """Features (B, width) of each view: a fixed nonlinear function of the latent vector, and noise of its own."""
    fixed, own = torch.Generator().manual_seed(7), torch.Generator().manual_seed(seed + 1)
    shared = latents(count, seed)
    return {
        name: torch.tanh(shared @ torch.randn(LATENT, width, generator=fixed) / LATENT**0.5)
        + NOISE * torch.randn(count, width, generator=own)
        for name, width in WIDTHS.items()
    }


class Encoder(nn.Module):
    """Features (B, width) to embeddings (B, d). No normalisation: the losses do that."""

    def __init__(self, width: int, hidden: int = 128) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(width, hidden), nn.Linear(hidden, DIM)

    def forward(self, x: Tensor) -> Tensor:
        embeddings: Tensor = self.out(gelu(self.hidden(x)))
        return embeddings


class Encoders(nn.Module):
    """One for each view, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.of = nn.ModuleDict({name: Encoder(width) for name, width in WIDTHS.items()})

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: encoder(features[name]) for name, encoder in self.of.items()}


class Scores(NamedTuple):
    loss: float  # of held-out rows, at the default temperatures
    recall: float  # R@1: how often one view finds the others of its instance among all held-out instances


def scores(embed: Callable[[], Mapping[str, Tensor]]) -> Scores:
    """Of what ``embed`` makes of held-out rows: embeddings (B, d) by view."""
    with torch.no_grad():
        embeddings = {name: x.float() for name, x in embed().items()}
        query, *candidates = embeddings.values()
        loss = pmrl_loss(embeddings, temperature=1.0, contrast="leave_one_out")
        return Scores(loss.item(), recall_at(retrieval_ranks(query, *candidates)).recall[1])


class Run(NamedTuple):
    before: Scores
    after: Scores

    def __str__(self) -> str:
        return (
            f"held-out rows: loss {self.before.loss:.3f} -> {self.after.loss:.3f}, "
            f"R@1 {self.before.recall:.3f} -> {self.after.recall:.3f}"
        )
