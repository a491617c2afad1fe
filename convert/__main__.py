"""python -m convert VERB"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import tyro

from convert.meter import Meter
from polyglot_jax.cli import Verbs, run
from polyglot_jax.config import InputError

if TYPE_CHECKING:
    from polyglot_jax.checkpoint import Copied


@dataclass(frozen=True)
class HfToOrbax:
    """Make a checkpoint from a Hugging Face model folder (safetensors; .bin with torch), or from a name on the hub."""

    source: tyro.conf.Positional[str]
    """The folder, or the name: owner/model, or owner/model@revision."""
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
    """Largest size of one safetensors file (a tensor is never cut)."""
    overwrite: bool = False
    """Replace what is at the destination."""


@dataclass(frozen=True)
class NeoxToOrbax:
    """Make a checkpoint from GPT-NeoX's own, of any tensor-parallel size."""

    source: tyro.conf.Positional[str]
    """Folder global_stepN, or the save folder above it, whose newest step is taken."""
    destination: tyro.conf.Positional[str]
    """Checkpoint folder to make."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the weights written; none: as they are."""
    config: tuple[str, ...] = ()
    """The run's .yml files, where the checkpoint has no configs/ of its own."""
    overwrite: bool = False
    """Replace what is at the destination."""


@dataclass(frozen=True)
class OrbaxToNeox:
    """Make a save folder of GPT-NeoX from a checkpoint or a run."""

    source: tyro.conf.Positional[str]
    """The checkpoint, or a run, whose newest checkpoint is taken."""
    destination: tyro.conf.Positional[str]
    """Folder to make."""
    tensor_parallel: int
    """Ranks to split each layer over: GPT-NeoX's model_parallel_size."""
    form: Literal["pipeline", "sequential"] = "pipeline"
    """pipeline: a file for each layer, for pipe_parallel_size 1 and more; sequential: a file for each rank, for 0,
    and room on the disk for the model twice."""
    legacy_names: bool = False
    """Name tensors as GPT-NeoX did in 2022: mlp.dense_h_to_4h, not mlp.linear1."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the weights written; none: as they are."""
    overwrite: bool = False
    """Replace what is at the destination."""


@dataclass(frozen=True)
class Verify:
    """Say whether two places hold the same weights, bit for bit; the exit status is 0 if so, else 1."""

    a: tyro.conf.Positional[str]
    """A checkpoint, a run, a Hugging Face folder, a name on the hub, or a checkpoint of GPT-NeoX."""
    b: tyro.conf.Positional[str]
    """Another."""
    logits: bool = False
    """Also run one here and one in transformers, in float32 on the same tokens, and print by how much they differ."""
    tokens: int = 32
    """How many tokens for that."""


def _hf_to_orbax(arguments: Sequence[str]) -> None:
    command = tyro.cli(HfToOrbax, args=arguments, prog="python -m convert hf-to-orbax")
    from convert.hf import hf_to_orbax

    with Meter() as meter:
        copied = hf_to_orbax(command.source, command.destination, command.dtype, overwrite=command.overwrite)
    _say_copied(command.destination, copied, meter)


def _say_copied(destination: str, copied: Copied, meter: Meter) -> None:
    print(f"wrote {destination}: {copied.pieces} parameters and layers of them, {copied.bytes:,} bytes, in {meter}")
    print(f'next: python -m polyglot_jax generate --checkpoint {destination} --prompt "..."')


def _orbax_to_hf(arguments: Sequence[str]) -> None:
    command = tyro.cli(OrbaxToHf, args=arguments, prog="python -m convert orbax-to-hf")
    from convert.hf import orbax_to_hf

    with Meter() as meter:
        orbax_to_hf(
            command.source,
            command.destination,
            command.dtype,
            shard_bytes=command.shard_bytes,
            overwrite=command.overwrite,
        )
    print(f"wrote {command.destination} in {meter}")
    print(f"next: AutoModelForCausalLM.from_pretrained({command.destination!r})")


def _neox_to_orbax(arguments: Sequence[str]) -> None:
    command = tyro.cli(NeoxToOrbax, args=arguments, prog="python -m convert neox-to-orbax")
    from convert.neox import neox_to_orbax

    with Meter() as meter:
        copied = neox_to_orbax(
            command.source,
            command.destination,
            command.dtype,
            config_files=command.config,
            overwrite=command.overwrite,
        )
    _say_copied(command.destination, copied, meter)


def _orbax_to_neox(arguments: Sequence[str]) -> None:
    command = tyro.cli(OrbaxToNeox, args=arguments, prog="python -m convert orbax-to-neox")
    from convert.neox_export import orbax_to_neox

    with Meter() as meter:
        orbax_to_neox(
            command.source,
            command.destination,
            command.tensor_parallel,
            form=command.form,
            legacy_names=command.legacy_names,
            dtype=command.dtype,
            overwrite=command.overwrite,
        )
    print(f"wrote {command.destination} in {meter}")
    print(f"next: python -m convert verify {command.source} {command.destination}")


def _verify(arguments: Sequence[str]) -> None:
    command = tyro.cli(Verify, args=arguments, prog="python -m convert verify")
    from convert.verify import differences, logit_differences, other_settings

    lines = list(differences(command.a, command.b))
    for line in lines[:20]:
        print(line)
    if len(lines) > 20:
        print(f"... and {len(lines) - 20} more")
    if command.logits:
        found = logit_differences(command.a, command.b, command.tokens)
        print("position  max |difference| of logits, ours against transformers'")
        for position, difference in enumerate(found):
            print(f"{position:>8}  {difference:.3g}")
    if lines:
        raise InputError(f"{command.a} and {command.b} differ in {len(lines)} places")
    settings = other_settings(command.a, command.b)
    for line in settings:
        print(line)
    but = "; with these other settings they compute something else" if settings else ""
    print(f"{command.a} and {command.b} hold the same weights, bit for bit{but}")


VERBS: Verbs = {
    "hf-to-orbax": (_hf_to_orbax, "Hugging Face folder -> checkpoint"),
    "orbax-to-hf": (_orbax_to_hf, "checkpoint -> Hugging Face folder"),
    "neox-to-orbax": (_neox_to_orbax, "GPT-NeoX's own checkpoint -> checkpoint"),
    "orbax-to-neox": (_orbax_to_neox, "checkpoint -> GPT-NeoX's own"),
    "verify": (_verify, "do two places hold the same weights?"),
}

if __name__ == "__main__":
    sys.exit(run(VERBS, "python -m convert", sys.argv[1:]))
