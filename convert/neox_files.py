"""The files of a checkpoint of GPT-NeoX: where they are, what they are called, of which step they are.

    SAVE/latest                                           name of the newest step's folder
    SAVE/global_stepN/configs/*.yml                       the run's settings
    SAVE/global_stepN/layer_XX-model_YY-model_states.pt   one layer on one tensor-parallel rank (pipeline form)
    SAVE/global_stepN/mp_rank_YY_model_states.pt          state of a run; in the sequential form the weights as well

XX counts the layers of their pipeline, from the embedding, 00, to the head; YY the tensor-parallel ranks.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

from convert.neox_config import Settings
from polyglot_jax import torch_files
from polyglot_jax.config import InputError
from polyglot_jax.tokenizer import read_text

_LAYER_FILE = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt")
_RANK_FILE = re.compile(r"mp_rank_(\d+)_model_states\.pt")
_STEP_FOLDER = re.compile(r"global_step(\d+)")


def is_neox(path: str | Path) -> bool:
    """Whether `path` is a step's folder of GPT-NeoX, or a save folder with such steps."""
    path = Path(path)
    if not path.is_dir():
        return False
    if (path / "latest").is_file() and any(path.glob("global_step*")):
        return True
    return bool(layer_files(path) or rank_files(path))


def step_folder(path: Path) -> Path:
    """The folder of a step: `path`, or the newest in it."""
    latest = path / "latest"
    if not latest.is_file():
        if is_neox(path):
            return path
        raise InputError(f"{path}: no checkpoint of GPT-NeoX: neither a folder global_stepN nor one with a file latest")
    name = latest.read_bytes().decode(errors="replace").strip()
    # A name with a folder in it could lead anywhere.
    if not name or name != Path(name).name or not (path / name).is_dir():
        raise InputError(f"{latest}: names {name!r}, which is not there; give the folder global_stepN itself")
    return path / name


def layer_files(folder: Path) -> dict[tuple[int, int], Path]:
    """The files of layers in a step's folder, by the number of the layer and the rank."""
    return _numbered(folder, _LAYER_FILE)


def rank_files(folder: Path) -> dict[int, Path]:
    """The mp_rank files in a step's folder, by the rank."""
    return {rank: file for (rank,), file in _numbered(folder, _RANK_FILE).items()}


def _numbered(folder: Path, pattern: re.Pattern[str]) -> dict[Any, Path]:
    """The files of a folder whose names match, by the numbers in them."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return {tuple(map(int, match.groups())): file for file in files if (match := pattern.fullmatch(file.name))}


def layer_name(number: int, rank: int) -> str:
    return f"layer_{number:02d}-model_{rank:02d}-model_states.pt"


def rank_name(rank: int) -> str:
    return f"mp_rank_{rank:02d}_model_states.pt"


def read_states(folder: Path, *, needed: bool) -> dict[Path, dict[str, Any]]:
    """What the mp_rank files hold; InputError if they are of different steps."""
    states, failures = {}, []
    for file in rank_files(folder).values():
        try:
            # NumPy's: the state of its random numbers.
            states[file] = torch_files.load(file, with_numpy=True)
            if not isinstance(states[file], dict):
                raise InputError(f"{file}: no state of a run of GPT-NeoX")
        except InputError as error:
            if needed:
                raise
            states.pop(file, None)
            failures.append(error)
    if failures:
        others = f" (and {len(failures) - 1} more like it)" if len(failures) > 1 else ""
        print(f"note: {failures[0]}{others}; weights are elsewhere, but its step is not checked", file=sys.stderr)
    _check_steps(folder, states)
    return states


def _check_steps(folder: Path, states: dict[Path, dict[str, Any]]) -> None:
    """The steps of ranks must be the same, and that of the folder's name."""
    named = _STEP_FOLDER.fullmatch(folder.resolve().name)
    seen: dict[str, tuple[Any, Path]] = {}
    for file, state in states.items():
        given = {key: state[key] for key in ("iteration", "total_iters", "global_steps") if state.get(key) is not None}
        for key, value in given.items():
            first, other = seen.setdefault(key, (value, file))
            if value != first:
                raise InputError(
                    f"{file}: {key}={value}, but {first} in {other}: ranks of different steps; take all from one "
                    "checkpoint"
                )
        # Fine-tuning starts anew with iteration, which names the folder, and goes on with DeepSpeed's global_steps.
        step = next(iter(given.values()), None)
        if named and step is not None and step != int(named[1]):
            raise InputError(f"{file}: is of step {step}, in a folder {named[0]}; take all files from one checkpoint")


def find_tokenizer(path: Path, folder: Path, settings: Settings) -> str | None:
    """The text of the tokenizer.json beside the weights, or where the settings say, if it is there; else None."""
    places = [path / "tokenizer.json", folder / "tokenizer.json"]
    named = settings.get("vocab_file")
    if settings.get("tokenizer_type") == "HFTokenizer" and isinstance(named, str) and os.path.isfile(named):
        places.append(Path(named))
    return next((text for place in places if (text := read_text(place)) is not None), None)
