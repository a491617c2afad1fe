"""GPT-NeoX's settings, which a run keeps in several .yml files, to our Config and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from polyglot_jax.config import Config, InputError, ModelConfig, from_plain, padded
from polyglot_jax.families import gpt_neox as tables

REMEDY = "pass the .yml files of its run with --config"


class Settings:
    """What several sources say together, keys spelled with _; each key remembers the file that gave it."""

    def __init__(self, path: Path):
        """`path`: the checkpoint, for messages about what no file gives."""
        self._path = path
        self._values: dict[str, Any] = {}
        self._files: dict[str, Path] = {}

    def add(self, values: Mapping[Any, Any], file: Path) -> None:
        """InputError if a key has another value already."""
        for key, value in values.items():
            if value is None:  # as good as absent
                continue
            name = str(key).replace("-", "_")
            if self._values.setdefault(name, value) != value:
                raise InputError(
                    f"{file}: {name}={value!r} contradicts {name}={self._values[name]!r} in {self._files[name]}; "
                    "use the files of one run"
                )
            self._files.setdefault(name, file)

    def add_file(self, file: Path) -> None:
        """Read a .yml; InputError if it is missing, not YAML or no mapping."""
        try:
            values = yaml.safe_load(file.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise InputError(f"{file}: missing") from error
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{file}: not a config of GPT-NeoX: {reason}") from error
        if not isinstance(values, dict):
            raise InputError(f"{file}: not a config of GPT-NeoX: no mapping of settings")
        self.add(values, file)

    def get(self, key: str, default: Any = None) -> Any:
        """The value of `key`; `default` where it is absent or null."""
        return self._values.get(key, default)

    def where(self, key: str) -> Path:
        """The file that gives `key`, or the checkpoint."""
        return self._files.get(key, self._path)

    def check(self, key: str, found: int) -> None:
        """InputError if `key` is given and is not the size that the checkpoint has."""
        if self.get(key, found) != found:
            raise InputError(
                f"{self.where(key)}: {key}={self.get(key)!r}, but {self._path} has {found}: these are not its "
                f"settings; {REMEDY}"
            )


def read_config(settings: Settings, sizes: Mapping[str, int]) -> Config:
    """The Config of a checkpoint whose tensors have `sizes` (fields of ModelConfig: vocab, layers, embed, mlp).

    InputError, naming the file, if a setting is absent, contradicts the tensors, or makes another model than this one.
    """
    for ours, key in tables.NEOX_SIZES:
        settings.check(key, sizes[ours.split(".")[1]])
    model: dict[str, Any] = {**sizes, "activation": _activation(settings)}
    for ours, key, default, values in tables.NEOX_FIELDS:
        value = settings.get(key, default)
        if value is None:
            raise InputError(
                f"{settings.where(key)}: {key} is in no .yml of the checkpoint nor in its mp_rank files, and the "
                f"tensors do not tell it; {REMEDY}"
            )
        if values is not None:
            if not isinstance(value, bool):
                raise InputError(f"{settings.where(key)}: {key}={value!r}: must be true or false")
            value = values[value]
        model[ours.split(".")[1]] = _number(value)
    sequence_length = min(2048, model["context"]) if isinstance(model["context"], int) else 2048
    try:
        return from_plain(Config, {"model": model, "train": {"sequence_length": sequence_length}})
    except InputError as error:
        raise InputError(f"{settings.where('num_attention_heads')}: {error}") from error


def _number(value: Any) -> Any:
    """YAML takes 1e-5, without a point, for text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _activation(settings: Settings) -> str:
    theirs, fused = settings.get("activation", "gelu"), settings.get("bias_gelu_fusion", False)
    for ours, activation, fusion in tables.NEOX_ACTIVATIONS:
        if (activation, fusion) == (theirs, fused):
            return ours
    known = ", ".join(sorted({row[1] for row in tables.NEOX_ACTIVATIONS}))
    raise InputError(f"{settings.where('activation')}: activation={theirs!r}: this model has {known}")


def refuse_other_models(settings: Settings) -> None:
    """InputError if a setting makes a model that this one has no form of."""
    for key, default, only in tables.NEOX_REQUIRED:
        value = settings.get(key, default)
        if isinstance(value, dict):  # such as soft_prompt_tuning
            value = value.get("enabled", False)
        if value != only:
            remedy = "" if settings.get(key) is not None else f"; no file sets {key}, so that is its default; {REMEDY}"
            raise InputError(
                f"{settings.where(key)}: {key}={value!r}: this model is implemented for {only!r} only{remedy}"
            )
    for key, other in tables.NEOX_EQUAL:
        if settings.get(key, settings.get(other)) != settings.get(other):
            raise InputError(
                f"{settings.where(key)}: {key}={settings.get(key)!r}: this model is implemented for {other} only, "
                f"{settings.get(other)!r} here"
            )
    for kind in _words(settings.get("attention_config", [])):
        if kind not in (*tables.NEOX_ATTENTION, "all"):
            raise InputError(
                f"{settings.where('attention_config')}: attention_config has {kind!r}: this model is implemented for "
                f"{' and '.join(tables.NEOX_ATTENTION)} only"
            )


def _words(value: Any) -> Iterator[str]:
    """The text in nested lists: [[["global", "flash"], 12]] -> global, flash."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _words(item)


def vocab_divisor(vocab: int, ids: int, ranks: int) -> int:
    """The make_vocab_size_divisible_by with which GPT-NeoX pads `ids` to `vocab` rows on so many ranks."""
    return next(n for n in (128, *range(1, vocab // ranks + 1)) if padded(ids, n * ranks) == vocab)


def model_settings(config: Config, ids: int, ranks: int, *, pipeline: bool, dtype: str) -> dict[str, Any]:
    """What GPT-NeoX must be told of the model in `dtype`; the inverse of `read_config`, and how it is laid out."""
    model = config.model
    settings: dict[str, Any] = {
        "pipe_parallel_size": int(pipeline),
        "model_parallel_size": ranks,
        "num_layers": model.layers,
        "hidden_size": model.embed,
        "seq_length": model.context,
    }
    for ours, key, _, values in tables.NEOX_FIELDS:
        value = getattr(model, ours.split(".")[1])
        if values is not None:
            value = {mine: their for their, mine in values.items()}[value]
        # Their rotary_emb_base has to be an int; an int does for a float everywhere.
        settings[key] = int(value) if isinstance(value, float) and value.is_integer() else value
    settings |= _written_activation(model)
    if model.mlp != 4 * model.embed:  # older versions do not know the key
        settings["intermediate_size"] = model.mlp
    settings |= {
        "pos_emb": "rotary",
        "norm": "layernorm",
        "output_layer_parallelism": "column",
        "tokenizer_type": "HFTokenizer",
        "make_vocab_size_divisible_by": vocab_divisor(model.vocab, ids, ranks),
    }
    # Every version derives the precision from fp16 where it is enabled, and only newer ones know of bf16.
    precision = {"float32": "fp32", "float16": "fp16", "bfloat16": "bfloat16"}[dtype]
    settings["precision"] = precision
    if precision == "fp16":
        settings["fp16"] = {"enabled": True, "loss_scale": 0, "loss_scale_window": 1000, "hysteresis": 2,
                            "min_loss_scale": 1}  # fmt: skip
    return settings


def _written_activation(model: ModelConfig) -> dict[str, Any]:
    activation, fusion = next(row[1:] for row in tables.NEOX_ACTIVATIONS if row[0] == model.activation)
    return {"activation": activation, "bias_gelu_fusion": fusion}


def run_settings(config: Config, folder: Path, *, has_tokenizer: bool) -> dict[str, Any]:
    """What GPT-NeoX must be told to start from the checkpoint in `folder`, with the recipe of `config`."""
    optimizer = config.optimizer
    return {
        "load": str(folder),
        **({"vocab_file": str(folder / "tokenizer.json")} if has_tokenizer else {}),
        "finetune": True,  # there is no optimizer state to go on from
        "train_micro_batch_size_per_gpu": 1,
        "train_iters": config.train.steps,
        "lr_decay_style": "cosine",
        "warmup": optimizer.warmup,
        "min_lr": optimizer.final_learning_rate,
        "weight_decay": optimizer.weight_decay,
        "gradient_clipping": optimizer.clip,
        "optimizer": {
            "type": "Adam",
            "params": {"lr": optimizer.learning_rate, "betas": [optimizer.b1, optimizer.b2], "eps": optimizer.eps},
        },
    }


def write(file: Path, values: Mapping[str, Any], comment: str) -> None:
    """Write settings as a .yml, in their order."""
    text = yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)
    file.write_text(f"# {comment}\n{text}", encoding="utf-8")
