"""Small models built in code, shared by all tests; nothing is fetched and no GPU is needed.

Environment variables that libraries read at import are set here, before anything imports them.
"""

from __future__ import annotations

import os

os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_XET="1",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",  # Tiny tensors: threads would only wait for each other.
)
os.environ.pop("HF_TOKEN", None)

import json
import time
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from canned import sketch_figures
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from bake.anatomy.examination import forget_examinations
from bake.card import figures, render
from bake.cli.messages import render_messages
from bake.models.forward import LanguageModel, load_model
from bake.proof.plain_process import kept_plain_process
from bake.sites import LayerStructure
from bake.texts.prompts import load_tokenizer

torch.set_num_threads(1)
logging.set_verbosity_error()
logging.disable_progress_bar()
render_messages()  # Tests read what is said on stderr, as the command line shows it.

LAYERS, HIDDEN = 6, 32
_COMMON = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

# One line an architecture. Sizes are small and unlike each other, so that a transposed matrix or a
# mixed-up width cannot fit by chance.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": HIDDEN,
        "intermediate_size": 88,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "gpt2": {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 4, "n_inner": 88},
    "mistral": {
        "hidden_size": HIDDEN,
        "intermediate_size": 88,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "sliding_window": 8,
    },
    "qwen3": {
        "hidden_size": HIDDEN,
        "intermediate_size": 88,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    },
    "mixtral": {
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
    },
    "granite": {
        "hidden_size": HIDDEN,
        "intermediate_size": 88,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
    },
    "opt": {
        "hidden_size": HIDDEN,
        "word_embed_proj_dim": HIDDEN,
        "ffn_dim": 88,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
    },
    "falcon_h1": {
        "hidden_size": HIDDEN,
        "intermediate_size": 88,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "mamba_d_ssm": 48,
        "mamba_n_heads": 6,
        "mamba_d_head": 8,
        "mamba_d_state": 16,
        "mamba_chunk_size": 16,
    },
    "gemma2": {
        "hidden_size": HIDDEN,
        "intermediate_size": 88,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 8,
    },
}

PAIRS = [
    {"prompt": "The day was ", "positive": "bright and kind", "negative": "grey and cold"},
    {"prompt": "She said it was ", "positive": "a lovely tune", "negative": "an awful noise"},
    {"prompt": "We found the room ", "positive": "warm", "negative": "damp and dark"},
    {"prompt": "", "positive": "Good morning to all of you!", "negative": "Leave me alone."},
]
PROMPTS = [
    "The market opens at eight and closes at noon on most days of the week.",
    "A short one.",
    "Water boils at one hundred degrees, and less high in the mountains.",
    "He walked to the station, bought a ticket and waited for the train to the coast.",
]


@dataclass(frozen=True)
class TinyModel:
    """What a small checkpoint should be like; hashable, so that one is built once a session."""

    architecture: str = "llama"
    dtype: str = "float32"
    sharded: bool = False
    tied: bool = False
    loud_biases: str = ""  # parameters whose name ends so get values of rms 10
    seed: int = 0
    config: tuple[tuple[str, Any], ...] = field(default=())

    @property
    def name(self) -> str:
        """Return a folder name that says it all."""
        parts = [self.architecture, self.dtype, "sharded" if self.sharded else "single"]
        return "-".join([*parts, "tied" if self.tied else "untied", f"{abs(hash(self)):x}"])


def build_model(directory: Path, wanted: TinyModel) -> Path:
    """Write a random checkpoint with a byte-level tokenizer.

    Every parameter is random, biases and norms too: zeros and ones would hide mistakes. The dtype is
    reached through from_pretrained, because `.to(bfloat16)` on a built model rounds rotary buffers.
    """
    tokenizer = byte_tokenizer()
    values = {**CONFIGS[wanted.architecture], **_COMMON, **dict(wanted.config)}
    config = AutoConfig.for_model(
        wanted.architecture,
        vocab_size=len(tokenizer),
        tie_word_embeddings=wanted.tied,
        **values,
    )
    torch.manual_seed(wanted.seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(wanted.seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            loud = bool(wanted.loud_biases) and name.endswith(wanted.loud_biases)
            spread = 10.0 if loud else 0.25 if parameter.ndim > 1 else 0.1
            parameter.add_(torch.randn(parameter.shape, generator=generator) * spread)
    source = directory.with_name(directory.name + "-float32")
    model.save_pretrained(source)
    stored = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, wanted.dtype))
    stored.save_pretrained(directory, max_shard_size="60KB" if wanted.sharded else "5GB")
    tokenizer.save_pretrained(directory)
    return directory


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer: 3 special tokens, 256 bytes, <s> put first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    special = ["<pad>", "<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(special + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture(autouse=True)
def one_thread():
    """Put the thread count back after a test that sets it, as training does."""
    yield
    torch.set_num_threads(1)


@pytest.fixture
def examined_anew():
    """Forget what is kept of examinations before and after a test that changes what examines."""
    forget_examinations()
    yield
    forget_examinations()


@pytest.fixture(scope="session", autouse=True)
def sketched_figures():
    """Draw no figure of a bake but write a digest of what it would show: drawing takes as long as the
    rest of a tiny export. Equal values still give equal bytes.
    """

    with pytest.MonkeyPatch.context() as patch:
        sketch_figures(patch.setattr)
        yield


@pytest.fixture
def drawn_figures(monkeypatch):
    """Draw a bake's figures for real, in a test of them."""
    monkeypatch.setattr(render, "draw_norms", figures.draw_norms)
    monkeypatch.setattr(render, "draw_separation", figures.draw_separation)


@pytest.fixture(scope="session", autouse=True)
def one_plain_process():
    """Let one plain process serve the proofs of all tests; starting it costs more than a tiny proof."""
    with kept_plain_process():
        yield


@pytest.fixture(scope="session")
def make_model(tmp_path_factory):
    """Return a function TinyModel(…) → directory; each is built once and must not be changed."""
    built: dict[TinyModel, Path] = {}
    root = tmp_path_factory.mktemp("models")

    def make(wanted: TinyModel | None = None, **options: Any) -> Path:
        wanted = wanted or TinyModel(**options)
        if wanted not in built:
            built[wanted] = build_model(root / wanted.name, wanted)
        return built[wanted]

    return make


@pytest.fixture(scope="session")
def llama(make_model) -> Path:
    """A single-file float32 Llama."""
    return make_model()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The loopback Hub as this process's only Hub, with ada logged in."""
    from huggingface_hub import constants
    from loopback_hub import LoopbackHub
    from publishing import FINE_TOKEN, READ_TOKEN, TOKEN

    with LoopbackHub() as hub:
        organisations = {"lab": "write", "museum": "read"}
        hub.add_user("ada", TOKEN, organisations=organisations)
        hub.add_user("ada", READ_TOKEN, "read", organisations)
        hub.add_user("ada", FINE_TOKEN, "fineGrained", organisations, scopes=("ada", "club"))
        # What the environment sets when a process starts; the end-to-end tests set it there.
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


@pytest.fixture
def unhurried(monkeypatch):
    """huggingface_hub's own retries, without their waiting."""
    import huggingface_hub.utils._http as client

    monkeypatch.setattr(client, "time", SimpleNamespace(**vars(time) | {"sleep": lambda _: None}))


@dataclass(frozen=True)
class OpenModel:
    """A small model in memory, the names of its layer's parts written by hand."""

    architecture: str
    loaded: LanguageModel

    @property
    def structure(self) -> LayerStructure:
        return self.loaded.structure

    @property
    def tokenizer(self) -> Any:
        return self.loaded.tokenizer


STRUCTURES = {
    "llama": LayerStructure("model.layers", "self_attn", "mlp", "post_attention_layernorm"),
    "gpt2": LayerStructure("transformer.h", "attn", "mlp", "ln_2"),
}
# Where the activation of each site arrives: the input of a module that bake does not hook there.
READERS = {
    ("llama", "attn_out"): "post_attention_layernorm",
    ("llama", "attn_in"): "self_attn.q_proj",
    ("llama", "mlp_in"): "mlp.gate_proj",
    ("gpt2", "attn_out"): "ln_2",
    ("gpt2", "attn_in"): "attn.c_attn",
    ("gpt2", "mlp_in"): "mlp.c_fc",
}
FINAL_NORMS = {"llama": "model.norm", "gpt2": "transformer.ln_f"}


@pytest.fixture(scope="session")
def load_tiny(make_model):
    """Return a function: architecture → a fresh OpenModel, which its test may change."""

    def load(architecture: str = "llama", **options: Any) -> OpenModel:
        directory = make_model(architecture=architecture, **options)
        loaded = load_model(directory, device=torch.device("cpu"))
        structure, tokenizer = STRUCTURES[architecture], load_tokenizer(directory)
        return OpenModel(
            architecture, LanguageModel(**vars(loaded), structure=structure, tokenizer=tokenizer)
        )

    return load


@pytest.fixture(scope="session")
def open_tiny(load_tiny):
    """Return a function: architecture → an OpenModel that is shared and must not be changed."""
    return cache(load_tiny)


def read_site(tiny: OpenModel, site: str, layer: int, ids: Any) -> torch.Tensor:
    """Return the activation at a site for one unpadded text, (positions, hidden_size), without bake.

    Read where it arrives: for mlp_out at the next decoder layer, or at the final norm.
    """
    layers = tiny.structure.layers
    if site != "mlp_out":
        name = f"{layers}.{layer}.{READERS[tiny.architecture, site]}"
    else:
        name = f"{layers}.{layer + 1}" if layer + 1 < LAYERS else FINAL_NORMS[tiny.architecture]
    seen: list[torch.Tensor] = []
    module = tiny.loaded.model.get_submodule(name)
    handle = module.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        tiny.loaded.model(input_ids=torch.tensor([list(ids)]), use_cache=False)
    handle.remove()
    return seen[0][0]


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory) -> Path:
    """Contrast pairs that share a prompt, and one that does not."""
    return _jsonl(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", PAIRS)


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory) -> Path:
    """Calibration prompts of different lengths."""
    rows = [{"text": text} for text in PROMPTS]
    return _jsonl(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", rows)


def _jsonl(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
