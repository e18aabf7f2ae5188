"""The families that people steer, by name: what `auto` chooses for each, and a bake from end to end.

A base is written as the Hub has it: bfloat16, sharded, tied where the family ties, its tokenizer saved
by the family's class under the name that the Hub's files give it. End to end every family starts a
process, so `make test-architectures` runs that part only.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoTokenizer,
    CodeGenTokenizer,
    CohereTokenizer,
    GemmaTokenizer,
    GPT2Tokenizer,
    GPTNeoXTokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)

from bake.anatomy import examine
from bake.anatomy.twin import build_random
from bake.api import export
from bake.checkpoint.config_json import edit_json
from bake.checkpoint.loading import auto_class, load_report
from bake.texts.tokenizer import TEXTS

LAYERS, HIDDEN, VOCABULARY = 4, 32, 320
BAND = range(1, 3)  # 40–90 % of the depth

# Tokenizers ----------------------------------------------------------------------------------------

TEMPLATE = (
    "{{ bos_token or '' }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MERGES = [("t", "h"), ("th", "e"), ("i", "n"), ("e", "r"), ("0", "0")]
CHAT_TOKENS = ["<|im_start|>", "<|im_end|>"]
SPLIT_DIGITS = Regex(r"\d{1,3}| ?[^\s\d]+|\s+")


def pieces_of(special: list[str], alphabet: list[str], space: str) -> tuple[dict[str, int], list]:
    """Return a vocabulary and its merges; a word's first letter carries the space."""
    merges = [*MERGES, (space, "the")]
    pieces = [*special, *alphabet, *("".join(pair) for pair in merges)]
    return {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}, merges


def of_bytes(tokenizer_class: type, *special: str, **options: Any) -> Any:
    """A byte-level tokenizer of a class that builds its own pre-tokenizer."""
    vocabulary, merges = pieces_of(list(special), sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġ")
    return tokenizer_class(vocab=vocabulary, merges=merges, **options)


def of_pieces(tokenizer_class: type, *special: str, **options: Any) -> Any:
    """A SentencePiece-like tokenizer with byte fallback, of a class that builds its own parts."""
    alphabet = [*(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"theinr0"]
    vocabulary, merges = pieces_of(list(special), alphabet, "▁")
    return tokenizer_class(vocab=vocabulary, merges=merges, **options)


def of_file(bos: str, eos: str) -> Any:
    """A byte-level tokenizer whose parts only tokenizer.json has: digits in threes, bos put first."""
    vocabulary, merges = pieces_of([bos, eos], sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġ")
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(SPLIT_DIGITS, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, vocabulary[bos])]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos)


END = "<|endoftext|>"


def gpt2_like() -> Any:
    return of_bytes(GPT2Tokenizer, END)


def neox_like() -> Any:
    return of_bytes(GPTNeoXTokenizer, END, "<|padding|>")


def opt_like() -> Any:
    special = ["<s>", "<pad>", "</s>"]
    names = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    return of_bytes(GPT2Tokenizer, *special, **names)


def codegen_like() -> Any:
    return of_bytes(CodeGenTokenizer, END)


def cohere_like() -> Any:
    special = ["<PAD>", "<UNK>", "<CLS>", "<SEP>", "<MASK_TOKEN>", "<BOS_TOKEN>"]
    return of_bytes(CohereTokenizer, *special, "<|END_OF_TURN_TOKEN|>")


def qwen_like() -> Any:
    return of_bytes(Qwen2Tokenizer, END)


def llama2_like() -> Any:
    return of_pieces(LlamaTokenizer, "<unk>", "<s>", "</s>")


def gemma_like() -> Any:
    return of_pieces(GemmaTokenizer, "<pad>", "<eos>", "<bos>", "<unk>", "<mask>")


def llama3_like() -> Any:
    return of_file("<|begin_of_text|>", "<|end_of_text|>")


def bloom_like() -> Any:
    return of_file("<s>", "</s>")


# Families ------------------------------------------------------------------------------------------

GENERIC = (
    "PreTrainedTokenizerFast"  # what the Hub's files call a tokenizer without a class of its own
)
SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": 88,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},  # the tokenizer's in the end
}
HEADS = {**SIZES, "head_dim": 16}
TIED = {"tie_word_embeddings": True}
GPT = {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 4, "vocab_size": VOCABULARY}
ROTARY = {"rope_type": "default", "rope_theta": 1e4}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 2.1, 2.2, 2.3],
    "original_max_position_embeddings": 64,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_VISION = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "out_hidden_size": HIDDEN,
}
QWEN_TEXT = {
    **SIZES,
    "head_dim": 8,
    "rope_parameters": {**ROTARY, "mrope_section": [2, 1, 1]},
}


@dataclass(frozen=True)
class Family:
    """A family's config, its tokenizer, and the site, route and host that `auto` picks.

    called: what tokenizer_config.json on the Hub calls the tokenizer's class. wrapper: the class that
    config.json of a multimodal model names.
    """

    model_type: str
    config: dict[str, Any]
    tokenizer: Callable[[], Any]
    called: str
    site: str
    route: str
    host: str | None = None
    wrapper: str | None = None

    def make_config(self) -> Any:
        config = AutoConfig.for_model(self.model_type, **self.config)
        if self.wrapper:
            config.architectures = [self.wrapper]
        return config


FAMILIES = {
    "llama": Family("llama", SIZES, llama3_like, GENERIC, "mlp_out", "flag"),
    "llama-2": Family("llama", SIZES, llama2_like, "LlamaTokenizer", "mlp_out", "flag"),
    "qwen2": Family(
        "qwen2", {**SIZES, **TIED}, qwen_like, "Qwen2Tokenizer", "mlp_out", "host", "llama"
    ),
    "qwen3": Family("qwen3", {**HEADS, **TIED}, qwen_like, "Qwen2Tokenizer", "attn_out", "flag"),
    "qwen3-moe": Family(
        "qwen3_moe",
        {**HEADS, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
        qwen_like,
        "Qwen2Tokenizer",
        "attn_out",
        "flag",
    ),
    "mistral": Family(
        "mistral",
        {**SIZES, "sliding_window": None},
        llama2_like,
        "LlamaTokenizer",
        "mlp_out",
        "host",
        "llama",
    ),
    "mistral-sliding-window": Family(
        "mistral",
        {**SIZES, "sliding_window": 8},
        llama2_like,
        "LlamaTokenizer",
        "mlp_out",
        "host",
        "smollm3",
    ),
    "mixtral": Family(
        "mixtral",
        {**SIZES, "num_local_experts": 4, "sliding_window": None},
        llama2_like,
        "LlamaTokenizer",
        "mlp_out",
        "host",
        "aria_text",
    ),
    "gemma": Family("gemma", HEADS, gemma_like, "GemmaTokenizer", "attn_out", "flag"),
    "gemma2": Family(
        "gemma2",
        {**HEADS, "query_pre_attn_scalar": 16, "sliding_window": 8},
        gemma_like,
        "GemmaTokenizer",
        "attn_in",
        "flag",
    ),
    "gemma3": Family(
        "gemma3_text",
        {**HEADS, "query_pre_attn_scalar": 16, "sliding_window": 8},
        gemma_like,
        "GemmaTokenizer",
        "attn_in",
        "flag",
    ),
    "phi3": Family("phi3", SIZES, llama2_like, "LlamaTokenizer", "mlp_out", "host", "llama"),
    "phi3-longrope": Family(
        "phi3",
        {**SIZES, "rope_parameters": LONGROPE, "original_max_position_embeddings": 64},
        llama2_like,
        "LlamaTokenizer",
        "mlp_out",
        "host",
        "llama",
    ),
    "phi3-partial-rotary": Family(
        "phi3",
        {**SIZES, **TIED, "rope_parameters": {**ROTARY, "partial_rotary_factor": 0.75}},
        gpt2_like,
        "GPT2Tokenizer",
        "mlp_out",
        "host",
        "bamba",
    ),
    "gpt2": Family("gpt2", GPT, gpt2_like, "GPT2Tokenizer", "mlp_out", "native"),
    "gpt-neox": Family("gpt_neox", SIZES, neox_like, "GPTNeoXTokenizerFast", "mlp_out", "native"),
    "opt": Family(
        "opt",
        {
            "hidden_size": HIDDEN,
            "word_embed_proj_dim": HIDDEN,
            "ffn_dim": 88,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 128,
        },
        opt_like,
        "GPT2Tokenizer",
        "mlp_out",
        "native",
    ),
    "phi-2": Family("phi", SIZES, codegen_like, "CodeGenTokenizer", "mlp_out", "native"),
    "starcoder2": Family("starcoder2", SIZES, gpt2_like, "GPT2Tokenizer", "mlp_out", "native"),
    "falcon": Family(
        "falcon",
        {
            "hidden_size": HIDDEN,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "vocab_size": VOCABULARY,
        },
        llama3_like,
        GENERIC,
        "mlp_out",
        "flag",
    ),
    "bloom": Family(
        "bloom",
        {"hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": 4, "vocab_size": VOCABULARY},
        bloom_like,
        "BloomTokenizerFast",
        "mlp_out",
        "native",
    ),
    "olmo": Family("olmo", SIZES, neox_like, "GPTNeoXTokenizerFast", "attn_out", "flag"),
    "olmo2": Family("olmo2", SIZES, gpt2_like, "GPT2Tokenizer", "attn_in", "flag"),
    "gpt-oss": Family(
        "gpt_oss",
        {
            **HEADS,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 8,
            "rope_parameters": ROTARY,
        },
        llama3_like,
        GENERIC,
        "mlp_out",
        "native",
    ),
    "granite": Family("granite", {**SIZES, **TIED}, gpt2_like, "GPT2Tokenizer", "mlp_out", "flag"),
    "smollm3": Family("smollm3", SIZES, llama3_like, GENERIC, "mlp_out", "flag"),
    "cohere": Family("cohere", SIZES, cohere_like, "CohereTokenizerFast", "mlp_out", "flag"),
    "deepseek-v3": Family(
        "deepseek_v3",
        {
            **SIZES,
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
        llama3_like,  # Bytes, under the name of a SentencePiece class.
        "LlamaTokenizerFast",
        "attn_out",
        "flag",
    ),
    "glm4": Family("glm4", HEADS, llama3_like, "PreTrainedTokenizer", "attn_in", "native"),
    "stablelm": Family("stablelm", SIZES, neox_like, "GPTNeoXTokenizerFast", "attn_in", "native"),
    "gemma3-wrapper": Family(
        "gemma3",
        {
            "text_config": {
                **HEADS,
                "model_type": "gemma3_text",
                "query_pre_attn_scalar": 16,
                "sliding_window": 8,
            },
            "vision_config": {**VISION, "model_type": "siglip_vision_model"},
            "mm_tokens_per_image": 4,
        },
        gemma_like,
        "GemmaTokenizer",
        "attn_in",
        "flag",
        wrapper="Gemma3ForConditionalGeneration",
    ),
    "mistral3-wrapper": Family(
        "mistral3",
        {
            "tie_word_embeddings": False,
            "text_config": {**HEADS, "model_type": "mistral", "sliding_window": None},
            "vision_config": {**VISION, "model_type": "pixtral"},
        },
        llama3_like,
        GENERIC,
        "mlp_out",
        "host",
        "llama",
        wrapper="Mistral3ForConditionalGeneration",
    ),
    "llama4-wrapper": Family(
        "llama4",
        {
            "text_config": {
                **HEADS,
                "num_local_experts": 4,
                "intermediate_size_mlp": 88,
                "attention_chunk_size": 16,
            },
            "vision_config": {
                **VISION,
                "hidden_size": 32,
                "intermediate_size": 64,
                "projector_input_dim": 32,
                "projector_output_dim": 32,
                "vision_output_dim": 32,
            },
        },
        llama3_like,
        GENERIC,
        "attn_out",
        "flag",
        wrapper="Llama4ForConditionalGeneration",
    ),
    "qwen2.5-vl": Family(
        "qwen2_5_vl",
        {
            "text_config": {**QWEN_TEXT, "model_type": "qwen2_5_vl_text"},
            "vision_config": {**QWEN_VISION, "fullatt_block_indexes": [1]},
        },
        qwen_like,
        "Qwen2Tokenizer",
        "attn_in",
        "native",
        wrapper="Qwen2_5_VLForConditionalGeneration",
    ),
    "qwen3-vl": Family(
        "qwen3_vl",
        {
            **TIED,
            "text_config": {**QWEN_TEXT, "model_type": "qwen3_vl_text"},
            "vision_config": {
                **QWEN_VISION,
                "deepstack_visual_indexes": [0],
                "num_position_embeddings": 16,
            },
        },
        qwen_like,
        "Qwen2Tokenizer",
        "attn_out",
        "flag",
        wrapper="Qwen3VLForConditionalGeneration",
    ),
}

TIED_FAMILIES = frozenset(
    {"qwen2", "qwen3", "qwen3-vl", "gemma", "gemma2", "gemma3", "gemma3-wrapper", "gpt2", "opt"}
    | {"phi3-partial-rotary", "starcoder2", "falcon", "bloom", "granite", "smollm3", "cohere"}
)


# What auto picks -----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("name", FAMILIES)
def test_auto_picks(name):
    family = FAMILIES[name]
    route = examine(family.make_config()).choose("auto")
    host = route.rewriter.name if route.rewriter else None
    assert (route.site, route.route, host) == (family.site, family.route, family.host)


# End to end ----------------------------------------------------------------------------------------


def build_base(directory: Path, family: Family, seed: int = 3) -> Path:
    """Write a random base as the Hub has them."""
    tokenizer = family.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": CHAT_TOKENS})
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = TEMPLATE
    assert len(tokenizer) <= VOCABULARY
    config = family.make_config()
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(part, token, getattr(tokenizer, token))
    with torch.random.fork_rng():
        model = build_random(config, seed)
    source = directory.with_name("float32")
    model.save_pretrained(source)
    # Never `.to(bfloat16)`, which rounds rotary buffers too.
    stored = auto_class(config).from_pretrained(source, dtype=torch.bfloat16)
    stored.save_pretrained(directory, max_shard_size="40KB")
    tokenizer.save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    path.write_text(edit_json(path.read_text(), {"tokenizer_class": family.called}))
    return directory


def write_direction(path: Path, site: str) -> Path:
    """A direction of another vector in every layer, found where the family takes it."""
    generator = torch.Generator().manual_seed(5)
    vectors = {f"direction.{layer}": torch.randn(HIDDEN, generator=generator) for layer in BAND}
    save_file(vectors, path, metadata={"site": site})
    return path


def render(tokenizer: Any) -> str:
    messages = [
        {"role": "user", "content": " Grüße,  who are you?"},
        {"role": "assistant", "content": "A model.\n你呢？"},
    ]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def load(directory: Path) -> Any:
    """Load a directory as a user does, in its stored dtype, and see that nothing is amiss."""
    model, info = auto_class(AutoConfig.from_pretrained(directory)).from_pretrained(
        directory, output_loading_info=True
    )
    assert not any(load_report(info).values())
    return model.eval()


def ties(model: Any) -> bool:
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight


def assert_tokenizer_kept(before: Any, after: Any) -> None:
    """The same ids, texts and conversations, of a base's tokenizer that has merges and a template."""
    assert len(before("the thing")["input_ids"]) < len("the thing")
    assert "<|im_start|>assistant" in render(before)
    assert render(after) == render(before)
    special = "".join(f"a {token}b " for token in before.all_special_tokens)
    for sample in (*TEXTS, special, render(before)):
        ids = before(sample)["input_ids"]
        assert after(sample)["input_ids"] == ids
        assert after.decode(ids) == before.decode(ids)


@pytest.mark.architectures
@pytest.mark.filterwarnings("ignore")  # Of every family's classes, none of which is bake's.
@pytest.mark.parametrize("name", FAMILIES)
def test_family_end_to_end(name, tmp_path, prompts_file):
    family = FAMILIES[name]
    base = build_base(tmp_path / "base", family)
    assert len(list(base.glob("model-*.safetensors"))) > 1
    baked = tmp_path / "baked"
    done = export(
        str(base),
        direction=str(write_direction(tmp_path / "direction.safetensors", family.site)),
        output=baked,
        prompts=str(prompts_file),
    )
    assert done.equivalence.passed
    assert done.equivalence.effect > 1e-3
    recorded = json.loads((baked / "bake.json").read_text())
    assert (recorded["site"], recorded["route"]) == (family.site, family.route)
    assert recorded["slot"].get("rewritten_as") == family.host

    base_model, model = load(base), load(baked)
    assert model.dtype == torch.bfloat16
    assert ties(model) == ties(base_model) == (name in TIED_FAMILIES)
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = torch.tensor([tokenizer("The thing in there.")["input_ids"]])
    with torch.no_grad():
        logits = base_model(input_ids=ids).logits.float()
        moved = (model(input_ids=ids).logits.float() - logits).abs().max()
    assert moved > 0.1 * logits.std()

    assert_tokenizer_kept(tokenizer, AutoTokenizer.from_pretrained(baked))


@pytest.mark.architectures
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "seed"), [("qwen3-moe", 7), ("mixtral", 5), ("gpt-oss", 5), ("deepseek-v3", 5)]
)
def test_experts_that_flip_on_rounding_are_told_apart(name, seed, tmp_path, prompts_file):
    """Weights with a near-tie between two experts, which the rounding of the push decides."""
    family = FAMILIES[name]
    found = export(
        str(build_base(tmp_path / "base", family, seed)),
        direction=str(write_direction(tmp_path / "direction.safetensors", family.site)),
        output=tmp_path / "baked",
        prompts=str(prompts_file),
    ).equivalence
    assert found.passed
    assert found.relative_error > found.tolerance >= found.same_experts_error
    assert 0 < found.experts_flipped < 0.01
    assert any("% of the choices of experts" in warning for warning in found.warnings)
    assert "as stored, the same experts" in (tmp_path / "baked" / "README.md").read_text()
