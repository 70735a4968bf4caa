"""PMRL in PyTorch Lightning.

    python examples/integrations/lightning_module.py

What differs from a module with ``cross_entropy``: ``training_step`` gives the loss the embeddings of all views, where
it had logits and labels. The loss is an attribute, so Lightning finds its temperature among the module's parameters,
and under ``strategy="ddp"`` averages its gradient; with ``group="world"`` the whole batch is contrasted there.
"""

import argparse
from collections.abc import Sequence

import lightning
import torch
from synthetic import HELD_OUT, HELD_OUT_SEED, Encoders, Run, scores, views
from torch import Tensor
from torch.utils.data import DataLoader, StackDataset

from pmrl_kernels import PMRLLoss, alignment_score


class Aligned(lightning.LightningModule):
    def __init__(self, group: str | None = None) -> None:
        super().__init__()
        self.encoders = Encoders()
        # Instead of: self.loss = nn.CrossEntropyLoss()
        self.loss = PMRLLoss(1.0, contrast="leave_one_out", learnable_instance_temperature=True, group=group)

    def training_step(self, features: dict[str, Tensor], number: int) -> Tensor:
        embeddings = self.encoders(features)
        loss: Tensor = self.loss(embeddings)  # instead of: self.loss(logits, labels)
        self.log_dict({"loss": loss, "alignment": alignment_score(embeddings)}, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 2e-3)


def main(arguments: Sequence[str] | None = None) -> Run:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--accumulate", type=int, default=1, help="batches for a step; each is contrasted by itself")
    parser.add_argument("--bf16", action="store_true", help="encoders under autocast, in bfloat16")
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args(arguments)

    lightning.seed_everything(0, verbose=False)
    module = Aligned("world" if options.processes > 1 else None)
    held_out = views(HELD_OUT, HELD_OUT_SEED)
    before = scores(lambda: module.encoders(held_out))
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=options.processes,
        strategy="ddp" if options.processes > 1 else "auto",
        max_epochs=options.epochs,
        accumulate_grad_batches=options.accumulate,
        precision="bf16-mixed" if options.bf16 else "32-true",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    rows = DataLoader(StackDataset(**views(2048, seed=0)), options.batch, shuffle=True, drop_last=True)
    trainer.fit(module, rows)
    run = Run(before, scores(lambda: module.encoders(held_out)))
    print(run)
    return run


if __name__ == "__main__":
    main()
