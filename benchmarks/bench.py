"""`make bench`: what bake costs, beside what it is compared with, both sides in one run.

    python benchmarks/bench.py [--work DIR] [--only a,b,c,d,e,f] [--runs 3]

(a) the write stage against load + set biases + save_pretrained, and against cp
(b) peak memory of a whole export with --max-memory, against the checkpoint's size
(c) calibration against a bare forward of the same batches
(d) `bake --help` against `python -c "import torch"`
(e) tokens a second of generation: base, hooked, baked
(f) a sweep of 7 multipliers in one batch against 7 hooked runs, the model loaded, same measurements

Sides alternate, so that a drift of the machine's speed meets both; medians are printed, with the ratio.
Files are warm in the page cache on both sides. The base is random and needs 2.2 GB of disk three times.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from base import HIDDEN, LAYERS, write_base
from memory import run_measured

PYTHON = sys.executable
TEXTS = ["The library near the station opens at nine and closes at six."] * 8


def alternate(sides: dict[str, Callable[[], float]], runs: int) -> dict[str, float]:
    """Run the sides in turn, once uncounted, and return each one's median seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for run in range(runs + 1):
        for name, side in sides.items():
            found = side()
            if run:
                seconds[name].append(found)
    return {name: statistics.median(values) for name, values in seconds.items()}


def report(title: str, figures: dict[str, float], unit: str, against: str) -> dict[str, float]:
    """Print one benchmark's figures and their ratios to one of them."""
    print(f"\n{title}")
    for name, value in figures.items():
        ratio = value / figures[against]
        print(f"  {name:<34} {value:>10.3f} {unit:<8} × {ratio:.3f} of {against}")
    return figures


def write_direction(path: Path) -> Path:
    """Write one random direction of the base's width."""
    import torch

    from bake.directions.direction_file import direction_bytes
    from bake.directions.direction import Direction, normalise

    vector = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(0))
    path.write_bytes(direction_bytes(Direction({None: normalise(vector, "random")}, "mlp_out")))
    return path


def bench_write(work: Path, base: Path, runs: int) -> dict[str, float]:
    """(a) The write stage, hashing apart, in this process; so is the baseline's."""
    from bake.anatomy import examine
    from bake.checkpoint.checkpoint import open_checkpoint
    from bake.strength.coefficients import band_layers, compute_push
    from bake.directions.direction_file import load_direction
    from bake.models.forward import read_config
    from bake.plan.plan import make_plan
    from bake.checkpoint.writer import copy_companions, write_config, write_weights

    anatomy = examine(read_config(base))
    route = anatomy.choose("mlp_out")
    layers = band_layers(LAYERS)
    vectors = load_direction(work / "direction.safetensors").select(layers, HIDDEN)
    push = compute_push(dict.fromkeys(layers, 10.0), vectors, hidden_size=HIDDEN)
    target = work / "written"

    def fresh() -> None:
        shutil.rmtree(target, ignore_errors=True)

    def bake(**options: Any) -> float:
        fresh()
        target.mkdir()
        start = time.perf_counter()
        checkpoint = open_checkpoint(str(base))
        plan = make_plan(checkpoint, anatomy, route, push)
        write_weights(checkpoint, plan.edits, target, **options)
        write_config(checkpoint, plan.config_changes, target)
        copy_companions(checkpoint, target)
        return time.perf_counter() - start

    def resave() -> float:
        import torch
        from transformers import AutoModelForCausalLM

        fresh()
        start = time.perf_counter()
        model = AutoModelForCausalLM.from_pretrained(base, dtype="auto", trust_remote_code=False)
        for layer, vector in push.vectors.items():
            bias = torch.nn.Parameter(vector.bfloat16())
            model.model.layers[layer].mlp.down_proj.bias = bias
        model.save_pretrained(target, max_shard_size="500MB")
        return time.perf_counter() - start

    def copy() -> float:
        fresh()
        start = time.perf_counter()
        subprocess.run(["cp", "-r", base, target], check=True)
        return time.perf_counter() - start

    sides: dict[str, Callable[[], float]] = {
        "cp -r": copy,
        "bake, write stage": bake,
        "load + set biases + save_pretrained": resave,
    }
    if "shards" in write_weights.__kwdefaults__:
        sides["bake, write stage, hardlinks"] = lambda: bake(shards="hardlink")
    figures = alternate(sides, runs)
    fresh()
    return report("(a) write stage", figures, "s", "cp -r")


def bench_memory(work: Path, base: Path, _runs: int) -> dict[str, float]:
    """(b) The largest RssAnon of the export's process tree: file pages the kernel can drop are left out."""
    output = work / "baked"
    shutil.rmtree(output, ignore_errors=True)
    command = [
        PYTHON, "-m", "bake.cli.main", "export", str(base), "-o", str(output), "--json",
        "--direction", str(work / "direction.safetensors"),
        "--prompts", str(work / "prompts.txt"), "--max-memory", "1MB",
    ]  # fmt: skip
    found = run_measured(command, stdout=subprocess.DEVNULL)
    if found.returncode:
        raise SystemExit("the export failed; see above")
    size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    figures = {"checkpoint": size / 1e9, "peak of the export": found.peak_anonymous / 1e9}
    return report(
        f"(b) peak memory with --max-memory 1MB ({found.seconds:.0f} s)",
        figures,
        "GB",
        "checkpoint",
    )


def bench_calibration(work: Path, base: Path, runs: int) -> dict[str, float]:
    """(c) Calibration of the band's layers against a bare forward of the same batches."""
    import torch

    from bake.anatomy.base import load_base, open_base
    from bake.strength.coefficients import band_layers
    from bake.strength.norms import measure_norms

    loaded = load_base(open_base(str(base)))
    batches = loaded.batches(TEXTS)

    def calibrate() -> float:
        start = time.perf_counter()
        measure_norms(loaded, "mlp_out", batches, band_layers(LAYERS))
        return time.perf_counter() - start

    def forward() -> float:
        start = time.perf_counter()
        with torch.no_grad():
            for batch in batches:
                loaded.model(**batch.inputs(loaded.device), use_cache=False)
        return time.perf_counter() - start

    figures = alternate({"bare forward": forward, "calibration": calibrate}, runs)
    return report("(c) calibration", figures, "s", "bare forward")


def bench_help(_work: Path, _base: Path, runs: int) -> dict[str, float]:
    """(d) Whole processes."""

    def timed(*command: str) -> float:
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - start

    figures = alternate(
        {
            "import torch": lambda: timed(PYTHON, "-c", "import torch"),
            "bake --help": lambda: timed(PYTHON, "-m", "bake.cli.main", "--help"),
        },
        max(runs, 5),
    )
    return report("(d) start-up", figures, "s", "import torch")


def bench_generation(work: Path, base: Path, runs: int) -> dict[str, float]:
    """(e) Greedy tokens a second with a key-value cache, float32, one prompt."""
    from bake.anatomy.base import load_base, open_base
    from bake.models.forward import continue_greedily, load_model
    from bake.texts.prompts import encode
    from bake.pipeline.record import read_result, rebuild_push

    baked = work / "baked"
    if not baked.exists():
        raise SystemExit("(e) needs the bake that (b) writes; run --only b,e")
    vectors = rebuild_push(read_result(baked), baked).vectors
    models = {"base": load_base(open_base(str(base))), "baked": load_model(baked)}
    prompt = [encode(models["base"].tokenizer, TEXTS[:1])[0].ids]
    tokens = 16

    def generate(name: str) -> float:
        start = time.perf_counter()
        continue_greedily(models[name], prompt, tokens)
        return time.perf_counter() - start

    def hooked() -> float:
        with models["base"].steered("mlp_out", vectors):
            return generate("base")

    seconds = alternate(
        {"base": lambda: generate("base"), "hooked": hooked, "baked": lambda: generate("baked")},
        runs,
    )
    return report(
        "(e) generation",
        {name: tokens / value for name, value in seconds.items()},
        "tokens/s",
        "base",
    )


def bench_sweep(_work: Path, _base: Path, runs: int) -> dict[str, float]:
    """(f) The shipped model, its direction and sets: all rows together, and one push after the other."""
    from bake.anatomy.base import load_base, open_base
    from bake.sweeps.design import Design, make_arms
    from bake.sweeps.measurements import Sampling, measure_neutral, measure_pairs, measure_rollouts
    from bake.sweeps.sweep import measure_sites
    from bake.directions.formats import read_direction
    from bake.texts.pairs import read_pairs
    from bake.texts.prompts import read_prompts
    from bake.io.shipped import DEMO_NAME

    base = open_base(DEMO_NAME)
    anatomy, loaded = base.anatomy, load_base(base)
    layer_count, neutral = anatomy.layer_count, read_prompts("toy-neutral")[:16]
    norms = measure_sites(loaded, {"mlp_out": range(layer_count)}, neutral)
    design = Design(multipliers=(-3.0, -2.0, -1.0, 0.5, 1.0, 2.0, 3.0), control_seeds=0)
    direction = read_direction(DEMO_NAME)
    arms = make_arms(direction, design, norms, layer_count, anatomy.hidden_size)[1:]
    pairs = read_pairs("toy-cheerful-gloomy.held-out")[:16]
    openings = read_prompts("openings")[:8]
    sampling = Sampling(samples=1, new_tokens=32)

    def measure(chosen: list[Any]) -> None:
        measure_pairs(loaded, chosen, pairs)
        measure_neutral(loaded, chosen, neutral)
        measure_rollouts(loaded, chosen, openings, sampling)

    def together() -> float:
        start = time.perf_counter()
        measure(arms)
        return time.perf_counter() - start

    def apart() -> float:
        start = time.perf_counter()
        for arm in arms:
            measure([arm])
        return time.perf_counter() - start

    figures = alternate({"7 hooked runs": apart, "one batched sweep": together}, runs)
    return report("(f) sweep of 7 multipliers", figures, "s", "7 hooked runs")


BENCHMARKS = {
    "a": bench_write,
    "b": bench_memory,
    "c": bench_calibration,
    "d": bench_help,
    "e": bench_generation,
    "f": bench_sweep,
}


def main() -> None:
    """Run the chosen benchmarks; write their figures beside the base as results.json."""
    from transformers.utils import logging

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("build/bench"), help="where to work")
    parser.add_argument("--only", default="a,b,c,d,e,f", help="which benchmarks")
    parser.add_argument("--runs", type=int, default=3, help="counted runs of each side")
    parsed = parser.parse_args()
    parsed.work.mkdir(parents=True, exist_ok=True)
    logging.disable_progress_bar()
    base = write_base(parsed.work / "base")
    write_direction(parsed.work / "direction.safetensors")
    (parsed.work / "prompts.txt").write_text("\n".join(TEXTS) + "\n")
    results = {}
    for letter in parsed.only.split(","):
        results[letter] = BENCHMARKS[letter](parsed.work, base, parsed.runs)
    (parsed.work / "results.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
