"""What finding a direction costs, and whether it is the same direction, beside two other tools.

    python -m pip install --no-deps --target build/references steering-vectors repeng gguf
    PYTHONPATH=build/references python benchmarks/extraction.py [--runs 3] [--pairs 200]

The floor is a bare forward of the same texts, sorted by length, in the same batches, without the head.
steering-vectors (mean, last token) and repeng (pca) take part where they can be imported; they get
batches of 32 texts, and their progress bars are off. Two sets on a random 12-layer, 512-wide Llama in
float32: pairs of uneven length that share only their beginning, and pairs that share a prompt. Two on the
small model that ships, 9 layers, for what trained weights do: its own pairs, and pairs in other words.
Sides alternate within one run; medians of CPU seconds on one thread are printed, so that what else the
machine does counts little, with the ratio to the floor and, layer by layer, the cosine between bake's
direction and theirs. One side asks for the lower half of the layers only: the others are not run.

repeng reads the last layer behind the model's final norm (`hidden_states[-1]`), where no vector is added.
So bake is also compared with its definition on the residual stream, in every layer, and the last layer of
repeng with bake's component of what the final norm makes of the stream: both are 1. Where a random model's
pairs are divided evenly, repeng keeps whatever sign its solver gave; bake then goes by the mean projection.
Nothing is installed into bake's own environment.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from base import write_tokenizer
from bench import alternate, report

LAYERS, HIDDEN, FEED_FORWARD, HEADS, VOCABULARY = 12, 512, 1376, 8, 1024
BATCH = 32  # texts a forward for the tools that count texts
WORDS = (
    "the",
    "river",
    "stone",
    "walks",
    "over",
    "green",
    "under",
    "quickly",
    "a",
    "paper",
    "letter",
)


def main() -> None:
    """Run all sets of pairs and print times and cosines."""
    import torch

    from bake.io.shipped import DEMO_MODEL

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3, help="counted runs of every side (3)")
    parser.add_argument("--pairs", type=int, default=200, help="(200)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"load average {', '.join(f'{value:.2f}' for value in os.getloadavg())}")
    with tempfile.TemporaryDirectory(prefix="bake-extraction-") as folder:
        base = write_model(Path(folder) / "base")
        for model, title, pairs in (
            (base, "random Llama, pairs of uneven length", uneven_pairs(options.pairs)),
            (base, "random Llama, pairs that share a prompt", shared_pairs(options.pairs)),
            (
                DEMO_MODEL,
                "shipped model, toy-cheerful-gloomy",
                shipped_pairs("toy-cheerful-gloomy"),
            ),
            (DEMO_MODEL, "shipped model, formal-casual", shipped_pairs("formal-casual")),
        ):
            compare(model, title, pairs, options.runs)


def write_model(directory: Path) -> Path:
    """Write the random base with a byte-level tokenizer, about one token a letter."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=FEED_FORWARD,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        vocab_size=VOCABULARY,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    write_tokenizer(directory)
    return directory


def uneven_pairs(count: int, seed: int = 0) -> list[tuple[str, str, str]]:
    """Return (prompt, positive, negative): no prompt, texts of 2 to 24 words."""
    draw = random.Random(seed)
    return [
        ("", _words(draw, 2, 24) + " glad.", _words(draw, 2, 24) + " sad.") for _ in range(count)
    ]


def shared_pairs(count: int, seed: int = 1) -> list[tuple[str, str, str]]:
    """Return (prompt, positive, negative): prompts of 4 to 30 words, completions of 1 to 5."""
    draw = random.Random(seed)
    return [
        (_words(draw, 4, 30), f" {_words(draw, 1, 4)} glad.", f" {_words(draw, 1, 4)} sad.")
        for _ in range(count)
    ]


def shipped_pairs(name: str) -> list[tuple[str, str, str]]:
    """Return (prompt, positive, negative) of a shipped set."""
    from bake.texts.pairs import read_pairs

    return [(pair.prompt, pair.positive, pair.negative) for pair in read_pairs(name)]


def _words(draw: random.Random, least: int, most: int) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(least, most)))


def compare(base: Path, title: str, pairs: Sequence[tuple[str, str, str]], runs: int) -> None:
    """Time every side on one set of pairs, and compare the directions they find."""
    from bake.directions.activations import read_activations
    from bake.anatomy.base import load_base, open_base
    from bake.directions.fit import fit_directions
    from bake.texts.pair_tokens import encode_pairs
    from bake.texts.pairs import ContrastPair

    opened = open_base(str(base))
    loaded, layers = load_base(opened), range(opened.anatomy.layer_count)
    tokenizer = loaded.tokenizer
    contrast = [ContrastPair(*pair) for pair in pairs]
    found: dict[str, dict[int, Any]] = {}

    def ours(method: str, asked: range = layers) -> dict[int, Any]:
        encoded = encode_pairs(tokenizer, contrast)
        return fit_directions(read_activations(loaded, "mlp_out", encoded, list(asked)), method)

    def kept(name: str, find: Callable[[], dict[int, Any]]) -> Callable[[], float]:
        def side() -> float:
            with contextlib.redirect_stderr(io.StringIO()):
                start = time.process_time()
                found[name] = find()
                return time.process_time() - start

        return side

    texts = [(prompt + positive, prompt + negative) for prompt, positive, negative in pairs]
    sides = {
        "floor": kept("floor", lambda: run_floor(loaded, tokenizer, texts)),
        "bake mean": kept("bake mean", lambda: ours("mean")),
        "bake pca": kept("bake pca", lambda: ours("pca")),
        "bake mean, lower half": kept("half", lambda: ours("mean", layers[: len(layers) // 2])),
    }
    for name, find in references(loaded.model, tokenizer, texts).items():
        sides[name] = kept(name, find)
    seconds = alternate(sides, runs)
    report(f"{title} ({len(pairs)})", seconds, "CPU s", "floor")
    read = read_activations(
        loaded, "mlp_out", encode_pairs(tokenizer, contrast), layers, share=False
    )
    found["exact component"] = exact_components(read)
    found["bake pca behind the final norm"] = behind_final_norm(loaded, read)
    for mine, theirs in (
        ("bake mean", "steering-vectors"),
        ("bake pca", "repeng"),
        ("bake pca", "exact component"),
        ("bake pca behind the final norm", "repeng"),
    ):
        if theirs in found:
            _print_cosines(mine, theirs, found)


def run_floor(loaded: Any, tokenizer: Any, texts: Sequence[tuple[str, str]]) -> dict[int, Any]:
    """Run every text through the decoder once, sorted by length, in batches."""
    import torch

    from bake.texts.prompts import encode, make_batches

    batches = make_batches(encode(tokenizer, [text for pair in texts for text in pair]))
    with torch.no_grad():
        for batch in batches:
            loaded.model.model(**batch.inputs(loaded.device), use_cache=False)
    return {}


def references(
    model: Any, tokenizer: Any, texts: Sequence[tuple[str, str]]
) -> dict[str, Callable[[], dict[int, Any]]]:
    """Return the other tools that can be imported, each a function that finds its directions."""
    sides: dict[str, Callable[[], dict[int, Any]]] = {}
    try:
        from steering_vectors import train_steering_vector
    except ImportError as error:
        print(f"steering-vectors does not take part: {error}")
    else:

        def with_steering_vectors() -> dict[int, Any]:
            vector = train_steering_vector(model, tokenizer, list(texts), batch_size=BATCH)
            return dict(vector.layer_activations)

        sides["steering-vectors"] = with_steering_vectors
    _restore_numpy_name()
    try:
        from repeng import ControlVector, DatasetEntry
    except ImportError as error:
        print(f"repeng does not take part: {error}")
    else:
        import torch

        def with_repeng() -> dict[int, Any]:
            data = [DatasetEntry(positive, negative) for positive, negative in texts]
            layers = range(model.config.num_hidden_layers)
            found = ControlVector.train(
                model, tokenizer, data, hidden_layers=layers, batch_size=BATCH
            )
            return {layer: torch.from_numpy(v) for layer, v in found.directions.items()}

        sides["repeng"] = with_repeng
    return sides


def exact_components(read: Any) -> dict[int, Any]:
    """Return repeng's definition of pca_diff with scikit-learn's exact solver, signed as repeng does."""
    import torch
    from sklearn.decomposition import PCA

    found = {}
    for layer in read.layers:
        differences = read.differences(layer).numpy()
        component = PCA(n_components=1, svd_solver="full").fit(differences).components_[0]
        if (differences @ component < 0).mean() > 0.5:
            component = -component
        found[layer] = torch.from_numpy(component).float()
    return found


def behind_final_norm(loaded: Any, read: Any) -> dict[int, Any]:
    """Return bake's component of what the model's final norm makes of the last layer's activations."""
    import torch

    from bake.directions.activations import PairActivations
    from bake.directions.fit import fit_directions
    from bake.directions.logit_lens import find_final_norm

    last, norm = read.layers[-1], find_final_norm(loaded)
    with torch.no_grad():
        positive, negative = norm(read.positive[last]), norm(read.negative[last])
    lengths = torch.stack([positive, negative], dim=1).flatten(0, 1).norm(dim=1)
    normed = PairActivations({last: positive}, {last: negative}, {last: lengths})
    return fit_directions(normed, "pca")


def _restore_numpy_name() -> None:
    """Give numpy 2 the old name that repeng 0.4.0 needs to be imported at all."""
    import numpy as np

    if not hasattr(np, "float_"):
        np.float_ = np.float64  # type: ignore[attr-defined]


def _print_cosines(mine: str, theirs: str, found: dict[str, dict[int, Any]]) -> None:
    import torch

    cosines = {
        layer: float(torch.cosine_similarity(found[mine][layer], found[theirs][layer], dim=0))
        for layer in sorted(found[mine])
    }
    text = " ".join(f"{layer}:{value:.5f}" for layer, value in cosines.items())
    print(f"  cosine of {mine} and {theirs}, by layer: {text}")


if __name__ == "__main__":
    main()
