"""python -m convert VERB"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import tyro

from polyglot_jax.cli import Verbs, run
from polyglot_jax.config import InputError


@dataclass(frozen=True)
class HfToOrbax:
    """Make a checkpoint from a Hugging Face model folder (safetensors), or from a name on the hub."""

    source: tyro.conf.Positional[str]
    """The folder or name."""
    destination: tyro.conf.Positional[str]
    """Checkpoint folder to make."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the weights written; none: as they are."""
    overwrite: bool = False
    """Replace what is at the destination."""


@dataclass(frozen=True)
class OrbaxToHf:
    """Make a Hugging Face model folder, for AutoModelForCausalLM and AutoTokenizer, from a checkpoint or a run."""

    source: tyro.conf.Positional[str]
    """The checkpoint, or a run, whose newest checkpoint is taken."""
    destination: tyro.conf.Positional[str]
    """Folder to make."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the weights written; none: as they are."""
    shard_bytes: int = 10**9
    """Largest size of one safetensors file."""
    overwrite: bool = False
    """Replace what is at the destination."""


@dataclass(frozen=True)
class Verify:
    """Say whether two places hold the same weights, bit for bit; the exit status is 0 if so, else 1."""

    a: tyro.conf.Positional[str]
    """A checkpoint, a run, a Hugging Face folder or a name on the hub."""
    b: tyro.conf.Positional[str]
    """Another."""


def _hf_to_orbax(arguments: Sequence[str]) -> None:
    command = tyro.cli(HfToOrbax, args=arguments, prog="python -m convert hf-to-orbax")
    from convert.hf import hf_to_orbax

    hf_to_orbax(command.source, command.destination, command.dtype, overwrite=command.overwrite)
    print(f"wrote {command.destination}")
    print(f'next: python -m polyglot_jax generate --checkpoint {command.destination} --prompt "..."')


def _orbax_to_hf(arguments: Sequence[str]) -> None:
    command = tyro.cli(OrbaxToHf, args=arguments, prog="python -m convert orbax-to-hf")
    from convert.hf import orbax_to_hf

    orbax_to_hf(
        command.source,
        command.destination,
        command.dtype,
        shard_bytes=command.shard_bytes,
        overwrite=command.overwrite,
    )
    print(f"wrote {command.destination}; next: AutoModelForCausalLM.from_pretrained({command.destination!r})")


def _verify(arguments: Sequence[str]) -> None:
    command = tyro.cli(Verify, args=arguments, prog="python -m convert verify")
    from convert.hf import differences

    lines = list(differences(command.a, command.b))
    for line in lines[:20]:
        print(line)
    if len(lines) > 20:
        print(f"... and {len(lines) - 20} more")
    if lines:
        raise InputError(f"{command.a} and {command.b} differ in {len(lines)} places")
    print(f"{command.a} and {command.b} hold the same weights, bit for bit")


VERBS: Verbs = {
    "hf-to-orbax": (_hf_to_orbax, "Hugging Face folder -> checkpoint"),
    "orbax-to-hf": (_orbax_to_hf, "checkpoint -> Hugging Face folder"),
    "verify": (_verify, "do two places hold the same weights?"),
}

if __name__ == "__main__":
    sys.exit(run(VERBS, "python -m convert", sys.argv[1:]))
