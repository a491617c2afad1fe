"""Our model in lm-evaluation-harness, through its own command line, beside its `hf` model and our own evaluation."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT
from models import random_tensors
from safetensors.numpy import save_file

from experiments.benchmarks.evaluate import harness_scores, write_hub_folder
from polyglot_jax import names
from polyglot_jax.__main__ import VERBS
from polyglot_jax.cli import run
from polyglot_jax.config import Config, DataConfig, ModelConfig, TrainConfig
from polyglot_jax.evaluate.metrics import choose, is_near_tie
from polyglot_jax.evaluate.tasks import TASKS

DOCUMENTS = 25


@pytest.fixture(scope="module")
def place(shared, tmp_path_factory):
    """A folder with a random model, and the front of KoBEST's real files as the hub's dataset."""
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("no lm_eval: pip install -r requirements-harness.txt")
    folder = tmp_path_factory.mktemp("harness")
    write_hub_folder(str(shared / "data" / "kobest"), list(TASKS), DOCUMENTS, folder)
    model = ModelConfig(vocab=30_080, layers=2, embed=48, heads=4, mlp=96, context=300)
    config = Config(model=model, data=DataConfig(valid_ids=30_003), train=TrainConfig(sequence_length=300))
    (folder / "model").mkdir()
    save_file(random_tensors(model, seed=21), folder / "model" / "model.safetensors", metadata={"format": "pt"})
    (folder / "model" / "config.json").write_text(json.dumps(names.config_to_theirs(config, "float32")))
    (folder / "model" / "tokenizer.json").write_bytes((shared / "tokenizer" / "tokenizer.json").read_bytes())
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "model" / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return folder


def harness(place, model, arguments, tasks, *more):
    """Where the harness, run through our launcher, logged its samples."""
    out = place / f"{model}{'-'.join(more)}"
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(place / "cache"), "TOKENIZERS_PARALLELISM": "false"}
    command = [
        sys.executable, "-m", "polyglot_jax.evaluate.harness", "run", "--model", model, "--model_args", arguments,
        "--tasks", *tasks, "--batch_size", "8", "--device", "cpu", "--log_samples", "--output_path", str(out), *more,
    ]  # fmt: skip
    environment = os.environ | offline | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.mark.slow
@pytest.mark.parametrize("shots", [0, 5])
def test_three_ways_choose_alike(place, shots):
    ours = harness(place, "polyglot_jax", "path=model,data=2,tensor=2", TASKS, "--num_fewshot", str(shots))
    theirs = harness(place, "hf", "pretrained=model,dtype=float32", TASKS, "--num_fewshot", str(shots))
    arguments = ["--checkpoint", place / "model", "--tasks", "kobest", "--shots", shots, "--protocol", "harness",
                 "--data", place / "skt" / "kobest_v1", "--out", place / f"native-{shots}.json"]  # fmt: skip
    assert run(VERBS, "python -m polyglot_jax", ["evaluate", *map(str, arguments)]) == 0
    native = json.loads((place / f"native-{shots}.json").read_text(encoding="utf-8"))
    by_ours, by_theirs = harness_scores(ours, list(TASKS)), harness_scores(theirs, list(TASKS))
    for task in TASKS:
        documents = native["documents"][task][str(shots)]
        assert len(documents) == len(by_ours[task]) == len(by_theirs[task]) == DOCUMENTS
        for document, a, b in zip(documents, by_ours[task], by_theirs[task], strict=True):
            assert a == pytest.approx(b, abs=1e-3)
            assert document["scores"] == pytest.approx(b, abs=1e-3)
            if not is_near_tie(b):
                assert document["prediction"] == choose(a) == choose(b)
    assert shots == 0 or any(native["results"][task]["5"]["truncated"] for task in TASKS)


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
        out = harness(place, model, arguments, ("rolling", "made"), "--include_path", "tasks")
        answers = {}
        for task in ("rolling", "made"):
            [file] = out.rglob(f"samples_{task}_*.jsonl")
            samples = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
            answers[task] = [sample["filtered_resps"][0] for sample in sorted(samples, key=lambda s: s["doc_id"])]
        found.append(answers)
    assert [float(value) for value in found[0]["rolling"]] == pytest.approx(
        [float(value) for value in found[1]["rolling"]], rel=1e-5
    )
    assert found[0]["made"] == found[1]["made"]
    assert all(found[0]["made"])
