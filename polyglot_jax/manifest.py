"""A checkpoint's manifest.json: what it holds, and size and CRC-32 of every file, and of itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from isal.isal_zlib import crc32

from polyglot_jax.config import InputError

FORMAT, VERSION = "polyglot-jax-checkpoint", 2
DAMAGED = "the checkpoint is damaged, use another one"
Files = dict[str, tuple[int, int]]
"""Size and CRC-32, by name."""


class Damaged(InputError):
    """A checkpoint is proven not to be what was written; a disk that does not answer, say, proves nothing."""


def files_in(folder: Path) -> Iterator[str]:
    """Names of all files in a folder, but for the hidden ones that systems and editors put anywhere."""
    for file in folder.rglob("*"):
        if not file.name.startswith(".") and not file.is_dir():
            yield file.relative_to(folder).as_posix()


def measure(file: Path) -> tuple[int, int]:
    """Size and checksum."""
    return file.stat().st_size, file_crc32(file)


def file_crc32(file: Path) -> int:
    checksum = 0
    with open(file, "rb") as opened:
        while part := opened.read(2**22):
            checksum = crc32(part, checksum)
    return checksum


def write(folder: Path, step: int, metrics: dict[str, float], params: dict[str, Any], known: Files) -> None:
    """Over all that is in `folder`. params: shape and dtype of each; known: of files that need not be read for it."""
    files, found = {}, sorted(files_in(folder))
    if lost := known.keys() - set(found):
        raise InputError(f"{folder / min(lost)}: was deleted while the checkpoint was being written; write it again")
    for name in found:
        size, checksum = known.get(name) or measure(folder / name)
        files[name] = {"bytes": size, "crc32": f"{checksum:08x}"}
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "step": step,
        "metrics": metrics,
        "params": {name: {"shape": list(leaf.shape), "dtype": str(leaf.dtype)} for name, leaf in params.items()},
        "files": files,
    }
    manifest["crc32"] = _crc32_of(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _crc32_of(manifest: dict[str, Any]) -> str:
    """Of a manifest's own content."""
    return f"{crc32(json.dumps(manifest, sort_keys=True).encode()):08x}"


def is_checkpoint(path: str | Path) -> bool:
    """Whether `path` claims to be a checkpoint of ours: its manifest says so, or is lost from a half-written one."""
    manifest = Path(path) / "manifest.json"
    if not manifest.is_file():
        return (Path(path) / "params" / "_METADATA").is_file()
    try:
        return json.loads(manifest.read_bytes())["format"] == FORMAT
    except (ValueError, LookupError, TypeError, RecursionError):
        return (Path(path) / "params" / "_METADATA").is_file()


def read(path: Path) -> dict[str, Any]:
    """What the manifest of the checkpoint `path` says.

    Damaged if there is none, or not one as it was written; InputError if it is another program's.
    """
    file = path / "manifest.json"
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        checksum = manifest.pop("crc32", None) if isinstance(manifest, dict) else None
        actual = _crc32_of(manifest)
    except FileNotFoundError as error:
        what = "a half-written checkpoint" if is_checkpoint(path) else "no checkpoint"
        raise Damaged(f"{path}: {what}: it has no manifest.json; use another one") from error
    except (ValueError, RecursionError) as error:  # not JSON, or not even text
        raise Damaged(f"{file}: {error}; {DAMAGED}") from error
    found = manifest.keys() if isinstance(manifest, dict) else set()
    for key, known in (("format", FORMAT), ("version", VERSION)):
        if key in found and manifest[key] != known:
            raise InputError(f"{file}: {key}={manifest[key]}: this program reads {known}; use the one that wrote it")
    if missing := {"format", "version", "step", "params", "files"} - found:
        raise Damaged(f"{file}: no {', '.join(sorted(missing))}; {DAMAGED}")
    if checksum != actual:
        raise Damaged(f"{file}: its content is not what was written; {DAMAGED}")
    return manifest
