"""Text as it is made: stop strings, pieces that cut no character, interruptions."""

import jax
import pytest
import speakers
from models import KOREAN
from speakers import EOS, pieces, script


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


def test_the_first_piece_comes_after_one_token(pair):
    """Then after 2, 4, and never more than 8 tokens at a time."""
    _, lm = pair
    limits = []
    run = lm._generator._continue
    lm._generator.__dict__["_continue"] = lambda form, params, state, over, limit, *rest: (
        limits.append(int(limit)) or run(form, params, state, over, limit, *rest)
    )
    try:
        pieces = lm.stream(KOREAN[0], max_new_tokens=30, stop=[])
        next(pieces)
        assert limits[0] == 1
        list(pieces)
    finally:
        lm._generator.__dict__["_continue"] = run
    assert limits == [1, 3, 7, 15, 23, 30]


def test_an_interrupted_stream_leaves_the_model_as_it_was(pair, monkeypatch):
    """Closed between pieces, and stopped by Ctrl-C while the device works."""
    _, lm = pair
    sample = {"max_new_tokens": 30, "stop": []}
    whole = lm.generate(KOREAN[0], **sample)
    pieces = lm.stream(KOREAN[0], **sample)
    begun = next(pieces)
    pieces.close()
    assert whole[0].startswith(begun)
    assert lm.generate(KOREAN[0], **sample) == whole

    fetch, calls = jax.device_get, []

    def interrupted(values):
        calls.append(values)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return fetch(values)

    monkeypatch.setattr(jax, "device_get", interrupted)
    begun = ""
    with pytest.raises(KeyboardInterrupt):
        for piece in lm.stream(KOREAN[0], **sample):
            begun += piece
    monkeypatch.undo()
    assert begun
    assert whole[0].startswith(begun)
    assert ["".join(lm.stream(KOREAN[0], **sample))] == lm.generate(KOREAN[0], **sample) == whole


def test_rows_that_met_their_stop_string_rest(monkeypatch):
    """One row ends at a special token and one at a string: neither goes on to the limit."""
    prompt, ids, _ = pieces()
    lm, looks = script([*ids, EOS]), []
    run = lm._generator.run

    def watched(*args):
        for made in run(*args):
            looks.append([len(row.ids) for row in made])
            yield made

    monkeypatch.setitem(lm._generator.__dict__, "run", watched)
    stop = ["사람", "<|endoftext|>"]
    made = lm.generate([lm.tokenizer.encode(prompt), ids[-1:]], max_new_tokens=len(ids) - 1, stop=stop)
    assert made == ["마을 ", ""]
    assert looks == [[1, 1], [3, 1], [7, 1]]  # of len(ids) - 1


def test_stop_strings_count_after_the_fewest_tokens():
    """What the first min_new_tokens tokens hold does not stop; what begins behind them does."""
    prompt, ids, text = pieces()
    lm = script(ids)
    least = len(lm.tokenizer.encode("마을 사람들은"))
    sample = {"max_new_tokens": len(ids) - 1, "stop": ["사람", "깡"]}
    assert lm.generate(prompt, **sample) == ["마을 "]
    expected = text[: text.index("깡")]
    assert lm.generate(prompt, min_new_tokens=least, **sample) == [expected]
    assert "".join(lm.stream(prompt, min_new_tokens=least, **sample)) == expected


def test_completions_say_why_they_ended():
    prompt, ids, text = pieces()
    lm = script(ids)
    [[by_string]] = lm.complete(prompt, stop=["깡"], max_new_tokens=len(ids) - 1)
    assert by_string.finish == "stop"
    assert by_string.text == text[: text.index("깡")]
    assert lm.tokenizer.decode(by_string.ids) == by_string.text + "깡"  # up to the last of its three tokens
    assert len(by_string.log_probabilities) == len(by_string.ids)
    [[by_length]] = lm.complete(prompt, stop=["깡"], max_new_tokens=3)
    assert (by_length.finish, len(by_length.ids)) == ("length", 3)
    first = lm.tokenizer.encode("리")
    [[by_end]] = script([*first, 50, 2, 51]).complete("리", max_new_tokens=9)
    assert (by_end.finish, by_end.ids, by_end.text) == ("end", [50, 2], lm.tokenizer.decode([50]))
