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
    """The commit this checkout is at, marked if files differ from it."""
    described = ("git", "-C", str(FOLDER.parent), "describe", "--always", "--dirty", "--abbrev=40")
    return subprocess.run(described, capture_output=True, text=True).stdout.strip() or "unknown"


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
