"""Our model in lm-evaluation-harness, through its own command line, beside its `hf` model and our own evaluation."""

import dataclasses
import importlib.util
import json

import pytest
from models import KOREAN, model_config, random_params, random_tensors, small_tokenizer
from safetensors.numpy import save_file

import polyglot_jax
from convert.__main__ import VERBS as CONVERT
from experiments import harness, kobest_three_ways, record
from experiments.benchmarks import evaluate as benchmarks_evaluate
from polyglot_jax import checkpoint, names
from polyglot_jax.cli import run
from polyglot_jax.config import Config, DataConfig, InputError, ModelConfig, SampleConfig, TrainConfig
from polyglot_jax.evaluate.tasks import TASKS

DOCUMENTS = 25


@pytest.fixture(scope="module")
def lm_eval():
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("no lm_eval: pip install -r requirements-harness.txt")
    import lm_eval

    return lm_eval


@pytest.fixture(scope="module")
def place(lm_eval, shared, tmp_path_factory):
    """A folder with a random model, and the front of KoBEST's real files as the hub's dataset."""
    folder = tmp_path_factory.mktemp("harness")
    harness.write_hub_folder(str(shared / "data" / "kobest"), list(TASKS), DOCUMENTS, folder)
    model = ModelConfig(vocab=30_080, layers=2, embed=48, heads=4, mlp=96, context=300)
    config = Config(model=model, data=DataConfig(valid_ids=30_003), train=TrainConfig(sequence_length=300))
    (folder / "model").mkdir()
    save_file(random_tensors(model, seed=21), folder / "model" / "model.safetensors", metadata={"format": "pt"})
    (folder / "model" / "config.json").write_text(json.dumps(names.config_to_theirs(config, "float32")))
    (folder / "model" / "tokenizer.json").write_bytes((shared / "tokenizer" / "tokenizer.json").read_bytes())
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "model" / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return folder


@pytest.mark.slow
def test_three_ways_choose_alike(place, shared, monkeypatch):
    """The command that made the record, on 8 devices, with contexts that are cut; all three read real documents."""
    monkeypatch.setattr(record, "FOLDER", place / "records")
    assert run(CONVERT, "python -m convert", ["hf-to-orbax", str(place / "model"), str(place / "orbax")]) == 0
    experiment = kobest_three_ways.ThreeWays(
        data=str(shared / "data" / "kobest"), checkpoint=str(place / "orbax"), documents=DOCUMENTS,
        out=str(place / "ways"),
    )  # fmt: skip
    kobest_three_ways.main(experiment)
    made = json.loads((place / "records" / "kobest_three_ways.json").read_text(encoding="utf-8"))
    assert str(place / "orbax") in made["command"] and made["command"].endswith(f"--documents {DOCUMENTS}")
    assert made["different"] == []
    for task in TASKS:
        for shots in ("0", "5"):
            cell = made["cells"][task][shots]
            assert cell["documents"] == DOCUMENTS
            assert cell["largest_difference"] < 1e-3
            assert cell["equal_metrics"] or cell["other_choices"]
    assert any(made["cells"][task]["5"]["truncated"] for task in TASKS)
    # Again, it computes nothing; of another checkpoint, it takes nothing over.
    monkeypatch.setattr(harness, "run", None)
    kobest_three_ways.main(experiment)
    with pytest.raises(InputError, match="holds what other settings made"):
        kobest_three_ways.main(dataclasses.replace(experiment, checkpoint=str(place / "model")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"documents": 0}, "documents=0: must be at least 1"),
        ({"documents": -1}, "documents=-1: must be at least 1"),
        ({"batch_size": 0}, "batch_size=0: must be at least 1"),
        ({"shots": ()}, r"shots=\(\): must be numbers from 0"),
        ({"shots": (0, -5)}, r"shots=\(0, -5\): must be numbers from 0"),
    ],
)
def test_bad_numbers_of_the_experiments_are_refused(changes, message):
    with pytest.raises(InputError, match=f"^{message}$"):
        kobest_three_ways.ThreeWays(data="nowhere", **changes)
    if "shots" not in changes:
        with pytest.raises(InputError, match=f"^{message}$"):
            benchmarks_evaluate.Benchmark(data="nowhere", tokenizer="nowhere", **changes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": "nowhere"}, "error: nowhere: no such folder"),
        ({"path": "nowhere", "dtype": "auto"}, "error: dtype=auto: must be one of float32, bfloat16, float16; none"),
        ({"path": "nowhere", "batch_size": -1}, "error: batch_size=-1: must be a whole number above 0, or auto"),
        ({"path": "nowhere", "batch_size": "0"}, "error: batch_size=0: must be a whole number above 0, or auto"),
        ({"path": "nowhere", "batch_size": "x"}, "error: batch_size=x: must be a whole number above 0, or auto"),
        ({"path": "nowhere", "batch_size": "auto:4"}, "error: nowhere: no such folder"),
    ],
)
def test_bad_arguments_are_one_line(lm_eval, monkeypatch, arguments, message):
    import lm_eval.__main__

    from polyglot_jax.evaluate.harness import HarnessModel, main

    monkeypatch.setattr(lm_eval.__main__, "cli_evaluate", lambda: HarnessModel(**arguments))
    with pytest.raises(SystemExit, match=f"^{message}"):
        main()


@pytest.fixture(scope="module")
def model(lm_eval, tmp_path_factory):
    """Random, as the harness has it; its checkpoint has settings of its own for what `generate` is not told."""
    from polyglot_jax.evaluate.harness import HarnessModel

    sample = SampleConfig(temperature=0.9, repetition_penalty=1.5)
    shape, data = model_config(layers=1, context=64), DataConfig(valid_ids=403)
    config = Config(model=shape, data=data, train=TrainConfig(sequence_length=64), sample=sample)
    folder = tmp_path_factory.mktemp("model") / "checkpoint"
    checkpoint.save(folder, config, random_params(shape, seed=3), tokenizer=small_tokenizer().to_json())
    return HarnessModel(str(folder), batch_size=4)


def answers(model, asked):
    """What a model answers to KOREAN[1] with each of `asked`, the generation_kwargs."""
    from lm_eval.api.instance import Instance

    requests = [Instance("generate_until", {}, (KOREAN[1], kwargs), number) for number, kwargs in enumerate(asked)]
    return model.generate_until(requests, disable_tqdm=True)


DRAWN = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 1.0, "seed": 3}


def test_what_is_drawn_depends_on_the_place_among_all_requests_alone(model, monkeypatch):
    asked = [DRAWN, DRAWN, DRAWN | {"max_gen_toks": 6}, DRAWN, DRAWN]
    by_four = answers(model, asked)
    monkeypatch.setattr(model, "_batch_size", 1)
    alone = answers(model, asked)
    own = {"max_new_tokens": 8, "temperature": 1.0, "repetition_penalty": 1.0, "seed": 3}
    [whole] = model._lm.generate([KOREAN[1]], first=2, **own)
    assert by_four == alone
    assert len({text[:4] for text in alone}) == len(asked)
    assert len(alone[2]) < len(whole) and whole.startswith(alone[2])


def test_generation_kwargs_are_those_of_generate(model):
    plain = {"max_new_tokens": 12, "temperature": 0.0, "repetition_penalty": 1.0}  # the harness's, not the checkpoint's
    greedy = model._lm.generate([KOREAN[1]], **plain)
    drawn = {"temperature": 1.5, "top_k": 90, "top_p": 0.9, "min_p": 0.01, "seed": 5}
    for given, ours in (
        ({}, {}),
        ({"do_sample": False, "temperature": 0.7}, {}),
        (drawn, drawn),
        ({"repetition_penalty": 1.3}, {"repetition_penalty": 1.3}),
        ({"num_beams": 3, "do_sample": False}, {"beams": 3}),
    ):
        expected = model._lm.generate([KOREAN[1]], **plain | ours)
        assert answers(model, [{"max_gen_toks": 12} | given]) == expected, given
        assert (expected == greedy) == (not ours), given


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"foo": 1}, r"generation_kwargs\.foo: no such field; generation_kwargs has beams, .*repetition_penalty"),
        ({"until": 5}, "until=5: must be a string or a list of strings"),
        ({"until": ["\n", None]}, r"until=\['\\n', None\]: must be a string or a list of strings"),
        ({"temperature": "hot"}, "generation_kwargs={'temperature': 'hot'}: not understood"),
        ({"max_gen_toks": 64}, r"max_gen_toks=64: must be less than model\.context=64"),
        ({"max_gen_toks": 0}, "max_new_tokens=0"),
    ],
)
def test_generation_kwargs_that_are_not_understood_are_refused_before_anything_is_made(
    model, monkeypatch, given, message
):
    monkeypatch.setattr(polyglot_jax.LanguageModel, "generate", None)
    with pytest.raises(InputError, match=message):
        answers(model, [DRAWN, given])


TASK = """
task: rolling
dataset_path: json
dataset_kwargs: {data_files: {test: texts.jsonl}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}, {metric: byte_perplexity}]
"""
MADE = """
task: made
dataset_path: json
dataset_kwargs: {data_files: {test: texts.jsonl}}
output_type: generate_until
test_split: test
doc_to_text: "{{text}}"
doc_to_target: "x"
generation_kwargs: {until: ["니다", "\\n\\n"], max_gen_toks: 20}
metric_list: [{metric: exact_match}]
"""


@pytest.mark.slow
def test_rolling_and_generated_text_are_those_of_torch(place):
    (place / "tasks").mkdir()
    (place / "tasks" / "rolling.yaml").write_text(TASK, encoding="utf-8")
    (place / "tasks" / "made.yaml").write_text(MADE, encoding="utf-8")
    texts = ["봄이 오면 마을 사람들은 강가에 모여 노래를 부른다. " * count for count in (1, 3, 40)]
    lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    (place / "texts.jsonl").write_text("".join(lines), encoding="utf-8")
    found = []
    for model, arguments in (("polyglot_jax", "path=model"), ("hf", "pretrained=model,dtype=float32")):
        out, tasks = place / f"texts-{model}", ("rolling", "made")
        harness.run(model, arguments, tasks, 0, out, 8, ["--include_path", "tasks"])
        found.append({task: [sample["filtered_resps"][0] for sample in harness.samples(out, task)] for task in tasks})
    assert [float(value) for value in found[0]["rolling"]] == pytest.approx(
        [float(value) for value in found[1]["rolling"]], rel=1e-5
    )
    assert found[0]["made"] == found[1]["made"]
    assert all(found[0]["made"])
