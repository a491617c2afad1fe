"""`load` and the object a notebook holds."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from polyglot_jax.config import Config, InputError, SampleConfig
from polyglot_jax.generate import Generator
from polyglot_jax.model import Params, Transformer
from polyglot_jax.scoring import Pair, Scored, Scorer
from polyglot_jax.sharding import parts
from polyglot_jax.tokenizer import Tokenizer
from polyglot_jax.weights import load_params, open_source, read_tokenizer

_CHUNK = 8  # tokens made on the device between two looks at the text


class Scores(NamedTuple):
    """Of each continuation: float64[N], the sum of its tokens' log-probabilities, and bool[N], whether it is greedy."""

    log_probabilities: np.ndarray
    is_greedy: np.ndarray


def load(path: str | Path, mesh: Mesh | None = None, dtype: Any = None) -> LanguageModel:
    """A model ready to use, from a checkpoint, a run, a Hugging Face folder or a name on the hub.

    mesh: of `sharding.make_mesh`; None: the first device. dtype: of weights and products; None:
    float32 on a CPU (whose bfloat16 products are slow), else bfloat16. What does not divide over the mesh is split over
    fewer of its axes, or whole on each device. InputError if `path` holds no model.
    """
    source = open_source(path)
    config, tokenizer = read_tokenizer(source)
    is_cpu = jax.default_backend() == "cpu"
    if dtype is None:
        dtype = jnp.float32 if is_cpu else jnp.bfloat16
    if is_cpu and jnp.dtype(dtype) == jnp.float16:
        raise InputError("dtype=float16: a CPU has no products in it; use float32")
    params = load_params(source, mesh, jnp.dtype(dtype), split=True, layout="decoding")
    return LanguageModel(config, params, tokenizer, mesh)


class LanguageModel:
    """A model and its tokenizer. .config .params (a subtree per layer, as `apply` takes it) .tokenizer (or None)"""

    def __init__(self, config: Config, params: Params, tokenizer: Tokenizer | None, mesh: Mesh | None = None):
        self.config, self.params, self.tokenizer, self.mesh = config, params, tokenizer, mesh
        self.model = Transformer(config.model, dtype=jax.tree.leaves(params)[0].dtype, layout="decoding")
        self._generator = Generator(self.model, config)
        self._logits = jax.jit(lambda params, tokens: self.model.apply({"params": params}, tokens))
        self._scorer = Scorer(self.model)

    def __repr__(self) -> str:
        leaves = jax.tree.leaves(self.params)
        where = "one device" if self.mesh is None else dict(self.mesh.shape)
        model = self.config.model
        return (
            f"LanguageModel({model.parameters():,} parameters, {model.layers} layers x {model.embed}, "
            f"{self.model.dtype} on {next(iter(leaves[0].devices())).platform} ({where}), "
            f"tokenizer: {f'{self.tokenizer.valid_ids:,} ids' if self.tokenizer else 'none'})"
        )

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
    ) -> list[str]:
        """The continuations alone, one for each prompt (a single string counts as one prompt; ids are taken as such).

        Arguments not given are those of config.sample. stop: None ends at <|endoftext|>; a list of strings ends before
        the first of them instead; [] always makes max_new_tokens tokens.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts:
            return []
        sample = self._sample(max_new_tokens, temperature, top_k, top_p, seed)
        ends, stop = self._ends(stop)
        texts: list[str] = []
        with self._on_mesh():
            for rows in self._generator.run(self.params, self._encode(prompts), sample, ends, _CHUNK if stop else 0):
                texts = [self._text(ids) for ids in rows]
                if stop and all(_first_stop(text, stop) is not None for text in texts):
                    break
        return [text[: _first_stop(text, stop)] for text in texts]

    def stream(
        self,
        prompt: str,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
    ) -> Iterator[str]:
        """Yield the text `generate` would return for the prompt, in pieces, as it is made.

        A piece never ends within a character, nor in what may become a stop string.
        """
        sample = self._sample(max_new_tokens, temperature, top_k, top_p, seed)
        ends, stop = self._ends(stop)
        text, shown = "", 0
        states = self._generator.run(self.params, self._encode([prompt]), sample, ends, _CHUNK)
        while True:
            with self._on_mesh():  # not around the yields: it would hold for what the caller does between them
                rows = next(states, None)
            if rows is None:
                break
            text = self._text(rows[0])
            end = _first_stop(text, stop)
            safe = end if end is not None else len(text) - _unsettled(text, stop)
            if safe > shown:
                yield text[shown:safe]
                shown = safe
            if end is not None:
                return
        if len(text) > shown:
            yield text[shown:]

    def logits(self, tokens: Any) -> jax.Array:
        """int[B, T] -> float32[B, T, vocab]: unmasked, rows of padding included."""
        tokens, vocab = np.asarray(tokens), self.config.model.vocab
        if tokens.ndim != 2 or not tokens.size or tokens.dtype.kind not in "iu":
            raise InputError(f"tokens: {tokens.dtype}{list(tokens.shape)}; logits takes int[B, T]")
        if tokens.min() < 0 or tokens.max() >= vocab:  # indexing on a device would wrap or clamp them in silence
            raise InputError(f"tokens: from {tokens.min()} to {tokens.max()}; ids are 0 to {vocab - 1}")
        with self._on_mesh():
            return self._logits(self.params, tokens.astype(np.int32))

    def score(self, contexts: Sequence[str], continuations: Sequence[str], batch_size: int | None = None) -> Scores:
        """How likely each continuation is after its context, over the whole padded vocabulary.

        Context and continuation are encoded apart and joined; an empty context is <|endoftext|>; what is longer
        than the model's context loses its beginning. Continuations of one context share its computation. batch_size:
        contexts read at a time. InputError if a continuation is empty.
        """
        if isinstance(contexts, str) or isinstance(continuations, str) or len(contexts) != len(continuations):
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
        vocab = self.config.model.vocab
        for pair in pairs:
            ids = (*pair.context, *pair.continuation)
            if min(ids, default=0) < 0 or max(ids, default=0) >= vocab:  # a device would clamp them in silence
                raise InputError(f"tokens: from {min(ids)} to {max(ids)}; ids are 0 to {vocab - 1}")
        replicas = 1 if self.mesh is None else parts("batch", self.mesh, "decoding")
        batches = self._scorer.run(self.params, pairs, batch_size, replicas)
        while True:
            with self._on_mesh():  # not around the yield, as in `stream`
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def _sample(self, *given: Any) -> SampleConfig:
        names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed")
        values = {name: value for name, value in zip(names, given, strict=True) if value is not None}
        return dataclasses.replace(self.config.sample, **values)

    def _ends(self, stop: str | Sequence[str] | None) -> tuple[list[int], list[str]]:
        """The ids that end a row and the strings that do; special tokens are in no text, so they are ids."""
        if stop is None:
            return [self.config.data.eos_id], []
        stop = [stop] if isinstance(stop, str) else stop
        if "" in stop:
            raise InputError("stop: an empty string would stop at once; give [] to make max_new_tokens tokens")
        special = self.tokenizer.special if self.tokenizer else {}
        end = self.config.data.eos_id
        is_known = self.tokenizer is not None and end < self.tokenizer.valid_ids
        if is_known and not self.tokenizer.decode([end]):  # special, under whatever name the family has for it
            special = special | {self.tokenizer.decode([end], skip_special_tokens=False): end}
        return [special[text] for text in stop if text in special], [text for text in stop if text not in special]

    def _tokens(self, texts: Sequence[str]) -> list[list[int]]:
        if self.tokenizer is None:
            raise InputError("this model came without a tokenizer.json; put one beside its weights, or use .logits")
        return self.tokenizer.encode_batch(texts)

    def _encode(self, texts: Sequence[str] | Sequence[Sequence[int]]) -> list[list[int]]:
        rows = self._tokens(texts) if all(isinstance(text, str) for text in texts) else [list(ids) for ids in texts]
        return [ids or [self.config.data.eos_id] for ids in rows]

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids)

    def _on_mesh(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)


def _first_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where the first of the stop strings begins, or None."""
    return min((at for at in (text.find(string) for string in stop) if at >= 0), default=None)


def _unsettled(text: str, stop: Sequence[str]) -> int:
    """How many characters at the end of a text may still change: half a character, or the start of a stop string."""
    broken = len(text) - len(text.rstrip("\ufffd"))
    settled = text[: len(text) - broken]
    beginnings = (n for string in stop for n in range(len(string) - 1, 0, -1) if settled.endswith(string[:n]))
    return broken + max(beginnings, default=0)
