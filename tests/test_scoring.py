"""Scores against torch, and against models whose output is known."""

import numpy as np
import pytest
import speakers
import torch
from models import KOREAN
from speakers import EOS, constant, pieces, script, tokenizer

from polyglot_jax.config import InputError


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A model with a context of 32 tokens."""
    return speakers.pair(tmp_path_factory.mktemp("short") / "pair", seed=13, max_position_embeddings=32)


def their_score(model, context, continuation):
    before, after = tokenizer().encode(context) or [EOS], tokenizer().encode(continuation)
    ids = torch.tensor([(before + after)[-33:]])  # 32 are read, the last is only predicted
    with torch.no_grad():
        logs = torch.log_softmax(model(ids[:, :-1]).logits[0].double(), dim=-1)
    targets = ids[0, 1:]
    picked = logs.gather(1, targets[:, None])[-len(after) :].sum()
    return float(picked), bool((logs.argmax(-1) == targets)[-len(after) :].all())


def test_score_is_that_of_torch(short):
    model, lm = short
    cases = [
        (KOREAN[0][:8], " 강가에"),
        ("", "마을 사람들은"),
        (KOREAN[1] * 3, " 김치를 담그고"),  # loses its beginning
        (KOREAN[2], KOREAN[3][:30]),  # most of it
        ("마을", "a"),
        ("마을", " 뒷산"),
    ]
    assert len(tokenizer().encode(KOREAN[1] * 3)) > 33
    # A continuation of 32 tokens leaves room for one token before it.
    exactly = "abcdefghijklmnopqrstuvwxyz012345"
    assert len(tokenizer().encode(exactly)) == 32
    cases.append((KOREAN[0], exactly))
    expected = [their_score(model, *case) for case in cases]
    for batch_size in (16, 3):
        sums, greedy = lm.score(*zip(*cases, strict=True), batch_size=batch_size)
        np.testing.assert_allclose(sums, [score for score, _ in expected], rtol=1e-5)
        assert greedy.tolist() == [is_greedy for _, is_greedy in expected]
    empty = lm.score([""], ["마을"])
    np.testing.assert_allclose(empty.log_probabilities, lm.score(["<|endoftext|>"], ["마을"]).log_probabilities)


def test_score_knows_what_is_greedy():
    prompt, ids, text = pieces()
    lm = script(ids)
    scores = lm.score([prompt, prompt, text[:2]], [text[:2], text[:1] + "차", text[2:7]])
    assert scores.is_greedy.tolist() == [True, False, True]


def test_score_divides_by_the_padding_too():
    """As GPT-NeoX trains: the softmax is over all rows."""
    lm = constant(np.zeros(512, np.float32))
    np.testing.assert_allclose(lm.score(["마을"], ["a"]).log_probabilities, [-np.log(512)], rtol=1e-6)


def test_score_refuses(short):
    _, lm = short
    with pytest.raises(InputError, match="continuation of 0 tokens"):
        lm.score(["마을"], [""])
    with pytest.raises(InputError, match=r"model\.context=32"):
        lm.score(["마을"], [KOREAN[3] * 3])
    with pytest.raises(InputError, match="contexts: 2 for 1"):
        lm.score(["마을", "사람"], ["a"])
    with pytest.raises(InputError, match=r"^continuations=.*: must be a list of strings"):
        lm.score(["마을", "사람"], "ab")
