"""torch.export with a batch of any size: the program that comes out takes others, and computes what eager code does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export

from pmrl_kernels import (
    dominant_singular_triplet,
    dominant_sv_loss,
    gram_loss,
    instance_contrastive_loss,
    joint_scores,
    pmrl_loss,
    triangle_loss,
)
from tests.conftest import CPU_BACKENDS
from tests.tools.functions import EVERY_CONTRAST

FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "dominant_sv_loss": dominant_sv_loss,
    "dominant_singular_triplet": lambda *xs, backend: dominant_singular_triplet(*xs, backend=backend).u,
    "instance_contrastive_loss": lambda x, *_, backend: instance_contrastive_loss(x, backend=backend),
    "of any norm": lambda x, *_, backend: instance_contrastive_loss(x, normalize=False, backend=backend),
    **{
        contrast: lambda *xs, backend, contrast=contrast: pmrl_loss(*xs, contrast=contrast, backend=backend)
        for contrast in EVERY_CONTRAST
    },
    "joint_scores": joint_scores,
    "gram_loss": gram_loss,
    "triangle_loss": triangle_loss,
}


class Model(nn.Module):
    def __init__(self, name: str, backend: str) -> None:
        super().__init__()
        self.function, self.backend = FUNCTIONS[name], backend

    def forward(self, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return self.function(a, b, c, backend=self.backend)


@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_exports_of_any_batch(name, strict, backend, device):
    xs = tuple(torch.randn(8, 6, device=device) for _ in range(3))
    model = Model(name, backend)
    with torch.no_grad():
        any_size = {0: Dim("B", min=2)}
        program = export(model, xs, dynamic_shapes=(any_size, any_size, any_size), strict=strict).module()
        for B in (8, 3, 40):
            others = [torch.randn(B, 6, device=device) for _ in range(3)]
            torch.testing.assert_close(program(*others), model(*others))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_traces_of_the_alignment_term(backend):
    """Which are deprecated, and know no lists of bools: contrasts cannot be traced so."""
    xs = tuple(torch.randn(8, 6) for _ in range(3))
    traced = torch.jit.trace(Model("dominant_sv_loss", backend), xs)
    torch.testing.assert_close(traced(*xs), dominant_sv_loss(*xs))
    with pytest.raises(RuntimeError, match="list of bool"):
        torch.jit.trace(Model("leading", backend), xs)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_tracing_with_symbols_of_every_size(name, backend, device):
    """Outside ``torch.compile`` too, where nobody says that something compiles: what comes out takes other batches."""
    from torch.fx.experimental.proxy_tensor import make_fx

    model = Model(name, backend)
    xs = [torch.randn(8, 6, device=device) for _ in range(3)]
    traced = make_fx(lambda *xs: model(*xs), tracing_mode="symbolic")(*xs)
    for B in (8, 5):
        others = [torch.randn(B, 6, device=device) for _ in range(3)]
        torch.testing.assert_close(traced(*others), model(*others))
