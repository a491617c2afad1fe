"""The decode loop: prompts are read once, then tokens are made one after the other without leaving the device.

Shapes are rounded up to buckets, so that another prompt seldom means another compilation. The key of each token is made
from (seed, the prompt's number, the sample's number, the token's position), so a prompt's tokens do not depend on its
company, nor on how a call is split.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from polyglot_jax import sampling, steps
from polyglot_jax.attention import QUERIES
from polyglot_jax.config import Config, InputError, ModelConfig, SampleConfig
from polyglot_jax.hardware import free_memory, readable
from polyglot_jax.model import CACHE_AXES, Cache, Params, Transformer, init_cache
from polyglot_jax.sampling import Counts, Form, Sampling
from polyglot_jax.sharding import constrain, shard_shape

CHUNK = 8
"""Most tokens made on the device between two looks at the text."""

MOST_ENDS = 8
"""Room for ids that end a row."""

# By platform. XLA for TPUs would give a product with one row to its vector units, which take four times as long as
# reading the weights does.
_COMPILER_OPTIONS = {"tpu": {"xla_tpu_enable_dot_strength_reduction": "false"}}


class Made(NamedTuple):
    """What was made after a prompt: its ids; the model's log-probability of each; whether the last one is an end."""

    ids: list[int]
    log_probabilities: list[float]
    is_ended: bool


class Decoding(NamedTuple):
    """State of the loop. Rows are prompts' samples, those of one prompt beside each other.

    tokens: int32[B, S], at each position of a row its token: a prompt of `lengths`, then `made`; log_probabilities:
    float32[B, S], of the tokens made; done: bool[B]; keys: key[B], of (seed, prompt, sample); logits: those of the
    next token; counts: None unless a penalty is on.
    """

    tokens: jax.Array
    log_probabilities: jax.Array
    lengths: jax.Array
    made: jax.Array
    done: jax.Array
    keys: jax.Array
    logits: jax.Array
    counts: Counts | None
    cache: Cache


def start(
    model: Transformer, slots: int, samples: int, form: Form, params: Params, tokens: jax.Array, lengths: jax.Array,
    done: jax.Array, key: jax.Array, first: jax.Array,
) -> Decoding:  # fmt: skip
    """Read each prompt once. tokens: int[P, T]; lengths, done: [P]; key: of the seed; first: number of prompt 0."""
    cache = init_cache(model.config, tokens.shape[0], slots, model.dtype)
    logits, cache = steps.prefill(model, params, tokens, lengths, cache)
    logits = _whole(logits)
    fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    keys = jax.vmap(fold, in_axes=(0, None))(fold(key, first + jnp.arange(tokens.shape[0])), jnp.arange(samples))
    counts = Counts.of(tokens, lengths, model.config.vocab) if form.counts else None
    tokens = jnp.pad(tokens, ((0, 0), (0, slots - tokens.shape[1])))
    made = jnp.zeros_like(lengths)
    of_prompt = (tokens, jnp.zeros(tokens.shape, jnp.float32), lengths, made, done, logits, counts, cache)
    if samples > 1:
        of_prompt = jax.tree.map(lambda x: jnp.repeat(x, samples, axis=0), of_prompt)
    *before, logits, counts, cache = of_prompt
    return Decoding(*before, keys.reshape(-1), logits, counts, cache)


def _whole(logits: jax.Array) -> jax.Array:
    """float32[B, V], not split by vocabulary: gathered once, instead of a word exchanged at every step of choosing.

    Both layouts are named, else XLA would gather the head's weights.
    """
    return constrain(constrain(logits, "batch", "vocab", layout="decoding"), "batch", None, layout="decoding")


def adjusted(
    state: Decoding, logits: jax.Array, valid_ids: int, form: Form, ends: jax.Array, settings: Sampling
) -> jax.Array:
    """Logits (or log-probabilities) float32[B, V] with penalties, and -inf for what must not come now."""
    if state.counts is not None:
        logits = sampling.penalise(logits, state.counts, settings)
    if form.ngram:
        logits = sampling.forbid_ngrams(logits, state.tokens, state.lengths + state.made, form.ngram)
    ids = jnp.arange(logits.shape[-1])
    is_early = (state.made < settings.min_new_tokens)[:, None] & jnp.isin(ids, ends)
    return jnp.where(is_early | (ids >= valid_ids), -jnp.inf, logits)


def _continue(
    model: Transformer, valid_ids: int, form: Form, params: Params, state: Decoding, is_over: jax.Array,
    limit: jax.Array, ends: jax.Array, settings: Sampling,
) -> Decoding:  # fmt: skip
    """Until every row is done, is_over (bool[B]) or has `limit` tokens. ends: int[E], ids that end a row."""
    state = state._replace(done=state.done | is_over)
    rows, slots = jnp.arange(state.tokens.shape[0]), state.tokens.shape[1]

    def is_going(state: Decoding) -> jax.Array:
        return ~jnp.all(state.done | (state.made >= limit))

    def one(state: Decoding) -> Decoding:
        positions = state.lengths + state.made
        keys = jax.vmap(jax.random.fold_in)(state.keys, positions)
        chosen = sampling.choose(adjusted(state, state.logits, valid_ids, form, ends, settings), keys, settings)
        goes = ~state.done & (state.made < limit)
        # A row that rests writes behind its slots, or, on a CPU or TPU, into its last: none of them ever goes on.
        at = jnp.where(goes, positions, slots)
        log_probabilities = state.logits[rows, chosen] - jax.nn.logsumexp(state.logits, axis=-1)
        logits, cache = steps.decode_step(model, params, chosen, at, state.cache)
        logits = _whole(logits)
        return state._replace(
            tokens=state.tokens.at[rows, at].set(chosen, mode="drop"),
            log_probabilities=state.log_probabilities.at[rows, at].set(log_probabilities, mode="drop"),
            made=state.made + goes,
            done=state.done | (goes & jnp.isin(chosen, ends)),
            logits=jnp.where(goes[:, None], logits, state.logits),
            counts=None if state.counts is None else state.counts.add(chosen, goes),
            cache=cache,
        )

    return jax.lax.while_loop(is_going, one, state)


def bucket(size: int, least: int, most: int) -> int:
    """`size` rounded up to `least` times a power of two, at most `most`."""
    rounded = least
    while rounded < size:
        rounded *= 2
    return min(rounded, most)


def width(size: int, least: int, most: int) -> int:
    """`size` rounded up to `least` times 1, 1.5, 2, 3, 4, 6, 8, ... (whole numbers); at most `most`."""
    power = bucket(size, least, 1 << 30)
    between = power * 3 // 4
    return min(most, between if size <= between and between > least else power)


class Batch(NamedTuple):
    """Prompts as arrays. tokens: int32[P, T]; lengths: int32[P]; is_filler: bool[P]; slots: positions each needs."""

    tokens: np.ndarray
    lengths: np.ndarray
    is_filler: np.ndarray
    slots: int

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], max_new_tokens: int, context: int, replicas: int) -> Batch:
        """Sizes are rounded up; rows to a multiple of `replicas`. InputError for an empty or too long prompt."""
        longest = max(map(len, prompts))
        if not all(prompts):
            raise InputError("prompt: holds no tokens; begin with <|endoftext|>")
        if longest + max_new_tokens > context:
            less = f"lower it to {context - longest} or shorten" if longest < context else "shorten"
            raise InputError(
                f"sample.max_new_tokens={max_new_tokens}: with a prompt of {longest} tokens that is more than "
                f"model.context={context}; {less} the prompt, or keep its end alone (keep_end)"
            )
        rows = bucket(-(-len(prompts) // replicas), 1, 1 << 30) * replicas
        tokens = np.zeros((rows, bucket(longest, 16, context)), np.int32)
        lengths = np.ones(rows, np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)], lengths[row] = prompt, len(prompt)
        slots = max(width(longest + max_new_tokens, 64, context), tokens.shape[1])
        return cls(tokens, lengths, np.arange(rows) >= len(prompts), slots)


def check_room(
    config: ModelConfig, dtype: Any, what: str, less: str, *, read: tuple[int, int], cache: tuple[int, int],
    logits: tuple[int, ...],
) -> None:  # fmt: skip
    """InputError if a device of `jax.set_mesh`, or the first one, has no room for what is made beside the weights.

    read: rows and tokens of what is read at once; cache: its rows and slots; logits: rows and, where each of them has
    some, tokens whose logits are held in float32. About as much is counted as these take. less: what helps.
    """
    mesh = jax.sharding.get_mesh()
    free = free_memory(jax.devices()[:1] if mesh.empty else list(mesh.devices.flat))

    def size(axes: Sequence[str | None], *shape: int) -> int:
        return math.prod(shard_shape(axes, shape, "decoding"))

    of_logits = ("batch", None) if len(logits) == 1 else ("batch", "length", "vocab")  # as they are constrained
    wide = 2 * size(CACHE_AXES, read[0], config.heads, min(read[1], QUERIES), cache[1])  # scores and their softmax
    wide += size(of_logits, *logits, config.vocab)
    narrow = 2 * config.layers * size(CACHE_AXES, cache[0], config.heads, cache[1], config.head_dim)
    narrow += size(("batch", None), read[0], read[1] * (4 * config.embed + config.mlp))
    needed = 4 * wide + jnp.dtype(dtype).itemsize * narrow
    if free is not None and needed > free:
        raise InputError(
            f"{what}: need about {readable(needed)} on each device, and {readable(free)} are free; give {less}"
        )


def check_batch(model: Transformer, batch: Batch, copies: int, each: str) -> None:
    """As `check_room`, for `copies` continuations of each prompt, said as `each`, besides the prompt's own cache."""
    prompts, rows = len(batch.tokens), len(batch.tokens) * (1 + copies if copies > 1 else 1)
    what = f"{prompts - batch.is_filler.sum():,} prompt(s) x {each} of {batch.slots:,} tokens"
    less = "fewer at a time (first= keeps their draws), shorter ones, or a lower max_new_tokens"
    # Choosing makes two copies of the logits.
    check_room(
        model.config, model.dtype, what, less, read=batch.tokens.shape, cache=(rows, batch.slots), logits=(3 * rows,)
    )


@dataclass(frozen=True)
class Generator:
    """Jitted generation for one model. replicas: devices that share out the rows; platform: theirs, None: JAX's own."""

    model: Transformer
    config: Config
    replicas: int = 1
    platform: str | None = None

    @property
    def _options(self) -> dict[str, str] | None:
        return _COMPILER_OPTIONS.get(self.platform or jax.default_backend())

    @functools.cached_property
    def _start(self) -> Any:
        return jax.jit(functools.partial(start, self.model), static_argnums=(0, 1, 2), compiler_options=self._options)

    @functools.cached_property
    def _continue(self) -> Any:
        valid = self.config.data.valid_ids or self.config.model.vocab
        return jax.jit(functools.partial(_continue, self.model, valid), static_argnums=0, donate_argnames="state",
                       compiler_options=self._options)  # fmt: skip

    def compile(self, params: Params, rows: int, slots: int) -> tuple[Any, Decoding]:
        """The loop as `run` has it for `rows` prompts of a token, compiled from shapes, and the shapes of its state.

        params: shapes with their shardings. Nothing is computed; the state lies as the compiled prefill leaves it.
        """
        of_rows, form = functools.partial(jax.ShapeDtypeStruct, (rows,)), Form.of(SampleConfig())
        number, is_row = jax.ShapeDtypeStruct((), jnp.int32), of_rows(bool)
        key = jax.eval_shape(lambda: jax.random.key(0))
        tokens = jax.ShapeDtypeStruct((rows, 1), jnp.int32)
        prefill = self._start.lower(slots, 1, form, params, tokens, of_rows(jnp.int32), is_row, key, number).compile()
        state = jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
            prefill.out_info, prefill.output_shardings,
        )  # fmt: skip
        ends, settings = (
            jax.ShapeDtypeStruct((MOST_ENDS,), jnp.int32),
            jax.eval_shape(lambda: Sampling.of(SampleConfig())),
        )
        return self._continue.lower(form, params, state, is_row, number, ends, settings).compile(), state

    def run(
        self,
        params: Params,
        prompts: Sequence[Sequence[int]],
        sample: SampleConfig,
        ends: Sequence[int],
        samples: int = 1,
        first: int = 0,
        is_over: Callable[[list[int]], bool] | None = None,
    ) -> Iterator[list[Made]]:
        """Yield what each sample of each prompt has so far: once, or, with `is_over`, after 1, 2, 4, 8, 8, ... tokens.

        ends: ids that end a row (included in it); a row also ends at sample.max_new_tokens, and where `is_over` says so
        of its ids. first: number of the first prompt, for a call that is split. The caller stops by no longer asking.
        InputError if a prompt is empty or leaves too little room in the context.
        """
        batch = Batch.of(prompts, sample.max_new_tokens, self.config.model.context, self.replicas)
        check_batch(self.model, batch, samples, f"{samples} sample(s)")
        form, count = Form.of(sample), len(prompts) * samples
        state = self._start(batch.slots, samples, form, params, batch.tokens, batch.lengths, batch.is_filler,
                            jax.random.key(sample.seed), jnp.int32(first))  # fmt: skip
        chunk, limit = 1, 0 if is_over else sample.max_new_tokens
        over = np.zeros(len(batch.tokens) * samples, bool)
        end_ids = jnp.array([*ends, *[-1] * (MOST_ENDS - len(ends))], jnp.int32)  # of one shape, however many
        settings = Sampling.of(sample)
        while True:
            if is_over:
                limit, chunk = min(limit + chunk, sample.max_new_tokens), min(2 * chunk, CHUNK)
            state = self._continue(form, params, state, over, jnp.int32(limit), end_ids, settings)
            tokens, logs, lengths, made, done = jax.device_get(state[:5])
            rows = [
                Made(tokens[i, n : n + new].tolist(), logs[i, n : n + new].tolist(), bool(done[i]))
                for i, (n, new) in enumerate(zip(lengths[:count], made[:count], strict=True))
            ]
            yield rows
            if is_over:
                over[:count] = [is_over(row.ids) for row in rows]
            if limit == sample.max_new_tokens or (done | over).all():
                return
