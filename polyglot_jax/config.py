"""The one configuration: frozen, nested, plain values, shared by training, conversion, generation and evaluation.

`Config.to_json` and `Config.from_json` are exact inverses. Every value is checked when it is made; a message names the
dotted field, its value, the reason and, where there is one, the remedy. Nothing here knows JAX, files or devices.
"""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro


class InputError(ValueError):
    """Bad input from outside. The message alone tells the user what is wrong and what to do."""


def _require(ok: bool, name: str, value: Any, reason: str) -> None:
    if not ok:
        raise InputError(f"{name}={value}: {reason}")


def padded(ids: int, multiple: int = 128) -> int:
    """`ids` rounded up to a multiple, as GPT-NeoX pads a vocabulary: 30,003 -> 30,080."""
    return -(-ids // multiple) * multiple


def _require_finite(section: str, obj: Any) -> None:
    for field_ in dataclasses.fields(obj):
        value = getattr(obj, field_.name)
        _require(not isinstance(value, float) or math.isfinite(value), f"{section}.{field_.name}", value,
                 "must be a finite number")  # fmt: skip


def _require_positive(section: str, obj: Any, *names: str) -> None:
    for name in names:
        value = getattr(obj, name)
        _require(value > 0, f"{section}.{name}", value, "must be above 0")


@dataclass(frozen=True)
class ModelConfig:
    """The architecture and nothing else: changing how it is trained or run never changes this section."""

    vocab: int = 30_080
    """Rows of the embedding and of the head: the tokenizer's ids rounded up to a multiple of 128."""
    layers: int = 24
    """Transformer layers."""
    embed: int = 2048
    """Width of the residual stream (d_model)."""
    heads: int = 16
    """Attention heads; each has embed / heads dimensions."""
    mlp: int = 8192
    """Width of the hidden layer of the MLP (d_ff)."""
    context: int = 2048
    """Longest sequence, in tokens."""
    positions: Literal["rotary", "rotary_interleaved", "learned", "sinusoidal"] = "rotary"
    """rotary: dimensions i and i + half are a pair; rotary_interleaved: 2i and 2i + 1; the others add a table."""
    rotary_pct: float = 0.5
    """Share of each head's dimensions that rotary position embedding turns; without one, ignored."""
    rotary_base: float = 10_000.0
    """Base of the rotary frequencies; without rotary position embedding, ignored."""
    embedding_scale: Literal["one", "sqrt_embed"] = "one"
    """What embeddings of tokens are multiplied by before positions are added: 1, or the root of embed."""
    residual: Literal["parallel", "parallel_shared", "sequential"] = "parallel"
    """parallel: x + attn(ln1(x)) + mlp(ln2(x)); parallel_shared: one norm for both; sequential: MLP after attention."""
    attention_bias: bool = True
    """Whether the attention's four projections (q, k, v, out) have biases."""
    activation: Literal["gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu"] = "gelu"
    """Hugging Face's names; plain gelu is the exact (erf) one, the other three gelus are its tanh approximation."""
    tied: bool = False
    """Whether the head is the embedding, transposed."""
    head_bias: bool = False
    """Whether the head has a bias, its own even when tied."""
    norm_eps: float = 1e-5
    """Added to the variance in LayerNorm."""
    init_std: float = 0.02
    """Standard deviation of the initial weights; projections back into the residual get init_std / sqrt(2 layers)."""

    @property
    def head_dim(self) -> int:
        return self.embed // self.heads

    @property
    def is_rotary(self) -> bool:
        return self.positions in ("rotary", "rotary_interleaved")

    @property
    def rotary_dims(self) -> int:
        """Dimensions of each head that are rotated, as Hugging Face counts them: int(head_dim * rotary_pct)."""
        return int(self.head_dim * self.rotary_pct)

    @property
    def sizes(self) -> dict[str, int]:
        """Axis name -> size: what every weight's shape is made of."""
        return {
            "vocab": self.vocab,
            "layers": self.layers,
            "embed": self.embed,
            "heads": self.heads,
            "head_dim": self.head_dim,
            "mlp": self.mlp,
            "context": self.context,
        }

    def parameters(self) -> int:
        """Number of parameters by the closed formula; a test holds it against `eval_shape` of the model."""
        d, f = self.embed, self.mlp
        attention = 4 * d * d + (4 * d if self.attention_bias else 0)
        mlp = 2 * d * f + f + d
        norms = 2 * d if self.residual == "parallel_shared" else 4 * d
        positions = self.context * d if self.positions == "learned" else 0
        head = (0 if self.tied else self.vocab * d) + (self.vocab if self.head_bias else 0)
        return self.vocab * d + positions + self.layers * (attention + mlp + norms) + 2 * d + head

    def __post_init__(self) -> None:
        _require_finite("model", self)
        _require_positive("model", self, "vocab", "layers", "embed", "heads", "mlp", "context", "norm_eps", "init_std")
        _require(self.embed % self.heads == 0, "model.heads", self.heads, f"does not divide model.embed={self.embed}")
        if self.is_rotary:
            self._check_rotary()
        _require(
            self.positions != "sinusoidal" or (self.embed >= 4 and self.embed % 2 == 0),
            "model.embed",
            self.embed,
            "is half sines, half cosines with model.positions=sinusoidal; it must be even and at least 4",
        )

    def _check_rotary(self) -> None:
        _require(0 < self.rotary_pct <= 1, "model.rotary_pct", self.rotary_pct, "must be above 0 and at most 1")
        _require(
            self.rotary_dims >= 2 and self.rotary_dims % 2 == 0,
            "model.rotary_pct",
            self.rotary_pct,
            f"gives {self.rotary_dims} rotary dimensions of a head's {self.head_dim}; it must give an even number, "
            "at least 2",
        )
        _require(self.rotary_base > 1, "model.rotary_base", self.rotary_base, "must be above 1")


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the device mesh's axes; their product is the number of devices used."""

    data: int = -1
    """Copies of the model, each with its share of the batch; -1: every device the other axes leave."""
    fsdp: int = 1
    """Devices that share out weights and optimizer state, gathering each layer when it is needed."""
    tensor: int = 1
    """Devices that split heads, MLP and vocabulary of each layer."""
    sequence: int = 1
    """Devices that split each sequence along its length and, in attention, by heads; they share out weights as fsdp."""
    slices: int = 1
    """TPU slices or nodes, joined by a slower network; each holds whole copies, gradients are summed within first."""

    def __post_init__(self) -> None:
        _require(self.data > 0 or self.data == -1, "mesh.data", self.data, "must be above 0, or -1 for what is left")
        _require_positive("mesh", self, "fsdp", "tensor", "sequence", "slices")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with clipping, linear warm-up and cosine decay."""

    learning_rate: float = 2e-4
    """Peak of the schedule."""
    final_learning_rate: float = 0.0
    """Where the cosine ends."""
    warmup: float = 0.01
    """Share of the steps in which the learning rate rises from 0."""
    decay_steps: int | None = None
    """Step at which the cosine ends; None: train.steps."""
    b1: float = 0.9
    """Decay of Adam's first moment."""
    b2: float = 0.999
    """Decay of Adam's second moment."""
    eps: float = 1e-8
    """Added to the root of Adam's second moment."""
    weight_decay: float = 0.0
    """Decoupled decay, on the matrices of the layers only (not on embedding, head, norms or biases)."""
    clip: float = 1.0
    """Largest global norm of the gradient; 0 turns clipping off."""

    def __post_init__(self) -> None:
        _require_finite("optimizer", self)
        _require_positive("optimizer", self, "learning_rate", "eps")
        for name in ("final_learning_rate", "weight_decay", "clip"):
            _require(getattr(self, name) >= 0, f"optimizer.{name}", getattr(self, name), "must not be negative")
        for name in ("warmup", "b1", "b2"):
            _require(0 <= getattr(self, name) < 1, f"optimizer.{name}", getattr(self, name), "must be in [0, 1)")
        _require(
            self.final_learning_rate <= self.learning_rate,
            "optimizer.final_learning_rate",
            self.final_learning_rate,
            f"is above optimizer.learning_rate={self.learning_rate}",
        )
        _require(self.decay_steps is None or self.decay_steps > 0, "optimizer.decay_steps", self.decay_steps,
                 "must be above 0, or none")  # fmt: skip


@dataclass(frozen=True)
class DataConfig:
    """Which token files, in what proportions, and what their tokenizer says of the ids."""

    paths: Annotated[tuple[str, ...], tyro.conf.arg(aliases=("--data",))] = ()
    """Folders written by `prepare` (or .bin/.idx prefixes of GPT-NeoX), one or several."""
    weights: tuple[float, ...] = ()
    """Share of samples drawn from each of the paths; none: by their number of tokens."""
    heldout: float = 0.01
    """Share of each corpus, at its end, that is never trained on and gives the held-out loss."""
    valid_ids: int | None = None
    """Ids the tokenizer can give; the rest of model.vocab is padding, never a target, never generated."""
    eos_id: int = 2
    """Id of `<|endoftext|>`, at which generation stops."""

    def __post_init__(self) -> None:
        _require_finite("data", self)
        _require(0 <= self.heldout < 1, "data.heldout", self.heldout, "must be in [0, 1)")
        if self.weights:
            _require(
                len(self.weights) == len(self.paths),
                "data.weights",
                self.weights,
                f"gives {len(self.weights)} weights for {len(self.paths)} paths",
            )
            _require(
                all(w > 0 and math.isfinite(w) for w in self.weights), "data.weights", self.weights, "must be above 0"
            )
        _require(self.valid_ids is None or self.valid_ids > 0, "data.valid_ids", self.valid_ids, "must be above 0")
        _require(self.eos_id >= 0, "data.eos_id", self.eos_id, "must not be negative")


@dataclass(frozen=True)
class TrainConfig:
    """How long, how much at once, in which precision, and what is kept."""

    steps: int = 102_000
    """Optimizer steps."""
    batch_size: int = 1024
    """Sequences in an optimizer step, over all devices."""
    sequence_length: int = 2048
    """Tokens predicted in a sequence; a sample holds one more."""
    accumulate: int = 1
    """Parts a batch is computed in, one after the other, to save memory."""
    seed: int = 0
    """Seed of the initial weights and of the order of the samples."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of activations and products; weights, optimizer, norms, softmax and loss are float32 all the same."""
    remat: Literal["none", "dots", "products", "value", "mlp", "attention", "full"] = "full"
    """What backward recomputes: nothing; all but products with weights (dots) or these and attention (products); with
    attention kept, v too (value), or q, k and v (mlp), or the MLP (attention); each layer from its input (full)."""
    attention: Literal["auto", "xla", "splash", "cudnn"] = "auto"
    """Kernel of causal attention; auto: splash on TPUs, cudnn on NVIDIA GPUs, xla elsewhere and for other sizes."""
    log_every: int = 10
    """Steps between rows of the log; what is not finite is noticed there."""
    eval_every: int = 1000
    """Steps between held-out losses; one is always taken at the start and at the end; 0: those two only."""
    eval_sequences: int = 1024
    """Held-out sequences of one evaluation, from the front; 0: all of them."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; one is always written at the end; 0: that one only."""
    keep: int = 3
    """Newest checkpoints kept; 0: all."""
    keep_every: int = 0
    """Steps between checkpoints that are kept besides; 0: none."""
    if_save_fails: Literal["stop", "continue"] = "stop"
    """A checkpoint that cannot be written, for want of room say, ends the run; or is warned of, but for the last."""
    skip_limit: int = 3
    """Steps in a row that may be skipped because loss or gradient is not finite; one more ends the run."""
    profile: tuple[int, ...] = ()
    """First and last step of which the profiler's trace is written to the run's folder; none: no trace."""
    watchdog: int = 1800
    """Seconds without a row of the log after which every thread's stack is printed, once; 0: never."""

    def __post_init__(self) -> None:
        _require_positive("train", self, "steps", "batch_size", "sequence_length", "accumulate", "log_every")
        not_negative = (
            "eval_every",
            "eval_sequences",
            "checkpoint_every",
            "keep",
            "keep_every",
            "skip_limit",
            "watchdog",
        )
        for name in not_negative:
            _require(getattr(self, name) >= 0, f"train.{name}", getattr(self, name), "must not be negative")
        _require(0 <= self.seed < 2**31, "train.seed", self.seed, "must be in [0, 2^31)")
        _require(
            not self.profile or (len(self.profile) == 2 and 0 < self.profile[0] <= self.profile[1] <= self.steps),
            "train.profile",
            self.profile,
            f"must be none, or the first and the last step, up to train.steps={self.steps}",
        )
        _require(
            self.batch_size % self.accumulate == 0,
            "train.accumulate",
            self.accumulate,
            f"does not divide train.batch_size={self.batch_size}",
        )


@dataclass(frozen=True)
class SampleConfig:
    """How tokens are chosen when generating."""

    max_new_tokens: int = 64
    """Most tokens made after the prompt."""
    min_new_tokens: int = 0
    """Tokens made before anything may end a text."""
    temperature: float = 0.0
    """0: always the likeliest token; otherwise logits are divided by it and a token is drawn."""
    top_k: int = 0
    """Draw only from this many of the likeliest tokens; 0: from all."""
    top_p: float = 1.0
    """Draw only from the likeliest tokens that together reach this probability."""
    min_p: float = 0.0
    """Draw only tokens at least this many times as probable as the likeliest."""
    repetition_penalty: float = 1.0
    """Above 1: logits of tokens in the prompt or made before are divided by it if positive, multiplied if negative."""
    frequency_penalty: float = 0.0
    """Taken from a token's logit for each time that it was made."""
    no_repeat_ngram: int = 0
    """No sequence of so many tokens, the prompt's included, comes twice; 0: any may."""
    beams: int = 1
    """Continuations followed at once, to find the likeliest as a whole; above 1 only with temperature 0."""
    length_penalty: float = 1.0
    """Beam search ranks by summed log-probability / length^this; above 0 favours long texts."""
    early_stopping: Literal["no", "yes", "never"] = "no"
    """Beam search ends when the running beams look worse than what is finished (no), when as many as there are beams
    are finished (yes), or when no running beam could still become better (never)."""
    seed: int = 0
    """Seed of the draws."""

    def __post_init__(self) -> None:
        _require_finite("sample", self)
        _require_positive("sample", self, "max_new_tokens")
        # Within these bounds nothing that is computed from them in float32 becomes infinite, or 0.
        temperature, repetition = self.temperature, self.repetition_penalty
        _require(temperature == 0 or 1e-6 <= temperature <= 1e6, "sample.temperature", temperature,
                 "must be 0, or from 1e-6 to 1e6")  # fmt: skip
        _require(1e-6 <= repetition <= 1e6, "sample.repetition_penalty", repetition, "must be from 1e-6 to 1e6")
        for name, most in (("frequency_penalty", 1e6), ("length_penalty", 10)):
            value = getattr(self, name)
            _require(abs(value) <= most, f"sample.{name}", value, f"must be from -{most:g} to {most:g}")
        _require(0 <= self.top_k < 2**31, "sample.top_k", self.top_k, "must not be negative, and below 2^31")
        # Below float32's least normal number it would be 0 on the device.
        _require(2**-126 <= self.top_p <= 1, "sample.top_p", self.top_p, "must be above 0 and at most 1")
        _require(0 <= self.min_p <= 1, "sample.min_p", self.min_p, "must be in [0, 1]")
        _require(
            0 <= self.min_new_tokens <= self.max_new_tokens,
            "sample.min_new_tokens",
            self.min_new_tokens,
            f"must be from 0 to sample.max_new_tokens={self.max_new_tokens}",
        )
        _require_positive("sample", self, "beams")
        _require(self.no_repeat_ngram >= 0, "sample.no_repeat_ngram", self.no_repeat_ngram, "must not be negative")
        _require(
            self.beams == 1 or self.temperature == 0,
            "sample.beams",
            self.beams,
            f"beam search draws nothing; set sample.temperature={self.temperature} to 0",
        )
        _require(0 <= self.seed < 2**31, "sample.seed", self.seed, "must be in [0, 2^31)")


@dataclass(frozen=True)
class DistributedConfig:
    """Several processes that train as one, as a rule one on each host: the same command on all, but for its number."""

    coordinator: str | None = None
    """HOST:PORT at which process 0 listens and all others find it; auto: as Slurm, Open MPI, Kubernetes or a TPU pod
    says, with what follows; none: one process, alone."""
    processes: int | None = None
    """How many processes there are."""
    process: int | None = None
    """Which of them this one is, from 0."""
    start_timeout: int = 300
    """Seconds within which all must have come."""
    heartbeat_timeout: int = 100
    """Seconds after which a process that gives no sign of life is taken for dead, and the others end."""
    meeting_timeout: int = 3600
    """Seconds that processes wait, at the start and around a save, for one that lives but does not come."""

    def __post_init__(self) -> None:
        _require_positive("distributed", self, "start_timeout", "heartbeat_timeout", "meeting_timeout")
        address = self.coordinator
        for name in ("processes", "process"):
            value, is_needed = getattr(self, name), address not in (None, "auto")
            reason = f"must {'' if is_needed else 'not '}be given with distributed.coordinator={address}"
            _require((value is not None) == is_needed, f"distributed.{name}", value, reason)
        if self.processes is not None and self.process is not None:
            host, _, port = (address or "").rpartition(":")
            _require(bool(host) and port.isdigit() and 0 < int(port) < 2**16, "distributed.coordinator", address,
                     "must be HOST:PORT, or auto")  # fmt: skip
            _require_positive("distributed", self, "processes")
            _require(0 <= self.process < self.processes, "distributed.process", self.process,
                     f"must be from 0 to {self.processes - 1} with distributed.processes={self.processes}")  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Everything a run, a checkpoint or a generation needs to know."""

    model: ModelConfig = field(default_factory=ModelConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)

    def __post_init__(self) -> None:
        model, data = self.model, self.data
        _require(
            self.train.sequence_length <= model.context,
            "train.sequence_length",
            self.train.sequence_length,
            f"is above model.context={model.context}",
        )
        _require(
            data.valid_ids is None or data.valid_ids <= model.vocab,
            "data.valid_ids",
            data.valid_ids,
            f"is above model.vocab={model.vocab}",
        )
        _require(data.eos_id < model.vocab, "data.eos_id", data.eos_id, f"is not below model.vocab={model.vocab}")

    def with_tokenizer(self, valid_ids: int, eos_id: int) -> Config:
        """This config with what its tokenizer says; InputError if the two do not belong together.

        A vocabulary is padded to a multiple of 128, over up to 8 tensor-parallel ranks, so by fewer than 1,024 rows.
        """
        padding = self.model.vocab - valid_ids
        _require(
            0 <= padding < 1024,
            "model.vocab",
            self.model.vocab,
            f"the tokenizer gives {valid_ids} ids; use the tokenizer this model was made for, or pass --model.vocab "
            f"{padded(valid_ids)} to make a model for this tokenizer",
        )
        return dataclasses.replace(self, data=dataclasses.replace(self.data, valid_ids=valid_ids, eos_id=eos_id))

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Config:
        """The inverse of `to_json`. Absent fields take their defaults; unknown ones and wrong types are InputErrors."""
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"config is not JSON: {error}") from error
        return from_plain(cls, value)


def from_plain(cls: type, value: Any, name: str = "") -> Any:
    """Build dataclass `cls` from nested dicts of plain JSON values, checking every name and type."""
    if not isinstance(value, dict):
        raise InputError(f"{name or 'config'}={value!r}: expected an object of fields")
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(value) - set(hints))
    if unknown:
        dotted = ", ".join(f"{name}.{key}" if name else key for key in unknown)
        raise InputError(f"{dotted}: no such field; {name or 'config'} has {', '.join(sorted(hints))}")
    return cls(**{key: _typed(hints[key], item, f"{name}.{key}" if name else key) for key, item in value.items()})


def _typed(hint: Any, value: Any, name: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_plain(hint, value, name)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        _require(value in args, name, repr(value), f"must be one of {', '.join(map(repr, args))}")
        return value
    if origin is tuple:
        _require(isinstance(value, (list, tuple)), name, repr(value), "must be a list")
        return tuple(_typed(args[0], item, f"{name}[{i}]") for i, item in enumerate(value))
    if type(None) in args:
        return None if value is None else _typed(args[0], value, name)
    _require(type(value) is not int or abs(value) < 2**63, name, value, "is too large a number")
    if hint is float and type(value) is int:
        return float(value)
    _require(type(value) is hint, name, repr(value), f"must be of type {hint.__name__}")
    return value


def _polyglot(layers: int, embed: int, heads: int, rotary_pct: float, *, steps: int, batch_size: int,
              learning_rate: float) -> Config:  # fmt: skip
    """A released size. Published on the cards: the architecture, the context, the steps, the tokens.

    batch_size is inferred: tokens / (steps * 2048) is 1020, 1018, 262 and 271, so 1024, 1024, 256 and 256.
    Not published, taken from the parent GPT-NeoX configs (branch multilingual-ko, XL.yml and 13B.yml; for 3.8B and 5.8B
    the rates today's configs give 1-3B and 6-7B): learning_rate, Adam's betas and eps, no weight decay, 1 % warm-up,
    cosine to 0, clipping at 1, initial weights normal with 0.02. remat is what is fastest on pods of 128 and 256 TPUs
    (experiments/LOG.md); smaller meshes may need full. The 12.8B card counts 12,898,631,680 parameters, the
    formula (exact for the three others) 12,893,603,840; no padded vocabulary explains the 5,027,840 between them.
    """
    return Config(
        model=ModelConfig(layers=layers, embed=embed, heads=heads, mlp=4 * embed, rotary_pct=rotary_pct),
        optimizer=OptimizerConfig(learning_rate=learning_rate),
        data=DataConfig(valid_ids=30_003),
        train=TrainConfig(steps=steps, batch_size=batch_size, remat="value"),
    )


def _compared(model: ModelConfig, *, eos_id: int) -> Config:
    """A model that Polyglot-Ko's cards compare it with. How it was trained was not published: those are defaults."""
    return Config(
        model=model,
        data=DataConfig(eos_id=eos_id),
        train=TrainConfig(sequence_length=min(2048, model.context)),
    )


PRESETS: dict[str, Config] = {
    # Not a published model: small enough to try everything on a laptop, with 8 heads so that any mesh of 8 divides it.
    "tiny": Config(
        model=ModelConfig(layers=4, embed=128, heads=8, mlp=512, context=256, tied=True),
        optimizer=OptimizerConfig(learning_rate=1e-3, final_learning_rate=1e-4, warmup=0.05, b2=0.99, weight_decay=0.1),
        data=DataConfig(heldout=0.05),
        train=TrainConfig(
            steps=500,
            batch_size=16,
            sequence_length=128,
            dtype="float32",
            remat="none",
            eval_every=100,
            eval_sequences=64,
            checkpoint_every=250,
        ),
    ),
    "polyglot-ko-1.3b": _polyglot(24, 2048, 16, 0.5, steps=102_000, batch_size=1024, learning_rate=2e-4),
    "polyglot-ko-3.8b": _polyglot(32, 3072, 24, 0.5, steps=105_000, batch_size=1024, learning_rate=2e-4),
    "polyglot-ko-5.8b": _polyglot(28, 4096, 16, 0.25, steps=320_000, batch_size=256, learning_rate=1.2e-4),
    "polyglot-ko-12.8b": _polyglot(40, 5120, 40, 0.5, steps=301_000, batch_size=256, learning_rate=1e-4),
    "ko-gpt-trinity-1.2b": _compared(
        ModelConfig(
            vocab=51_200,
            layers=24,
            embed=1920,
            heads=16,
            mlp=7680,
            context=1024,
            positions="learned",
            residual="sequential",
            activation="gelu_new",
            tied=True,
        ),
        eos_id=8,
    ),
    "kogpt-6b": _compared(
        ModelConfig(
            vocab=64_512,
            layers=28,
            embed=4096,
            heads=16,
            mlp=16_384,
            positions="rotary_interleaved",
            rotary_pct=0.25,
            residual="parallel_shared",
            attention_bias=False,
            activation="gelu_new",
            head_bias=True,
        ),
        eos_id=1,
    ),
    "xglm-7.5b": _compared(
        ModelConfig(
            vocab=256_008,
            layers=32,
            embed=4096,
            heads=32,
            mlp=16_384,
            positions="sinusoidal",
            embedding_scale="sqrt_embed",
            residual="sequential",
            tied=True,
        ),
        eos_id=2,
    ),
}
