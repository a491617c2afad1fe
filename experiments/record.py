"""What every record says besides its numbers."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "records"


def commit() -> str:
    """The commit this checkout is at, marked if files differ from it; other records, which are no code, may."""

    def git(*arguments: str) -> str:
        return subprocess.run(("git", "-C", str(FOLDER), *arguments), capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude).")
    return (git("rev-parse", "HEAD") or "unknown") + ("-dirty" if changed else "")


def write(name: str, what: str, command: str, packages: tuple[str, ...], numbers: dict[str, Any]) -> Path:
    """Write records/NAME.json; returns its path."""
    record = {
        "what": what,
        "command": command,
        "commit": commit(),
        "device": f"{platform.machine()} CPU, {os.cpu_count()} cores",
        "versions": {package: version(package) for package in packages} | {"python": platform.python_version()},
    }
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.json"
    path.write_text(json.dumps(record | numbers, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path
