"""Models that do not fit: weights read from the checkpoint's own files while they are needed.

accelerate decides what stays in memory (`max_memory`) and moves the rest in and out, module by module;
here it is given the base's safetensors as the place to read from, so nothing is copied to an offload
folder, and every tensor is cast on the way, so a bfloat16 checkpoint runs in float32 without ever being
one. Embedding and head, the two largest matrices, are read by rows. accelerate's own `offload_index`
serves names that map one to one; it knows no parameter that several tensors on disk make, no rows, and
gives no freed memory back, so both kinds would need what is here.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bake.checkpoint.checkpoint import Checkpoint, open_checkpoint
from bake.checkpoint.loading import build_model, quiet_transformers
from bake.checkpoint.names import DiskNames
from bake.checkpoint.pretrained import load_config
from bake.errors import BakeError, CheckpointError, UnsupportedError
from bake.support import processes

if TYPE_CHECKING:
    import torch
    from torch import nn

HEAD_BYTES = 32 * 1024 * 1024  # of float32 head rows decoded at a time
_TRIM_EVERY = 64 * 1024 * 1024  # bytes of decoded weights between two returns of freed memory
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


TENSOR_PARALLEL = "tp"


@dataclass(frozen=True)
class Placement:
    """Where weights may be: {"cpu" or GPU number: bytes kept there}; None: as accelerate finds.

    parallel: every process keeps its share of every layer, and nothing is streamed.
    """

    max_memory: Mapping[str | int, int] | None = None
    parallel: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {str(key): value for key, value in (self.max_memory or {}).items()}


def choose_placement(device_map: str | None, max_memory: str | None) -> Placement | None:
    """Return where weights may be, from the two options; None where the model is loaded whole."""
    if device_map not in (None, "auto", TENSOR_PARALLEL):
        raise BakeError(f"--device-map {device_map!r} is not known; one of auto, {TENSOR_PARALLEL}")
    processes.share_model(device_map == TENSOR_PARALLEL)
    if device_map == TENSOR_PARALLEL:
        if max_memory is not None:
            raise BakeError(
                "--device-map tp keeps its share of the weights whole: leave --max-memory out"
            )
        if processes.count() == 1:
            raise BakeError(
                "--device-map tp shards a model over several processes; start it with accelerate launch -m "
                "bake, or give --device-map auto"
            )
        return Placement(parallel=True)
    if max_memory is not None:
        return parse_max_memory(max_memory)
    return Placement() if device_map else None


def parse_max_memory(text: str) -> Placement:
    """Parse '600MB' (of the CPU) or '0=20GB,1=20GB,cpu=60GB'; raise BakeError for anything else."""
    budgets: dict[str | int, int] = {}
    for part in text.split(","):
        name, equals, size = part.strip().rpartition("=")
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", size.strip())
        unit = _UNITS.get(match[2].upper()) if match else None
        if match is None or unit is None or (equals and not (name == "cpu" or name.isdigit())):
            raise BakeError(
                f"--max-memory {text!r} is not a size such as 600MB, nor DEVICE=SIZE,… "
                f"such as 0=20GB,cpu=60GB"
            )
        budgets[int(name) if name.isdigit() else "cpu"] = int(float(match[1]) * unit)
    return Placement(budgets)


# Gives a parameter's value, or rows of it.
Computed = Callable[[slice | None], "torch.Tensor"]


class CheckpointWeights(Mapping[str, "torch.Tensor"]):
    """{parameter name: tensor in the computing dtype}, read from the checkpoint when asked for.

    aliases: {parameter: the one it is tied to}, where only that one is stored. `held` are tensors
    that stay in memory, because the placement says so or because a value other than the stored one
    is wanted.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        names: DiskNames,
        aliases: Mapping[str, str],
        dtype: torch.dtype,
    ) -> None:
        self.checkpoint = checkpoint
        self.dtype = dtype
        self._names = names
        self._aliases = aliases
        self._parameters = dict.fromkeys([*names.renamed, *names.fusions, *aliases])
        self.held: dict[str, torch.Tensor] = {}
        self.computed: dict[str, Computed] = {}
        self._read = 0  # bytes since memory was last given back

    def __getitem__(self, parameter: str) -> torch.Tensor:
        if parameter in self.held:
            return self.held[parameter]
        if parameter in self.computed:
            return self.computed[parameter](None).to(self.dtype)
        stored = self._aliases.get(parameter, parameter)
        return self._count(self._names.read(stored).to(self.dtype))

    def __contains__(self, parameter: object) -> bool:
        return parameter in self._parameters  # Mapping's own would read the tensor to find out.

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)

    def disk_name(self, parameter: str) -> str | None:
        """Return the one tensor on disk that is this parameter; None where there is no such one."""
        return self._names.find(self._aliases.get(parameter, parameter))

    def rows(self, parameter: str, start: int, stop: int) -> torch.Tensor:
        """Return rows [start, stop) of a matrix in the computing dtype."""
        if parameter in self.computed:
            return self.computed[parameter](slice(start, stop)).to(self.dtype)
        disk = self._names.existing(self._aliases.get(parameter, parameter))
        return self._count(self.checkpoint.read_rows(disk, start, stop).to(self.dtype))

    def _count(self, tensor: torch.Tensor) -> torch.Tensor:
        """Give back what earlier tensors have left, every so many bytes."""
        self._read += tensor.nbytes
        if self._read > _TRIM_EVERY:
            give_memory_back()
            self._read = 0
        return tensor


def stream_model(
    directory: Path, dtype: str | None, placement: Placement
) -> tuple[nn.Module, CheckpointWeights, dict[str, list[str]], torch.device]:
    """Return a model whose weights stay on disk where memory ends, its weights, report and device.

    dtype: what is computed in; None means float32 on a CPU, the stored dtype elsewhere. Raises
    UnsupportedError for a checkpoint whose names transformers does not understand either, or whose
    tensors it converts in a way that needs more than the tensors.
    """
    import torch
    from accelerate import dispatch_model, infer_auto_device_map, init_empty_weights

    checkpoint = open_checkpoint(str(directory), allowed=None)  # Whoever asks has opened it.
    config = load_config(directory)
    computing = _computing_dtype(config, dtype)
    with init_empty_weights(include_buffers=False), quiet_transformers():
        model: Any = build_model(config, dtype=computing).eval()
    model.tie_weights()
    names = DiskNames(checkpoint, model)
    aliases = _tied_to(model, names)
    report = _load_report(model, checkpoint, names, aliases)
    weights = CheckpointWeights(checkpoint, names, aliases, computing)
    device_map = infer_auto_device_map(
        model,
        max_memory=dict(placement.max_memory) if placement.max_memory else None,
        no_split_module_classes=list(getattr(model, "_no_split_modules", None) or ()),
        dtype=computing,
    )
    main = next((d for d in device_map.values() if d not in ("cpu", "disk")), "cpu")
    replaced = _replace_large(model, weights, device_map)
    _place_resident(model, weights, device_map, main)
    if not replaced:
        model.tie_weights()  # Placing a tensor has put a new one under one of its names.
    if set(device_map.values()) != {"cpu"}:
        with _quiet_accelerate():
            dispatch_model(
                model, device_map, main_device=main, state_dict=weights, offload_index={}
            )
    return model, weights, report, torch.device(main)


def give_memory_back() -> None:
    """Return freed pages to the system: glibc keeps them for itself, in heaps with holes.

    Weights that come and go would make those heaps as large as the model. Without glibc nothing is
    done.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _computing_dtype(config: Any, dtype: str | None) -> torch.dtype:
    import torch

    if dtype is not None:
        chosen = getattr(torch, dtype)
    elif torch.cuda.is_available():
        chosen = config.get_text_config().dtype or torch.float32
    else:
        chosen = torch.float32
    return getattr(torch, chosen) if isinstance(chosen, str) else chosen  # type: ignore[no-any-return]


def _tied_to(model: nn.Module, names: DiskNames) -> dict[str, str]:
    """Return {parameter that is not stored: the stored one that it is tied to}."""
    aliases = {}
    for alias, source in _tied(model):
        if names.sources(source) and not names.sources(alias):
            aliases[alias] = source
        elif names.sources(alias) and not names.sources(source):
            aliases[source] = alias
    return aliases


def _load_report(
    model: nn.Module, checkpoint: Checkpoint, names: DiskNames, aliases: Mapping[str, str]
) -> dict[str, list[str]]:
    """Return a report like transformers' own; raise where the names or shapes are not understood."""
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    present = {name for name in wanted if name in aliases or names.sources(name)}
    missing = sorted(set(wanted) - present)
    if missing and len(missing) > len(wanted) // 4:
        raise UnsupportedError(
            f"{checkpoint.model_id}: names on disk are rearranged on loading ({missing[0]} is not "
            f"there), so its weights cannot be streamed; leave out --max-memory and --device-map"
        )
    mismatched = [
        name for name in sorted(present - set(aliases)) if names.shape(name) != wanted[name]
    ]
    if mismatched:
        raise CheckpointError(
            f"{checkpoint.model_id}: {mismatched[0]} has another shape on disk than in the model"
        )
    return {
        "missing_keys": _not_ignored(model, "missing", missing),
        "unexpected_keys": _not_ignored(model, "unexpected", sorted(names.unexpected)),
        "mismatched_keys": [],
        "error_msgs": [],
    }


def _not_ignored(model: nn.Module, kind: str, names: Sequence[str]) -> list[str]:
    """Leave out what the architecture says is no matter when it is missing or unexpected."""
    patterns = getattr(model, f"_keys_to_ignore_on_load_{kind}", None) or ()
    return [name for name in names if not any(re.search(pattern, name) for pattern in patterns)]


def _tied(model: nn.Module) -> list[tuple[str, str]]:
    """Return pairs (name, first name) of parameters that are one tensor."""
    first: dict[int, str] = {}
    pairs = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            pairs.append((name, first[id(parameter)]))
        else:
            first[id(parameter)] = name
    return pairs


def _replace_large(
    model: Any, weights: CheckpointWeights, device_map: dict[str, str | int]
) -> bool:
    """Read embedding and head by rows where they would be read whole, from disk, for every forward.

    Returns whether any was replaced.
    """
    from torch import nn

    replaced = False

    for getter, kind, reader in (
        (model.get_input_embeddings, nn.Embedding, _make_row_embedding),
        (model.get_output_embeddings, nn.Linear, _make_chunked_head),
    ):
        module = getter()
        name = next((n for n, m in model.named_modules() if m is module), None)
        plain = type(module) is kind and getattr(module, "bias", None) is None
        if name is None or not plain or _device_of(name, device_map) != "disk":
            continue
        if weights.disk_name(f"{name}.weight") is not None:
            model.set_submodule(name, reader(weights, f"{name}.weight", module))
            device_map.pop(name, None)
            replaced = True
    return replaced


def _make_row_embedding(weights: CheckpointWeights, parameter: str, old: Any) -> nn.Module:
    import torch

    class RowEmbedding(torch.nn.Module):
        """An embedding whose rows are read from the file, the ones that are asked for."""

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            unique, places = ids.unique(return_inverse=True)
            rows = [weights.rows(parameter, index, index + 1) for index in unique.tolist()]
            return torch.cat(rows).to(ids.device)[places]

    return RowEmbedding()


def _make_chunked_head(weights: CheckpointWeights, parameter: str, old: Any) -> nn.Module:
    import torch

    class ChunkedHead(torch.nn.Module):
        """An unembedding that decodes a few thousand rows of the vocabulary at a time."""

        out_features: int = old.out_features

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            logits = hidden.new_empty(*hidden.shape[:-1], self.out_features)
            step = max(1, HEAD_BYTES // (4 * old.in_features))
            for start in range(0, self.out_features, step):
                stop = min(start + step, self.out_features)
                rows = weights.rows(parameter, start, stop).to(hidden.device)
                logits[..., start:stop] = hidden @ rows.T
            return logits

    return ChunkedHead()


def _place_resident(
    model: nn.Module,
    weights: CheckpointWeights,
    device_map: Mapping[str, str | int],
    main: str | int,
) -> None:
    """Load what stays in memory: on its own device, or on the CPU to be lent to the GPU."""
    from accelerate.utils import set_module_tensor_to_device

    for name, _ in list(model.named_parameters()):
        device = _device_of(name, device_map)
        if device == "disk" or name not in weights:
            continue
        if device == "cpu" and main != "cpu":
            weights.held[name] = weights[name]
        else:
            set_module_tensor_to_device(model, name, device, value=weights[name])
    for name, buffer in list(model.named_buffers()):
        if name in weights:
            set_module_tensor_to_device(model, name, "cpu", value=weights[name].to(buffer.dtype))


def _device_of(name: str, device_map: Mapping[str, str | int]) -> str | int:
    """Return the device of the longest prefix of `name` in the map."""
    while name and name not in device_map:
        name = name.rpartition(".")[0]
    return device_map.get(name, "cpu")


def hold(
    model: nn.Module, weights: CheckpointWeights | None, values: Mapping[str, torch.Tensor]
) -> None:
    """Give parameters other values than the stored ones, whether they are in memory or on disk."""
    import torch

    with torch.no_grad():
        for name, value in values.items():
            parameter = model.get_parameter(name)
            if parameter.device.type == "meta" and weights is not None:
                weights.held[name] = value.to(weights.dtype)
            else:
                parameter.copy_(value.to(parameter.device, parameter.dtype))


def hold_computed(
    model: nn.Module, weights: CheckpointWeights | None, name: str, compute: Computed
) -> None:
    """Give a parameter another value: at once where it is in memory, else whenever it is asked for."""
    import torch

    try:
        parameter = model.get_parameter(name)
    except AttributeError:  # An embedding that is read by rows has none.
        parameter = None
    if parameter is not None and parameter.device.type != "meta":
        with torch.no_grad():
            parameter.copy_(compute(None).to(parameter.device, parameter.dtype))
    elif weights is not None:
        weights.computed[name] = compute


@contextmanager
def _quiet_accelerate() -> Iterator[None]:
    """Silence accelerate's remark that weights are on the meta device: that is the purpose."""
    logger = logging.getLogger("accelerate.big_modeling")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


__all__: Sequence[str] = (
    "CheckpointWeights",
    "Placement",
    "hold",
    "hold_computed",
    "parse_max_memory",
    "stream_model",
)
