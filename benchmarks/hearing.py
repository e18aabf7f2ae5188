"""How long until a first token is heard: `bake try` beside a plain transformers script, as processes.

python benchmarks/hearing.py MODEL [ROUNDS]: MODEL a directory with a chat template, such as one of
benchmarks/real_models.py. The two take turns; the medians and their ratio are printed.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROMPT = "Tell me something about the moon."
PLAIN = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
messages = [{"role": "user", "content": sys.argv[2]}]
options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
ids = tokenizer.apply_chat_template(messages, **options)
print(tokenizer.decode(model.generate(**ids, max_new_tokens=1)[0]))
"""


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    model, rounds = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 5
    bake = [sys.executable, "-m", "bake"]
    with tempfile.TemporaryDirectory() as folder:
        direction = str(Path(folder) / "formal.safetensors")
        seconds([*bake, "direction", model, "--pairs", "formal-casual", "-o", direction])
        heard = [*bake, "try", model, PROMPT, "--new-tokens", "1", "-m", "-0.35,0,0.35"]
        sides = {
            "plain transformers": [sys.executable, "-c", PLAIN, model, PROMPT],
            "bake try --direction": [*heard, "--direction", direction],
            "bake try --pairs": [*heard, "--pairs", "formal-casual"],
        }
        found: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(rounds):
            for name, command in sides.items():
                found[name].append(seconds(command))
    plain = statistics.median(found["plain transformers"])
    for name, times in found.items():
        middle = statistics.median(times)
        print(
            f"{name:22} {middle:5.1f} s  {middle / plain:.2f} ×  ({min(times):.1f} to {max(times):.1f})"
        )


if __name__ == "__main__":
    main()
