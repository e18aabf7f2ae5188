"""Whether a bake's push is there when other libraries load it.

    python benchmarks/after_elsewhere.py NAME BASE BAKE

NAME: bitsandbytes, transformer_lens or nnsight, with that library installed beside transformers; nothing of
bake is needed. Prints the cosine and the length of the change from base to bake, beside that of the two in
plain transformers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

IDS = torch.tensor([[1, 504, 3575, 4052, 335, 260, 2240, 314]])
Run = Callable[[str], torch.Tensor]


def plain(directory: str, **options: Any) -> torch.Tensor:
    """Return the logits of plain transformers."""
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, trust_remote_code=False, **options
    ).eval()
    return model(input_ids=IDS).logits[0]


def bitsandbytes() -> Iterator[tuple[str, Run]]:
    """Yield both kinds of quantisation."""
    from transformers import BitsAndBytesConfig

    kinds = {
        "8 bits": BitsAndBytesConfig(load_in_8bit=True),
        "4 bits (nf4)": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    }
    for name, config in kinds.items():
        yield name, lambda each, config=config: plain(each, quantization_config=config)


def transformer_lens() -> Iterator[tuple[str, Run]]:
    """Yield its bridge over a transformers model."""
    from transformer_lens.model_bridge import TransformerBridge

    def run(directory: str) -> torch.Tensor:
        model = TransformerBridge.boot_transformers(directory, device="cpu", dtype=torch.float32)
        return model(IDS)[0]

    yield "TransformerBridge", run


def nnsight() -> Iterator[tuple[str, Run]]:
    """Yield its LanguageModel, traced."""
    from nnsight import LanguageModel

    def run(directory: str) -> torch.Tensor:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        model = LanguageModel(directory, tokenizer=tokenizer, device_map="cpu", dtype=torch.float32)
        with torch.no_grad(), model.trace(IDS):
            out = model.lm_head.output.save()
        return out[0]

    yield "LanguageModel", run


def main() -> None:
    """Compare the changes."""
    name, base, baked = sys.argv[1:]
    with torch.no_grad():
        wanted = _change(plain, base, baked)
        for kind, run in {
            "bitsandbytes": bitsandbytes,
            "transformer_lens": transformer_lens,
            "nnsight": nnsight,
        }[name]():
            found = _change(run, base, baked)
            cosine = torch.nn.functional.cosine_similarity(wanted, found, dim=0)
            print(f"{name}, {kind}: cosine {cosine:.4f}, length {found.norm() / wanted.norm():.3f}")


def _change(run: Run, base: str, baked: str) -> torch.Tensor:
    old, new = (run(each).detach().double().log_softmax(-1) for each in (base, baked))
    return (new - old).flatten()


if __name__ == "__main__":
    main()
