"""Text as it is made: stop strings, pieces that cut no character, interruptions."""

import pytest
import speakers
from models import KOREAN
from speakers import pieces, script


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return speakers.pair(tmp_path_factory.mktemp("speakers") / "pair")


@pytest.mark.parametrize(
    "stop",
    [
        ["사람"],
        ["강가에"],
        ["을 사"],  # across tokens
        ["깡"],  # a character of three tokens
        ["🙂"],
        ["에 깡🙂a 옛"],
        ["강가에서", "🙂a"],  # the first only begins
        ["옛날", "a 옛"],  # the later one in the list comes first
        ["마"],  # at once
        ["없는 말"],
        ["오면!"],  # begins at the very end
    ],
)
def test_stop_strings(stop):
    prompt, ids, text = pieces()
    lm = script(ids)
    expected = text[: min((text.index(s) for s in stop if s in text), default=None)]
    assert lm.generate(prompt, max_new_tokens=len(ids) - 1, stop=stop) == [expected]
    streamed = list(lm.stream(prompt, max_new_tokens=len(ids) - 1, stop=stop))
    assert "".join(streamed) == expected
    assert all(streamed)
    assert not any("\ufffd" in piece for piece in streamed)


def test_stop_strings_of_several_prompts():
    """Each text ends by itself, though one of them stops at once and one never."""
    lm = script(pieces()[1])
    made = lm.generate(["리", "마을", "마을 사람들은 강가에"], max_new_tokens=8, stop=["사람"])
    assert made == ["마을 ", " ", " 깡🙂"]


def test_stream_cuts_no_character(pair):
    """Random models speak in broken characters: what is streamed is what is generated, and whole."""
    _, lm = pair
    broken = 0
    for seed in range(6):
        sample = {"max_new_tokens": 40, "temperature": 1.0, "seed": seed, "stop": []}
        whole = lm.generate(KOREAN[2], **sample)[0]
        streamed = list(lm.stream(KOREAN[2], **sample))
        assert "".join(streamed) == whole
        assert len(streamed) > 1
        broken += "\ufffd" in whole
        # A character may be broken for good, but no piece but the last may end in one that could still be mended.
        assert not any(piece.endswith("\ufffd") for piece in streamed[:-1])
    assert broken


def test_stream_waits_for_the_rest_of_a_character():
    prompt, ids, text = pieces()
    streamed = list(script(ids).stream(prompt, max_new_tokens=len(ids) - 1))
    assert "".join(streamed) == text
    assert len(streamed) > 1
    assert not any("\ufffd" in piece for piece in streamed)
