"""The plain process: what a user of the baked checkpoint has, torch and transformers and no bake.

Run as a script, `python -P plain.py`, never imported by bake. Each line of stdin is the path of a request.
It loads the directory, or a repository on the Hub by its id and commit, in its stored dtype, runs the token
ids it is given, and writes what it saw: the loading report, the greedy continuations, and the logits as
safetensors; then it answers with a line. If bake were importable and imported, the result would prove
nothing, so that is checked too.
"""

import gc
import importlib
import json
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

STOCK_ATTENTION = (None, "eager", "sdpa")
STOCK_EXPERTS = (None, "eager", "batched_mm", "grouped_mm")


def load_config(directory: str, revision: str | None = None) -> Any:
    """Load the config as bake's `pretrained.py` does: no code and no kernel that it names is followed."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(directory, revision=revision, trust_remote_code=False)
    for nested in every_config(config):
        vars(nested).pop("auto_map", None)
        if nested is not config:
            vars(nested).pop("transformers_weights", None)
        if nested._attn_implementation_internal not in STOCK_ATTENTION:
            nested._attn_implementation_internal = None
        if nested._experts_implementation_internal not in STOCK_EXPERTS:
            nested._experts_implementation_internal = None
    return config


def every_config(config: Any) -> Iterator[Any]:
    """Yield a config and the ones inside it."""
    from transformers import PreTrainedConfig

    yield config
    for value in list(vars(config).values()):
        if isinstance(value, PreTrainedConfig):
            yield from every_config(value)


def auto_class(config: Any) -> Any:
    """Choose as the checkpoint's config says: a multimodal wrapper where it names one."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    wrapper = str(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(config.model_type, ""))
    named = wrapper in (config.architectures or ())
    if named and wrapper.endswith("ForConditionalGeneration"):
        return AutoModelForImageTextToText
    if wrapper and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    # What libraries print is no answer, and what they ask is answered by nobody.
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)

    import torch
    from transformers import dynamic_module_utils
    from transformers.utils import logging

    # Inner calls of transformers refuse instead of asking.
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    import_what_models_need()
    for line in requests:
        request = json.loads(Path(line.rstrip("\n")).read_text(encoding="utf-8"))
        torch.set_num_threads(request["threads"])
        try:
            result = {**serve(request), "error": None}
        except Exception as error:
            traceback.print_exc()
            result = {"error": traceback.format_exception_only(error)[-1].strip()}
        Path(request["result"]).write_text(json.dumps(result), encoding="utf-8")
        give_memory_back()
        print("done", file=answers, flush=True)


def import_what_models_need() -> None:
    """Import most of it now, while whoever will ask is still busy."""
    for name in (
        "modeling_utils",
        "generation.utils",
        "models.auto.modeling_auto",
        "masking_utils",
    ):
        importlib.import_module(f"transformers.{name}")


def serve(request: dict[str, Any]) -> dict[str, Any]:
    """Observe as asked; dequantised where a quantisation's kernels are not here."""
    placement = {}
    if request["max_memory"] is not None:
        budgets = {int(k) if k.isdigit() else k: v for k, v in request["max_memory"].items()}
        placement = {"device_map": "auto", "max_memory": budgets or None}
    try:
        return observe(request, placement, {})
    except Exception as error:
        options = dequantizing_options(request["directory"], request["revision"])
        if not options:
            raise
        # Its kernels are not here: the weights themselves can still be loaded and run.
        result = observe(request, placement, options)
        return {
            **result,
            "quantized_run_failed": f"{type(error).__name__}: {error}".splitlines()[0],
        }


def give_memory_back() -> None:
    """Free what the last request held; the next one is another model."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def dequantizing_options(directory: str, revision: str | None) -> dict[str, Any]:
    """What loads a quantised checkpoint dequantised; nothing for another."""
    from transformers.quantizers.auto import AutoQuantizationConfig

    values = getattr(load_config(directory, revision), "quantization_config", None)
    if not values:
        return {}
    return {"quantization_config": AutoQuantizationConfig.from_dict({**values, "dequantize": True})}


def observe(
    request: dict[str, Any], placement: dict[str, Any], options: dict[str, Any]
) -> dict[str, Any]:
    """Load and run the directory; save the logits and return the rest of what was seen."""
    import torch
    from safetensors.torch import save_file
    from transformers import GenerationConfig

    named = {"revision": request["revision"]} if request["revision"] else {}
    config = load_config(request["directory"], request["revision"])
    model, info = auto_class(config).from_pretrained(
        request["directory"],
        config=config,
        dtype="auto",
        output_loading_info=True,
        trust_remote_code=False,
        adapter_kwargs={"subfolder": "no-adapter"},
        **named,
        **placement,
        **options,
    )
    model.eval()
    # Greedy means greedy: a checkpoint's own generation settings may penalise what was said before.
    model.generation_config = GenerationConfig(pad_token_id=0)
    if not placement:
        model.to(request["device"])
    logits = {}
    continuations = {}
    shares = watch(model, request["watched"])
    with torch.no_grad():
        for index, ids in enumerate(request["prompts"]):
            prompt = torch.tensor([ids], device=request["device"])
            # A copy of its own: a view would drag the storage of the whole output into the file.
            logits[str(index)] = model(prompt, use_cache=False).logits[0].float().cpu().clone()
        remainder = max(shares, default=None)
        for length in sorted({len(ids) for ids in request["canaries"]}):
            prompts = [ids for ids in request["canaries"] if len(ids) == length]
            batch = torch.tensor(prompts, device=request["device"])
            output = model.generate(
                batch,
                attention_mask=torch.ones_like(batch),
                max_new_tokens=request["new_tokens"],
                do_sample=False,
            )
            found = output[:, length:].tolist()
            continuations.update({tuple(p): f for p, f in zip(prompts, found, strict=True)})
    save_file(logits, request["logits"])
    return {
        "report": {
            name: sorted(str(entry) for entry in info.get(name, ()))
            for name in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
        },
        "continuations": [continuations[tuple(ids)] for ids in request["canaries"]],
        "bake_imported": any(name.partition(".")[0] == "bake" for name in sys.modules),
        "quantized": bool(getattr(model, "is_quantized", False)),
        "quantized_run_failed": None,
        "remainder": remainder,
    }


def watch(model: Any, file: str | None) -> list[float]:
    """Return a list to which runs add max |x·b| / ‖x‖ of the outputs of the modules that a file names.

    file: safetensors, {module: its directions (directions, hidden_size), orthonormal}; None for none.
    """
    from safetensors.torch import load_file

    shares: list[float] = []
    for name, basis in load_file(file).items() if file else ():

        def look(_module: Any, _arguments: Any, output: Any, basis: Any = basis) -> None:
            found = output[0] if isinstance(output, tuple | list) else output
            rows = found.reshape(-1, found.shape[-1]).double()
            along = (rows @ basis.to(rows.device).double().T).norm(dim=-1)
            shares.append(float((along / rows.norm(dim=-1).clamp(min=1e-30)).max()))

        model.get_submodule(name).register_forward_hook(look)
    return shares


if __name__ == "__main__":
    main()
