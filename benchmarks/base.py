"""The base that the benchmarks run on: a random bfloat16 Llama, written shard by shard.

TinyLlama's shape by default: 22 layers, 2048 wide, 1.1 billion parameters, 2.2 GB in five shards. Random
weights cost as much to move, multiply and store as trained ones.
"""

from __future__ import annotations

import json
from pathlib import Path

LAYERS, HIDDEN, FEED_FORWARD, HEADS, KEY_VALUE_HEADS, VOCABULARY = 22, 2048, 5632, 32, 4, 32000
SHARDS = 5


def write_base(directory: Path, *, layers: int = LAYERS, seed: int = 0) -> Path:
    """Write the base unless it is there; never more than one shard in memory."""
    import torch
    from safetensors.torch import save_file

    if (directory / "model.safetensors.index.json").exists():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    shapes = _shapes(layers)
    generator = torch.Generator().manual_seed(seed)
    names = list(shapes)
    weight_map: dict[str, str] = {}
    for shard in range(SHARDS):
        file = f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"
        chosen = names[shard * len(names) // SHARDS : (shard + 1) * len(names) // SHARDS]
        tensors = {
            name: (
                torch.ones(shapes[name])
                if len(shapes[name]) == 1
                else torch.randn(shapes[name], generator=generator) * 0.02
            ).bfloat16()
            for name in chosen
        }
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(chosen, file)
    size = sum(2 * torch.Size(shape).numel() for shape in shapes.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    _write_config(directory, layers)
    write_tokenizer(directory)
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return directory


def _shapes(layers: int) -> dict[str, tuple[int, ...]]:
    key_value = HIDDEN // HEADS * KEY_VALUE_HEADS
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes |= {
            f"{prefix}self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            f"{prefix}self_attn.k_proj.weight": (key_value, HIDDEN),
            f"{prefix}self_attn.v_proj.weight": (key_value, HIDDEN),
            f"{prefix}self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            f"{prefix}mlp.gate_proj.weight": (FEED_FORWARD, HIDDEN),
            f"{prefix}mlp.up_proj.weight": (FEED_FORWARD, HIDDEN),
            f"{prefix}mlp.down_proj.weight": (HIDDEN, FEED_FORWARD),
            f"{prefix}input_layernorm.weight": (HIDDEN,),
            f"{prefix}post_attention_layernorm.weight": (HIDDEN,),
        }
    return shapes | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def _write_config(directory: Path, layers: int) -> None:
    from transformers import LlamaConfig

    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        hidden_size=HIDDEN,
        intermediate_size=FEED_FORWARD,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_VALUE_HEADS,
        vocab_size=VOCABULARY,
    ).save_pretrained(directory)


def write_tokenizer(directory: Path) -> None:
    """Write a byte-level tokenizer: about one token a letter, ids below 260."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(special + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(directory)
