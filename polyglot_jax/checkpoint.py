"""Checkpoints: the only room that knows Orbax.

    CHECKPOINT/
      params/          the model's parameters, an Orbax PyTree of zarr3 arrays
      optimizer/       the optimizer's state, where training wrote it
      config.json      the Config
      tokenizer.json   as it was given, where there was one
      manifest.json    step and metrics; shape and dtype of each parameter; size and CRC-32 of every file, and of itself

A leaf under "layers" is stacked, [layers, ...], and no chunk on disk spans two layers, so one layer can be read alone.
A checkpoint is written beside its place under another name and renamed when it is whole.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import stat
import sys
import threading
from collections import ChainMap, Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from isal.isal_zlib import crc32
from tqdm import tqdm

from polyglot_jax import hosts, manifest, store
from polyglot_jax.config import Config, InputError
from polyglot_jax.files import beside, new_folder, read_config, sync
from polyglot_jax.manifest import DAMAGED, Damaged, Files, file_crc32, files_in, is_checkpoint, measure
from polyglot_jax.orbax_noise import quiet
from polyglot_jax.parallel import in_order
from polyglot_jax.source import Source
from polyglot_jax.tokenizer import read_text
from polyglot_jax.two_phases import TwoPhases

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


def _orbax() -> ocp.PyTreeCheckpointHandler:
    return ocp.PyTreeCheckpointHandler(use_zarr3=True, use_compression=False)


def _start_tree(path: Path, tree: Any) -> Callable[[], None]:
    """Copies this process's part of `tree` to the host and begins to write it; what is returned waits for that."""

    def arguments(path: tuple[Any, ...], leaf: Any) -> ocp.SaveArgs:
        stacked = any(getattr(key, "key", None) == "layers" for key in path) and leaf.ndim
        # In small chunks, so that conversion can read a part of a large matrix; Orbax alone puts one in one chunk.
        return ocp.SaveArgs(shard_axes=(0,) if stacked else (), chunk_byte_size=store.CHUNK)

    args = ocp.args.PyTreeSave(tree, save_args=jax.tree_util.tree_map_with_path(arguments, tree))
    with ThreadPoolExecutor(1) as pool:  # a notebook's thread has an event loop already
        futures = pool.submit(asyncio.run, _orbax().async_save(epath.Path(path), args=args)).result()
    return lambda: _each(future.result for future in futures)


def _each(waits: Iterable[Callable[[], Any]]) -> None:
    """Wait for all; one that fails has the others waited for too, before it is raised."""
    with contextlib.ExitStack() as stack:
        for wait in waits:
            stack.callback(wait)


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
    start_save(path, config, params, optimizer=optimizer, tokenizer=tokenizer, step=step, overwrite=overwrite).result()


def start_save(
    path: str | Path,
    config: Config,
    params: Tree,
    *,
    optimizer: Any = None,
    tokenizer: str | None = None,
    step: int = 0,
    metrics: dict[str, float] | None = None,
    overwrite: bool = False,
) -> TwoPhases:
    """As `save`, but returns once the arrays are copied to the host, so that they may change or be donated.

    metrics: what is noted with the step. Of all processes: each writes its part, into the same folder.
    """
    trees = {"params": params} | ({} if optimizer is None else {"optimizer": optimizer})
    leaves = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in flatten(params).items()}
    with contextlib.ExitStack() as stack:
        stack.enter_context(quiet())
        with hosts.together():
            folder = beside(Path(path).resolve())[0]
            if hosts.is_first():
                stack.enter_context(new_folder(path, is_checkpoint, overwrite=overwrite))
                for name in trees:
                    (folder / name).mkdir()
        writing = []
        with hosts.together(), contextlib.ExitStack() as started:  # one that fails has the other waited for
            for name, tree in trees.items():
                if not (folder / name).is_dir():
                    raise InputError(f"{folder / name}: made by process 0, is not seen here; name a folder all share")
                writing.append(_start_tree(folder / name, tree))
                started.callback(writing[-1])
            started.pop_all()

        def write() -> Files:
            _each(writing)  # whoever is told of a failure deletes the folder, so nobody may be writing
            ours = f"/ocdbt.process_{jax.process_index()}/d/"  # the data; the rest is small, and changes at the end
            names = [name for name in files_in(folder) if ours in name]
            sync(*(folder / name for name in names))  # a host can answer for what it wrote alone
            return {name: measure(folder / name) for name in names}

        def commit(parts: list[Files]) -> None:
            for name in trees:
                _orbax().finalize(epath.Path(folder / name))
            _write_rest(folder, config, tokenizer, step, leaves, dict(ChainMap(*parts)), metrics)

        return TwoPhases(stack.pop_all(), write, commit)


class Copied(NamedTuple):
    """What `copy` wrote. pieces: parameters, counted layer by layer; non_finite: where infs and NaNs are, how many."""

    pieces: int
    bytes: int
    non_finite: dict[str, int]


def copy(path: str | Path, source: Source, dtype: Any = None, *, overwrite: bool = False) -> Copied:
    """Write a checkpoint of the weights, config and tokenizer of `source`, a few megabytes at a time.

    dtype: of the weights written; None: of each parameter its own. Errors as of `save`.
    """
    params = {
        name: jax.ShapeDtypeStruct(leaf.shape, np.dtype(dtype or leaf.dtype)) for name, leaf in source.params.items()
    }
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in params.values())
    files: Files = {}
    non_finite: Counter[str] = Counter()
    written = 0
    with new_folder(path, is_checkpoint, overwrite=overwrite) as folder:
        writer = store.Writer(folder / "params", unflatten(params), params)
        progress = tqdm(total=total, unit="B", unit_scale=True, desc=f"writing {Path(path).name}")
        blocks = (
            block
            for name, layer in store.pieces(params)
            for block in writer.blocks(name, layer, source.read(name, layer))
        )
        with progress:
            for block, done in in_order(lambda block: (block, writer.write(block)), blocks):
                file = f"params/{done.file}"
                if file in files:
                    raise ValueError(f"{file}: written twice")
                files[file] = done.bytes, done.crc32
                size = block.values.size * params[block.name].dtype.itemsize
                written += size
                progress.update(size)
                if done.non_finite:
                    where = block.name if block.layer is None else f"{block.name}, layer {block.layer}"
                    non_finite[where] += done.non_finite
        if written != total:
            raise ValueError(f"{path}: {written} bytes written of {total}")
        _write_rest(folder, source.config, source.tokenizer, 0, params, files)
    return Copied(len(list(store.pieces(params))), total, dict(non_finite))


def _write_rest(
    folder: Path,
    config: Config,
    tokenizer: str | None,
    step: int,
    params: dict[str, Any],
    known: Files,
    metrics: dict[str, float] | None = None,
) -> None:
    """All but the arrays. `known`: size and checksum of files that need not be read for them."""
    (folder / "config.json").write_text(config.to_json(), encoding="utf-8")
    if tokenizer is not None:
        (folder / "tokenizer.json").write_bytes(tokenizer.encode())
    manifest.write(folder, step, metrics or {}, params, known)


def of_run(run: str | Path) -> list[Path]:
    """The checkpoints in a run folder, the newest first."""
    found = Path(run, "checkpoints").glob("*")
    folders = [item for item in found if item.name.isascii() and item.name.isdigit() and item.is_dir()]
    return sorted(folders, key=lambda folder: int(folder.name), reverse=True)


def newest(run: str | Path) -> Path | None:
    """The checkpoint of the last step in a run folder, or None."""
    return next(iter(of_run(run)), None)


def newest_whole(run: str | Path) -> Checkpoint | None:
    """The newest checkpoint of a run whose every byte is as it was written; None if the run has none.

    Damaged ones after it are named on stderr, and set aside as STEP.damaged. InputError if all are damaged, or if one
    cannot be judged: nothing is set aside then. Of all processes; the first says which checkpoints there are.
    """
    names = json.loads(hosts.gather(json.dumps([folder.name for folder in of_run(run)]))[0])
    folders, damaged = [Path(run, "checkpoints", name) for name in names], []
    for folder in folders:
        try:
            with _judging():
                found = Checkpoint(folder)
            found.check()
        except Damaged as error:
            _warn(str(error))
            damaged.append(folder)
            continue
        with hosts.together():
            for other in damaged if hosts.is_first() else ():
                aside = other.with_name(f"{other.name}.damaged")
                shutil.rmtree(aside, ignore_errors=True)
                other.rename(aside)
                _warn(f"{other}: set aside as {aside.name}; going on from {folder}")
        return found
    if damaged:
        raise InputError(f"{run}: none of its {len(damaged)} checkpoints is whole; begin anew in another folder")
    return None


@contextlib.contextmanager
def _judging() -> Iterator[None]:
    """As hosts.together, but damage that one process finds is Damaged on all."""
    damage = ""
    with hosts.together():
        try:
            yield
        except Damaged as error:
            damage = str(error)
        except OSError as error:
            raise InputError(f"{error}; a checkpoint cannot be checked; mend that and run the same again") from error
    for said in filter(None, hosts.gather(damage)):
        raise Damaged(said)


def _warn(message: str) -> None:
    if hosts.is_first():
        print(f"warning: {message}", file=sys.stderr)


def prune(run: str | Path, keep: int, keep_every: int = 0) -> None:
    """Delete all but the newest `keep` checkpoints of a run (0: none), except those of every `keep_every` steps.

    And what saves that were killed have left, so nothing may be being written.
    """
    for folder in Path(run, "checkpoints").glob("*.incomplete"):
        if folder.is_dir() and not folder.is_symlink():  # else it is nothing of ours
            shutil.rmtree(folder)
    for folder in of_run(run)[keep:] if keep else []:
        if not (keep_every and int(folder.name) % keep_every == 0):
            (folder / "manifest.json").unlink(missing_ok=True)  # without it nothing loads what is being deleted
            shutil.rmtree(folder)


def _size(file: Path) -> int | None:
    """In bytes; None if no file is there, which `is_file` may say of one that cannot be reached, too."""
    try:
        status = file.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


class Checkpoint:
    """A checkpoint on disk, whole as far as names and sizes tell; what is read is checked, byte for byte, before.

    .config .step .metrics .tokenizer (text of tokenizer.json, or None) .params ({name: ShapeDtypeStruct})
    """

    def __init__(self, path: str | Path):
        """Damaged if `path` holds no checkpoint, or not a whole one; InputError if it is one of another format."""
        self.path = path = Path(path).resolve()  # TensorStore takes no ".."
        about = manifest.read(path)
        self._files: dict[str, dict[str, Any]] = about["files"]
        surplus = sorted(name for name in files_in(path) if name not in self._files and name != "manifest.json")
        if surplus:
            raise InputError(f"{path / surplus[0]}: does not belong to the checkpoint; move it away")
        self._unchecked = set(self._files)
        self._checking = threading.Lock()
        for name, entry in self._files.items():
            file = path / name
            found = _size(file)
            if found != entry["bytes"]:
                state = "is missing" if found is None else f"has {found} bytes instead of {entry['bytes']}"
                raise Damaged(f"{file}: {state}; {DAMAGED}")
        # Not the arrays' chunks, in folders c (zarr's) or d (OCDBT's): those are checked when they are read.
        self._check(*(name for name in self._files if "/c/" not in name and "/d/" not in name))
        self.step: int = about["step"]
        self.metrics: dict[str, float] = about.get("metrics", {})
        self.config = read_config(path / "config.json")
        self.tokenizer = read_text(path / "tokenizer.json")
        self.params = {
            name: jax.ShapeDtypeStruct(tuple(leaf["shape"]), np.dtype(leaf["dtype"]))
            for name, leaf in about["params"].items()
        }
        self._reader = store.Reader(path / "params", self._load)

    def _check(self, *names: str) -> None:
        """Compare files with their checksums, each once; Damaged, naming the first that is not as it was written."""
        with self._checking:
            for name in sorted(self._unchecked.intersection(names)):
                self._compare(name, file_crc32(self.path / name))

    def check(self) -> None:
        """Compare every file with its checksum; Damaged, naming the first that is not as it was written.

        Of all processes, which share the files out: all see the same disk, and one could not read it all in time.
        """
        with _judging():
            by_size = sorted(self._unchecked, key=lambda name: (self._files[name]["bytes"], name))
            self._check(*by_size[jax.process_index() :: jax.process_count()])
        self._unchecked.clear()

    def _check_folder(self, folder: str) -> None:
        self._check(*(name for name in self._files if name.startswith(folder)))

    def _compare(self, name: str, checksum: int) -> None:
        if f"{checksum:08x}" != self._files[name]["crc32"]:
            raise Damaged(f"{self.path / name}: its bytes are not those that were written; {DAMAGED}")
        self._unchecked.discard(name)

    def _load(self, file: str) -> np.ndarray:
        """The bytes of a file of parameters, mapped, and checked when they are first asked for."""
        name = f"params/{file}"
        content = np.memmap(self.path / name, np.uint8, mode="r").view(np.ndarray)
        if name in self._unchecked:
            self._compare(name, crc32(content.data))
        return content

    def read(self, name: str, layer: int | None = None, index: store.Index = ()) -> np.ndarray:
        """A parameter, one layer of a stacked one, or a part of it, as it is on disk; nothing else is read."""
        if self._reader.is_database:
            self._check_folder("params/")
        return self._reader.read(name, layer, index)

    def chunk(self, name: str) -> tuple[int, ...]:
        """Shape of the parts in which a piece is stored; reading less than one costs as much."""
        if self._reader.is_database:
            self._check_folder("params/")
        return self._reader.chunk(name)

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
        self._check_folder(f"{part}/")
        args = jax.tree.map(lambda leaf: ocp.ArrayRestoreArgs(sharding=leaf.sharding, dtype=leaf.dtype), abstract)
        restore = ocp.args.PyTreeRestore(item=abstract, restore_args=args)
        return _orbax().restore(epath.Path(self.path / part), args=restore)
