"""What keeps a push that is baked in: compiling, quantising in PyTorch, training on top. On the toy.

python benchmarks/after_the_bake.py: needs torchao and peft. Of each, the change of the next token's
log-probabilities from base to bake is compared with that of the two as they are.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup
from transformers import AutoModelForCausalLM, AutoTokenizer, TorchAoConfig

import bake
from bake.io.shipped import DEMO_MODEL

TEXTS = ("The garden was", "She said that the soup", "He walked to the", "We opened the box and")
Make = Callable[[str], torch.nn.Module]


def load(directory: str, **options: object) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, trust_remote_code=False, **options
    ).eval()


def log_probabilities(model: torch.nn.Module) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL, trust_remote_code=False)
    with torch.no_grad():
        rows = [model(**tokenizer(text, return_tensors="pt")).logits[0, -1] for text in TEXTS]
    return torch.stack(rows).float().log_softmax(-1)


def trained_on_top(directory: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = get_peft_model(load(directory), LoraConfig(r=4, target_modules="all-linear"))
    model.train()
    rate = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(rate, lr=1e-3)
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL, trust_remote_code=False)
    ids = tokenizer("The river runs past the old mill.", return_tensors="pt").input_ids
    for _ in range(20):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval().merge_and_unload()


def main() -> None:
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        baked = str(Path(folder) / "baked")
        direction = DEMO_MODEL.parent / "direction.safetensors"
        bake.export(DEMO_MODEL, direction=direction, output=baked)
        pair = (str(DEMO_MODEL), baked)
        four = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
        ways: dict[str, Make] = {
            "as it is": load,
            "torch.compile": lambda each: torch.compile(load(each), dynamic=True),
            "torchao, int8 weights": lambda each: load(
                each, quantization_config=TorchAoConfig(Int8WeightOnlyConfig())
            ),
            "torchao, int4 weights in groups of 32": lambda each: load(
                each, quantization_config=TorchAoConfig(four)
            ),
            "torch, dynamic int8": lambda each: torch.ao.quantization.quantize_dynamic(
                load(each), {torch.nn.Linear}, dtype=torch.qint8
            ),
        }
        wanted: torch.Tensor | None = None
        for name, make in ways.items():
            base, own = (log_probabilities(make(each)) for each in pair)
            shift = own - base
            shift -= shift.mean(dim=1, keepdim=True)
            wanted = shift if wanted is None else wanted
            cosine = torch.cosine_similarity(shift.flatten(), wanted.flatten(), dim=0)
            print(f"{name:38} cosine {cosine:.4f}, length × {shift.norm() / wanted.norm():.3f}")
        before, after = (
            {n: p for n, p in model.named_parameters() if n.endswith("down_proj.bias")}
            for model in (load(baked), trained_on_top(baked))
        )
        same = bool(before) and all(torch.equal(before[name], after[name]) for name in before)
        print(f"a LoRA trained on top and merged: the {len(before)} biases are the same: {same}")


if __name__ == "__main__":
    main()
