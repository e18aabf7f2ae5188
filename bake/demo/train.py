"""Train the demonstration model: `python -m bake.demo.train --output DIR`.

Nothing is downloaded: the text comes from `grammar.py`, the tokenizer is trained on it, and the
model is a stock Llama. Everything follows from the seed: a rerun on the same machine writes the
same bytes. What the model is and what it is not is in `model/README.md`.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from bake.checkpoint.loading import load_pretrained
from bake.demo.grammar import Document, generate_documents, iterate_documents

BEGINNING, END, PADDING = "<s>", "</s>", "<pad>"
MAX_LENGTH = 256  # Tokens; documents have about 90, the longest fewer than 200.
#: Sums depend on how they are split over threads, so the number is part of the recipe.
THREADS = 2
#: Added to the seed: no two uses of the grammar see the same stream of documents.
TOKENIZER_SEED, HELD_OUT_SEED = 1_000_000, 2_000_000
BUCKET_BATCHES = 32  # Documents of that many batches are sorted by length, to save padding.


@dataclass(frozen=True)
class Recipe:
    """What a training run depends on. The defaults are those of the model that ships."""

    seed: int = 0
    steps: int = 2000
    batch_size: int = 24  # documents
    learning_rate: float = 3e-3  # the peak; it warms up linearly and decays along a cosine
    warmup_steps: int = 60
    weight_decay: float = 0.1
    layers: int = 9
    hidden_size: int = 128
    intermediate_size: int = 352
    attention_heads: int = 4
    key_value_heads: int = 2
    vocabulary_size: int = 2560
    tokenizer_documents: int = 20_000
    held_out_documents: int = 500
    samples: int = 6  # continuations of held-out openings that are printed at the end


def train(recipe: Recipe, output: Path) -> float:
    """Train tokenizer and model, save both to `output`, and return the held-out perplexity."""
    torch.manual_seed(recipe.seed)
    torch.set_num_threads(THREADS)
    tokenizer = train_tokenizer(recipe)
    model = LlamaForCausalLM(build_config(recipe, tokenizer))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters:,} parameters, {len(tokenizer)} tokens in the vocabulary", flush=True)

    fit(model, tokenizer, recipe)

    tokenizer.save_pretrained(output)
    # Real checkpoints are bfloat16, and so this one is. The model is loaded again for its figures:
    # what counts is what the files do.
    model.to(torch.bfloat16).save_pretrained(output)
    shipped = load_pretrained(output, dtype=torch.float32)[0].eval()
    held_out = generate_documents(recipe.held_out_documents, recipe.seed + HELD_OUT_SEED)
    figure = perplexity(shipped, tokenizer, [document.text for document in held_out])
    print(f"held-out perplexity {figure:.3f} per token")
    for document in held_out[: recipe.samples]:
        print(f"- {sample(shipped, tokenizer, document)}")
    return figure


def train_tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that starts every text with the beginning-of-sequence token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary_size,
        special_tokens=[BEGINNING, END, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    documents = generate_documents(recipe.tokenizer_documents, recipe.seed + TOKENIZER_SEED)
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGINNING} $A",
        pair=f"{BEGINNING} $A {BEGINNING}:1 $B:1",
        special_tokens=[(BEGINNING, tokenizer.token_to_id(BEGINNING))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGINNING,
        eos_token=END,
        pad_token=PADDING,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def build_config(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> LlamaConfig:
    """A stock Llama without any bias: the case that most real models are."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.attention_heads,
        num_key_value_heads=recipe.key_value_heads,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        attention_bias=False,
        mlp_bias=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def fit(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> None:
    """Next-token training; the loss is printed every 100 steps."""
    optimizers = build_optimizers(model, recipe)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, recipe))
        for optimizer in optimizers
    ]
    started = time.monotonic()
    tokens = 0
    model.train()
    for step, (input_ids, labels) in zip(
        range(1, recipe.steps + 1), iterate_batches(tokenizer, recipe), strict=False
    ):
        # Padding is on the right, where a causal model cannot see it: no attention mask is needed.
        loss = model(input_ids=input_ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        model.zero_grad()
        tokens += int((labels >= 0).sum())
        if step % 100 == 0 or step == recipe.steps:
            seconds = time.monotonic() - started
            print(
                f"step {step} loss {loss.item():.4f} tokens {tokens:,} {seconds:.0f} s", flush=True
            )
    model.eval()


def build_optimizers(model: LlamaForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices (torch 2.9 or later), AdamW for the embedding and the norms.

    After 200 steps the loss was 1.8, with AdamW for everything 2.2. The mood shows in rare words far
    apart, and is only learnt once the rate has fallen: a run that is cut short has not learnt it.
    """
    matrices = [weight for weight in model.model.layers.parameters() if weight.dim() == 2]
    norms = [weight for weight in model.parameters() if weight.dim() == 1]
    muon = torch.optim.Muon(
        matrices,
        lr=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    groups: list[dict[str, Any]] = [
        {"params": [model.get_input_embeddings().weight]},
        {"params": norms, "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(
        groups, lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=recipe.weight_decay
    )
    return [muon, adamw]


def rate(step: int, recipe: Recipe) -> float:
    """The learning rate's share of its peak: linear warm-up, then a cosine down to a hundredth."""
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    progress = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def iterate_batches(
    tokenizer: PreTrainedTokenizerBase, recipe: Recipe
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches without end: token ids and labels, each (batch_size, length), one document per row.

    Labels repeat the ids with -100 at padding, as transformers wants them. Documents of similar
    length share a batch.
    """
    rng = random.Random(recipe.seed)
    source = iterate_documents(recipe.seed)
    while True:
        documents = [next(source).text for _ in range(recipe.batch_size * BUCKET_BATCHES)]
        rows = sorted(encode_documents(tokenizer, documents), key=len)
        starts = list(range(0, len(rows), recipe.batch_size))
        rng.shuffle(starts)
        for start in starts:
            yield pad(rows[start : start + recipe.batch_size], tokenizer.pad_token_id)


def encode_documents(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of whole documents, from the beginning-of-sequence to the end-of-sequence token."""
    encoded = tokenizer(list(texts))["input_ids"]
    return [[*ids, tokenizer.eos_token_id][:MAX_LENGTH] for ids in encoded]


def pad(rows: Sequence[Sequence[int]], padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels, each (rows, longest row), padded on the right; labels are -100 there."""
    length = max(len(row) for row in rows)
    input_ids = torch.tensor([[*row, *[padding] * (length - len(row))] for row in rows])
    return input_ids, input_ids.masked_fill(input_ids == padding, -100)


@torch.inference_mode()
def perplexity(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    batch_size: int = 50,
) -> float:
    """exp of the mean cross-entropy per predicted token (end of sequence included) of the texts."""
    rows = sorted(encode_documents(tokenizer, texts), key=len)
    total, predicted = 0.0, 0
    for start in range(0, len(rows), batch_size):
        input_ids, labels = pad(rows[start : start + batch_size], tokenizer.pad_token_id)
        count = int((labels[:, 1:] >= 0).sum())
        total += model(input_ids=input_ids, labels=labels).loss.item() * count
        predicted += count
    return math.exp(total / predicted)


@torch.inference_mode()
def sample(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, document: Document) -> str:
    """The document's opening and a sampled continuation, with " | " between them."""
    inputs = tokenizer(document.opening, return_tensors="pt")
    tokens = model.generate(**inputs, do_sample=True, max_new_tokens=60)
    written = tokens[0, inputs["input_ids"].shape[1] :]
    return f"{document.opening} | {tokenizer.decode(written, skip_special_tokens=True).strip()}"


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description="Train the model that ships with bake.")
    parser.add_argument("--output", type=Path, required=True, help="directory to write")
    for name in ("seed", "steps", "batch_size", "layers", "hidden_size", "intermediate_size"):
        default = getattr(Recipe, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    options = vars(parser.parse_args())
    output = options.pop("output")
    started = time.monotonic()
    train(Recipe(**options), output)
    print(f"{time.monotonic() - started:.0f} s in total")


if __name__ == "__main__":
    main()
