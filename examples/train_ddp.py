"""PMRL on several processes: one global batch, whoever holds its rows.

    python examples/train_ddp.py                                   one process
    torchrun --nproc-per-node 2 examples/train_ddp.py              two, by gloo on CPUs, by NCCL where each has a GPU
    torchrun ... examples/train_ddp.py --compile --autocast        compiled, in bfloat16 where autocast says so
    torchrun ... examples/train_ddp.py --checkpoint run.pt         saves there, and goes on from there if it exists;
                                                                   only the first process needs to see the file

Step i draws the same global batch in every process, and each takes its share of the rows, uneven ones where the batch
does not divide. The loss contrasts the whole batch (``group=``), so the curve does not depend on how many processes
there are. Features are synthetic: every modality is a nonlinear view of one latent vector, and some are missing.
"""

import argparse
import gc
import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.nn  # before there is a group: functions in it take that as a default, for good
from torch import Tensor, nn
from tqdm import tqdm

from pmrl_kernels import PMRLLoss, alignment_score, uniformity

WIDTHS = {"text": 48, "video": 80, "audio": 40}
LATENT, DIM = 16, 64
NOISE, MISSING = 0.3, 0.15
RECIPE = ("batch", "seed", "contrast", "autocast")  # options that a run goes on with; the others may change on the way


class Batch(NamedTuple):
    features: dict[str, Tensor]  # name -> (B, width)
    mask: dict[str, Tensor]  # name -> bool (B,), True = present


def global_batch(size: int, seed: int, step: int) -> Batch:
    """The rows of step ``step``, the same in every process and in a resumed run."""
    world = torch.Generator().manual_seed(seed)
    mixing = {name: torch.randn(LATENT, width, generator=world) for name, width in WIDTHS.items()}
    own = torch.Generator().manual_seed(seed + 1_000_003 * (step + 1))
    latent = torch.randn(size, LATENT, generator=own)
    features = {
        name: torch.tanh(latent @ m / LATENT**0.5) + NOISE * torch.randn(size, m.shape[1], generator=own)
        for name, m in mixing.items()
    }
    mask = {name: torch.rand(size, generator=own) >= MISSING for name in WIDTHS}
    return Batch(features, mask)


def shares(size: int, world: int) -> list[int]:
    """How many rows each process takes; the first ones take what does not divide."""
    return [size // world + (rank < size % world) for rank in range(world)]


class Model(nn.Module):
    """Encoders and the loss. The loss is in the module that DDP wraps, so its temperatures' gradients are averaged."""

    def __init__(self, group: Any, sizes: Sequence[int] | None, contrast: str) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict({
            name: nn.Sequential(nn.Linear(width, 128), nn.GELU(), nn.Linear(128, DIM)) for name, width in WIDTHS.items()
        })  # fmt: skip
        self.loss = PMRLLoss(1.0, 0.1, learnable_instance_temperature=True, contrast=contrast, group=group)
        self.sizes = sizes  # known, so nobody has to ask

    def embed(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: encoder(features[name]) for name, encoder in self.encoders.items()}

    def forward(self, batch: Batch) -> Tensor:
        loss: Tensor = self.loss(self.embed(batch.features), mask=batch.mask, local_sizes=self.sizes)
        return loss


def save(path: Path, state: dict[str, Any]) -> None:
    """Whole or not at all, should the machine stop half-way."""
    part = path.with_name(path.name + ".part")
    torch.save(state, part)
    os.replace(part, path)


def saved_run(options: argparse.Namespace, recipe: dict[str, Any]) -> dict[str, Any] | None:
    """What the checkpoint holds, if there is one. The first process looks and tells the others, who may be on other
    hosts, or look a moment later: all go on from the same step."""
    found: list[Any] = [None]
    first = not dist.is_initialized() or dist.get_rank() == 0
    if first and options.checkpoint and options.checkpoint.exists():
        found = [torch.load(options.checkpoint, map_location="cpu", weights_only=True)]
    if dist.is_initialized():
        dist.broadcast_object_list(found)
    (saved,) = found
    if saved is not None:
        theirs = saved.get("recipe", {})
        differing = [name for name, value in recipe.items() if theirs.get(name, "unknown") != value]
        if differing:
            told = ", ".join(f"--{name} {theirs.get(name, 'unknown')} there, {recipe[name]} here" for name in differing)
            raise SystemExit(
                f"{options.checkpoint} is of another recipe: {told}; resume as it began, or save elsewhere"
            )
    return saved


def train(options: argparse.Namespace) -> dict[str, Any]:
    """The loss of every step, and two scores of the last batch."""
    spread = dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if spread else (0, 1)
    group = "world" if spread else None
    device = torch.device("cpu")
    if torch.cuda.is_available() and (not spread or dist.get_backend() == "nccl"):
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)

    sizes = shares(options.batch, world)
    rows = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    torch.manual_seed(options.seed)
    model = Model(group, sizes if spread else None, options.contrast).to(device)
    if options.compile:
        model.compile(backend=options.compile, dynamic=False)
    step_model: nn.Module = nn.parallel.DistributedDataParallel(model) if spread else model
    optimiser = torch.optim.Adam(model.parameters(), 1e-3)

    history: list[float] = []
    recipe = {name: getattr(options, name) for name in RECIPE}
    saved = saved_run(options, recipe)
    if saved is not None:
        model.load_state_dict(saved["model"])
        optimiser.load_state_dict(saved["optimiser"])
        history = saved["history"]

    def local(step: int) -> Batch:
        whole = global_batch(options.batch, options.seed, step)
        return Batch(*({name: x[rows].to(device) for name, x in part.items()} for part in whole))

    shares_of_loss: list[Tensor] = []
    progress = tqdm(range(len(history), options.steps), initial=len(history), total=options.steps, disable=rank > 0)
    for step in progress:
        batch = local(step)
        with torch.autocast(device.type, torch.bfloat16) if options.autocast else nullcontext():
            loss = step_model(batch)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        shares_of_loss.append(loss.detach())
        last = step + 1 == options.steps
        if last or (step + 1) % options.save_every == 0:
            # Processes return W times their shares: the mean is the loss. Read by the host only here.
            recent = torch.stack(shares_of_loss)
            if spread:
                dist.all_reduce(recent)
            history += (recent / world).tolist()
            shares_of_loss.clear()
            progress.set_postfix(loss=f"{history[-1]:.4f}")
            if options.checkpoint and rank == 0:
                state = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "history": history}
                save(options.checkpoint, {"recipe": recipe, **state})
            if spread:
                dist.barrier()  # nobody goes on, or ends, before the checkpoint is there

    batch = local(options.steps)
    with torch.no_grad():
        embeddings = model.embed(batch.features)
    return {
        "loss": history,
        "alignment_score": float(alignment_score(embeddings, mask=batch.mask, group=group)),
        "uniformity": float(uniformity(embeddings, mask=batch.mask, group=group)),
    }


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a number from 1 on")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=count, default=200)
    parser.add_argument("--batch", type=count, default=257, help="rows of the global batch")
    parser.add_argument("--seed", type=int, default=0)
    contrasts = ("leading", "modality", "leave_one_out", "pairs")
    parser.add_argument("--contrast", choices=contrasts, default="leave_one_out")
    parser.add_argument("--compile", nargs="?", const="inductor", metavar="BACKEND", help="by torch.compile")
    parser.add_argument("--autocast", action="store_true", help="encoders in bfloat16")
    parser.add_argument("--checkpoint", type=Path, help="save there, and resume from there")
    parser.add_argument("--save-every", type=count, default=50, help="steps")
    options = parser.parse_args(arguments)

    if "RANK" in os.environ:  # started by torchrun
        enough = torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
        dist.init_process_group("nccl" if enough else "gloo")
    try:
        results = train(options)
        if not dist.is_initialized() or dist.get_rank() == 0:
            curve = results["loss"]
            print(f"loss {curve[0]:.4f} -> {curve[-1]:.4f} in {len(curve)} steps")
            print(f"alignment_score {results['alignment_score']:.3f}, uniformity {results['uniformity']:.3f}")
    finally:
        if dist.is_initialized():
            # Gloo's threads end with the last reference to the group, and abort the process if they meet the end of
            # the interpreter: compiled code refers to it, and so do cycles.
            torch.compiler.reset()
            gc.collect()
            dist.destroy_process_group()
    return results


if __name__ == "__main__":
    main()
