"""The edits a checkpoint can undergo: what a plan is written in and the writer executes.

A tensor that no edit names is kept: its bytes are copied and never decoded. Names are names on
disk. All edits happen at once: a `Rename` chain (a → b, b → c) or an `Add` under a name that a
`Rename` or `Drop` frees is fine, as long as every name is unique in the end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import torch


class _Removed(Enum):
    """A type with one value, so that None stays what it is in JSON: null."""

    REMOVED = "removed"


REMOVED: Final = _Removed.REMOVED  # as a value in config changes: the key disappears


@dataclass(frozen=True)
class Add:
    """A new tensor, already in the dtype in which it is stored. It goes to the extra shard.

    Large constant tensors may be expanded views (`torch.zeros(1).expand(shape)`): the writer makes
    one at a time contiguous.
    """

    name: str
    tensor: torch.Tensor


@dataclass(frozen=True)
class Patch:
    """A new value for a tensor that exists: same shape, same dtype, already cast.

    The shard is copied and these bytes replaced; the old value goes to `originals.safetensors`.
    """

    name: str
    tensor: torch.Tensor


@dataclass(frozen=True)
class Rename:
    """The same bytes under another name."""

    name: str
    new_name: str


@dataclass(frozen=True)
class Transform:
    """Tensors computed from one existing tensor, which disappears.

    `function` takes the decoded tensor `name` and returns {new name: tensor}; what it returns
    must have the names and shapes of `outputs` (new name → shape) and the dtype that `dtype`
    names, so that headers can be planned without weights. An output may keep the input's name.
    `splits` says that the outputs, one after another along the first axis, are the input, which is
    what undoing a bake needs to know.
    """

    name: str
    outputs: Mapping[str, tuple[int, ...]]
    function: Callable[[torch.Tensor], Mapping[str, torch.Tensor]]
    dtype: str | None = None  # safetensors dtype of the outputs ("F32", …); None: the input's dtype
    splits: bool = False


@dataclass(frozen=True)
class Merge:
    """Tensors computed from several existing ones, which disappear: a Transform of more than one.

    `function` takes {name: decoded tensor} of all `names`, from whatever shards they lie in; the
    result goes where the first of them was. `dtype` None is the first one's.
    """

    names: tuple[str, ...]
    outputs: Mapping[str, tuple[int, ...]]
    function: Callable[[Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]]
    dtype: str | None = None


@dataclass(frozen=True)
class Drop:
    """A tensor that is left out."""

    name: str


Change = Patch | Rename | Transform | Drop  # of a tensor that exists
Edit = Add | Change | Merge
