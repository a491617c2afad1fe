"""Sampling against transformers' processors, on the same logits; and what draws depend on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import speakers
import torch
from models import KOREAN
from speakers import EOS, VALID, constant, their_tokens, tokens_of
from transformers import LogitsProcessorList
from transformers.generation import (
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from polyglot_jax.config import SampleConfig
from polyglot_jax.generate import Decoding, adjusted
from polyglot_jax.sampling import Counts, Form, Sampling, filter_logits


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return speakers.pair(tmp_path_factory.mktemp("speakers") / "pair")


def their_filter(logits, sample):
    warpers = LogitsProcessorList([TemperatureLogitsWarper(sample.temperature)])
    if sample.top_k:
        warpers.append(TopKLogitsWarper(sample.top_k))
    if sample.top_p < 1:
        warpers.append(TopPLogitsWarper(sample.top_p))
    if sample.min_p:
        warpers.append(MinPLogitsWarper(sample.min_p))
    return warpers(None, torch.from_numpy(logits)).numpy()


@pytest.mark.parametrize("ties", [False, True])
def test_filter_is_that_of_transformers(ties):
    """Temperature, then top-k, top-p and min-p, with 200 settings on 4 rows each."""
    rng = np.random.default_rng(int(ties))
    ours = jax.jit(filter_logits)
    cut = set()
    for _ in range(200):
        logits = (3 * rng.standard_normal((4, 60))).astype(np.float32)
        if ties:
            logits = np.round(logits)
        sample = SampleConfig(
            temperature=float(rng.choice([0.3, 0.7, 1.0, 1.9])),
            top_k=int(rng.choice([0, 1, 2, 7, 30, 60, 100])),
            top_p=float(rng.choice([1.0, 0.02, *rng.uniform(0.1, 0.99, 3)])),
            min_p=float(rng.choice([0.0, 0.0, 0.001, 0.05, 0.4, 1.0])),
        )
        expected = their_filter(logits, sample)
        # Of several tokens as likely as the least likely one kept, theirs drops those that come first; ours keeps all.
        least = np.where(np.isfinite(expected), expected, np.inf).min(-1, keepdims=True)
        scaled = their_filter(logits, SampleConfig(temperature=sample.temperature))
        expected = np.where(scaled >= least, scaled, -np.inf)
        result = np.asarray(ours(logits, Sampling.of(sample)))
        np.testing.assert_array_equal(np.isfinite(result), np.isfinite(expected), err_msg=str(sample))
        np.testing.assert_allclose(result, expected, rtol=1e-6)
        cut |= set(np.isfinite(result).sum(-1).tolist())
    assert {1, 2, 7, 60} <= cut


def their_penalties(tokens, length, logits, sample):
    """The logits after a row's tokens, of which `length` are the prompt."""
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(sample.repetition_penalty)])
    if sample.no_repeat_ngram:
        processors.append(NoRepeatNGramLogitsProcessor(sample.no_repeat_ngram))
    processors.append(MinNewTokensLengthLogitsProcessor(length, sample.min_new_tokens, EOS))
    processors.append(SuppressTokensLogitsProcessor([18, 19]))
    return processors(torch.tensor([tokens]), torch.from_numpy(logits[None])).numpy()[0]


def test_penalties_are_those_of_transformers():
    """Rows of several lengths over 18 ids and two of padding, so that everything repeats."""
    rng = np.random.default_rng(3)
    forbidden = 0
    for _ in range(60):
        sample = SampleConfig(
            max_new_tokens=20,
            repetition_penalty=float(rng.choice([0.8, 1.3, 2.5])),
            no_repeat_ngram=int(rng.choice([0, 1, 2, 3, 4])),
            min_new_tokens=int(rng.choice([0, 3, 6])),
        )
        logits = (2 * rng.standard_normal((5, 20))).astype(np.float32)
        tokens = rng.integers(0, 18, (5, 24))
        lengths, made = rng.integers(1, 12, 5), rng.integers(0, 12, 5)
        counts = Counts.of(jnp.asarray(tokens), jnp.asarray(lengths), 20)
        for step in range(12):
            now = np.minimum(lengths + step, 23)
            counts = counts.add(jnp.asarray(tokens[np.arange(5), now]), jnp.asarray(step < made))
        state = Decoding(jnp.asarray(tokens), None, lengths, made, None, None, None, counts, None)
        ends = jnp.array([EOS, -1])
        found = np.asarray(adjusted(state, jnp.asarray(logits), 18, Form.of(sample), ends, Sampling.of(sample)))
        for row in range(5):
            so_far = tokens[row, : lengths[row] + made[row]].tolist()
            expected = their_penalties(so_far, int(lengths[row]), logits[row], sample)
            np.testing.assert_allclose(found[row], expected, rtol=1e-6, err_msg=str(sample))
            forbidden += np.isinf(expected[:18]).sum()
    assert forbidden > 100


def test_frequency_penalty_counts_what_was_made(pair):
    """Against the formula: logits less the penalty for each time a token was made, the prompt's not counted."""
    _, lm = pair
    prompt, penalty = lm.tokenizer.encode(KOREAN[1]), 1.5
    made = tokens_of(lm, [prompt], None, max_new_tokens=24, frequency_penalty=penalty)[0]
    assert made != tokens_of(lm, [prompt], None, max_new_tokens=24)[0]
    logits = np.array(lm.logits([prompt + made]))[0, len(prompt) - 1 : -1]
    logits[:, VALID:] = -np.inf
    for i, token in enumerate(made):
        assert token == (logits[i] - penalty * np.bincount(made[:i], minlength=512)).argmax()


@pytest.mark.parametrize("settings", [{"repetition_penalty": 1.4}, {"no_repeat_ngram": 2}, {"min_new_tokens": 14}])
def test_greedy_tokens_with_penalties_are_those_of_transformers(pair, settings):
    model, lm = pair
    eos = 77  # which this model likes to say early
    rng = np.random.default_rng(5)
    prompts = [rng.integers(4, VALID, length).tolist() for length in (6, 13)]
    theirs = {"no_repeat_ngram_size" if name == "no_repeat_ngram" else name: value for name, value in settings.items()}
    expected = their_tokens(model, prompts, eos, 24, **theirs)
    assert tokens_of(lm, prompts, eos, max_new_tokens=24, **settings) == expected


def test_draws_follow_the_probabilities():
    logits = np.full(512, -np.inf, np.float32)
    logits[[10, 20, 30, 40]] = np.log([0.5, 0.3, 0.15, 0.05])
    logits = np.maximum(logits, -1e4)
    lm = constant(logits)

    def shares(**sample):
        made = [token for seed in range(8)
                for row in tokens_of(lm, [[5]] * 32, None, max_new_tokens=16, temperature=1.0, seed=seed, **sample)
                for token in row]  # fmt: skip
        assert len(made) == 8 * 32 * 16
        return {token: made.count(token) / len(made) for token in sorted(set(made))}

    # 4096 draws: a share's standard deviation is below 0.008.
    assert shares() == pytest.approx({10: 0.5, 20: 0.3, 30: 0.15, 40: 0.05}, abs=0.03)
    assert shares(top_k=2) == pytest.approx({10: 0.625, 20: 0.375}, abs=0.03)
    assert shares(top_p=0.9) == pytest.approx({10: 0.5 / 0.95, 20: 0.3 / 0.95, 30: 0.15 / 0.95}, abs=0.03)


# Samples, and what their draws depend on

DRAWN = {"max_new_tokens": 16, "temperature": 1.0, "top_p": 0.95, "seed": 3}


def test_samples_differ_and_each_is_what_it_is_alone(pair):
    _, lm = pair
    prompts = [lm.tokenizer.encode(text) for text in (KOREAN[0][:9], KOREAN[1], "마을")]
    rows = tokens_of(lm, prompts, samples=4, **DRAWN)
    assert len(rows) == 12
    assert len(set(map(tuple, rows))) == 12
    assert tokens_of(lm, prompts, samples=2, **DRAWN) == [row for i in (0, 4, 8) for row in rows[i : i + 2]]
    texts = lm.generate(prompts, samples=4, **DRAWN)
    assert [len(of_prompt) for of_prompt in texts] == [4, 4, 4]
    assert lm.generate(prompts, **DRAWN) == [of_prompt[0] for of_prompt in texts]


def test_a_split_call_draws_the_same(pair):
    """Any batches of a call, given the number of the first prompt of each."""
    _, lm = pair
    prompts = [lm.tokenizer.encode(text) for text in KOREAN] * 2
    whole = tokens_of(lm, prompts, samples=2, **DRAWN)
    assert len(set(map(tuple, whole))) == len(whole)
    for size in (1, 3, 7):
        parts = [tokens_of(lm, prompts[i : i + size], samples=2, first=i, **DRAWN) for i in range(0, 10, size)]
        assert sum(parts, []) == whole  # noqa: RUF017


def test_log_probabilities_are_those_of_the_score(pair):
    """Whatever chose the tokens: the model's own, of each token made."""
    _, lm = pair
    prompts = [lm.tokenizer.encode(text) for text in KOREAN[:3]]
    made = lm.complete(prompts, samples=2, repetition_penalty=1.2, **DRAWN)
    for prompt, completions in zip(prompts, made, strict=True):
        for completion in completions:
            logits = np.array(lm.logits([prompt + completion.ids]))[0, len(prompt) - 1 : -1]
            expected = torch.log_softmax(torch.from_numpy(logits), -1).numpy()[range(len(logits)), completion.ids]
            np.testing.assert_allclose(completion.log_probabilities, expected, rtol=1e-4, atol=1e-5)
