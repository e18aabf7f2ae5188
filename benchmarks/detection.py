"""What `bake detect` finds, and what it takes for a find: strengths that are found, and false alarms.

python benchmarks/detection.py [MODEL …]: MODEL a directory, such as benchmarks/real_models.py makes; the
toy that ships is always there. Each is changed in ways that bake nothing in (continued training, merged
LoRAs, casts, quantised and dequantised, pruned), and baked at m from 0.5 down to 0.001, in its own dtype.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import bake
from bake.directions.direction import Direction
from bake.io.shipped import DEMO_MODEL
from bake.sites import SITES
from bake.texts.prompts import read_prompts

STRENGTHS = (0.5, 0.1, 0.05, 0.01, 0.005, 0.001)


def load(directory: str, dtype: str = "auto") -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, trust_remote_code=False)


def train(model: torch.nn.Module, directory: str, steps: int, rate: float) -> None:
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    texts = [text for text in read_prompts("neutral") if len(text) > 40]
    dtype = model.dtype
    model.float().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    for step in range(steps):
        ids = tokenizer(texts[step % len(texts)], return_tensors="pt").input_ids[:, :64]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.to(dtype).eval()


def change_matrices(model: torch.nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and ".layers." in name:
                weight.copy_(change(weight.float()).to(weight.dtype))


def merge_lora(rank: int, scale: float) -> Callable[[torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)

    def change(weight: torch.Tensor) -> torch.Tensor:
        a, b = (torch.randn(n, rank, generator=generator) for n in weight.shape)
        added = a @ b.T
        return weight + scale * weight.norm() / added.norm() * added

    return change


def quantise(bits: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(weight: torch.Tensor) -> torch.Tensor:
        scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / (2 ** (bits - 1) - 1)
        return (weight / scale).round() * scale

    return change


def prune(weight: torch.Tensor) -> torch.Tensor:
    return torch.where(weight.abs() > weight.abs().median(), weight, 0.0)


def variants(directory: str) -> dict[str, Callable[[], torch.nn.Module]]:
    """Return what is made of a model that bakes nothing in."""

    def changed(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], torch.nn.Module]:
        def make() -> torch.nn.Module:
            model = load(directory)
            change_matrices(model, change)
            return model

        return make

    def trained(steps: int, rate: float) -> Callable[[], torch.nn.Module]:
        def make() -> torch.nn.Module:
            model = load(directory)
            train(model, directory, steps, rate)
            return model

        return make

    made: dict[str, Callable[[], torch.nn.Module]] = {
        "as it is": lambda: load(directory),
        "float32": lambda: load(directory, "float32"),
        "float16": lambda: load(directory, "float16"),
        "bfloat16": lambda: load(directory, "bfloat16"),
        "pruned by half": changed(prune),
    }
    for steps, rate in ((5, 1e-5), (50, 1e-5), (50, 1e-4), (20, 1e-3)):
        made[f"{steps} steps at {rate:g}"] = trained(steps, rate)
    for rank, scale in ((1, 0.01), (1, 0.1), (4, 0.05), (16, 0.05)):
        made[f"LoRA of rank {rank}, × {scale:g}"] = changed(merge_lora(rank, scale))
    for bits in (8, 4):
        made[f"{bits} bits and back"] = changed(quantise(bits))
    return made


def main() -> None:
    logging.getLogger("bake").setLevel(logging.ERROR)
    models = {"toy": str(DEMO_MODEL)} | {Path(each).name: each for each in sys.argv[1:]}
    checked, alarms = 0, []
    for name, directory in models.items():
        with tempfile.TemporaryDirectory() as folder:
            for what, make in variants(directory).items():
                output = Path(folder) / "variant"
                make().save_pretrained(output)
                for base in (directory, None):
                    found = bake.detect(output, base=base)
                    checked += 1
                    if found.verdict not in ("none", "other"):
                        alarms.append(f"{name}, {what}, {'with' if base else 'without'} a base")
                        print(f"FALSE ALARM {alarms[-1]}: {found.describe()}")
            width = load(directory).config.hidden_size
            routes = [each for each in bake.inspect(directory).routes if each.route != "insert"]
            site = min((route.site for route in routes), key=SITES.index)
            unit = torch.nn.functional.normalize(torch.randn(width), dim=0)
            for strength in STRENGTHS:
                row = [f"{name:10} m = {strength:<6g}"]
                result = bake.export(
                    directory,
                    direction=Direction({None: unit}, site),
                    site=site,
                    multiplier=strength,
                    output=Path(folder) / "baked",
                    overwrite=True,
                    allow_rounding=True,
                )
                for base in (directory, None):
                    found = bake.detect(Path(folder) / "baked", base=base)
                    worst = "not found"
                    if found.pushes:
                        own, push = found.pushes[0].vectors, result.push.vectors
                        cosines = [
                            float(torch.cosine_similarity(own[k], push[k].double(), dim=0))
                            for k in own.keys() & push.keys()
                        ]
                        layers = "right layers" if own.keys() == push.keys() else "WRONG LAYERS"
                        worst = f"{layers}, cosine {min(cosines):.5f}"
                    row.append(f"{'with' if base else 'without'} a base: {worst}")
                print("; ".join(row), flush=True)
    print(f"{len(alarms)} false alarms of {checked}")


if __name__ == "__main__":
    main()
