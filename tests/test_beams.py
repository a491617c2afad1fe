"""Beam search against that of transformers, token for token, in float32."""

import numpy as np
import pytest
import speakers
import torch
from models import KOREAN
from speakers import VALID

from polyglot_jax.config import InputError, SampleConfig

EOS = 77  # which these models like to say early


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return speakers.pair(tmp_path_factory.mktemp("beams") / "pair", seed=11)


def prompts():
    rng = np.random.default_rng(1)
    return [rng.integers(4, VALID, length).tolist() for length in (5, 1, 19, 12)]


def their_beams(model, prompt, sample, count):
    """Sequences, best first, without prompt and padding."""
    ids = torch.tensor([prompt])
    found = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=sample.max_new_tokens,
        num_beams=sample.beams,
        num_return_sequences=count,
        length_penalty=sample.length_penalty,
        early_stopping={"no": False, "yes": True, "never": "never"}[sample.early_stopping],
        repetition_penalty=sample.repetition_penalty,
        no_repeat_ngram_size=sample.no_repeat_ngram,
        min_new_tokens=sample.min_new_tokens or None,
        do_sample=False,
        eos_token_id=EOS,
        pad_token_id=511,  # which is never made
        suppress_tokens=list(range(VALID, 512)),
        return_dict_in_generate=True,
        output_scores=True,
    )
    rows = found.sequences[:, len(prompt) :].tolist()
    return [[i for i in row if i != 511] for row in rows]


def our_beams(lm, prompts, sample, ends=(EOS,)):
    return [[made.ids for made in row] for row in lm._beam_search.run(lm.params, prompts, sample, ends)]


@pytest.mark.parametrize(
    "settings",
    [
        {"beams": 2},
        {"beams": 4},
        {"beams": 4, "early_stopping": "yes"},
        {"beams": 4, "early_stopping": "never", "length_penalty": 0.5},
        {"beams": 2, "length_penalty": -1.0, "early_stopping": "never"},
        {"beams": 4, "length_penalty": 0.0},
        {"beams": 4, "repetition_penalty": 1.5, "no_repeat_ngram": 3, "min_new_tokens": 6},
    ],
    ids=str,
)
def test_beams_are_those_of_transformers(pair, settings):
    model, lm = pair
    sample = SampleConfig(max_new_tokens=24, **settings)
    expected = [their_beams(model, prompt, sample, sample.beams) for prompt in prompts()]
    assert our_beams(lm, prompts(), sample) == expected
    assert len({len(row) for rows in expected for row in rows}) > 1  # some end, and not all at once


def test_beams_do_not_see_their_company(pair):
    _, lm = pair
    sample = SampleConfig(max_new_tokens=24, beams=4)
    together = our_beams(lm, prompts(), sample)
    assert [our_beams(lm, [prompt], sample)[0] for prompt in prompts()[:3]] == together[:3]


def test_beams_of_several_ends(pair):
    """Twice as many candidates are kept as with one end."""
    _, lm = pair
    sample = SampleConfig(max_new_tokens=20, beams=3)
    found = our_beams(lm, prompts(), sample, (EOS, 88, 99))
    assert {row[-1] for rows in found for row in rows if len(row) < 20} <= {EOS, 88, 99}


def test_complete_gives_beams_best_first(pair):
    _, lm = pair
    found = lm.complete(KOREAN[:2], samples=3, stop=[], beams=4, max_new_tokens=12, temperature=0)
    for prompt, row in zip(KOREAN[:2], found, strict=True):
        sums = [sum(completion.log_probabilities) for completion in row]
        assert sums == sorted(sums, reverse=True)
        assert len({tuple(completion.ids) for completion in row}) == 3
        scores = lm.score([prompt] * 3, [completion.text for completion in row])
        same = [lm.tokenizer.encode(completion.text) == completion.ids for completion in row]
        np.testing.assert_allclose(np.array(sums)[same], scores.log_probabilities[same], rtol=1e-5)
        assert {completion.finish for completion in row} == {"length"}
    best = lm.generate(KOREAN[:2], stop=[], beams=4, max_new_tokens=12, temperature=0)
    assert best == [row[0].text for row in found]
    greedy = lm.complete(KOREAN[:2], stop=[], max_new_tokens=12)
    assert all(
        sum(row[0].log_probabilities) >= sum(g[0].log_probabilities) for row, g in zip(found, greedy, strict=True)
    )


def test_beam_search_refuses(pair):
    _, lm = pair
    with pytest.raises(
        InputError, match=r"^sample\.beams=2: beam search draws nothing; set sample\.temperature=0\.5 to 0"
    ):
        lm.generate("마을", beams=2, temperature=0.5)
    with pytest.raises(InputError, match=r"samples=3: must be at most sample\.beams=2"):
        lm.complete("마을", samples=3, beams=2)
    with pytest.raises(InputError, match="stop='사람': a string ends no beam"):
        lm.generate("마을", beams=2, stop=["사람"])
    with pytest.raises(InputError, match="beam search knows no token before the last"):
        next(lm.stream("마을", beams=2))
