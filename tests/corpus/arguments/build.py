"""What the rows of this area need beside texts."""

from pathlib import Path

import torch
from safetensors.torch import save_file


def direction(folder: Path) -> None:
    vector = torch.randn(128, generator=torch.Generator().manual_seed(0))
    save_file({"direction": vector}, folder / "d.safetensors", {"site": "mlp_out"})
