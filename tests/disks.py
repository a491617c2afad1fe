"""Small disks of their own, for what happens where room runs out or nothing may be written; all that lies there."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A disk of `size` bytes mounted at `folder`; where that may not be done the test is skipped, saying why."""
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        # Lazily: what is still mapped, by the traceback of a test that failed say, keeps a disk busy.
        subprocess.run(["umount", "--lazy", folder], check=True)


def remount(disk: Path, options: str) -> None:
    """Change a disk while it is mounted: "ro", "rw", "size=700k"."""
    subprocess.run(["mount", "-o", f"remount,{options}", disk], check=True)


def used(disk: Path) -> int:
    """Bytes taken on a disk."""
    found = os.statvfs(disk)
    return (found.f_blocks - found.f_bfree) * found.f_frsize


def state(path: Path) -> dict[str, tuple]:
    """All that is in a folder: kind and permissions, times of the last changes, and contents or where a link leads."""
    found = {}
    for item in [path, *sorted(path.rglob("*"))]:
        status = item.lstat()
        content = os.readlink(item) if item.is_symlink() else item.read_bytes() if item.is_file() else None
        found[str(item.relative_to(path))] = (status.st_mode, status.st_mtime_ns, status.st_ctime_ns, content)
    return found
