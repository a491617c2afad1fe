"""The converters' command lines: what each verb is tried on, and how it ended."""

import contextlib
import io
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from conftest import ROOT
from formats import FORMATS

from convert.__main__ import VERBS
from polyglot_jax.cli import run


class Verb(NamedTuple):
    """source: a format of formats.FORMATS; arguments: what the verb wants besides two places."""

    source: str
    arguments: tuple[str, ...] = ()

    def make(self, folder: Path) -> Path:
        """Make a source at `folder`."""
        FORMATS[self.source].make(folder)
        return folder


CONVERSIONS = {
    "hf-to-orbax": Verb("safetensors in shards"),
    "orbax-to-hf": Verb("converted", ("--shard-bytes", "20000")),
    "neox-to-orbax": Verb("neox"),
    "orbax-to-neox": Verb("converted", ("--tensor-parallel", "2")),
}


class Ended(NamedTuple):
    """A command that has ended. out, err: what it printed, line by line, without progress bars."""

    status: int
    out: list[str]
    err: list[str]

    @property
    def error(self) -> str:
        """The error of a command that failed as it should: with status 1, after at most notes, in one line."""
        assert self.status == 1, self
        *notes, error = self.err
        assert all(line.startswith("note: ") for line in notes) and error.startswith("error: "), self
        return error


def convert(verb: str, source: Path | str, destination: Path | str, *more: str) -> Ended:
    """Run `python -m convert VERB` in this process, with the arguments that the verb is tried with."""
    usual = CONVERSIONS[verb].arguments if verb in CONVERSIONS else ()
    arguments = [verb, str(source), str(destination), *(more if usual[:1] == more[:1] else (*usual, *more))]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        status = run(VERBS, "python -m convert", arguments)
    return Ended(status, out.getvalue().splitlines(), _without_bars(err.getvalue()))


WITHOUT = """
import sys

class Absent:
    packages = sys.argv.pop(1).split()

    def find_spec(self, name, *_):
        if name.partition(".")[0] in self.packages:
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, Absent())
from convert.__main__ import VERBS
from polyglot_jax.cli import run
sys.exit(run(VERBS, "python -m convert", sys.argv[1:]))
"""


def without(packages: str, *arguments: str | Path) -> Ended:
    """Run `python -m convert ARGUMENTS` in a process that cannot import some packages."""
    command = [sys.executable, "-c", WITHOUT, packages, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return Ended(done.returncode, done.stdout.splitlines(), _without_bars(done.stderr))


def _without_bars(text: str) -> list[str]:
    return [line for line in re.split("[\r\n]+", text) if line and "%|" not in line]
