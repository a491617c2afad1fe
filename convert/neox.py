"""GPT-NeoX's own checkpoints to ours, and whatever holds weights opened. The way back is `convert.neox_export`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from convert.conversion import to_checkpoint
from convert.neox_files import is_neox
from convert.neox_folder import NeoxFolder
from polyglot_jax.checkpoint import Checkpoint, Copied
from polyglot_jax.hf_folder import HfFolder
from polyglot_jax.weights import open_source


def open_any(path: str | Path) -> Checkpoint | HfFolder | NeoxFolder:
    """Whatever holds weights: what `weights.open_source` opens, and GPT-NeoX's checkpoints."""
    return NeoxFolder(path) if is_neox(path) else open_source(path)


def neox_to_orbax(
    source: str | Path,
    destination: str | Path,
    dtype: Any = None,
    *,
    config_files: Sequence[str | Path] = (),
    overwrite: bool = False,
) -> Copied:
    """Write a checkpoint from GPT-NeoX's; dtype None keeps the source's own. `config_files`: as of NeoxFolder."""
    folder = NeoxFolder(source, config_files)
    return to_checkpoint(folder, destination, dtype, overwrite=overwrite)
