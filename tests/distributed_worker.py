"""What each process of a test's world does, started by torchrun: one batch split over them, the results to a file.

    torchrun --nproc-per-node 3 tests/distributed_worker.py OUT

Every case of ``CASES`` runs on this process's rows; rank 0 gathers what everyone found and saves it. The cases and the
batch are made from a seed, so that the test can compute the same with one process.
"""

from __future__ import annotations

import gc
import sys
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn  # as in examples/train_ddp.py, like the end of main()
from torch import Tensor

from pmrl_kernels import (
    PMRLLoss,
    alignment_score,
    backends,
    effective_rank,
    instance_contrastive_loss,
    pmrl_loss,
    uniformity,
)

B, D, K = 23, 12, 3
# Rows of each rank: uneven in a world of two, and an empty one among three.
SIZES = {1: [B], 2: [15, 8], 3: [9, 0, 14]}
DIAGNOSTICS = {"alignment_score": alignment_score, "effective_rank": effective_rank, "uniformity": uniformity}

BACKENDS = [name for name in ("reference", "native") if name in backends.available]
CASES: dict[str, dict[str, Any]] = {}
for _backend in BACKENDS:
    for _contrast in ("leading", "modality"):
        for _masked in (False, True):
            name = f"{_backend}-{_contrast}-{'masked' if _masked else 'all'}"
            CASES[name] = {"backend": _backend, "contrast": _contrast, "masked": _masked, "objective": "softmax"}
    CASES[f"{_backend}-objective-leading"] = {
        "backend": _backend, "contrast": "leading", "masked": True, "objective": "leading"
    }  # fmt: skip


def batch(dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Tensor]:
    """k embeddings (B, d) and a mask (B, k): some modalities are missing, some instances have none or one."""
    generator = torch.Generator().manual_seed(11)
    shared = torch.randn(B, D, generator=generator, dtype=torch.float64)
    xs = [shared + torch.randn(B, D, generator=generator, dtype=torch.float64) for _ in range(K)]
    mask = torch.rand(B, K, generator=generator) < 0.7
    mask[2] = False
    return [x.to(dtype) for x in xs], mask


def run_case(case: dict[str, Any], rows: slice, dtype: torch.dtype, **where: Any) -> list[Tensor]:
    """The three components, and for total, alignment, instance and a mix of them the gradients of the embeddings and
    of both temperatures."""
    xs, mask = batch(dtype)
    xs = [x[rows].clone().requires_grad_() for x in xs]
    taus = [torch.tensor(t, dtype=dtype, requires_grad=True) for t in (0.5, 0.2)]
    parts = pmrl_loss(
        *xs,
        temperature=taus[0],
        instance_temperature=taus[1],
        instance_weight=0.7,
        mask=mask[rows] if case["masked"] else None,
        objective=case["objective"],
        contrast=case["contrast"],
        backend=case["backend"],
        return_components=True,
        **where,
    )
    found = [x.detach() for x in parts]
    mix = 3 * parts.total - 0.5 * parts.alignment + 2 * parts.instance
    for output in (*parts, mix):
        grads = torch.autograd.grad(output, [*xs, *taus], retain_graph=True, allow_unused=True)
        found += [torch.zeros_like(x) if g is None else g for g, x in zip(grads, [*xs, *taus], strict=True)]
    return found


def run_instance(rows: slice, normalize: bool, backend: str, **where: Any) -> list[Tensor]:
    xs, mask = batch()
    x, tau = (0.3 * xs[0][rows]).requires_grad_(), torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    loss = instance_contrastive_loss(x, tau, normalize, mask[rows, 0], backend=backend, **where)
    return [loss.detach(), *torch.autograd.grad(3 * loss, (x, tau))]


def run_model(rows: slice, world: int, **where: Any) -> list[Tensor]:
    """The loss and averaged parameter gradients of a small model; DDP averages if there are several processes."""
    torch.manual_seed(5)
    model: torch.nn.Module = torch.nn.ModuleDict({
        "heads": torch.nn.ModuleList(torch.nn.Linear(D, 8) for _ in range(K)),
        "loss": PMRLLoss(0.5, 0.2, learnable_temperature=True, learnable_instance_temperature=True, **where),
    }).double()  # fmt: skip

    class Step(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = model

        def forward(self, xs: list[Tensor], mask: Tensor) -> Tensor:
            embeddings = [head(x) for head, x in zip(self.parts["heads"], xs, strict=True)]
            loss: Tensor = self.parts["loss"](embeddings, mask=mask)
            return loss

    step: torch.nn.Module = Step()
    parameters = list(step.parameters())
    if world > 1:
        step = torch.nn.parallel.DistributedDataParallel(step)
    xs, mask = batch()
    loss = step([x[rows] for x in xs], mask[rows])
    loss.backward()
    return [loss.detach(), *(p.grad for p in parameters)]


def run_compiled(rows: slice, fullgraph: bool, **where: Any) -> list[Tensor]:
    """With ``local_sizes`` there is nothing the host has to wait for: one graph, collectives in it."""
    xs, mask = batch()
    xs = [x[rows].clone().requires_grad_() for x in xs]

    @torch.compile(fullgraph=fullgraph, backend="aot_eager")
    def step(xs: list[Tensor], mask: Tensor) -> Tensor:
        return pmrl_loss(xs, mask=mask, contrast="modality", temperature=0.5, instance_temperature=0.2, **where)

    loss = step(xs, mask[rows])
    return [loss.detach(), *torch.autograd.grad(loss, xs)]


def everything(rows: slice, world: int, group: Any, local_sizes: list[int] | None) -> dict[str, list[Tensor]]:
    where = {} if group is None else {"group": group}
    known = {} if group is None else {"group": group, "local_sizes": local_sizes}
    found = {name: run_case(case, rows, torch.float64, **where) for name, case in CASES.items()}
    found["float32"] = run_case(CASES[f"{BACKENDS[-1]}-leading-masked"], rows, torch.float32, **known)
    for backend in BACKENDS:
        for normalize in (True, False):
            found[f"instance-{backend}-{normalize}"] = run_instance(rows, normalize, backend, **where)
    found["model"] = run_model(rows, world, **where)
    found["compiled-known"] = run_compiled(rows, True, **known)
    found["compiled-asked"] = run_compiled(rows, False, **where)
    xs, mask = batch()
    found["alone"] = [pmrl_loss([x[rows] for x in xs], mask=mask[rows], group=None)]
    for name, function in DIAGNOSTICS.items():
        found[name] = [function([x[rows] for x in xs], mask=mask[rows], **where)]
    return found


def main() -> None:
    dist.init_process_group("gloo")
    world, rank = dist.get_world_size(), dist.get_rank()
    sizes = SIZES[world]
    rows = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    found = everything(rows, world, dist.group.WORLD, sizes)
    gathered: list[Any] = [None] * world
    dist.all_gather_object(gathered, found)
    if rank == 0:
        torch.save(gathered, sys.argv[1])
    torch.compiler.reset()
    gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
