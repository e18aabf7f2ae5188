"""A direction taken out of a model by bake and by ablate-llm (0.3.0 on the Python index), in one run.

pip install --no-deps --target PEER ablate-llm
python benchmarks/ablation.py MODEL PEER [ROUNDS]: MODEL a directory, such as benchmarks/real_models.py
makes. The two take turns as processes. What each wrote is reloaded in float32 and compared with hooks on
the base; bake's time holds its proof, the other has none.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from bake.anatomy import examine
from bake.hooks import ablated, share_watched
from bake.models.forward import read_config
from bake.texts.prompts import read_prompts
from bake.writes import Ablation, orthonormalize

LAYER = 18
PEER = """
import sys
sys.path.insert(0, sys.argv[4])
import torch
from safetensors.torch import load_file
from ablate.weights import bake_direction
from transformers import AutoModelForCausalLM, AutoTokenizer
dtype = getattr(torch, sys.argv[5])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=dtype)
bake_direction(model, load_file(sys.argv[2])["direction"])
model.save_pretrained(sys.argv[3])
AutoTokenizer.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[3])
"""


def run(command: list[str]) -> tuple[float, float]:
    """Return the seconds of a command and the largest resident size of its processes together, in MB."""
    start, peak = time.perf_counter(), 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            peak = max(peak, sum(map(anonymous, family(process.pid))))
            time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{command} ended with {process.returncode}")
    return time.perf_counter() - start, peak / 1e3


def family(pid: int) -> list[int]:
    """Return a process and those below it."""
    found = [pid]
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [each for child in children.read_text().split() for each in family(int(child))]
        except OSError:
            continue
    return found


def anonymous(pid: int) -> int:
    """Return a process's own memory in kB: pages of files that it has mapped do not count."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in status.splitlines() if "RssAnon" in line), 0)


def load(directory: Path | str) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, trust_remote_code=False
    ).eval()


def main() -> None:
    model, peer = sys.argv[1], sys.argv[2]
    rounds = int(sys.argv[3]) if len(sys.argv) > 3 else 3
    anatomy = examine(read_config(Path(model)))
    writes = anatomy.ablation.choose("stream", anatomy.model_type)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pairs, file = folder / "formal.safetensors", folder / "one.safetensors"
        bake = [sys.executable, "-m", "bake"]
        run([*bake, "direction", model, "--pairs", "formal-casual", "-o", str(pairs)])
        save_file({"direction": load_file(pairs)[f"direction.{LAYER}"]}, file, {"site": "mlp_out"})
        wrong = [sys.executable, "-c", PEER, model, str(file)]
        ours = [*bake, "ablate", model, "--direction", str(file), "--overwrite"]
        sides = {
            "ablate-llm, float32": ([*wrong, str(folder / "peer32"), peer, "float32"], "peer32"),
            "ablate-llm, bfloat16": ([*wrong, str(folder / "peer16"), peer, "bfloat16"], "peer16"),
            "bake, --dtype float32": (
                [*ours, "-o", str(folder / "b32"), "--dtype", "float32"],
                "b32",
            ),
            "bake, the base's dtype": ([*ours, "-o", str(folder / "b16")], "b16"),
        }
        times: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
        for _ in range(rounds):
            for side, (command, _place) in sides.items():
                times[side].append(run(command))
        unit = load_file(file)["direction"]
        basis = orthonormalize([unit])
        layers = range(anatomy.layer_count)
        ablation = Ablation(dict.fromkeys(layers, basis))
        watched = {f"{writes.layers}.{layer}": basis for layer in layers}
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        texts = [
            tokenizer(text, return_tensors="pt").input_ids for text in read_prompts("equivalence")
        ]

        def logits(loaded: torch.nn.Module) -> list[torch.Tensor]:
            with torch.no_grad():
                return [loaded(ids).logits for ids in texts]

        base = load(model)
        plain = logits(base)
        with ablated(base, writes, ablation):
            wanted = logits(base)
        effect = max(float((a - b).abs().max()) for a, b in zip(wanted, plain, strict=True))
        for side, (_command, place) in sides.items():
            loaded = load(folder / place)
            with share_watched(loaded, watched) as shares:
                found = logits(loaded)
            error = max(float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True))
            kl = torch.cat(
                [
                    (b.softmax(-1) * (b.log_softmax(-1) - a.log_softmax(-1))).sum(-1).flatten()
                    for a, b in zip(found, wanted, strict=True)
                ]
            )
            size = sum(path.stat().st_size for path in (folder / place).glob("*.safetensors")) / 1e6
            print(
                f"{side:24} {statistics.median(s for s, _ in times[side]):5.1f} s  "
                f"{max(m for _, m in times[side]):5.0f} MB of memory  error {error / effect:.1e} of the "
                f"effect  KL {float(kl.mean()):.1e}  remainder {max(shares):.1e}  {size:.0f} MB"
            )


if __name__ == "__main__":
    main()
