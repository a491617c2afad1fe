"""Generation against transformers and models whose output is known: tokens, ends, seeds, compilations, meshes."""

import copy
import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import speakers
import torch
from models import KOREAN, model_config, off_by, random_params
from speakers import EOS, VALID, config_of, constant, script, their_tokens, tokenizer, tokens_of

import polyglot_jax
from polyglot_jax import checkpoint, generate
from polyglot_jax.config import InputError, MeshConfig, SampleConfig
from polyglot_jax.generate import Batch, Generator
from polyglot_jax.language_model import LanguageModel
from polyglot_jax.sampling import Form, Sampling
from polyglot_jax.sharding import make_mesh


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return speakers.pair(tmp_path_factory.mktemp("speakers") / "pair")


# Against transformers


@pytest.mark.parametrize("eos", [EOS, 77])
def test_greedy_tokens_are_those_of_transformers(pair, eos):
    model, lm = pair
    rng = np.random.default_rng(1)
    prompts = [rng.integers(4, VALID, length).tolist() for length in (5, 1, 19, 12)]
    expected = their_tokens(model, prompts, eos, 30)
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


def test_seeds(pair):
    _, lm = pair
    texts = [lm.generate(KOREAN[0], max_new_tokens=24, temperature=0.9, seed=seed)[0] for seed in (0, 1, 2, 0)]
    assert texts[0] == texts[3]
    assert len(set(texts)) == 3
    greedy = [lm.generate(KOREAN[0], max_new_tokens=24, seed=seed)[0] for seed in (0, 1)]
    assert greedy[0] == greedy[1]


# Where generation ends


@pytest.mark.parametrize("temperature", [0.0, 1.0, 5.0])
def test_padding_is_never_made(temperature):
    """Ids that no text has, with the largest logits of all."""
    logits = np.zeros(512, np.float32)
    logits[VALID:] = 50
    logits[300:310] = 3
    lm = constant(logits)
    made = np.array(tokens_of(lm, [[5], [6, 7]], None, max_new_tokens=64, temperature=temperature))
    assert made.shape == (2, 64)
    assert made.max() < VALID
    if temperature == 0:
        assert (made == 300).all()
    else:
        assert len(np.unique(made)) > 5


def test_logits_are_not_masked():
    logits = np.zeros(512, np.float32)
    logits[VALID:] = 50
    found = constant(logits).logits([[5, 6, 7]])
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
    with pytest.raises(InputError, match=r"^tokens: .*logits takes int\[B, T\], rows of one length"):
        lm.logits([[1], [2, 3]])
    with pytest.raises(InputError, match="tokens: 129 in a row; the model takes 128"):
        lm.logits([[5] * 129])


def test_end_of_text_ends():
    first = tokenizer().encode("리")
    ids = [*tokenizer().encode("마을"), EOS, *tokenizer().encode(" 옛날 오면")]
    lm, prompt = script(first + ids), "리"
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
def test_no_stop_makes_exactly_max_new_tokens(count):
    logits = np.zeros(512, np.float32)
    logits[EOS] = 5
    rows = tokens_of(constant(logits), [[5], [6]], None, max_new_tokens=count)
    assert [len(row) for row in rows] == [count] * 2
    logits[tokenizer().encode("a")] = 9
    lm = constant(logits)
    assert lm.generate(["마을", "노래"], max_new_tokens=count, stop=[]) == ["a" * count] * 2
    assert "".join(lm.stream("마을", max_new_tokens=count, stop=[])) == "a" * count


def test_the_end_of_text_may_have_another_name():
    lm = copy.copy(script([10, 11, 1, 12]))
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


def test_only_if_asked_a_prompt_too_long_keeps_its_end(pair):
    _, lm = pair
    prompt = lm.tokenizer.encode(KOREAN[3] * 8)
    expected = lm.generate([prompt[-120:]], max_new_tokens=8)
    assert lm.generate([prompt, prompt[-120:]], max_new_tokens=8, keep_end=True) == expected * 2
    assert "".join(lm.stream(KOREAN[3] * 8, max_new_tokens=8, keep_end=True)) == expected[0]


def test_numbers_of_any_kind_are_the_same_settings(pair):
    _, lm = pair
    settings = {"max_new_tokens": 12, "temperature": 0.75, "top_p": 0.5, "min_p": 0.125, "repetition_penalty": 1.25}
    expected = lm.generate("마을", **settings, seed=5)
    assert expected != lm.generate("마을", max_new_tokens=12)
    for kind in (np.float32, jnp.float32):
        made = {name: kind(value) for name, value in settings.items() if name != "max_new_tokens"}
        assert lm.generate("마을", **made, max_new_tokens=np.int64(12), seed=jnp.int32(5)) == expected
    assert lm.generate("마을", temperature=2, max_new_tokens=9) == lm.generate(
        "마을", temperature=2.0, max_new_tokens=9
    )


@pytest.mark.parametrize(
    ("sample", "name"),
    [({"max_new_tokens": 0}, "max_new_tokens"), ({"temperature": -1.0}, "temperature"), ({"top_p": 0.0}, "top_p"),
     ({"top_k": -1}, "top_k"), ({"seed": -1}, "seed"), ({"top_p": 1e-46}, "top_p"), ({"top_k": 2.5}, "top_k"),
     ({"frequency_penalty": 1e39}, "frequency_penalty"), ({"length_penalty": 11.0}, "length_penalty"),
     ({"repetition_penalty": 1e-9}, "repetition_penalty"), ({"temperature": 1e-30}, "temperature"),
     ({"temperature": np.ones(2)}, "temperature"), ({"early_stopping": True}, "early_stopping"),
     ({"beams": 2.5}, "beams"), ({"max_new_tokens": "9"}, "max_new_tokens")],
)  # fmt: skip
def test_bad_settings_are_input_errors(pair, sample, name):
    with pytest.raises(InputError, match=rf"^sample\.{name}="):
        pair[1].generate("마을", **sample)


@pytest.mark.parametrize("ids", [[5, 512], [-1]])
def test_ids_that_are_no_ids_are_an_input_error(pair, ids):
    with pytest.raises(InputError, match=r"^prompt: ids from .* they are 0 to 511$"):
        pair[1].generate([[7], ids], max_new_tokens=2)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [([5, 6, 7], "prompt=5: prompts are strings, or each a list of ids"), (None, "prompt=None: "),
     ([[5.7, 6.2]], "ids are whole numbers"), (["마을", [5]], "prompt='마을': "),
     ("\ud800 봄", "a lone surrogate at 0"), ([["마", "을"]], "ids are whole numbers")],
)  # fmt: skip
def test_prompts_that_are_none_are_input_errors(pair, prompts, message):
    with pytest.raises(InputError, match=message):
        pair[1].generate(prompts, max_new_tokens=2)


@pytest.mark.parametrize("how", [{"samples": 1.5}, {"samples": 0}, {"samples": True}, {"first": 2**40}, {"first": -1}])
def test_numbers_that_count_nothing_are_input_errors(pair, how):
    with pytest.raises(InputError, match=f"^{next(iter(how))}=.*: must be a whole number from "):
        pair[1].generate("마을", max_new_tokens=2, **how)
    if "first" in how:
        with pytest.raises(InputError, match=r"^first="):
            next(pair[1].stream("마을", max_new_tokens=2, **how))
    with pytest.raises(InputError, match=r"^batch_size=0: must be a whole number from 1 to "):
        pair[1].score(["마을"], ["오면"], batch_size=0)


def test_numpys_numbers_count_too(pair):
    numbers = {"samples": np.int64(2), "first": np.int32(3)}
    plain = {name: int(value) for name, value in numbers.items()}
    drawn = {"max_new_tokens": 4, "temperature": 1.0}
    assert pair[1].generate("마을", **drawn, **numbers) == pair[1].generate("마을", **drawn, **plain)


@pytest.mark.parametrize("stop", [5, [5], [None], b"x"], ids=str)
def test_what_is_no_string_stops_nothing(pair, stop):
    with pytest.raises(InputError, match=r"^stop=.*: must be a string, a list of strings, or None"):
        pair[1].generate("마을", stop=stop)


@pytest.mark.parametrize("texts", [(3, 4), (iter(["마을"]), ["오면"]), (["마을"], "오면")])
def test_what_is_scored_is_a_list(pair, texts):
    with pytest.raises(InputError, match=r"^cont(exts|inuations)=.*: must be a list of strings$"):
        pair[1].score(*texts)


def test_samples_that_would_be_the_same_are_refused(pair):
    with pytest.raises(InputError, match=r"^samples=2: at sample\.temperature=0\.0 all would be the same; raise it"):
        pair[1].generate("마을", samples=2)


@pytest.mark.parametrize("how", [{"temperature": 1.0, "samples": 5}, {"beams": 3}], ids=str)
def test_what_has_no_room_is_refused_before_it_is_begun(pair, monkeypatch, how):
    """5 prompts, which are 8 rows."""
    lm, prompts = pair[1], ["마을"] * 5
    model = lm.config.model
    row = 2 * model.layers * model.embed * 4 * 64  # the cache of a row of 64 slots
    monkeypatch.setattr(generate, "free_memory", lambda devices: 8 * 6 * row)
    with pytest.raises(
        InputError, match=r"^5 prompt\(s\) x . (sample\(s\)|beams) of 64 tokens: need about .* MB are free; give "
    ):
        lm.generate(prompts, max_new_tokens=8, **how)
    monkeypatch.setattr(generate, "free_memory", lambda devices: 8 * 8 * row + 10**6)
    assert len(lm.generate(prompts, max_new_tokens=8, **how)) == 5


def test_logits_and_scores_that_have_no_room_are_refused(pair, monkeypatch):
    lm = pair[1]
    monkeypatch.setattr(generate, "free_memory", lambda devices: 4 * 3 * 8 * lm.config.model.vocab)
    with pytest.raises(InputError, match=r"^logits of 3 x 8 tokens: need about .*; give fewer rows$"):
        lm.logits(np.ones((3, 8), int))
    with pytest.raises(InputError, match=r"^batch_size=64: contexts of 16 tokens: need about .*; give a smaller one$"):
        lm.score([f"마을 {i}" for i in range(64)], [" 오면"] * 64, batch_size=64)


def test_a_row_takes_less_room_where_heads_are_split(pair, monkeypatch, tmp_path):
    """The same prompts, refused by one device, go over eight with an eighth of the room each."""
    model = pair[1].config.model
    cache = 2 * model.layers * model.embed * 4 * 128 * 16  # 16 rows of 128 slots
    monkeypatch.setattr(generate, "free_memory", lambda devices: cache)
    with pytest.raises(InputError, match=r"^16 prompt\(s\) x 1 sample\(s\) of 128 tokens: need about"):
        pair[1].generate(["마을"] * 16, max_new_tokens=100)
    checkpoint.save(tmp_path / "model", pair[1].config, random_params(model, seed=3))
    many = polyglot_jax.load(tmp_path / "model", mesh=make_mesh(MeshConfig(data=2, tensor=4)))
    many.tokenizer = pair[1].tokenizer
    assert len(many.generate(["마을"] * 16, max_new_tokens=100)) == 16


def test_unknown_settings_are_input_errors(pair):
    with pytest.raises(InputError, match=r"^sample\.top_q: no such setting; there are beams, "):
        pair[1].generate("마을", top_q=0.5)


def test_few_and_empty_prompts(pair):
    _, lm = pair
    assert lm.generate([]) == []
    made = lm.generate(["", "마을"], max_new_tokens=20)
    assert made[0] == lm.tokenizer.decode(tokens_of(lm, [[EOS]], max_new_tokens=20)[0])
    assert lm.generate("마을", max_new_tokens=20) == made[1:]
    assert lm.generate([[], lm.tokenizer.encode("마을")], max_new_tokens=20) == made  # ids are taken as they are


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

    assert len([name for name in ask(3, max_new_tokens=20) if "jit(start)" in name or "jit(_continue)" in name]) == 2
    for length in (1, 4, 9, 16):
        assert ask(length, max_new_tokens=20) == []
    # Nor do other settings, nor a few tokens more.
    assert ask(5, max_new_tokens=20, temperature=0.7, top_k=3, top_p=0.8, seed=9) == []
    assert ask(5, max_new_tokens=17) == []
    # A longer prompt is another bucket: its reading is compiled anew.
    assert any("jit(start)" in name for name in ask(17, max_new_tokens=20))


def test_compilations_are_bounded(pair, monkeypatch):
    """Every length a prompt can have, with few shapes: one for each power of two."""
    generator = Generator(pair[1].model, pair[1].config)
    shapes = set()

    class Stop(Exception):
        pass

    def start(slots, samples, form, params, tokens, *_):
        shapes.add((slots, tokens.shape))
        raise Stop

    monkeypatch.setitem(generator.__dict__, "_start", start)
    for length in range(1, 109):
        with pytest.raises(Stop):
            next(generator.run(None, [[7] * length], SampleConfig(max_new_tokens=20), [EOS]))
    assert {tokens for _, tokens in shapes} == {(1, 16), (1, 32), (1, 64), (1, 128)}
    assert len(shapes) <= 5


def test_the_cache_is_written_in_place(pair):
    """The loop's state is donated: memory for the cache is there once, and the next chunk goes on in the same place."""
    _, lm = pair
    batch = Batch.of([[5, 6], [7]], 40, 128, 1)
    state = lm._generator._start(batch.slots, 1, Form(False, 0), lm.params, *batch[:3], jax.random.key(0), 0)
    caches = sum(leaf.nbytes for leaf in jax.tree.leaves(state.cache))
    places = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state.cache)]
    settings = (np.zeros(2, bool), jnp.int32(8), jnp.full(8, -1), Sampling.of(SampleConfig()))
    memory = lm._generator._continue.lower(Form(False, 0), lm.params, state, *settings).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= caches
    state = lm._generator._continue(Form(False, 0), lm.params, state, *settings)
    assert [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state.cache)] == places
    assert state.made.tolist() == [8, 8]


# On a mesh


def test_eight_devices_generate_what_one_does(tmp_path):
    model, path = model_config(), tmp_path / "checkpoint"
    checkpoint.save(path, config_of(model), random_params(model, seed=14), tokenizer=tokenizer().to_json())
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    one, eight = polyglot_jax.load(path), polyglot_jax.load(path, mesh=mesh)
    sharding = eight.params["layer_0"]["mlp"]["up"]["kernel"].sharding
    assert len(sharding.device_set) == 8
    assert sharding.shard_shape((64, 96)) == (64, 24)  # fsdp splits as tensor does: decoding gathers no weights
    prompts = [KOREAN[0][:9], KOREAN[1], "마을", KOREAN[2][:5], KOREAN[4]]  # not a multiple of the 2 replicas
    assert eight.generate(prompts, max_new_tokens=16) == one.generate(prompts, max_new_tokens=16)
    # Rows of the cache lie on two devices, heads on four.
    batch = Batch.of([[5]] * 5, 16, 128, 2)
    with eight._on_mesh():
        state = eight._generator._start(batch.slots, 1, Form(False, 0), eight.params, *batch[:3], jax.random.key(0), 0)
        assert state.cache[0]["k"].sharding.shard_shape(state.cache[0]["k"].shape) == (4, 1, 64, 16)
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
    more = polyglot_jax.load(path, mesh=make_mesh(MeshConfig(fsdp=8)))  # devices than heads, which stay whole
    assert more.generate(prompts[:1], max_new_tokens=16) == one.generate(prompts[:1], max_new_tokens=16)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"data": 8}, {"data": 1, "tensor": 4}], ids=str)
def test_any_mesh_draws_and_searches_the_same(tmp_path, sizes):
    _, one = speakers.pair(tmp_path / "pair")
    many = polyglot_jax.load(tmp_path / "pair", mesh=make_mesh(MeshConfig(**sizes)))
    drawn = {"max_new_tokens": 16, "temperature": 1.0, "seed": 4, "samples": 2, "repetition_penalty": 1.1}
    assert many.generate(KOREAN, **drawn) == one.generate(KOREAN, **drawn)
    beams = {"max_new_tokens": 16, "beams": 3, "temperature": 0}
    assert many.generate(KOREAN, **beams) == one.generate(KOREAN, **beams)
