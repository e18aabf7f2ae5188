"""What a stranger's config.json may say: the kinds of values that bake and transformers rely on.

transformers checks most of what its config classes declare, and trips over the rest in its own ways. So
the keys that are read before a class sees them are checked here by name, and whatever comes out of
building a class becomes one line. Whether the values make a model is the examination's affair.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bake.errors import BakeError, CheckpointError, UnsupportedError
from bake.support.text import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_DTYPE = re.compile(r"auto|(torch\.)?(bfloat|float|int|uint)\d+\w*")
SHOWN = 60  # characters of a value
# Above these no model is, and building one, without its weights, takes minutes or all memory. The deepest
# published models have fewer than 200 layers, the widest vocabularies a few million entries.
BOUNDS: tuple[tuple[re.Pattern[str], int], ...] = (
    (re.compile(r"(\w+_)?(n_|num_)?layers?|depths?"), 1000),
    (re.compile(r"(n|num|\w+_num)_(\w+_)?experts|num_labels"), 100_000),
    (re.compile(r"(\w+_)?(size|dim|rank|heads?|positions|embd|inner|model|ff)"), 2**31 - 1),
)
Check = Callable[[Any], bool]


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_string(value: Any) -> bool:
    return isinstance(value, str)


def _is_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, str) for entry in value)


def _is_count(value: Any) -> bool:
    return _is_size(value) and value != 0


def _is_size(value: Any) -> bool:
    # A few architectures give a list of sizes, one a layer; a few write 1200.0.
    return isinstance(value, list) or (type(value) in (int, float) and value >= 0)


def _is_dtype(value: Any) -> bool:
    names = value.values() if isinstance(value, dict) else [value]
    return all(isinstance(name, str) and _DTYPE.fullmatch(name) for name in names)


_OBJECT, _STRING = (_is_object, "an object"), (_is_string, "a string")
_STRINGS, _COUNT = (_is_strings, "a list of strings"), (_is_count, "a number of at least 1")
_SIZE, _NAME = (_is_size, "a number of at least 0"), (_is_dtype, 'a dtype such as "bfloat16"')
# Where a multimodal wrapper keeps its language model's config.
_OF_TEXT = ("text_config", "language_config", "llm_config", "thinker_config")
# What each key is where it is given and not null.
KINDS: Mapping[str, tuple[Check, str]] = {
    **dict.fromkeys(("text_config", "quantization_config", "id2label", "label2id"), _OBJECT),
    **dict.fromkeys(("rope_scaling", "rope_parameters"), _OBJECT),
    **dict.fromkeys(("model_type", "transformers_weights"), _STRING),
    **dict.fromkeys(("attn_implementation", "_attn_implementation"), _STRING),
    **dict.fromkeys(("architectures", "layer_types"), _STRINGS),
    **dict.fromkeys(("hidden_size", "num_hidden_layers", "vocab_size"), _COUNT),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "head_dim"), _SIZE),
    **dict.fromkeys(("intermediate_size", "max_position_embeddings"), _SIZE),
    **dict.fromkeys(("dtype", "torch_dtype"), _NAME),
}


def check_config(values: Mapping[str, Any], path: Path, prefix: str = "") -> None:
    """Raise CheckpointError, naming the key, where a config's values are of the wrong kind.

    values: the object in `path`, or one nested in it at the dotted `prefix`. Sizes that no model has are
    refused too, before anything is built.
    """
    if not prefix:
        _check_bounds(values, path, prefix)
    for key, value in values.items():
        check, expected = KINDS.get(key, (None, ""))
        if check is not None and value is not None and not check(value):
            raise CheckpointError(
                f"{path}: {prefix}{key} is {_shown(value)} where {expected} is expected: download or "
                f"save it again"
            )
        if isinstance(value, dict) and key in _OF_TEXT:
            check_config(value, path, f"{prefix}{key}.")


def _check_bounds(values: Mapping[str, Any], path: Path, prefix: str) -> None:
    """Raise CheckpointError where a number of a config, or of what is nested in it, is beyond measure."""
    for key, value in values.items():
        most = next((most for pattern, most in BOUNDS if pattern.fullmatch(key)), None)
        if most is not None and type(value) in (int, float) and value > most:
            raise CheckpointError(
                f"{path}: {prefix}{key} is {_shown(value)}, above the {most} that bake takes: download or "
                f"save it again"
            )
        if isinstance(value, dict):
            _check_bounds(value, path, f"{prefix}{key}.")


@contextmanager
def config_errors_named(directory: Path) -> Iterator[None]:
    """Turn whatever a config class raises over a stranger's config.json into one line.

    Classes compute with the values, so that no list of exceptions would be complete.
    """
    try:
        yield
    except BakeError:
        raise
    except Exception as error:
        raise UnsupportedError(
            f"{directory.name}: transformers cannot read its config.json ({_reason(error)})"
        ) from None


def check_methods(config: PreTrainedConfig, directory: Path, prefix: str = "") -> None:
    """Raise CheckpointError where a key has taken the place of one of its class' methods."""
    from transformers import PreTrainedConfig

    for key, value in vars(config).items():
        if callable(getattr(type(config), key, None)):
            raise CheckpointError(
                f"{directory.name}: {prefix}{key} in config.json is the name of a function of "
                f"transformers and no setting: take it out"
            )
        if isinstance(value, PreTrainedConfig):
            check_methods(value, directory, f"{prefix}{key}.")


def _reason(error: Exception) -> str:
    """The message of an error, without the frame that a validator puts around the one that matters."""
    from huggingface_hub.errors import StrictDataclassError

    if isinstance(error, StrictDataclassError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    text = str(error).strip()
    if isinstance(error, OSError | ValueError) and text:
        return one_line(text)
    return one_line(f"{type(error).__name__}: {text}" if text else type(error).__name__)


def _shown(value: Any) -> str:
    return one_line(json.dumps(value, ensure_ascii=False), SHOWN)
