"""Checkpoints: the only room that knows Orbax.

    CHECKPOINT/
      params/          the model's parameters, an Orbax PyTree (zarr3 in OCDBT)
      optimizer/       the optimizer's state, where training wrote it
      config.json      the Config
      tokenizer.json   as it was given, where there was one
      manifest.json    step, shape and dtype of each parameter, size of every file: proof that nothing is missing

A leaf under "layers" is stacked, [layers, ...], and no chunk on disk spans two layers, so one layer can be read alone.
A checkpoint is written beside its place under another name and renamed when it is whole.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from polyglot_jax.config import Config, InputError
from polyglot_jax.files import new_folder, read_config

FORMAT, VERSION = "polyglot-jax-checkpoint", 1
Tree = dict[str, Any]


def flatten(tree: Tree) -> dict[str, Any]:
    """Nested dicts -> {"layers/attention/q/kernel": leaf}: the public names of parameters."""
    return {
        "/".join(key.key for key in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: not isinstance(x, dict))
    }


def unflatten(leaves: dict[str, Any]) -> Tree:
    """The inverse of `flatten`."""
    tree: Tree = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = leaf
    return tree


def _orbax() -> ocp.Checkpointer:
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_zarr3=True, use_compression=False))


def _is_stacked(path: tuple[Any, ...]) -> bool:
    return any(getattr(key, "key", None) == "layers" for key in path)


def _save_tree(path: Path, tree: Any) -> None:
    args = jax.tree_util.tree_map_with_path(
        lambda path, leaf: ocp.SaveArgs(shard_axes=(0,)) if _is_stacked(path) and leaf.ndim else ocp.SaveArgs(), tree
    )
    with _orbax() as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(tree, save_args=args))


def save(
    path: str | Path,
    config: Config,
    params: Tree,
    *,
    optimizer: Any = None,
    tokenizer: str | None = None,
    step: int = 0,
    overwrite: bool = False,
) -> None:
    """Write a checkpoint at `path`. `params`: stacked tree of arrays; `tokenizer`: the text of a tokenizer.json.

    InputError if something is at `path` (unless `overwrite`, and it is a checkpoint) or the disk fills; whatever goes
    wrong, what was at `path` stays and no partial checkpoint takes its name.
    """
    with new_folder(path, is_checkpoint, overwrite=overwrite) as folder:
        _save_tree(folder / "params", params)
        if optimizer is not None:
            _save_tree(folder / "optimizer", optimizer)
        (folder / "config.json").write_text(config.to_json(), encoding="utf-8")
        if tokenizer is not None:
            (folder / "tokenizer.json").write_bytes(tokenizer.encode())
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "step": step,
            "params": {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in flatten(params).items()},
            "files": {
                file.relative_to(folder).as_posix(): file.stat().st_size
                for file in sorted(folder.rglob("*"))
                if file.is_file()
            },
        }
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def is_checkpoint(path: str | Path) -> bool:
    """Whether `path` claims to be a checkpoint of ours: its manifest says so, or is lost from a half-written one."""
    manifest = Path(path) / "manifest.json"
    if not manifest.is_file():
        return (Path(path) / "params").is_dir()
    try:
        return json.loads(manifest.read_bytes())["format"] == FORMAT
    except (ValueError, LookupError, TypeError):
        return (Path(path) / "params").is_dir()


def newest(run: str | Path) -> Path | None:
    """The checkpoint of the last step in a run folder, or None."""
    steps = [folder for folder in Path(run, "checkpoints").glob("*") if folder.name.isdigit()]
    return max(steps, key=lambda folder: int(folder.name), default=None)


def prune(run: str | Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints of a run (0: none), after a new one is whole."""
    if keep:
        steps = [folder for folder in Path(run, "checkpoints").glob("*") if folder.name.isdigit()]
        for folder in sorted(steps, key=lambda folder: int(folder.name))[:-keep]:
            shutil.rmtree(folder)


class Checkpoint:
    """A checkpoint on disk, checked to be whole; arrays are read when asked for.

    .config .step .tokenizer (text of tokenizer.json, or None) .params ({name: ShapeDtypeStruct})
    """

    def __init__(self, path: str | Path):
        """InputError if `path` holds no checkpoint, a half-written one, or one of another format."""
        self.path = path = Path(path).absolute()
        try:
            manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            what = "a half-written checkpoint" if is_checkpoint(path) else "no checkpoint"
            raise InputError(f"{path}: {what}: it has no manifest.json; use another one") from error
        except ValueError as error:  # not JSON, or not even text
            raise InputError(f"{path}/manifest.json: damaged: {error}; use another checkpoint") from error
        found = manifest.keys() if isinstance(manifest, dict) else set()
        for key, known in (("format", FORMAT), ("version", VERSION)):
            if key in found and manifest[key] != known:
                raise InputError(f"{path}/manifest.json: {key}={manifest[key]}: this program reads {known}")
        if missing := {"format", "version", "step", "params", "files"} - found:
            raise InputError(f"{path}/manifest.json: damaged: no {', '.join(sorted(missing))}; use another checkpoint")
        for name, size in manifest["files"].items():
            file = path / name
            found = file.stat().st_size if file.is_file() else None
            if found != size:
                state = "is missing" if found is None else f"has {found} bytes instead of {size}"
                raise InputError(
                    f"{file}: {state}; the checkpoint is damaged, use another one (a run takes the one before when "
                    f"{path} is deleted)"
                )
        self.step: int = manifest["step"]
        self.config = read_config(path / "config.json")
        tokenizer = path / "tokenizer.json"
        self.tokenizer = tokenizer.read_bytes().decode() if tokenizer.is_file() else None
        self.params = {
            name: jax.ShapeDtypeStruct(tuple(shape), np.dtype(dtype))
            for name, (shape, dtype) in manifest["params"].items()
        }

    def read(self, name: str, layer: int | None = None) -> np.ndarray:
        """One parameter, or one layer of a stacked one, as it is on disk; nothing else is read."""
        files = {"driver": "file", "path": f"{self.path}/params/"}
        spec = {"driver": "zarr3", "kvstore": {"driver": "ocdbt", "base": files, "path": name.replace("/", ".")}}
        array = tensorstore.open(spec, read=True, open=True).result()
        return np.asarray((array if layer is None else array[layer]).read().result())

    @property
    def leaf_count(self) -> int:
        """How many `leaves` there are."""
        return sum(1 if layers is None else len(layers) for _, layers in self._layers())

    def _layers(self) -> Iterator[tuple[str, range | None]]:
        for name, leaf in self.params.items():
            yield name, range(leaf.shape[0]) if name.startswith("layers/") else None

    def leaves(self) -> Iterator[tuple[str, int | None, np.ndarray]]:
        """(name, layer, array) of every parameter, stacked ones layer by layer (layer is None for the others)."""
        for name, layers in self._layers():
            for layer in (None,) if layers is None else layers:
                yield name, layer, self.read(name, layer)

    def restore_params(self, abstract: Tree) -> Tree:
        """The parameters as jax.Arrays. `abstract`: tree of ShapeDtypeStructs, with the shardings (and dtypes) wanted.

        InputError, naming the first one, if the shapes are not those of the checkpoint: it is another model's.
        """
        wanted = flatten(abstract)
        for name in sorted(wanted | self.params):
            theirs, ours = self.params.get(name), wanted.get(name)
            if theirs is None or ours is None or theirs.shape != ours.shape:
                raise InputError(
                    f"{self.path}: another model's checkpoint: {name} is {theirs.shape if theirs else 'absent'} there, "
                    f"{ours.shape if ours else 'absent'} in this model"
                )
        return self._restore("params", abstract)

    def restore_optimizer(self, abstract: Any) -> Any:
        """The optimizer's state, in the structure of `abstract`; InputError if the checkpoint holds none."""
        if not (self.path / "optimizer").is_dir():
            raise InputError(f"{self.path}: holds no optimizer state; training can start from it with --init only")
        return self._restore("optimizer", abstract)

    def _restore(self, part: str, abstract: Any) -> Any:
        args = jax.tree.map(lambda leaf: ocp.ArrayRestoreArgs(sharding=leaf.sharding, dtype=leaf.dtype), abstract)
        with _orbax() as checkpointer:
            return checkpointer.restore(self.path / part, args=ocp.args.PyTreeRestore(item=abstract, restore_args=args))
