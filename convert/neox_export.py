"""Writes GPT-NeoX's own checkpoints, for any tensor-parallel size. The files are those of `convert.neox_files`."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from isal.isal_zlib import crc32
from tqdm import tqdm

from convert import neox_config
from convert.conversion import check_apart, say_non_finite
from convert.neox_files import is_neox, layer_name, rank_name
from convert.neox_folder import place
from polyglot_jax import names, store, torch_files
from polyglot_jax.checkpoint import Checkpoint
from polyglot_jax.config import Config, InputError
from polyglot_jax.families import gpt_neox as tables
from polyglot_jax.files import new_folder, write_checksums
from polyglot_jax.names import Tensor
from polyglot_jax.source import Outgoing, Source, to_write
from polyglot_jax.weights import open_source, read_tokenizer

Form = Literal["pipeline", "sequential"]


def orbax_to_neox(
    source: str,
    destination: str | Path,
    tensor_parallel: int = 1,
    *,
    form: Form = "pipeline",
    legacy_names: bool = False,
    dtype: Any = None,
    overwrite: bool = False,
) -> None:
    """Write a save folder of GPT-NeoX for `tensor_parallel` ranks from a checkpoint or a run.

    form: pipeline for pipe_parallel_size 1 and more, sequential for 0. legacy_names: as in 2022, when Polyglot-Ko was
    trained. dtype None keeps the source's own; values that are infinite or NaN in it are counted on stderr. InputError
    if the model does not divide over the ranks, or as of `files.new_folder`. The disk must have room for the model
    twice in the sequential form.
    """
    opened = open_source(source)
    if not isinstance(opened, Checkpoint):
        raise InputError(f"{source}: is a Hugging Face folder, not a checkpoint; hf-to-orbax makes one of it")
    config, tokenizer = read_tokenizer(opened)
    kind = names.family_of(config.model).MODEL_TYPE
    if kind != tables.MODEL_TYPE:
        raise InputError(f"{source}: is a {kind} model; GPT-NeoX's checkpoints hold {tables.MODEL_TYPE} models only")
    _check_divides(config, tensor_parallel)
    ids = tokenizer.valid_ids if tokenizer else config.data.valid_ids or config.model.vocab
    export = _Export(opened, config, tensor_parallel, dtype, legacy_names=legacy_names)
    target = Path(destination).resolve()
    check_apart(opened.path, target)
    with new_folder(target, _is_export, overwrite=overwrite) as folder:
        step = f"global_step{opened.step}"
        (folder / step / "configs").mkdir(parents=True)
        settings = neox_config.model_settings(
            config, ids, tensor_parallel, pipeline=form == "pipeline", dtype=export.common_dtype
        )
        export.write(folder / step, form, _run_state(opened.step, settings, config, tensor_parallel))
        write_checksums(folder / step, export.checksums)
        configs = folder / step / "configs"
        neox_config.write(configs / "model.yml", settings, "The model, as GPT-NeoX has to be told of it.")
        neox_config.write(
            configs / "run.yml",
            neox_config.run_settings(config, target, has_tokenizer=tokenizer is not None),
            "A run from these weights: change what is to be different, and the paths if the folder moves.",
        )
        if opened.tokenizer is not None:
            (folder / "tokenizer.json").write_bytes(opened.tokenizer.encode())
        (folder / "latest").write_text(step, encoding="utf-8")
    say_non_finite(export.non_finite)


def _check_divides(config: Config, ranks: int) -> None:
    if ranks < 1:
        raise InputError(f"tensor_parallel={ranks}: must be above 0")
    for field in ("vocab", "heads", "mlp"):
        size = getattr(config.model, field)
        if size % ranks:
            raise InputError(f"model.{field}={size}: does not divide over --tensor-parallel {ranks}")


def _is_export(path: Path) -> bool:
    """Whether `path` is what `orbax_to_neox` writes: one step, no optimizer; a training run has more to lose."""
    found = {item.name for item in path.iterdir()} - {"latest", "tokenizer.json"}
    return is_neox(path) and len(found) == 1 and not any((path / found.pop()).glob("*optim_states.pt"))


def _run_state(step: int, settings: dict[str, Any], config: Config, ranks: int) -> dict[str, Any]:
    """What GPT-NeoX and DeepSpeed read from a mp_rank file besides weights, without the state of an optimizer."""
    copied = ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings",
              "make_vocab_size_divisible_by", "tokenizer_type", "model_parallel_size")  # fmt: skip
    return {
        "module": None,
        "optimizer": None,
        "lr_scheduler": None,
        "csr_tensor_module_names": [],
        "skipped_steps": 0,
        "global_steps": step,
        "global_samples": 0,
        "dp_world_size": 1,
        "mp_world_size": ranks,
        "iteration": step,
        "args": {key: settings[key] for key in copied} | {"padded_vocab_size": config.model.vocab},
    }


class _Export:
    """A model on its way into GPT-NeoX's files."""

    def __init__(self, source: Source, config: Config, ranks: int, dtype: Any, *, legacy_names: bool):
        self._source, self._config, self._ranks, self._legacy = source, config, ranks, legacy_names
        self._tensors, self.common_dtype = to_write(source, dtype)
        """Name of the dtype that most of the model is in."""
        self.checksums: dict[str, dict[str, int]] = {}
        """CRC-32 of each tensor's bytes, by file and name, as files are written."""
        self.non_finite: dict[str, int] = {}
        """How many values of which tensors are infinite or NaN, by their names in the sequential form."""

    def write(self, folder: Path, form: Form, state: dict[str, Any]) -> None:
        """Write the files of layers and of ranks."""

        def number(outgoing: Outgoing) -> int:
            return place(outgoing.tensor, self._config)[0]

        total = sum(tensor.nbytes for tensor in self._tensors)
        with tqdm(total=total, unit="B", unit_scale=True, desc=f"writing {folder.name}") as progress:
            if form == "pipeline":
                for layer, group in itertools.groupby(self._tensors, number):
                    with self._spooled(folder, group, "", progress) as modules:
                        for rank, module in enumerate(modules):
                            self._save(folder / layer_name(layer, rank), module, module)
                for rank in range(self._ranks):
                    torch_files.save(state, folder / rank_name(rank))
            else:
                with self._spooled(folder, self._tensors, "sequential.{}.", progress) as modules:
                    for rank, module in enumerate(modules):
                        self._save(folder / rank_name(rank), state | {"module": module}, module)

    def _save(self, file: Path, state: dict[str, Any], module: dict[str, Any]) -> None:
        torch_files.save(state, file)
        contents = {name: torch_files.to_numpy(tensor).reshape(-1).view(np.uint8) for name, tensor in module.items()}
        self.checksums[file.name] = {name: crc32(content.data) for name, content in contents.items()}

    @contextlib.contextmanager
    def _spooled(
        self, folder: Path, tensors: Iterable[Outgoing], prefix: str, progress: tqdm
    ) -> Iterator[list[dict[str, Any]]]:
        """For each rank its torch tensors by name, mapped from files that are gone afterwards.

        torch.save wants all tensors of a file at once; as maps of a file they take no memory of their own.
        """
        files = [folder / f"rank_{rank}.spool" for rank in range(self._ranks)]
        places: list[list[tuple[str, tuple[int, ...], np.dtype, int]]] = [[] for _ in files]
        with contextlib.ExitStack() as stack:
            spools = [stack.enter_context(open(file, "wb")) for file in files]
            for outgoing in tensors:
                for name, parts in self._split(*outgoing, prefix):
                    for table, spool, part in zip(places, spools, parts, strict=True):
                        spool.write(bytes(-spool.tell() % 64))
                        table.append((name, part.shape, part.dtype, spool.tell()))
                        spool.write(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
                progress.update(outgoing.nbytes)
        try:
            yield [_mapped(file, table) for file, table in zip(files, places, strict=True)]
        finally:
            for file in files:
                file.unlink()

    def _split(self, tensor: Tensor, dtype: np.dtype, prefix: str) -> Iterator[tuple[str, list[np.ndarray]]]:
        """A tensor, by its name among theirs, on each rank; after a legacy attention's last also its buffer."""
        number, alternatives, rule = place(tensor, self._config)
        name = alternatives.split("|")[-1 if self._legacy else 0]
        ours = [self._source.read(path, tensor.layer) for path in tensor.paths]
        whole = store.rounded(tensor.to_theirs(ours), dtype)
        if count := store.count_non_finite(whole):
            self.non_finite[f"sequential.{number}.{name}"] = count
        yield prefix.format(number) + name, split(whole, rule.split("|")[0], self._ranks)
        if self._legacy and name == "attention.dense.weight":
            buffer = _inverse_frequencies(self._config)
            yield prefix.format(number) + tables.NEOX_LEGACY_BUFFER, [buffer] * self._ranks


def split(whole: np.ndarray, rule: str, ranks: int) -> list[np.ndarray]:
    """A tensor's part for each rank, by a rule of NEOX_WEIGHTS; merging them gives every bit of it back."""
    if rule == "sum":
        # Halves do not always sum to the whole (a subnormal has none); x + -0.0 is x for every x, also for -0.0.
        return [whole] + [np.full_like(whole, -0.0)] * (ranks - 1)
    if rule == "copy":
        return [whole] * ranks
    return np.split(whole, ranks, axis=0 if rule == "rows" else 1)


def _mapped(file: Path, table: Sequence[tuple[str, tuple[int, ...], np.dtype, int]]) -> dict[str, Any]:
    data = np.memmap(file, np.uint8, mode="c")  # torch warns of arrays that it may not write to
    return {
        name: torch_files.from_numpy(data[at : at + math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape))
        for name, shape, dtype, at in table
    }


def _inverse_frequencies(config: Config) -> np.ndarray:
    """float32[rotary_dims / 2]: the rotary frequencies as GPT-NeoX computes them."""
    dims = config.model.rotary_dims
    exponents = np.arange(0, dims, 2, dtype=np.float32) / np.float32(dims)
    return np.float32(1) / np.float32(config.model.rotary_base) ** exponents
