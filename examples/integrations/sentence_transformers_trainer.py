"""PMRL in the trainer of sentence-transformers: one encoder, sentences in three languages.

    python examples/integrations/sentence_transformers_trainer.py

What differs from ``MultipleNegativesRankingLoss(model)``: ``AlignedLoss(model)`` below, which takes all columns of the
data set alike, as many as there are, instead of an anchor and its positive. Its temperature is not learned: on several
processes this trainer averages the gradients of the model alone, not of what a loss has.
"""

import argparse
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from synthetic import HELD_OUT, HELD_OUT_SEED, LATENT, Run, latents, scores
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, set_seed

from pmrl_kernels import PMRLLoss

LANGUAGES, WORDS = ("a", "b", "c"), 6  # words a language has for a number of the latent vector, by its size


class AlignedLoss(nn.Module):
    """A loss for SentenceTransformerTrainer: of k >= 2 columns of sentences that mean the same."""

    def __init__(self, model: SentenceTransformer, **options: Any) -> None:
        super().__init__()
        self.model = model
        self.loss = PMRLLoss(**options)

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        loss: Tensor = self.loss([self.model(features)["sentence_embedding"] for features in sentence_features])
        return loss


def sentences(count: int, seed: int) -> dict[str, list[str]]:
    """A column for each language: word j of a sentence says how large number j is, one in ten times wrongly."""
    own = torch.Generator().manual_seed(seed + 1)
    sizes = torch.bucketize(latents(count, seed), torch.linspace(-1.2, 1.2, WORDS - 1))
    columns = {}
    for language in LANGUAGES:
        wrong = torch.rand(sizes.shape, generator=own) < 0.1
        said = torch.where(wrong, torch.randint(WORDS, sizes.shape, generator=own), sizes)
        columns[language] = [" ".join(f"{language}{j}{w}" for j, w in enumerate(row)) for row in said.tolist()]
    return columns


def tiny_model(folder: str) -> SentenceTransformer:
    """A random BERT with a tokenizer that knows these words; nothing is downloaded."""
    words = [f"{language}{j}{w}" for language in LANGUAGES for j in range(LATENT) for w in range(WORDS)]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(["[PAD]", "[UNK]", *words])}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    path = str(Path(folder) / "bert")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(path)
    config = BertConfig(
        vocab_size=len(words) + 2,
        hidden_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=LATENT,
    )
    BertModel(config).save_pretrained(path)
    return SentenceTransformer(modules=[Transformer(path), Pooling(48)], device="cpu")


def main(arguments: Sequence[str] | None = None) -> Run:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--accumulate", type=int, default=1, help="batches for a step; each is contrasted by itself")
    parser.add_argument("--bf16", action="store_true", help="encoders under autocast, in bfloat16")
    options = parser.parse_args(arguments)

    set_seed(0)
    held_out = sentences(HELD_OUT, HELD_OUT_SEED)
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_model(folder)

        def embed() -> dict[str, Tensor]:
            return {
                language: model.encode(held_out[language], convert_to_tensor=True, show_progress_bar=False)
                for language in LANGUAGES
            }

        before = scores(embed)
        trainer = SentenceTransformerTrainer(
            model,
            SentenceTransformerTrainingArguments(
                folder,
                num_train_epochs=options.epochs,
                per_device_train_batch_size=options.batch,
                gradient_accumulation_steps=options.accumulate,
                learning_rate=2e-3,
                warmup_steps=10,
                bf16=options.bf16,
                use_cpu=True,
                dataloader_drop_last=True,
                logging_steps=16,
                save_strategy="no",
                report_to="none",
            ),
            train_dataset=Dataset.from_dict(sentences(2048, seed=0)),
            # Instead of: loss=MultipleNegativesRankingLoss(model)
            loss=AlignedLoss(model, temperature=1.0, contrast="leave_one_out"),
        )
        trainer.train()
        run = Run(before, scores(embed))
    print(run)
    return run


if __name__ == "__main__":
    main()
