"""Our model in lm-evaluation-harness, through its own command line, beside its `hf` model and our own evaluation."""

import dataclasses
import importlib.util
import json

import pytest
from models import random_tensors
from safetensors.numpy import save_file

from convert.__main__ import VERBS as CONVERT
from experiments import harness, kobest_three_ways, record
from polyglot_jax import names
from polyglot_jax.cli import run
from polyglot_jax.config import Config, DataConfig, InputError, ModelConfig, TrainConfig
from polyglot_jax.evaluate.tasks import TASKS

DOCUMENTS = 25


@pytest.fixture(scope="module")
def place(shared, tmp_path_factory):
    """A folder with a random model, and the front of KoBEST's real files as the hub's dataset."""
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("no lm_eval: pip install -r requirements-harness.txt")
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
    ("arguments", "message"),
    [
        ({"path": "nowhere"}, "error: nowhere: no such folder"),
        ({"path": "nowhere", "dtype": "auto"}, "error: dtype=auto: must be one of float32, bfloat16, float16; none"),
    ],
)
def test_bad_arguments_are_one_line(monkeypatch, arguments, message):
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("no lm_eval: pip install -r requirements-harness.txt")
    import lm_eval.__main__

    from polyglot_jax.evaluate.harness import HarnessModel, main

    monkeypatch.setattr(lm_eval.__main__, "cli_evaluate", lambda: HarnessModel(**arguments))
    with pytest.raises(SystemExit, match=f"^{message}"):
        main()


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
