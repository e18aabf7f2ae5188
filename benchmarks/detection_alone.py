"""Pushes into trained biases, looked for without the base: how many are found, and how many are not there.

python benchmarks/detection_alone.py FOLDER [FIGURE.png]: small models of families with biases of their own
are trained on the demo's texts (kept in FOLDER, minutes each), scored as they are, and scored again with a
random direction baked in at several strengths. Prints what share is found by the threshold of bake detect,
and draws the ROC of the score.
"""

from __future__ import annotations

import itertools
import logging
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPTNeoXConfig,
    OPTConfig,
    PreTrainedConfig,
    Qwen2Config,
)

import bake
from bake.card import figures
from bake.demo.grammar import iterate_documents
from bake.detection.alone import score_trained
from bake.detection.detect import open_suspect
from bake.detection.steps import Step
from bake.directions.direction import Direction
from bake.io.shipped import DEMO_MODEL

FAMILIES = ("gpt2", "qwen2", "opt", "neox")
WIDTH, LAYERS, STEPS = 64, 8, 300
STRENGTHS = (0.25, 0.5, 1.0, 2.0)
SITES = ("mlp_out", "attn_in")


def config(family: str, vocabulary: int) -> PreTrainedConfig:
    heads = 2
    if family == "gpt2":
        return GPT2Config(
            vocab_size=vocabulary, n_positions=128, n_embd=WIDTH, n_layer=LAYERS, n_head=heads
        )
    common = {
        "vocab_size": vocabulary,
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": heads,
        "max_position_embeddings": 128,
    }
    if family == "qwen2":
        return Qwen2Config(**common, intermediate_size=3 * WIDTH, num_key_value_heads=1)
    if family == "opt":
        return OPTConfig(**common, ffn_dim=3 * WIDTH, word_embed_proj_dim=WIDTH, dropout=0.0)
    return GPTNeoXConfig(**common, intermediate_size=4 * WIDTH)


def train(family: str, seed: int, output: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL, trust_remote_code=False)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        config(family, len(tokenizer)), trust_remote_code=False
    )
    documents = iterate_documents(1000 + 100 * FAMILIES.index(family) + seed)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01 if seed else 0.1)
    for step in range(STEPS):
        texts = [document.text for document in itertools.islice(documents, 8)]
        ids = tokenizer(
            texts, return_tensors="pt", padding="max_length", truncation=True, max_length=64
        ).input_ids
        labels = ids.masked_fill(ids == tokenizer.pad_token_id, -100)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 20) * (1 - step / STEPS)
        model(input_ids=ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(output)
    tokenizer.save_pretrained(output)


def trained(folder: Path, seeds: int = 3) -> Iterator[Path]:
    for family, seed in itertools.product(FAMILIES, range(seeds)):
        output = folder / f"{family}-{WIDTH}-{seed}"
        if not (output / "config.json").is_file():
            train(family, seed, output)
        yield output


def scores(directory: Path) -> dict[str, Step]:
    opened, tensors, names = open_suspect(str(directory))
    found: dict[str, Step] = {}
    for push in score_trained(opened, tensors, names, frozenset()):
        step = push.step
        if step is not None and (push.site not in found or step.margin > found[push.site].margin):
            found[push.site] = step
    return found


def draw(path: Path, clean: list[Step], baked: dict[float, list[Step]]) -> None:
    with figures.canvas(path, 1, figures.HEIGHT) as (axes,):
        axes.set_title("Found without the base, in trained biases")
        lines = ("-", "--", "-.", ":", (0, (1, 3)))
        for line, (strength, found) in zip(lines, baked.items(), strict=False):
            every = sorted({step.margin for step in (*clean, *found)}, reverse=True)
            alarms = [0.0, *(sum(s.margin >= t for s in clean) / len(clean) for t in every)]
            hits = [0.0, *(sum(s.margin >= t for s in found) / len(found) for t in every)]
            axes.plot(alarms, hits, linestyle=line, color=figures.BLUE, label=f"m = {strength:g}")
        axes.set(xlabel="share of models without a push above the score", ylabel="pushes above it")
        axes.legend(loc="lower right")


def main() -> None:
    logging.getLogger("bake").setLevel(logging.ERROR)
    folder = Path(sys.argv[1])
    models = list(trained(folder))
    clean = [step for model in models for step in scores(model).values()]
    bands = [step.score for step in clean if step.stop - step.first > 1]
    single = [step.score for step in clean if step.stop - step.first == 1]
    print(
        f"{len(clean)} scores of {len(models)} models without a push: at most {max(bands, default=0):.2f} "
        f"(bands), {max(single, default=0):.2f} (single layers); "
        f"{sum(step.is_found for step in clean)} above the threshold"
    )
    baked: dict[float, list[Step]] = {strength: [] for strength in STRENGTHS}
    right: dict[float, int] = dict.fromkeys(STRENGTHS, 0)
    with tempfile.TemporaryDirectory() as work:
        for index, model in enumerate(models):
            sites = [site for site in SITES if site in scores(model)]
            for strength, site in itertools.product(STRENGTHS, sites):
                torch.manual_seed(index)
                unit = torch.nn.functional.normalize(torch.randn(WIDTH), dim=0)
                output = Path(work) / "baked"
                result = bake.export(
                    model,
                    direction=Direction({None: unit}, site),
                    site=site,
                    multiplier=strength,
                    output=output,
                    overwrite=True,
                    allow_rounding=True,
                )
                step = scores(output)[site]
                layers = sorted(result.push.vectors)
                baked[strength].append(step)
                right[strength] += step.is_found and [step.first, step.stop - 1] == [
                    layers[0],
                    layers[-1],
                ]
    for strength, found in baked.items():
        hits = sum(step.is_found for step in found)
        print(
            f"m = {strength:<6g} {hits} of {len(found)} found ({hits / len(found):.0%}), "
            f"{right[strength]} in the right layers"
        )
    if len(sys.argv) > 2:
        draw(Path(sys.argv[2]), clean, baked)


if __name__ == "__main__":
    main()
