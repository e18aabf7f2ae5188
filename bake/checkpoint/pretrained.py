"""The one door to transformers: configs, tokenizers and models of others, and no code of theirs.

Every call says `trust_remote_code=False`; by its default, None, transformers asks on stdin, and "y" runs
what the directory holds. What a config may name beside code is not followed either: attention and expert
kernels of the Hub, an adapter beside the weights, another config file, weights elsewhere.
`bake/proof/plain.py`, which may not import bake, decides alike.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bake.checkpoint.hub_cache import identify
from bake.checkpoint.own_code import AUTO_MAP, STOCK_ATTENTION, STOCK_EXPERTS, describe_reference
from bake.checkpoint.quantization import check_quantization
from bake.errors import CheckpointError, UnsupportedError
from bake.io.foreign_json import read_json
from bake.io.foreign_paths import check_name
from bake.support.text import one_line

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig

TOKENIZER_CONFIG = "tokenizer_config.json"
# What transformers reads beside the config, each an object.
_TOKENIZER_FILES = "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"
_GENERATION_CONFIG = "generation_config.json"
# Where peft is installed, transformers applies an adapter that lies beside the weights; this is where it
# looks instead.
_NO_ADAPTER = {"subfolder": "no-adapter"}


def load_config(directory: Path) -> PreTrainedConfig:
    """Load a directory's config as transformers' own class, without what names code or kernels.

    Raises UnsupportedError where it needs code of its own, or is quantised in a way that bake does not
    understand; CheckpointError where it is malformed; else what transformers raises.
    """
    from transformers import AutoConfig

    path = directory / "config.json"
    values = read_json(path)
    _check_config(values, path)
    _read_where_present(directory, (_GENERATION_CONFIG,))
    with unasked():
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    _check_model_class(values, config, path)
    for nested in _every_config(config):
        vars(nested).pop(AUTO_MAP, None)
        if nested is not config:
            vars(nested).pop(
                "transformers_weights", None
            )  # The outer one's is checked where it is read.
        if nested._attn_implementation_internal not in STOCK_ATTENTION:
            nested._attn_implementation_internal = None
        if nested._experts_implementation_internal not in STOCK_EXPERTS:
            nested._experts_implementation_internal = None
    return config  # type: ignore[no-any-return]


def load_tokenizer(directory: Path) -> Any:
    """Load a directory's tokenizer as a class of transformers' own.

    Raises UnsupportedError where it needs code of its own, CheckpointError where its files name what is
    no tokenizer; else what transformers raises.
    """
    from transformers import AutoTokenizer

    options: dict[str, Any] = {}
    values: Mapping[str, Any] = {}
    if (directory / "config.json").is_file():
        options["config"] = load_config(directory)
    if (directory / TOKENIZER_CONFIG).is_file():
        values = read_json(directory / TOKENIZER_CONFIG)
    _read_where_present(directory, _TOKENIZER_FILES)
    _check_tokenizer(values, options.get("config"), directory)
    with unasked():
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False, **options)


def load_model(
    auto_class: Any, directory: Path, config: PreTrainedConfig, **options: Any
) -> tuple[nn.Module, dict[str, Any]]:
    """Load a directory's weights into the model of a config that `load_config` gave.

    Returns the model and transformers' loading information. Raises what transformers raises.
    """
    with unasked():
        model, info = auto_class.from_pretrained(
            directory,
            config=config,
            trust_remote_code=False,
            output_loading_info=True,
            adapter_kwargs=dict(_NO_ADAPTER),
            **options,
        )
    return model, info


def make_model(auto_class: Any, config: PreTrainedConfig, **options: Any) -> nn.Module:
    """Build the model of a config with fresh weights; options as `from_config` takes them."""
    with unasked():
        model: nn.Module = auto_class.from_config(
            copy.deepcopy(config), trust_remote_code=False, **options
        )
    return model


@contextmanager
def unasked() -> Iterator[None]:
    """Let transformers refuse where it would ask on stdin: its own inner calls pass no answer on."""
    from transformers import dynamic_module_utils

    before = dynamic_module_utils.TIME_OUT_REMOTE_CODE
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    try:
        yield
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = before


def _check_config(values: Mapping[str, Any], path: Path) -> None:
    """Raise where a config.json needs code, or sends the reader elsewhere."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    own = _auto_map(values, path)
    if "AutoConfig" in own and values.get("model_type") not in CONFIG_MAPPING:
        raise _own_code(path, own["AutoConfig"])
    if "configuration_files" in values:
        raise CheckpointError(
            f"{path} names other files to be read in its place (configuration_files), which bake does "
            f"not follow: make the one that holds config.json, and take that key out"
        )
    check_quantization(values, identify(path.parent)[0], path.parent)


def _read_where_present(directory: Path, names: Iterable[str]) -> None:
    """Raise CheckpointError for a file that is there and no sound JSON object, as transformers may not."""
    for name in names:
        if (directory / name).is_file():
            read_json(directory / name)


def _check_model_class(values: Mapping[str, Any], config: PreTrainedConfig, path: Path) -> None:
    """Raise where transformers has the config's class and the model's only the directory."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    )

    own = _auto_map(values, path)
    known = MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if any(type(config) in mapping for mapping in known):
        return
    for name in ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModel"):
        if name in own:
            raise _own_code(path, own[name])


def _check_tokenizer(
    values: Mapping[str, Any], config: PreTrainedConfig | None, directory: Path
) -> None:
    """Raise where a tokenizer needs code, or its class is one that loads something else."""
    from transformers import PreTrainedTokenizerBase
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    path = directory / TOKENIZER_CONFIG
    for file in _strings(values, "fast_tokenizer_files", path):
        check_name(file, path, suffixes=".json")
    named = values.get("tokenizer_class") or getattr(config, "tokenizer_class", None)
    if named is not None and not isinstance(named, str):
        raise CheckpointError(f"{path} has a tokenizer_class that is no name: save it again")
    found = tokenizer_class_from_name(named) if named else None
    # A class whose library is not installed is a stand-in, which says so itself.
    absent = getattr(found, "__module__", "").startswith("transformers.utils.dummy")
    if found is None or absent:
        pass
    elif not (isinstance(found, type) and issubclass(found, PreTrainedTokenizerBase)):
        raise CheckpointError(
            f"{path} names {one_line(named)} as its tokenizer_class, which is no tokenizer: save it again"
        )
    own = _auto_map(values, path).get("AutoTokenizer")
    if own and found is None and not (directory / "tokenizer.json").is_file():
        raise _own_code(path, own)


def _auto_map(values: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """Return {auto class: class of the directory's own}; one or two of a tokenizer, of old as a list."""
    own = values.get(AUTO_MAP, {})
    if isinstance(own, list):
        own = {"AutoTokenizer": own}
    if not isinstance(own, Mapping) or not all(map(_is_reference, own.items())):
        raise CheckpointError(
            f"{path} has an {AUTO_MAP} that does not name a class for each auto class: save it again"
        )
    return own


def _is_reference(entry: tuple[str, Any]) -> bool:
    key, value = entry
    if key != "AutoTokenizer" or not isinstance(value, list):
        return isinstance(value, str)
    names = [name for name in value if name is not None]
    return len(value) == 2 and bool(names) and all(isinstance(name, str) for name in names)


def _own_code(path: Path, reference: Any) -> UnsupportedError:
    return UnsupportedError(
        f"{path} needs code of its own ({one_line(describe_reference(reference))}), and bake runs "
        f"none: give a checkpoint in an architecture of transformers' own"
    )


def _strings(values: Mapping[str, Any], key: str, path: Path) -> list[Any]:
    found = values.get(key, [])
    if not isinstance(found, list):
        raise CheckpointError(f"{path} has {key} that is no JSON array: save it again")
    return found


def _every_config(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """Yield a config and the ones inside it."""
    from transformers import PreTrainedConfig

    yield config
    for value in list(vars(config).values()):
        if isinstance(value, PreTrainedConfig):
            yield from _every_config(value)
