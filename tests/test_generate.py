"""Generation, sampling, streaming and scoring, against transformers, torch and models whose output is known."""

import copy
import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from models import KOREAN, model_config, off_by, random_params, small_tokenizer
from parity import transformers_model
from transformers import GPTNeoXConfig, LogitsProcessorList
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import polyglot_jax
from polyglot_jax import checkpoint
from polyglot_jax.checkpoint import flatten, unflatten
from polyglot_jax.config import Config, DataConfig, InputError, MeshConfig, SampleConfig, TrainConfig
from polyglot_jax.generate import Generator, Sampling, filter_logits
from polyglot_jax.language_model import LanguageModel
from polyglot_jax.model import Transformer, split_layers
from polyglot_jax.sharding import make_mesh

EOS = 2
VALID = 403


def config_of(model, **sample):
    return Config(
        model=model,
        data=DataConfig(valid_ids=VALID, eos_id=EOS),
        train=TrainConfig(sequence_length=min(model.context, 2048)),
        sample=SampleConfig(**sample),
    )


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


def theirs(**changes):
    return GPTNeoXConfig(
        **{
            "vocab_size": 512,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 96,
            "max_position_embeddings": 128,
            "rotary_pct": 0.5,
        }
        | changes
    )


@pytest.fixture(scope="module")
def pair(tmp_path_factory, tokenizer):
    """A random model of transformers', and ours of the same weights, loaded from its folder."""
    model, _, _ = transformers_model(theirs(), seed=11)
    path = tmp_path_factory.mktemp("pair")
    model.save_pretrained(path)
    (path / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    return model, polyglot_jax.load(path)


@pytest.fixture(scope="module")
def silent(tokenizer):
    """A model of one layer, all of whose weights are 0."""
    model = model_config(layers=1, embed=512, heads=1, mlp=8, context=128)
    params = jax.tree.map(np.zeros_like, random_params(model, seed=0))
    return LanguageModel(config_of(model), split_layers(params), tokenizer)


def changed(silent, **leaves) -> LanguageModel:
    """The silent model with some weights set; what is compiled is shared."""
    lm = copy.copy(silent)
    lm.params = unflatten(flatten(silent.params) | {name.replace("__", "/"): leaf for name, leaf in leaves.items()})
    return lm


def constant(silent, logits) -> LanguageModel:
    """A model with these logits, whatever it reads."""
    head = np.zeros((512, 512), np.float32)
    head[:, 0] = logits
    return changed(silent, final_norm__bias=np.eye(512, dtype=np.float32)[0], head__kernel=head)


def script(silent, ids) -> LanguageModel:
    """A model that, after a token of `ids`, makes the next one. No token may come twice."""
    assert len(set(ids)) == len(ids)
    head = np.zeros((512, 512), np.float32)
    head[ids[1:], ids[:-1]] = 1
    ones = np.ones(512, np.float32)
    return changed(silent, embed__kernel=np.diag(ones), final_norm__scale=ones, head__kernel=head)


def tokens_of(lm, prompts, eos=EOS, **sample):
    """The tokens that `generate` would turn into text."""
    with lm._on_mesh():
        return list(lm._generator.run(lm.params, prompts, SampleConfig(**sample), [] if eos is None else [eos]))[-1]


# Against transformers


@pytest.mark.parametrize("eos", [EOS, 77])
def test_greedy_tokens_are_those_of_transformers(pair, eos):
    model, lm = pair
    rng = np.random.default_rng(1)
    prompts = [rng.integers(4, VALID, length).tolist() for length in (5, 1, 19, 12)]
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=30,
            do_sample=False,
            eos_token_id=eos,
            pad_token_id=eos,
            suppress_tokens=list(range(VALID, 512)),
        )
        expected.append(made[0, len(prompt) :].tolist())
    assert tokens_of(lm, prompts, eos, max_new_tokens=30) == expected
    assert [tokens_of(lm, [prompt], eos, max_new_tokens=30)[0] for prompt in prompts] == expected
    assert {len(made) for made in expected} != {1}


def test_a_prompt_does_not_see_its_company(pair):
    _, lm = pair
    prompts = [KOREAN[0][:9], KOREAN[1], "마을", KOREAN[2][:5]]
    together = lm.generate(prompts, max_new_tokens=20)
    assert together == [lm.generate(prompt, max_new_tokens=20)[0] for prompt in prompts]
    assert len(set(together)) == len(together)
    # Drawn tokens depend on the place in the list, so that two samples of one prompt differ, and on nothing else.
    drawn = lm.generate(prompts, max_new_tokens=20, temperature=1.0, seed=3)
    assert drawn[:1] == lm.generate(prompts[:1], max_new_tokens=20, temperature=1.0, seed=3)
    assert drawn[:3] == lm.generate(prompts[:3], max_new_tokens=20, temperature=1.0, seed=3)
    one, two = lm.generate(["마을", "마을"], max_new_tokens=20, temperature=1.0, seed=3)
    assert one != two


def test_the_whole_context_can_be_used(pair):
    _, lm = pair
    prompt = list(range(10, 110))
    made = tokens_of(lm, [prompt], None, max_new_tokens=28)[0]
    assert len(made) == 28
    logits = np.array(lm.logits([prompt + made]))[0, 99:-1]
    logits[:, VALID:] = -np.inf
    assert made == logits.argmax(-1).tolist()


def their_filter(logits, temperature, top_k, top_p):
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    return warpers(None, torch.from_numpy(logits)).numpy()


@pytest.mark.parametrize("ties", [False, True])
def test_filter_is_that_of_transformers(ties):
    """Temperature, then top-k, then top-p, with 200 settings on 4 rows each."""
    rng = np.random.default_rng(int(ties))
    ours = jax.jit(filter_logits)
    cut = set()
    for _ in range(200):
        logits = (3 * rng.standard_normal((4, 60))).astype(np.float32)
        if ties:
            logits = np.round(logits)
        temperature = float(rng.choice([0.3, 0.7, 1.0, 1.9]))
        top_k = int(rng.choice([0, 1, 2, 7, 30, 60, 100]))
        top_p = float(rng.choice([1.0, 0.02, *rng.uniform(0.1, 0.99, 3)]))
        expected = their_filter(logits, temperature, top_k, top_p)
        # Of several tokens as likely as the least likely one kept, theirs drops those that come first; ours keeps all.
        least = np.where(np.isfinite(expected), expected, np.inf).min(-1, keepdims=True)
        scaled = their_filter(logits, temperature, 0, 1.0)
        expected = np.where(scaled >= least, scaled, -np.inf)
        sample = SampleConfig(temperature=temperature, top_k=top_k, top_p=top_p)
        result = np.asarray(ours(logits, Sampling.of(sample)))
        np.testing.assert_array_equal(np.isfinite(result), np.isfinite(expected), err_msg=str(sample))
        np.testing.assert_allclose(result, expected, rtol=1e-6)
        cut |= set(np.isfinite(result).sum(-1).tolist())
    assert {1, 2, 7, 30, 60} <= cut


def test_draws_follow_the_probabilities(silent):
    logits = np.full(512, -np.inf, np.float32)
    logits[[10, 20, 30, 40]] = np.log([0.5, 0.3, 0.15, 0.05])
    logits = np.maximum(logits, -1e4)
    lm = constant(silent, logits)

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


def test_seeds(pair):
    _, lm = pair
    texts = [lm.generate(KOREAN[0], max_new_tokens=24, temperature=0.9, seed=seed)[0] for seed in (0, 1, 2, 0)]
    assert texts[0] == texts[3]
    assert len(set(texts)) == 3
    greedy = [lm.generate(KOREAN[0], max_new_tokens=24, seed=seed)[0] for seed in (0, 1)]
    assert greedy[0] == greedy[1]


# Where generation ends


@pytest.mark.parametrize("temperature", [0.0, 1.0, 5.0])
def test_padding_is_never_made(silent, temperature):
    """Ids that no text has, with the largest logits of all."""
    logits = np.zeros(512, np.float32)
    logits[VALID:] = 50
    logits[300:310] = 3
    lm = constant(silent, logits)
    made = np.array(tokens_of(lm, [[5], [6, 7]], None, max_new_tokens=64, temperature=temperature))
    assert made.shape == (2, 64)
    assert made.max() < VALID
    if temperature == 0:
        assert (made == 300).all()
    else:
        assert len(np.unique(made)) > 5


def test_logits_are_not_masked(silent):
    logits = np.zeros(512, np.float32)
    logits[VALID:] = 50
    found = constant(silent, logits).logits([[5, 6, 7]])
    assert (found.dtype, found.shape) == (jnp.float32, (1, 3, 512))
    np.testing.assert_allclose(found[0], np.tile(logits, (3, 1)), rtol=1e-6)


def test_logits_are_those_of_transformers(pair):
    model, lm = pair
    tokens = np.random.default_rng(2).integers(0, 512, (3, 17))
    with torch.no_grad():
        assert off_by(lm.logits(tokens), model(torch.from_numpy(tokens)).logits) <= 1e-5
    with pytest.raises(InputError, match=r"tokens: int64\[17\]; logits takes int\[B, T\]"):
        lm.logits(tokens[0])
    for bad in ([[512]], [[-1]], [[1.5]]):
        with pytest.raises(InputError, match=r"^tokens: "):
            lm.logits(bad)


def test_end_of_text_ends(silent, tokenizer):
    first = tokenizer.encode("리")
    ids = [*tokenizer.encode("마을"), EOS, *tokenizer.encode(" 옛날 오면")]
    lm, prompt = script(silent, first + ids), "리"
    assert tokens_of(lm, [first], max_new_tokens=12) == [ids[: ids.index(EOS) + 1]]
    assert lm.generate(prompt, max_new_tokens=12) == ["마을"]
    assert "".join(lm.stream(prompt, max_new_tokens=12)) == "마을"
    # Stop strings replace the end of text, none at all included.
    assert lm.generate(prompt, max_new_tokens=len(ids), stop=[]) == ["마을 옛날 오면"]
    assert "".join(lm.stream(prompt, max_new_tokens=len(ids), stop=[])) == "마을 옛날 오면"
    assert lm.generate(prompt, max_new_tokens=len(ids), stop=["날"]) == ["마을 옛"]
    assert lm.generate(prompt, max_new_tokens=len(ids), stop="날") == ["마을 옛"]
    # A special token among them is one, though the text never shows it.
    assert lm.generate(prompt, max_new_tokens=len(ids), stop=["날", "<|endoftext|>"]) == ["마을"]
    assert "".join(lm.stream(prompt, max_new_tokens=len(ids), stop=["<|endoftext|>"])) == "마을"
    with pytest.raises(InputError, match="stop: an empty string"):
        lm.generate(prompt, stop=[""])


@pytest.mark.parametrize("count", [1, 7, 8, 9, 16])
def test_no_stop_makes_exactly_max_new_tokens(silent, tokenizer, count):
    logits = np.zeros(512, np.float32)
    logits[EOS] = 5
    rows = tokens_of(constant(silent, logits), [[5], [6]], None, max_new_tokens=count)
    assert [len(row) for row in rows] == [count] * 2
    logits[tokenizer.encode("a")] = 9
    lm = constant(silent, logits)
    assert lm.generate(["마을", "노래"], max_new_tokens=count, stop=[]) == ["a" * count] * 2
    assert "".join(lm.stream("마을", max_new_tokens=count, stop=[])) == "a" * count


@pytest.fixture(scope="module")
def pieces(tokenizer):
    """A prompt, and a text after it of which no token comes twice: some are bytes of a character, some whole words."""
    prompt, text = "리", "마을 사람들은 강가에 깡🙂a 옛날 오면"
    ids = tokenizer.encode(prompt) + tokenizer.encode(text)
    assert tokenizer.decode(ids) == prompt + text
    parts = [tokenizer.decode([i]) for i in ids]
    assert parts.count("\ufffd") > 5
    assert " 사람들은" in parts
    return prompt, ids, text


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
def test_stop_strings(silent, pieces, stop):
    prompt, ids, text = pieces
    lm = script(silent, ids)
    expected = text[: min((text.index(s) for s in stop if s in text), default=None)]
    assert lm.generate(prompt, max_new_tokens=len(ids) - 1, stop=stop) == [expected]
    streamed = list(lm.stream(prompt, max_new_tokens=len(ids) - 1, stop=stop))
    assert "".join(streamed) == expected
    assert all(streamed)
    assert not any("\ufffd" in piece for piece in streamed)


def test_stop_strings_of_several_prompts(silent, pieces):
    """Each text ends by itself, though one of them stops at once and one never."""
    lm = script(silent, pieces[1])
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


def test_stream_waits_for_the_rest_of_a_character(silent, pieces):
    prompt, ids, text = pieces
    streamed = list(script(silent, ids).stream(prompt, max_new_tokens=len(ids) - 1))
    assert "".join(streamed) == text
    assert len(streamed) > 1
    assert not any("\ufffd" in piece for piece in streamed)


def test_the_end_of_text_may_have_another_name(silent):
    lm = copy.copy(script(silent, [10, 11, 1, 12]))
    lm.config = dataclasses.replace(lm.config, data=dataclasses.replace(lm.config.data, eos_id=1))
    assert lm.tokenizer.decode([1], skip_special_tokens=False) == "<eos>"
    assert lm.generate([[10]], max_new_tokens=3, stop=[]) == [lm.tokenizer.decode([11, 12])]
    for stop in (None, ["<eos>"], ["할머니", "<eos>"]):
        assert lm.generate([[10]], max_new_tokens=3, stop=stop) == [lm.tokenizer.decode([11])]


# Inputs


def test_a_prompt_too_long_is_an_input_error(pair):
    _, lm = pair
    prompt = KOREAN[3] * 8
    length = len(lm.tokenizer.encode(prompt))
    assert length > 128
    message = rf"sample\.max_new_tokens=8: with a prompt of {length} tokens .*model\.context=128"
    with pytest.raises(InputError, match=message):
        lm.generate(["마을", prompt], max_new_tokens=8)
    with pytest.raises(InputError, match=r"model\.context=128; shorten the prompt"):
        list(lm.stream(prompt, max_new_tokens=8))
    room = 128 - len(lm.tokenizer.encode(KOREAN[0]))
    with pytest.raises(InputError, match=f"lower it to {room} "):
        lm.generate(KOREAN[0], max_new_tokens=room + 1)


@pytest.mark.parametrize(
    ("sample", "name"),
    [({"max_new_tokens": 0}, "max_new_tokens"), ({"temperature": -1.0}, "temperature"), ({"top_p": 0.0}, "top_p"),
     ({"top_k": -1}, "top_k"), ({"seed": -1}, "seed")],
)  # fmt: skip
def test_bad_settings_are_input_errors(pair, sample, name):
    with pytest.raises(InputError, match=rf"^sample\.{name}="):
        pair[1].generate("마을", **sample)


def test_few_and_empty_prompts(pair):
    _, lm = pair
    assert lm.generate([]) == []
    made = lm.generate(["", "마을"], max_new_tokens=20)
    assert made[0] == lm.tokenizer.decode(tokens_of(lm, [[EOS]], max_new_tokens=20)[0])
    assert lm.generate("마을", max_new_tokens=20) == made[1:]
    assert lm.generate([[], lm.tokenizer.encode("마을")], max_new_tokens=20) == made  # ids are taken as they are


def test_a_model_without_a_tokenizer(tmp_path):
    model = model_config()
    checkpoint.save(tmp_path / "checkpoint", config_of(model), random_params(model, seed=12))
    lm = polyglot_jax.load(tmp_path / "checkpoint")
    assert lm.tokenizer is None
    assert "tokenizer: none" in repr(lm)
    assert np.isfinite(lm.logits([[1, 2, 3]])).all()
    for ask in (
        lambda: lm.generate("마을"),
        lambda: list(lm.stream("마을")),
        lambda: lm.score(["마을"], [" 사람"]),
    ):
        with pytest.raises(InputError, match=r"without a tokenizer\.json"):
            ask()


def test_defaults_are_those_of_the_config(pair):
    _, lm = pair
    sample = SampleConfig(max_new_tokens=19, temperature=0.8, top_k=50, top_p=0.9, seed=5)
    configured = copy.copy(lm)
    configured.config = dataclasses.replace(lm.config, sample=sample)
    expected = lm.generate("마을", 19, 0.8, 50, 0.9, 5)
    assert configured.generate("마을") == expected
    assert configured.generate("마을", seed=6) == lm.generate("마을", 19, 0.8, 50, 0.9, 6) != expected


# Compilation


def compiled(caplog, work):
    """Names of the functions that `work()` compiles."""
    caplog.clear()
    with caplog.at_level(logging.WARNING), jax.log_compiles():
        work()
    return [record.getMessage() for record in caplog.records if "Finished XLA compilation" in record.getMessage()]


def test_another_prompt_compiles_nothing(pair, caplog):
    _, lm = pair
    fresh = LanguageModel(lm.config, lm.params, lm.tokenizer)
    run = fresh._generator.run

    def ask(length, **sample):
        return compiled(caplog, lambda: list(run(fresh.params, [[7] * length], SampleConfig(**sample), [EOS])))

    assert len([name for name in ask(3, max_new_tokens=20) if "_start" in name or "_continue" in name]) == 2
    for length in (1, 4, 9, 16):
        assert ask(length, max_new_tokens=20) == []
    # Nor do other settings, nor a few tokens more.
    assert ask(5, max_new_tokens=20, temperature=0.7, top_k=3, top_p=0.8, seed=9) == []
    assert ask(5, max_new_tokens=17) == []
    # A longer prompt is another bucket: its reading is compiled anew.
    assert any("_start" in name for name in ask(17, max_new_tokens=20))


def test_compilations_are_bounded(pair, monkeypatch):
    """Every length a prompt can have, with few shapes: one for each power of two."""
    generator = Generator(pair[1].model, pair[1].config)
    shapes = set()

    class Stop(Exception):
        pass

    def start(slots, room, params, tokens, lengths, done):
        shapes.add((slots, room, tokens.shape))
        raise Stop

    monkeypatch.setitem(generator.__dict__, "_start", start)
    for length in range(1, 109):
        with pytest.raises(Stop):
            next(generator.run(None, [[7] * length], SampleConfig(max_new_tokens=20), [EOS]))
    assert {tokens for _, _, tokens in shapes} == {(1, 16), (1, 32), (1, 64), (1, 128)}
    assert len(shapes) <= 5


# score


@pytest.fixture(scope="module")
def short(tmp_path_factory, tokenizer):
    """As `pair`, with a context of 32 tokens."""
    model, _, _ = transformers_model(theirs(max_position_embeddings=32), seed=13)
    path = tmp_path_factory.mktemp("short")
    model.save_pretrained(path)
    (path / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    return model, polyglot_jax.load(path)


def their_score(model, tokenizer, context, continuation):
    before, after = tokenizer.encode(context) or [EOS], tokenizer.encode(continuation)
    ids = torch.tensor([(before + after)[-33:]])  # 32 are read, the last is only predicted
    with torch.no_grad():
        logs = torch.log_softmax(model(ids[:, :-1]).logits[0].double(), dim=-1)
    targets = ids[0, 1:]
    picked = logs.gather(1, targets[:, None])[-len(after) :].sum()
    return float(picked), bool((logs.argmax(-1) == targets)[-len(after) :].all())


def test_score_is_that_of_torch(short, tokenizer):
    model, lm = short
    cases = [
        (KOREAN[0][:8], " 강가에"),
        ("", "마을 사람들은"),
        (KOREAN[1] * 3, " 김치를 담그고"),  # loses its beginning
        (KOREAN[2], KOREAN[3][:30]),  # most of it
        ("마을", "a"),
        ("마을", " 뒷산"),
    ]
    assert len(tokenizer.encode(KOREAN[1] * 3)) > 33
    # A continuation of 32 tokens leaves room for one token before it.
    exactly = "abcdefghijklmnopqrstuvwxyz012345"
    assert len(tokenizer.encode(exactly)) == 32
    cases.append((KOREAN[0], exactly))
    expected = [their_score(model, tokenizer, *case) for case in cases]
    for batch_size in (16, 3):
        sums, greedy = lm.score(*zip(*cases, strict=True), batch_size=batch_size)
        np.testing.assert_allclose(sums, [score for score, _ in expected], rtol=1e-5)
        assert greedy.tolist() == [is_greedy for _, is_greedy in expected]
    empty = lm.score([""], ["마을"])
    np.testing.assert_allclose(empty.log_probabilities, lm.score(["<|endoftext|>"], ["마을"]).log_probabilities)


def test_score_knows_what_is_greedy(silent, pieces):
    prompt, ids, text = pieces
    lm = script(silent, ids)
    scores = lm.score([prompt, prompt, text[:2]], [text[:2], text[:1] + "차", text[2:7]])
    assert scores.is_greedy.tolist() == [True, False, True]


def test_score_divides_by_the_padding_too(silent):
    """As GPT-NeoX trains: the softmax is over all rows."""
    lm = constant(silent, np.zeros(512, np.float32))
    np.testing.assert_allclose(lm.score(["마을"], ["a"]).log_probabilities, [-np.log(512)], rtol=1e-6)


def test_score_refuses(short):
    _, lm = short
    with pytest.raises(InputError, match="continuation of 0 tokens"):
        lm.score(["마을"], [""])
    with pytest.raises(InputError, match=r"model\.context=32"):
        lm.score(["마을"], [KOREAN[3] * 3])
    with pytest.raises(InputError, match="contexts: 2 for 1"):
        lm.score(["마을", "사람"], ["a"])
    with pytest.raises(InputError, match="contexts: 2 for 2 continuations; give a list"):
        lm.score(["마을", "사람"], "ab")


# On a mesh


def test_eight_devices_generate_what_one_does(tmp_path, tokenizer):
    model, path = model_config(), tmp_path / "checkpoint"
    checkpoint.save(path, config_of(model), random_params(model, seed=14), tokenizer=tokenizer.to_json())
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    one, eight = polyglot_jax.load(path), polyglot_jax.load(path, mesh=mesh)
    sharding = eight.params["layer_0"]["mlp"]["up"]["kernel"].sharding
    assert len(sharding.device_set) == 8
    assert sharding.shard_shape((64, 96)) == (64, 24)  # fsdp splits as tensor does: decoding gathers no weights
    prompts = [KOREAN[0][:9], KOREAN[1], "마을", KOREAN[2][:5], KOREAN[4]]  # not a multiple of the 4 replicas
    assert eight.generate(prompts, max_new_tokens=16) == one.generate(prompts, max_new_tokens=16)
    contexts, continuations = KOREAN[:3], KOREAN[2:]
    np.testing.assert_allclose(
        eight.score(contexts, continuations).log_probabilities,
        one.score(contexts, continuations).log_probabilities,
        rtol=1e-5,
    )
    # Between two pieces the mesh is not the caller's.
    pieces = eight.stream("마을", max_new_tokens=16, stop=[])
    next(pieces)
    assert jax.sharding.get_abstract_mesh().empty
    one.logits([[1]])
    pieces.close()
    for rows in (1, 3):  # a single prompt, and one row less than the replicas
        tokens = np.arange(rows * 20).reshape(rows, 20)
        assert off_by(eight.logits(tokens), one.logits(tokens)) < 1e-5
    with pytest.raises(InputError, match=r"mesh.tensor=8: does not divide model.heads=4"):
        polyglot_jax.load(path, mesh=make_mesh(MeshConfig(tensor=8)))


def test_bfloat16_and_the_split_tree(tmp_path):
    model = model_config()
    params = random_params(model, seed=15)
    checkpoint.save(tmp_path / "checkpoint", config_of(model), params)
    lm = polyglot_jax.load(tmp_path / "checkpoint", dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(lm.params)} == {jnp.dtype(jnp.bfloat16)}
    assert set(lm.params) == {"embed", "layer_0", "layer_1", "final_norm", "head"}
    tokens = np.arange(20)[None]
    full = Transformer(model).apply({"params": params}, tokens)
    assert 0 < off_by(lm.logits(tokens), full) < 0.05
    made = list(lm._generator.run(lm.params, [[5, 6, 7]], SampleConfig(max_new_tokens=8), []))[-1][0]
    assert len(made) == 8
