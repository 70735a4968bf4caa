"""PMRL in the Trainer of Hugging Face transformers: a text, an image and an audio tower.

    python examples/integrations/hugging_face_trainer.py
    python examples/integrations/hugging_face_trainer.py --loss-function      the loss outside the model

What differs from a model with a classification loss: ``forward`` returns {"loss": the loss of the embeddings}, so the
Trainer needs no line of its own. The temperature is the model's parameter then, trained, averaged and saved with it.
(``return_loss=True`` in the signature tells the Trainer that there is a loss without labels, when it evaluates.)
With ``--loss-function`` the model returns embeddings, and ``compute_loss_func`` makes a loss of them.
"""

import argparse
import functools
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from synthetic import HELD_OUT, HELD_OUT_SEED, LATENT, Run, latents, scores
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    ASTConfig,
    ASTModel,
    BertConfig,
    BertModel,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTModel,
    set_seed,
)

from pmrl_kernels import PMRLLoss, pmrl_loss

WORDS = 6  # of which one says where a number of the latent vector lies
SMALL = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 96}


class Clips(Dataset[dict[str, Tensor]]):
    """Token ids (T,), pixels (1, 16, 16) and a spectrogram (16, 16) of one latent vector each, with noise."""

    def __init__(self, count: int, seed: int) -> None:
        fixed, own = torch.Generator().manual_seed(7), torch.Generator().manual_seed(seed + 1)
        z = latents(count, seed)
        edges = torch.linspace(-1.2, 1.2, WORDS - 1)
        words = torch.arange(LATENT) * WORDS + torch.bucketize(z + 0.1 * torch.randn(z.shape, generator=own), edges)
        self.columns = {"input_ids": words}
        for name, shape in (("pixel_values", (1, 16, 16)), ("input_values", (16, 16))):
            mixing = torch.randn(LATENT, 256, generator=fixed) / LATENT**0.5
            clean = torch.tanh(z @ mixing)
            self.columns[name] = (clean + 0.3 * torch.randn(clean.shape, generator=own)).view(count, *shape)

    def __len__(self) -> int:
        return len(self.columns["input_ids"])

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {name: column[row] for name, column in self.columns.items()}


class Towers(nn.Module):
    def __init__(self, has_loss: bool) -> None:
        super().__init__()
        self.text = BertModel(BertConfig(vocab_size=LATENT * WORDS, max_position_embeddings=LATENT, **SMALL))
        self.image = ViTModel(ViTConfig(image_size=16, patch_size=4, num_channels=1, **SMALL))
        self.audio = ASTModel(
            ASTConfig(max_length=16, num_mel_bins=16, patch_size=4, time_stride=4, frequency_stride=4, **SMALL)
        )
        # Instead of: CrossEntropyLoss() in forward
        loss = PMRLLoss(1.0, contrast="leave_one_out", learnable_instance_temperature=True)
        self.loss = loss if has_loss else None

    def forward(
        self, input_ids: Tensor, pixel_values: Tensor, input_values: Tensor, return_loss: bool = True
    ) -> dict[str, Tensor]:
        embeddings = {
            "text": self.text(input_ids).last_hidden_state.mean(1),
            "image": self.image(pixel_values).last_hidden_state.mean(1),
            "audio": self.audio(input_values).last_hidden_state.mean(1),
        }
        return embeddings if self.loss is None else {"loss": self.loss(embeddings), **embeddings}


def loss_of(embeddings: dict[str, Tensor], labels: None, num_items_in_batch: Any = None, *, batches: int) -> Tensor:
    """For ``compute_loss_func``, with which the Trainer no longer divides by the batches that make a step."""
    return pmrl_loss(embeddings, temperature=1.0, contrast="leave_one_out") / batches


def main(arguments: Sequence[str] | None = None) -> Run:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--accumulate", type=int, default=1, help="batches for a step; each is contrasted by itself")
    parser.add_argument("--bf16", action="store_true", help="encoders under autocast, in bfloat16")
    parser.add_argument("--loss-function", action="store_true", help="the loss in the Trainer, not in the model")
    options = parser.parse_args(arguments)

    set_seed(0)
    model = Towers(has_loss=not options.loss_function)
    held_out = Clips(HELD_OUT, HELD_OUT_SEED)

    def embed() -> dict[str, Tensor]:
        found = model.eval()(**held_out.columns)
        return {name: found[name] for name in ("text", "image", "audio")}

    before = scores(embed)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model,
            TrainingArguments(
                folder,
                num_train_epochs=options.epochs,
                per_device_train_batch_size=options.batch,
                per_device_eval_batch_size=HELD_OUT,  # the loss depends on what a batch is contrasted with
                gradient_accumulation_steps=options.accumulate,
                learning_rate=2e-3,
                lr_scheduler_type="cosine",
                warmup_steps=10,
                bf16=options.bf16,
                use_cpu=True,
                dataloader_drop_last=True,
                logging_steps=16,
                save_strategy="no",
                report_to="none",
            ),
            train_dataset=Clips(2048, seed=0),
            eval_dataset=held_out,
            compute_loss_func=functools.partial(loss_of, batches=options.accumulate) if options.loss_function else None,
        )
        trainer.train()
        if not options.loss_function:
            print(trainer.evaluate())
    run = Run(before, scores(embed))
    print(run)
    return run


if __name__ == "__main__":
    main()
