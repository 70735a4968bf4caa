"""PMRL in a loop of one's own with Accelerate.

    python examples/integrations/accelerate_loop.py                        one process
    accelerate launch --cpu --num_processes 2 examples/integrations/accelerate_loop.py

What differs from a loop with ``cross_entropy``: the loss is a module in the model that ``prepare`` wraps, so that a
learned temperature is averaged as all parameters are, and it has ``group="world"`` if there are several processes.
"""

import argparse
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from synthetic import HELD_OUT, HELD_OUT_SEED, Encoders, Run, scores, views
from torch import Tensor, nn
from torch.utils.data import DataLoader, StackDataset
from tqdm import tqdm

from pmrl_kernels import PMRLLoss


class Model(nn.Module):
    def __init__(self, group: str | None) -> None:
        super().__init__()
        self.encoders = Encoders()
        # Instead of: self.loss = nn.CrossEntropyLoss()
        self.loss = PMRLLoss(1.0, contrast="leave_one_out", learnable_instance_temperature=True, group=group)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        loss: Tensor = self.loss(self.encoders(features))
        return loss


def main(arguments: Sequence[str] | None = None) -> Run:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=128, help="rows of a process's batch")
    parser.add_argument("--accumulate", type=int, default=1, help="batches for a step; each is contrasted by itself")
    parser.add_argument("--bf16", action="store_true", help="encoders under autocast, in bfloat16")
    options = parser.parse_args(arguments)

    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision="bf16" if options.bf16 else "no",
        gradient_accumulation_steps=options.accumulate,
    )
    set_seed(0)
    model = Model("world" if accelerator.num_processes > 1 else None)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    rows = DataLoader(StackDataset(**views(2048, seed=0)), options.batch, shuffle=True, drop_last=True)
    model, optimizer, rows = accelerator.prepare(model, optimizer, rows)

    held_out = {name: x.to(accelerator.device) for name, x in views(HELD_OUT, HELD_OUT_SEED).items()}
    encoders = accelerator.unwrap_model(model).encoders
    before = scores(lambda: encoders(held_out))
    progress = tqdm(range(options.epochs), disable=not accelerator.is_main_process)
    for _ in progress:
        for features in rows:
            with accelerator.accumulate(model):
                loss = model(features)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
        # Processes return W times their shares: the mean is the loss.
        progress.set_postfix(loss=f"{accelerator.reduce(loss.detach(), 'mean').item():.3f}")
    run = Run(before, scores(lambda: encoders(held_out)))
    accelerator.print(run)
    accelerator.end_training()
    return run


if __name__ == "__main__":
    main()
