"""How long `bake detect` takes for a 70B repository on the Hub, and what it reads.

python benchmarks/detection_remote.py
Two Llamas of 70B parameters lie as sparse files behind the loopback Hub of the tests, in 30 shards each, no
two alike by their hashes; one has a push in its biases. Every answer of Hub and storage waits 50 ms.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

LAYERS, WIDTH, INNER, VOCABULARY, SHARDS, WAIT = 80, 8192, 28672, 128256, 30, 0.05
BAND = range(32, 72)
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": VOCABULARY,
    "torch_dtype": "bfloat16",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8192,
}


def shapes(pushed: bool) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, WIDTH),
        "lm_head.weight": (VOCABULARY, WIDTH),
        "model.norm.weight": (WIDTH,),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        for name, shape in {
            "self_attn.q_proj": (WIDTH, WIDTH),
            "self_attn.k_proj": (1024, WIDTH),
            "self_attn.v_proj": (1024, WIDTH),
            "self_attn.o_proj": (WIDTH, WIDTH),
            "mlp.gate_proj": (INNER, WIDTH),
            "mlp.up_proj": (INNER, WIDTH),
            "mlp.down_proj": (WIDTH, INNER),
        }.items():
            found[f"{prefix}.{name}.weight"] = shape
            if pushed and name.startswith("mlp"):
                found[f"{prefix}.{name}.bias"] = shape[:1]
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"{prefix}.{norm}.weight"] = (WIDTH,)
    return found


def write(directory: Path, pushed: bool) -> None:
    directory.mkdir()
    unit = torch.nn.functional.normalize(torch.randn(WIDTH), dim=0)
    names = list(shapes(pushed).items())
    index = {}
    for shard in range(SHARDS):
        file = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        header, end, values = {}, 0, {}
        for name, shape in names[shard::SHARDS]:
            size = 2 * torch.Size(shape).numel()
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
            layer = int(name.split(".")[2]) if ".layers." in name else -1
            if name.endswith("down_proj.bias") and layer in BAND:
                values[end] = (0.02 * layer * unit).to(torch.bfloat16)
            index[name], end = file, end + size
        text = json.dumps(header).encode()
        with (directory / file).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for start, tensor in values.items():
                stream.seek(8 + len(text) + start)
                stream.write(tensor.view(torch.uint8).numpy().tobytes())
            stream.truncate(8 + len(text) + end)
    config = {**CONFIG, "mlp_bias": True} if pushed else CONFIG
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )


def main() -> None:
    import loopback_hub
    from loopback_hub import LoopbackHub, StoredFile, run_client

    @dataclass(frozen=True)
    class SparseFile(StoredFile):
        """Content that is mapped from a file of holes, under a hash of its name."""

        oid: str = ""

        @property
        def sha256(self) -> str:
            return self.oid

    class SlowHub(LoopbackHub):
        def answer(self, request: loopback_hub.Request) -> loopback_hub.Reply:
            time.sleep(WAIT)
            return super().answer(request)

    code = """
import json, sys, time
sys.path.insert(0, {root!r})
import bake
began = time.perf_counter()
found = bake.detect("ada/suspect", base={base!r})
print(json.dumps([found.to_dict(), time.perf_counter() - began]))
"""
    with tempfile.TemporaryDirectory() as work, SlowHub() as hub:
        hub.add_user("ada", token="hf_ada")
        for name, pushed in (("base", False), ("suspect", True)):
            directory = Path(work) / name
            write(directory, pushed)
            repo = hub.create_repo(f"ada/{name}")
            files: dict[str, StoredFile] = {}
            for path in sorted(directory.iterdir()):
                if path.suffix != ".safetensors":
                    files[path.name] = StoredFile(path.read_bytes(), False)
                    continue
                with path.open("rb") as stream:
                    content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
                oid = hashlib.sha256(f"{name}/{path.name}".encode()).hexdigest()
                files[path.name] = SparseFile(content, True, oid)  # type: ignore[arg-type]
                repo.lfs_objects[oid] = content  # type: ignore[assignment]
            commit = repo.add_commit(repo.at("main"), files, "weights", "ada")
            repo.branches["main"] = commit.oid
        for base in ("ada/base", None):
            hub.requests.clear()
            done = run_client(
                hub,
                code.format(root=str(Path.cwd()), base=base),
                Path(tempfile.mkdtemp(dir=work)),
                "hf_ada",
            )
            if done.returncode:
                raise SystemExit(done.stderr)
            found, seconds = json.loads(done.stdout.splitlines()[-1])
            sent = sum(r.sent for r in hub.requests if r.host == "storage" and r.method == "GET")
            right = [int(layer) for layer in found["pushes"][0]["lengths"]] == list(BAND)
            print(
                f"{'with' if base else 'without'} a base: {found['verdict']}, "
                f"{'right' if right else 'WRONG'} layers, {seconds:.1f} s, {len(hub.requests)} requests, "
                f"{sent / 1e6:.1f} MB sent of {found['size_bytes'] / 1e9:.0f} GB"
            )
            for note in found["notes"]:
                print("  note:", note)


if __name__ == "__main__":
    main()
