"""What each process of a test's world does: one batch split over them, the results to a file.

    torchrun --nproc-per-node 3 tests/tools/distributed_worker.py OUT
    python tests/tools/distributed_worker.py OUT 3      the same, of forks, which import torch once

Every case of ``CASES`` runs on this process's rows; rank 0 gathers what everyone found and saves it. The cases and the
batch are made from a seed, so that the test can compute the same with one process.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn  # as in examples/train_ddp.py, like the end of main()
import torch.distributed.tensor.debug
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor

from pmrl_kernels import (
    Chunked,
    PMRLLoss,
    alignment_score,
    effective_rank,
    instance_contrastive_loss,
    joint_contrastive_loss,
    losses,
    ops,
    pmrl_loss,
    uniformity,
)

B, D, K = 23, 12, 3
# Rows of each rank: uneven in a world of two, and an empty one among three.
SIZES = {1: [B], 2: [15, 8], 3: [9, 0, 14]}
GALLERY = {1: [17], 2: [7, 10], 3: [11, 0, 6]}  # candidates of each rank, where queries have others than their own
JOINT: dict[str, tuple[str, bool, bool, bool]] = {  # score, whether there are positives, masks, halved gradients
    "gain": ("gain", False, True, False),
    "volume of captions": ("volume", True, True, False),
    "area2, halved": ("area2", False, False, True),
    "cosine of captions": ("cosine", True, True, False),
    "sigma of captions, halved": ("sigma", True, False, True),
}
DIAGNOSTICS = {"alignment_score": alignment_score, "effective_rank": effective_rank, "uniformity": uniformity}

BACKENDS = [name for name in ("reference", "native") if name in ops.available]
CASES: dict[str, dict[str, Any]] = {}
for _backend in BACKENDS:
    for _contrast in ("leading", "modality", "leave_one_out", "pairs"):
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


def shares(sizes: list[int]) -> list[slice]:
    """Each rank's rows."""
    return [slice(sum(sizes[:r]), sum(sizes[: r + 1])) for r in range(len(sizes))]


def run_joint(name: str, world: int, rank: int | None, sizes: bool = False, **where: Any) -> list[Tensor]:
    """The loss and the gradients of queries, candidates and temperature; those of a batch that a world of so many has,
    by one of its ranks, or by nobody's group (``rank`` None). Queries have candidates of their own rank."""
    score, captions, masked, half = JOINT[name]
    xs, mask = batch()
    gallery = GALLERY[world] if captions else SIZES[world]
    t, C, mask = xs[0], torch.stack(xs[1:], 1)[: sum(gallery)], mask[: sum(gallery), 1:]
    positives = torch.empty(B, dtype=torch.int64)
    for queries, candidates in zip(shares(SIZES[world]), shares(gallery), strict=True):
        numbers = torch.arange(queries.stop - queries.start)
        count = candidates.stop - candidates.start
        known = candidates.start + numbers * 5 % count if count else -torch.ones_like(numbers)
        positives[queries] = torch.where(numbers % 4 == 3, -1, known)
    if rank is not None:
        queries, candidates = shares(SIZES[world])[rank], shares(gallery)[rank]
        t, C, mask, positives = t[queries], C[candidates], mask[candidates], positives[queries] - candidates.start
        if sizes:
            where["local_sizes"] = list(zip(SIZES[world], gallery, strict=True)) if captions else SIZES[world]
    tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    t, *C = (x.clone().requires_grad_() for x in (t, *C.unbind(1)))
    loss = joint_contrastive_loss(
        t,
        *C,
        score=score,
        temperature=tau,
        label_smoothing=0.1,
        positives=positives if captions else None,
        mask=mask if masked else None,
        half_gradient=half,
        **where,
    )
    return [loss.detach(), *torch.autograd.grad(3 * loss, (tau, t, *C))]


class Model(torch.nn.Module):
    """A small one, the loss with its temperatures in it; with ``chunk_size``, its heads run over so many rows."""

    def __init__(self, chunk_size: int = 0, **where: Any) -> None:
        super().__init__()
        torch.manual_seed(5)
        heads = [torch.nn.Linear(D, 8) for _ in range(K)]
        self.heads = torch.nn.ModuleList(Chunked(head, chunk_size) if chunk_size else head for head in heads)
        self.loss = PMRLLoss(0.5, 0.2, learnable_temperature=True, learnable_instance_temperature=True, **where)
        self.double()

    def forward(self, xs: list[Tensor], mask: Tensor) -> Tensor:
        embeddings = [head(x) for head, x in zip(self.heads, xs, strict=True)]
        loss: Tensor = self.loss(embeddings, mask=mask)
        return loss


def run_model(rows: slice, world: int, **where: Any) -> list[Tensor]:
    """The loss and averaged parameter gradients of a model; DDP averages if there are several processes."""
    step: torch.nn.Module = Model(**where)
    parameters = list(step.parameters())
    if world > 1:
        step = torch.nn.parallel.DistributedDataParallel(step)
    xs, mask = batch()
    loss = step([x[rows] for x in xs], mask[rows])
    loss.backward()
    return [loss.detach(), *(p.grad for p in parameters)]


SHARDED = ("model", "loss", "ignored", "FSDP1", "chunks")


def run_sharded(what: str, rows: slice, world: int, **where: Any) -> list[Tensor]:
    """Whole gradients of all parameters, and the parameters after three steps. What is not sharded is averaged here."""
    model = step = Model(4 if what == "chunks" else 0, **where)
    if world and what == "FSDP1":
        with warnings.catch_warnings():  # a world of one has nothing to shard
            warnings.simplefilter("ignore")
            step = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    elif world:
        mesh = dist.device_mesh.init_device_mesh("cpu", (world,))
        ignored = set(model.loss.parameters()) if what == "ignored" else set()
        if what == "chunks":  # each head gathered once, however many chunks a process has
            for head in model.heads:
                fully_shard(head, mesh=mesh)
        fully_shard(model.loss if what == "loss" else model, mesh=mesh, ignored_params=ignored)

    def whole(x: Tensor) -> Tensor:
        if not isinstance(x, DTensor):
            return x.clone()
        parts: list[Any] = [None] * world  # full_tensor() would leave the group in a cache
        dist.all_gather_object(parts, x.to_local())
        return torch.cat(parts)

    def everything_of(attribute: str) -> list[Tensor]:
        if step is model:
            return [whole(getattr(p, attribute)) for p in model.parameters()]
        with FullyShardedDataParallel.summon_full_params(step, with_grads=True):
            return [getattr(p, attribute).clone() for p in model.parameters()]

    xs, mask = batch()
    optimizer = torch.optim.SGD(step.parameters(), lr=0.2)
    gradients: list[Tensor] = []
    for _ in range(3):
        optimizer.zero_grad()
        step([x[rows] for x in xs], mask[rows]).backward()
        for p in model.parameters():
            if world and step is model and not isinstance(p, DTensor):
                dist.all_reduce(p.grad)
                p.grad /= world
        gradients = gradients or everything_of("grad")
        optimizer.step()
    return [*gradients, *everything_of("data")]


def run_compiled(rows: slice, fullgraph: bool, **where: Any) -> list[Tensor]:
    """With ``local_sizes`` there is nothing the host has to wait for: one graph, collectives in it."""
    xs, mask = batch()
    xs = [x[rows].clone().requires_grad_() for x in xs]

    @torch.compile(fullgraph=fullgraph, backend="aot_eager")
    def step(xs: list[Tensor], mask: Tensor) -> Tensor:
        return pmrl_loss(xs, mask=mask, contrast="leave_one_out", temperature=0.5, instance_temperature=0.2, **where)

    loss = step(xs, mask[rows])
    return [loss.detach(), *torch.autograd.grad(loss, xs)]


def differing(odd: int) -> dict[str, Callable[..., Any]]:
    """Calls that processes make differently, by what differs; ``odd`` is 1 on one of them and 0 on the others."""
    x, wide = torch.ones(4, 3, 5), torch.ones(4, 3, 5 + odd)
    dtype = torch.float64 if odd else torch.float32
    return {
        "d": lambda **where: pmrl_loss(wide, **where),
        "d of u": lambda **where: instance_contrastive_loss(wide[:, 0], **where),
        "d, compiled": lambda **where: torch.compile(lambda: pmrl_loss(wide, **where), backend="eager")(),
        "d, uniformity": lambda **where: uniformity(wide, **where),
        "k": lambda **where: PMRLLoss(contrast="leave_one_out", **where)(torch.ones(4, 3 + odd, 5)),
        "dtype": lambda **where: pmrl_loss(x.to(dtype), **where),
        "dtype of u": lambda **where: instance_contrastive_loss(x[:, 0].to(dtype), **where),
        "contrast": lambda **where: pmrl_loss(x, contrast=("leading", "modality")[odd], **where),
        "normalize": lambda **where: instance_contrastive_loss(x[:, 0], normalize=not odd, **where),
        "score": lambda **where: joint_contrastive_loss(x[:, 0], x, score=("gain", "mip")[odd], **where),
        "positives": lambda **where: joint_contrastive_loss(
            x[:, 0], x, positives=torch.arange(4) if odd else None, **where
        ),
        "n": lambda **where: joint_contrastive_loss(x[:, 0], torch.ones(4, 3 + odd, 5), **where),
    }


def called_beside_its_model(**where: Any) -> Tensor:
    """A loss whose temperatures are sharded as part of a model, which alone makes them whole."""
    model = Model(**where)
    fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),)))
    return model.loss(torch.ones(4, 3, 5))


def refusals(odd: int, **where: Any) -> dict[str, str]:
    """What the errors say. Nobody waits for anybody: everyone has one."""
    found = {}
    for name, call in {**differing(odd), "sharded": called_beside_its_model}.items():
        try:
            found[name] = str(call(**where))
        except (RuntimeError, ValueError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def allowed(rows: slice, odd: int, **where: Any) -> list[Tensor]:
    """What may differ between processes: dtypes with one dtype of results, and numbers of modalities where only
    leading vectors go round."""
    xs, _ = batch()
    fewer = pmrl_loss([x[rows] for x in (xs if odd else xs[:-1])], temperature=0.5, **where)
    short = pmrl_loss([x[rows].to(torch.bfloat16 if odd else torch.float32) for x in xs], temperature=0.5, **where)
    raw = instance_contrastive_loss(xs[0][rows].to(torch.float64 if odd else torch.float32), 0.4, False, **where)
    return [fewer, short, raw.double()]


def warned(xs: list[Tensor], **where: Any) -> list[str]:
    """Of a temperature below what the modality contrast asks for."""
    losses._warned_of_floor = False
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        pmrl_loss(xs, contrast="modality", instance_temperature=0.08, **where)
    return [str(one.message) for one in heard if "sqrt(k)" in str(one.message)]


def everything(rows: slice, group: Any, local_sizes: list[int] | None) -> dict[str, Any]:
    where = {} if group is None else {"group": group}
    by_name = {} if group is None else {"group": "world"}
    sizes = {} if group is None else {"local_sizes": local_sizes}
    world, rank = (0, 0) if group is None else (group.size(), group.rank())
    found: dict[str, Any] = {name: run_case(case, rows, torch.float64, **where) for name, case in CASES.items()}
    last = CASES[f"{BACKENDS[-1]}-leading-masked"]
    found["float32"] = run_case(last, rows, torch.float32, **where, **sizes)
    found["world"] = run_case(last, rows, torch.float64, **by_name)
    for backend in BACKENDS:
        for normalize in (True, False):
            found[f"instance-{backend}-{normalize}"] = run_instance(rows, normalize, backend, **where)
    found["instance-world"] = run_instance(rows, True, BACKENDS[-1], **by_name)
    for name in JOINT:
        if group is None:
            found |= {f"joint-{name}-{of}": run_joint(name, of, None) for of in SIZES}
        else:
            found[f"joint-{name}"] = run_joint(name, world, rank, sizes=name.endswith("halved"), **by_name)
    found["model"] = run_model(rows, world, **by_name)
    found["chunks"] = run_model(rows, world, chunk_size=4, **by_name)
    for what in SHARDED:
        found[f"sharded-{what}"] = run_sharded(what, rows, world, **where)
    found["compiled-known"] = run_compiled(rows, True, **where, **sizes)
    found["compiled-asked"] = run_compiled(rows, False, **by_name)
    xs, mask = batch()
    mine = [x[rows] for x in xs]
    found["alone"] = [pmrl_loss(mine, mask=mask[rows], group=None)]
    found["warning"] = warned(mine, **where)
    for name, function in DIAGNOSTICS.items():
        found[name] = [function(mine, mask=mask[rows], **these) for these in (where, by_name)]
    if world > 1:
        # Compiled on one process, which the others need not know.
        call = uniformity if rank else torch.compile(uniformity, backend="aot_eager", fullgraph=True)
        found["uniformity"].append(call(mine, mask=mask[rows], **by_name))
        odd = int(rank == world - 1)
        found["refusals"] = refusals(odd, **by_name)
        found["allowed"] = allowed(rows, odd, **where)
    return found


def main() -> None:
    dist.init_process_group("gloo")
    world, rank = dist.get_world_size(), dist.get_rank()
    sizes = SIZES[world]
    rows = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    found = everything(rows, dist.group.WORLD, sizes)
    gathered: list[Any] = [None] * world
    dist.all_gather_object(gathered, found)
    if rank == 0:
        torch.save(gathered, sys.argv[1])
    torch.compiler.reset()
    for name in dir(torch.distributed.tensor.debug):  # caches of FSDP2's tensors hold the group; names vary by version
        if name.startswith("_clear"):
            getattr(torch.distributed.tensor.debug, name)()
    gc.collect()
    dist.destroy_process_group()


def fork(world: int) -> int | None:
    """None in each process of the world. In their parent, what they exit with; if one fails, the others are ended."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    children = set()
    for rank in range(world):
        if not (child := os.fork()):
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            return None
        children.add(child)
    status = 0
    while children:
        child, ended = os.wait()
        children.discard(child)
        if ended and not status:
            status = 1
            for other in children:
                os.kill(other, signal.SIGKILL)
    return status


if __name__ == "__main__":
    status = None if "RANK" in os.environ else fork(int(sys.argv[2]))
    if status is None:
        main()
    sys.exit(status)
