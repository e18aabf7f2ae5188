"""Every architecture of the installed transformers: which sites are exact, by which route, why not else."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bake.anatomy.tables import COMPLETIONS
from bake.errors import UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def list_model_types() -> list[str]:
    """Return the model types that transformers has a causal language model for."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def default_config(model_type: str) -> PreTrainedConfig:
    """Return a model type's default configuration, completed where it alone builds no decoder.

    Raises UnsupportedError where the defaults contradict themselves.
    """
    from transformers import CONFIG_MAPPING

    try:
        config_class = CONFIG_MAPPING[model_type]
        options = dict(COMPLETIONS.get(model_type, {}))
        for name, nested in config_class.sub_configs.items():
            completion = COMPLETIONS.get(getattr(nested, "model_type", ""))
            if completion and name not in options:
                options[name] = completion
        config: PreTrainedConfig = config_class(**options)
    except Exception as error:  # Whatever a third-party constructor raises, it builds no config.
        raise UnsupportedError(
            f"{model_type}: its default configuration is invalid ({' '.join(str(error).split())[:160]})"
        ) from error
    if getattr(config, "is_decoder", None) is False and not config.is_encoder_decoder:
        config.is_decoder = True
    return config
