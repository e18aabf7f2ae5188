"""Runs cases in one engine: `python run.py ENGINE CASES OUTPUT`, with the engine's own Python.

Needs numpy and the engine, and nothing of bake. Writes OUTPUT/NAME.npy, log p(next token) after each
beginning of the text, or OUTPUT/NAME.error with the first line of what went wrong. What is there already is
not run again, so that a run which took its process along goes on behind it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np

IDS = [1, 72, 104, 111, 35, 119, 100, 90]  # as in cases.py
VOCABULARY = 304
Compute = Callable[[Path], np.ndarray]


def mlx() -> Compute:
    """Return what computes with MLX."""
    import mlx.core as mx
    from mlx_lm.utils import load_model

    def compute(directory: Path) -> np.ndarray:
        model, _ = load_model(directory)
        logits = model(mx.array([IDS[:-1]])).astype(mx.float32)
        return _log_softmax(np.array(logits)[0])

    return compute


def transformers() -> Compute:
    """Return what computes with whatever transformers is installed."""
    import torch
    from transformers import AutoModelForCausalLM

    def compute(directory: Path) -> np.ndarray:
        model, info = AutoModelForCausalLM.from_pretrained(
            directory, torch_dtype=torch.float32, output_loading_info=True
        )
        lost = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
        if lost:
            raise ValueError(f"does not load as it is: {lost[0]}")
        with torch.no_grad():
            return _log_softmax(model.eval()(input_ids=torch.tensor([IDS[:-1]])).logits[0].numpy())

    return compute


def vllm() -> Compute:
    """Return what computes with vLLM, in this process and without a tokenizer."""
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    from vllm import LLM, SamplingParams

    asked = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=-1, detokenize=False)

    def compute(directory: Path) -> np.ndarray:
        model = LLM(
            model=str(directory),
            skip_tokenizer_init=True,
            dtype="float32",
            enforce_eager=True,
            max_model_len=64,
            max_num_seqs=2,
            max_logprobs=-1,
            disable_log_stats=True,
        )
        (answer,) = model.generate([{"prompt_token_ids": IDS}], asked, use_tqdm=False)
        rows = np.full((len(IDS) - 1, VOCABULARY), np.nan)
        for row, told in enumerate(answer.prompt_logprobs[1:]):
            for token, value in told.items():
                rows[row, token] = value.logprob
        return rows

    return compute


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


ENGINES: dict[str, tuple[str, Callable[[], Compute]]] = {
    "mlx": ("mlx-lm", mlx),
    "transformers": ("transformers", transformers),
    "vllm": ("vllm-cpu", vllm),
}


def main() -> None:
    """Run every case that is not run yet."""
    engine, cases, output = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    output.mkdir(parents=True, exist_ok=True)
    package, load = ENGINES[engine]
    compute = load()
    (output / "version").write_text(version(package), encoding="utf-8")
    told = json.loads((cases / "cases.json").read_text(encoding="utf-8"))
    names = dict.fromkeys(name for case in told for name in (case["base"], case["name"]))
    for name in names:
        done, failed = output / f"{name}.npy", output / f"{name}.error"
        if done.exists() or failed.exists():
            continue
        failed.write_text("the process ended", encoding="utf-8")  # Taken back below.
        try:
            rows = compute(cases / name)
        except (Exception, SystemExit) as error:
            text = " ".join(str(error).split())
            failed.write_text(f"{type(error).__name__}: {text}"[:2000], encoding="utf-8")
            continue
        np.save(done, rows)
        failed.unlink()


if __name__ == "__main__":
    main()
