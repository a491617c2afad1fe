"""`load` and the object a notebook holds."""

from __future__ import annotations

import bisect
import collections
import contextlib
import dataclasses
import html
import operator
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from polyglot_jax.beams import BeamSearch
from polyglot_jax.config import Config, InputError, SampleConfig, from_plain
from polyglot_jax.generate import Generator, Made, check_room
from polyglot_jax.hardware import readable
from polyglot_jax.model import Params, Transformer
from polyglot_jax.scoring import Pair, Scored, Scorer
from polyglot_jax.sharding import check_decoding, parts
from polyglot_jax.stopping import Stop
from polyglot_jax.tokenizer import Tokenizer
from polyglot_jax.weights import load_params, open_source, preflight, read_tokenizer


class Completion(NamedTuple):
    """What was made after a prompt.

    text: without what ended it; ids: with it; log_probabilities: of each id, the model's own (over the whole padded
    vocabulary, as in `score`, before temperature, penalties and filters); finish: why there is no more: "end" (of text,
    or a special token to stop at), "stop" (a string) or "length".
    """

    text: str
    ids: list[int]
    log_probabilities: list[float]
    finish: Literal["end", "stop", "length"]


class Scores(NamedTuple):
    """Of each continuation: float64[N], the sum of its tokens' log-probabilities, and bool[N], whether it is greedy."""

    log_probabilities: np.ndarray
    is_greedy: np.ndarray


def load(
    path: str | Path, mesh: Mesh | None = None, dtype: Any = None, quantize: Literal["int8"] | None = None
) -> LanguageModel:
    """A model ready to use, from a checkpoint, a run, a Hugging Face folder or a name on the hub.

    mesh: of `sharding.make_mesh`; None: the first device. Its tensor axis must divide heads, hidden layer and
    vocabulary; what fsdp and sequence do not divide is split over fewer axes, or whole on each device, and said. dtype:
    of weights and products; None: float32 on a CPU (whose bfloat16 products are slow), else bfloat16. quantize: "int8"
    keeps the weights of products in a byte each, with a scale for each output; products stay in `dtype`. Says first how
    much memory that takes. InputError if `path` holds no model, or one that has no room there.
    """
    if quantize not in (None, "int8"):
        raise InputError(f"quantize={quantize!r}: there is int8, or None")
    source = open_source(path)
    config, tokenizer = read_tokenizer(source)
    is_cpu = jax.default_backend() == "cpu"
    if dtype is None:
        dtype = jnp.float32 if is_cpu else jnp.bfloat16
    if dtype not in map(jnp.dtype, ("float32", "bfloat16", "float16")):
        raise InputError(f"dtype={dtype}: must be float32, bfloat16 or float16; for int8 weights quantize='int8'")
    dtype = jnp.dtype(dtype)
    if mesh is not None and not isinstance(mesh, Mesh):
        raise InputError(f"mesh={mesh}: must be a mesh of devices: sharding.make_mesh(MeshConfig(...))")
    if mesh is not None:
        check_decoding(config.model, mesh)
    if is_cpu and dtype == jnp.float16:
        raise InputError("dtype=float16: a CPU has no products in it; use float32")
    print(f"note: {preflight(source, mesh, dtype, quantize)}", file=sys.stderr)
    params = load_params(source, mesh, dtype, split=True, layout="decoding", quantize=quantize)
    return LanguageModel(config, params, tokenizer, mesh)


def _count(name: str, value: Any, least: int) -> int:
    """A whole number of Python's or NumPy's as Python's; InputError by `name` if it is none, or out of range."""
    try:
        number = operator.index(value)
    except TypeError:
        number = -1
    if isinstance(value, bool) or not least <= number < 2**31:
        raise InputError(f"{name}={value!r}: must be a whole number from {least} to 2^31 - 1")
    return number


class LanguageModel:
    """A model and its tokenizer. .config .params (a subtree per layer, as `apply` takes it) .tokenizer (or None)"""

    def __init__(self, config: Config, params: Params, tokenizer: Tokenizer | None, mesh: Mesh | None = None):
        self.config, self.params, self.tokenizer, self.mesh = config, params, tokenizer, mesh
        self.model = Transformer(config.model, dtype=params["final_norm"]["scale"].dtype, layout="decoding")
        self._generator = Generator(self.model, config, self._replicas)
        self._beam_search = BeamSearch(self._generator)
        self._logits = jax.jit(lambda params, tokens: self.model.apply({"params": params}, tokens))
        self._scorer = Scorer(self.model)

    def _facts(self) -> dict[str, str]:
        model, sizes = self.config.model, collections.Counter()
        for leaf in jax.tree.leaves(self.params):
            for shard in leaf.addressable_shards:
                sizes[shard.device] += shard.data.nbytes
        platform = next(iter(sizes)).platform
        mesh = "" if self.mesh is None else " ".join(f"{axis} {size}" for axis, size in self.mesh.shape.items())
        ids = f"{self.tokenizer.valid_ids:,} ids" if self.tokenizer else "none"
        return {
            "parameters": f"{model.parameters():,}",
            "layers": f"{model.layers} x {model.embed}, {model.heads} heads",
            "positions": f"{model.context:,}, {model.positions}",
            "tokenizer": f"{ids}, in {model.vocab:,} rows" if self.tokenizer else ids,
            "dtype": str(self.model.dtype) + (", weights in int8" if "kernel_scale" in self.params["embed"] else ""),
            "where": f"one {platform}" if self.mesh is None else f"{len(sizes)} x {platform} ({mesh})",
            "on each device": readable(max(sizes.values())),
        }

    def __repr__(self) -> str:
        return f"LanguageModel({', '.join(f'{name}: {fact}' for name, fact in self._facts().items())})"

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        rows = (f"<tr><th>{name}</th><td>{html.escape(fact)}</td></tr>" for name, fact in self._facts().items())
        return f"<table><caption>LanguageModel</caption>{''.join(rows)}</table>"

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        samples: int | None = None,
        first: int = 0,
        keep_end: bool = False,
        **settings: Any,
    ) -> list[Any]:
        """The continuations alone, one for each prompt (a single string counts as one prompt; ids are taken as such).

        settings: any other field of `SampleConfig`; arguments not given are those of config.sample. stop: None ends at
        <|endoftext|>; a list of strings ends before the first of them instead; [] always makes max_new_tokens tokens.
        samples: how many of each prompt; the result is then a list for each prompt. first: the number of the first
        prompt, which its draws depend on: a call that is split gives what it gives whole. keep_end: of a prompt that
        the context has no room for, keep the end; else it is refused.
        """
        settings |= {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p,
                     "seed": seed}  # fmt: skip
        made = self.complete(prompts, 1 if samples is None else samples, stop, first, keep_end, **settings)
        return [row[0].text if samples is None else [completion.text for completion in row] for row in made]

    def complete(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        samples: int = 1,
        stop: str | Sequence[str] | None = None,
        first: int = 0,
        keep_end: bool = False,
        **settings: Any,
    ) -> list[list[Completion]]:
        """As `generate`, with ids, log-probabilities and why each ended: `samples` completions for each prompt.

        With settings' beams=N they are the best of beam search's N, best first.
        """
        if isinstance(prompts, str) or not isinstance(prompts, Iterable):
            prompts = [prompts]
        prompts = list(prompts)
        sample, ends = self._sample(settings), self._stop(stop)
        samples = _count("samples", samples, 1)
        if samples > sample.beams > 1:
            raise InputError(f"samples={samples}: must be at most sample.beams={sample.beams}")
        if samples > 1 and sample.beams == 1 and sample.temperature == 0:
            raise InputError(
                f"samples={samples}: at sample.temperature=0.0 all would be the same; raise it, or follow beams"
            )
        first = _count("first", first, 0)
        if not prompts:
            return []
        ids = self._prompts(prompts, sample, keep_end)
        with self._on_mesh():
            if sample.beams > 1:
                if ends.strings:
                    raise InputError(
                        f"stop={ends.strings[0]!r}: a string ends no beam; give special tokens, or beams=1"
                    )
                rows = self._beam_search.run(self.params, ids, sample, ends.ids)
                return [[self._completion(made, ends, 0) for made in row[:samples]] for row in rows]
            is_over = self._is_over(ends, sample.min_new_tokens) if ends.strings else None
            *_, made = self._generator.run(self.params, ids, sample, ends.ids, samples, first, is_over)
        completions = [self._completion(each, ends, sample.min_new_tokens) for each in made]
        return [completions[i : i + samples] for i in range(0, len(completions), samples)]

    def stream(
        self,
        prompt: str,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        first: int = 0,
        keep_end: bool = False,
        **settings: Any,
    ) -> Iterator[str]:
        """Yield the text `generate` would return for the prompt, in pieces, as it is made: first after one token.

        A piece never ends within a character, nor in what may become a stop string. Interrupted or closed, it leaves
        the model as it was.
        """
        settings |= {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p,
                     "seed": seed}  # fmt: skip
        sample, ends = self._sample(settings), self._stop(stop)
        if sample.beams > 1:
            raise InputError(f"sample.beams={sample.beams}: beam search knows no token before the last; use generate")
        first, ids, text, shown = _count("first", first, 0), self._prompts([prompt], sample, keep_end), "", 0
        is_over = self._is_over(ends, sample.min_new_tokens)
        states = self._generator.run(self.params, ids, sample, ends.ids, 1, first, is_over)
        while True:
            with self._on_mesh():  # not around the yields: it would hold for what the caller does between them
                rows = next(states, None)
            if rows is None:
                break
            text, end = self._cut(rows[0].ids, ends, sample.min_new_tokens)
            safe = len(text) if end is None else end
            safe -= ends.unsettled(text) if end is None else 0
            if safe > shown:
                yield text[shown:safe]
                shown = safe
            if end is not None:
                return
        if len(text) > shown:
            yield text[shown:]

    def logits(self, tokens: Any) -> jax.Array:
        """int[B, T] -> float32[B, T, vocab]: unmasked, rows of padding included."""
        try:
            tokens, vocab = np.asarray(tokens), self.config.model.vocab
        except ValueError as error:
            raise InputError(f"tokens: {error}; logits takes int[B, T], rows of one length") from error
        if tokens.ndim != 2 or not tokens.size or tokens.dtype.kind not in "iu":
            raise InputError(f"tokens: {tokens.dtype}{list(tokens.shape)}; logits takes int[B, T]")
        if tokens.min() < 0 or tokens.max() >= vocab:  # indexing on a device would wrap or clamp them in silence
            raise InputError(f"tokens: from {tokens.min()} to {tokens.max()}; ids are 0 to {vocab - 1}")
        context = self.config.model.context
        if tokens.shape[1] > context:  # likewise the rows of learned positions
            raise InputError(f"tokens: {tokens.shape[1]} in a row; the model takes {context}")
        with self._on_mesh():
            rows, length = tokens.shape
            check_room(self.config.model, self.model.dtype, f"logits of {rows:,} x {length:,} tokens", "fewer rows",
                       read=(rows, length), cache=(0, length), logits=(rows, length))  # fmt: skip
            return self._logits(self.params, tokens.astype(np.int32))

    def score(self, contexts: Sequence[str], continuations: Sequence[str], batch_size: int | None = None) -> Scores:
        """How likely each continuation is after its context, over the whole padded vocabulary.

        Context and continuation are encoded apart and joined; an empty context is <|endoftext|>; what is longer
        than the model's context loses its beginning. Continuations of one context share its computation. batch_size:
        contexts read at a time. InputError if a continuation is empty.
        """
        for name, texts in (("contexts", contexts), ("continuations", continuations)):
            if isinstance(texts, str) or not isinstance(texts, Sequence):
                raise InputError(f"{name}={texts!r}: must be a list of strings")
        if len(contexts) != len(continuations):
            raise InputError(
                f"contexts: {len(contexts)} for {len(continuations)} continuations; give a list of as many"
            )
        pairs = list(map(Pair, self._encode(contexts), self._tokens(continuations)))
        sums, greedy = np.zeros(len(pairs)), np.zeros(len(pairs), bool)
        with tqdm(total=len(pairs), desc="scoring", leave=False) as progress:
            for batch in self.scored(pairs, batch_size):
                sums[batch.numbers], greedy[batch.numbers] = batch.log_probabilities, batch.is_greedy
                progress.update(len(batch.numbers))
        return Scores(sums, greedy)

    def scored(self, pairs: Sequence[Pair], batch_size: int | None = None) -> Iterator[Scored]:
        """The scores of pairs of token ids, batch by batch, those with the longest contexts first.

        batch_size: contexts read at a time; None: as many as are good for speed. Pairs of one context share its
        computation. InputError if a continuation is empty, or an id is not of this model.
        """
        batch_size = None if batch_size is None else _count("batch_size", batch_size, 1)
        vocab = self.config.model.vocab
        for pair in pairs:
            ids = (*pair.context, *pair.continuation)
            if min(ids, default=0) < 0 or max(ids, default=0) >= vocab:  # a device would clamp them in silence
                raise InputError(f"tokens: from {min(ids)} to {max(ids)}; ids are 0 to {vocab - 1}")
        batches = self._scorer.run(self.params, pairs, batch_size, self._replicas)
        while True:
            with self._on_mesh():  # not around the yield, as in `stream`
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def _sample(self, settings: dict[str, Any]) -> SampleConfig:
        names = {field.name for field in dataclasses.fields(SampleConfig)}
        if unknown := sorted(settings.keys() - names):
            raise InputError(f"sample.{unknown[0]}: no such setting; there are {', '.join(sorted(names))}")
        plain = {name: value.item() if np.ndim(value) == 0 and hasattr(value, "item") else value
                 for name, value in settings.items()}  # fmt: skip
        given = {name: value for name, value in plain.items() if value is not None}
        return from_plain(SampleConfig, dataclasses.asdict(self.config.sample) | given, "sample")

    def _stop(self, stop: str | Sequence[str] | None) -> Stop:
        return Stop.of(stop, self.tokenizer, self.config.data.eos_id)

    def _cut(self, ids: list[int], stop: Stop, least: int) -> tuple[str, int | None]:
        """The text of `ids`, and where a stop string begins in it that is not in the text of the first `least`."""
        text = self._text(ids)
        return text, stop.first(text, len(self._text(ids[:least])) if least else 0) if stop.strings else None

    def _is_over(self, stop: Stop, least: int) -> Callable[[list[int]], bool]:
        return lambda ids: self._cut(ids, stop, least)[1] is not None

    def _completion(self, made: Made, stop: Stop, least: int) -> Completion:
        text, end = self._cut(made.ids, stop, least)
        if end is None:
            return Completion(text, made.ids, made.log_probabilities, "end" if made.is_ended else "length")
        # The tokens up to the one in which the stop string is complete: those after it are a chunk's rest.
        lengths = range(1, len(made.ids) + 1)
        used = 1 + bisect.bisect_left(lengths, True, key=lambda n: self._cut(made.ids[:n], stop, least)[1] is not None)
        return Completion(text[:end], made.ids[:used], made.log_probabilities[:used], "stop")

    @property
    def _replicas(self) -> int:
        """Devices that share out the rows of a batch."""
        return 1 if self.mesh is None else parts("batch", self.mesh, "decoding")

    @property
    def _known_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise InputError("this model came without a tokenizer.json; put one beside its weights, or use .logits")
        return self.tokenizer

    def _tokens(self, texts: Sequence[str]) -> list[list[int]]:
        for text in texts:
            if not isinstance(text, str):
                raise InputError(f"text={text!r}: must be a string")
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise InputError(
                    f"text={text[:40]!a}: is no text (a lone surrogate at {error.start}); decode the bytes it "
                    "came from as UTF-8"
                ) from error
        return self._known_tokenizer.encode_batch(texts)

    def _prompts(self, texts: Sequence[Any], sample: SampleConfig, keep_end: bool) -> list[list[int]]:
        room = self.config.model.context - sample.max_new_tokens
        return [ids[-room:] if keep_end and room > 0 else ids for ids in self._encode(texts)]

    def _encode(self, texts: Sequence[str] | Sequence[Sequence[int]]) -> list[list[int]]:
        if all(isinstance(text, str) for text in texts):
            rows = self._tokens(texts)
        else:
            rows = [self._ids(given) for given in texts]
            self._text([])  # what is made will be text: that there is no tokenizer is said now
        return [ids or [self.config.data.eos_id] for ids in rows]

    def _ids(self, given: Any) -> list[int]:
        if isinstance(given, str) or np.ndim(given) != 1:
            raise InputError(f"prompt={given!r}: prompts are strings, or each a list of ids")
        ids, vocab = np.asarray(given), self.config.model.vocab
        if ids.size and ids.dtype.kind not in "iu":
            raise InputError(f"prompt={given!r}: ids are whole numbers, 0 to {vocab - 1}")
        if ids.size and not 0 <= ids.min() <= ids.max() < vocab:  # a device would clamp them in silence
            raise InputError(f"prompt: ids from {ids.min()} to {ids.max()}; they are 0 to {vocab - 1}")
        return ids.tolist()

    def _text(self, ids: list[int]) -> str:
        return self._known_tokenizer.decode(ids)

    def _on_mesh(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)
