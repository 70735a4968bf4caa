"""PMRL with parameters sharded over processes by FSDP2 (``fully_shard``), and one contrast over everyone's rows.

    torchrun --nproc-per-node 2 examples/integrations/fsdp2.py      by gloo on CPUs, by NCCL where each has a GPU

What differs from a run with ``cross_entropy``: the loss is in the model, is sharded with it and called in its
``forward``, where its temperature is whole; and ``group="world"``. The temperature's parameter has the shape (1,), so
one process holds it and the others an empty shard. The loss is a unit of its own: a mixed precision policy of the
model's, as ``--bf16`` has one, would round the temperature.
"""

import argparse
import gc
import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.distributed.tensor.debug
from synthetic import HELD_OUT, HELD_OUT_SEED, Encoders, Run, scores, views
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from tqdm import tqdm

from pmrl_kernels import PMRLLoss


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoders = Encoders()
        # Instead of: self.loss = nn.CrossEntropyLoss()
        self.loss = PMRLLoss(1.0, contrast="leave_one_out", learnable_instance_temperature=True, group="world")

    def forward(self, features: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        embeddings = self.encoders(features)
        return self.loss(embeddings), embeddings


def train(options: argparse.Namespace, device: torch.device) -> Run:
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = Model().to(device)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if options.bf16 else MixedPrecisionPolicy()
    mesh = dist.device_mesh.init_device_mesh(device.type, (world,))
    for encoder in model.encoders.of.values():
        fully_shard(encoder, mesh=mesh, mp_policy=policy)
    fully_shard(model.loss, mesh=mesh)  # without the policy: the temperature stays in float32
    fully_shard(model, mesh=mesh, mp_policy=policy)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)

    def of_this_process(features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: x[rank::world].to(device) for name, x in features.items()}

    def held_out() -> dict[str, Tensor]:
        """Embeddings of all processes' held-out rows."""
        embeddings = model(of_this_process(views(HELD_OUT, HELD_OUT_SEED)))[1]
        everyone: list[dict[str, Tensor]] = [{} for _ in range(world)]
        dist.all_gather_object(everyone, {name: x.cpu() for name, x in embeddings.items()})
        return {name: torch.cat([found[name] for found in everyone]) for name in embeddings}

    before = scores(held_out)
    progress = tqdm(range(options.steps), disable=rank > 0)
    for step in progress:
        loss, _ = model(of_this_process(views(options.batch, seed=2 * step)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 50 == 0:
            mean = loss.detach().clone()
            dist.all_reduce(mean)  # processes return W times their shares: the mean is the loss
            progress.set_postfix(loss=f"{mean.item() / world:.3f}")
    run = Run(before, scores(held_out))
    shard = model.loss.instance_temperature.log_excess.to_local()
    print(f"process {rank}: {run}; holds {shard.numel()} number(s) of the temperature")
    return run


def main(arguments: Sequence[str] | None = None) -> Run:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--batch", type=int, default=129, help="rows of all processes together; they need not divide")
    parser.add_argument("--bf16", action="store_true", help="encoders' parameters gathered in bfloat16")
    options = parser.parse_args(arguments)

    enough = torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if enough else torch.device("cpu")
    if enough:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if enough else "gloo")
    try:
        return train(options, device)
    finally:
        # Gloo's threads end with the last reference to the group, and abort the process if they meet the end of the
        # interpreter: caches of sharded tensors hold it. (Names vary by version.)
        for name in dir(torch.distributed.tensor.debug):
            if name.startswith("_clear"):
                getattr(torch.distributed.tensor.debug, name)()
        gc.collect()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
