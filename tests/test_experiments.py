"""The sample, the baselines and the demo."""

import dataclasses
import importlib
import json
import math
import shlex
import subprocess
import sys
import unicodedata

import kobest
import numpy as np
import pytest
import tyro
from conftest import ROOT
from models import model_config, random_params, small_tokenizer

from experiments import record
from experiments.baselines import trigram_bits, unigram_bits
from experiments.kobest_three_ways import WAYS, ThreeWays, cell, command_of, prepared, problems, table
from experiments.pretraining import plan
from polyglot_jax import checkpoint
from polyglot_jax.config import PRESETS, Config, DataConfig, InputError, TrainConfig

SAMPLE = sorted((ROOT / "experiments" / "sample").glob("*.txt"))


def test_the_sample_is_60_kb_of_korean_without_repeats():
    texts = [file.read_text(encoding="utf-8") for file in SAMPLE]
    assert sum(len(text.encode()) for text in texts) >= 60_000
    lines = [line for text in texts for line in text.splitlines()]
    assert len(lines) == len(set(lines)) > 200
    for text in texts:
        assert unicodedata.normalize("NFC", text) == text
        letters = [char for char in text if not char.isspace()]
        assert sum("가" <= char <= "힣" for char in letters) / len(letters) > 0.85


def test_unigram_bits_by_hand():
    # counts plus one of the 3 ids: 3, 2, 1 of 6; heldout[1:] is 0, 2
    assert unigram_bits(np.array([0, 0, 1]), np.array([1, 0, 2]), 3) == pytest.approx(
        (math.log2(6 / 3) + math.log2(6 / 1)) / 2
    )


@pytest.mark.parametrize("context", [[1, 2], [2, 2], [6, 6], [0, 6]])
def test_the_trigram_sums_to_one_after_any_context(context):
    vocab, train = 7, np.random.default_rng(0).integers(0, 6, 500)  # id 6 never occurs
    total = 0.0
    for token in range(vocab):
        # bits are a mean over the tokens after the first: taking the first one's away leaves the last one's
        both = 2 * trigram_bits(train, np.array([*context, token]), vocab)
        total += 2.0 ** -(both - trigram_bits(train, np.array(context), vocab))
    assert total == pytest.approx(1, abs=1e-9)


def test_the_trigram_learns_a_cycle_the_unigram_cannot():
    train = np.tile([0, 1, 0, 2], 300)
    heldout = np.tile([0, 1, 0, 2], 10)
    assert unigram_bits(train, heldout, 3) > 1.4
    assert trigram_bits(train, heldout, 3) < 0.2


def three_ways(scores, other, macro_f1=0.5, lengths=((2, 3), (3, 2))):
    """What the comparison says of one task, of which the third way has `other` scores and another metric."""
    metrics = {"acc": 0.5, "macro_f1": 0.5}
    native = metrics | {"macro_f1_low": 0.4, "macro_f1_high": 0.6, "truncated": 0}
    found = {way: {"scores": {"kobest_copa": scores}, "metrics": {"kobest_copa": metrics}} for way in WAYS}
    found["native"]["metrics"] = {"kobest_copa": native}
    found["hf"] = {"scores": {"kobest_copa": other}, "metrics": {"kobest_copa": metrics | {"macro_f1": macro_f1}}}
    return cell("kobest_copa", found, lengths)


def test_ways_may_differ_in_near_ties_alone():
    scores = [[-2.0, -1.0], [-3.0, -3.00005]]
    same = three_ways(scores, [[-2.0, -1.0], [-3.0, -3.00004]])
    assert (same["documents"], same["other_choices"], same["near_ties"]) == (2, [], [1])
    assert same["largest_difference"] == pytest.approx(1e-5)
    turned = three_ways(scores, [[-2.0, -1.0], [-3.0, -2.99999]], macro_f1=0.4)
    assert (turned["other_choices"], turned["near_ties"], turned["equal_metrics"]) == ([1], [1], False)
    wrong = three_ways(scores, [[-1.0, -2.0], [-3.0, -3.00005]])
    counted = three_ways(scores, scores, macro_f1=0.5001)
    assert problems({"kobest_copa": {"0": same, "5": turned}}) == []
    assert problems({"kobest_copa": {"0": wrong, "5": counted}}) == [
        "kobest_copa, 0 shots: documents [0] are chosen otherwise, and are no near-ties",
        "kobest_copa, 5 shots: the same choices, but other metrics",
    ]
    assert table({"kobest_copa": {"0": turned}}).splitlines()[2:] == [
        "| kobest_copa | 0 | 2, 0 | macro_f1 | 0.5000 | 0.5000 | 0.4000 | 1 | 1 | 6e-05 |",
        "| kobest_copa | 0 | 2, 0 | acc | 0.5000 | 0.5000 | 0.5000 | 1 | 1 | 6e-05 |",
    ]
    with pytest.raises(ValueError, match="shorter"):
        three_ways(scores, scores[:1])


def test_ways_may_differ_in_near_ties_per_character():
    scores = [[-2.0, -3.0], [-4.0, -9.0]]  # the first document's are -1 each
    turned = three_ways(scores, [[-2.00002, -3.0], [-4.0, -9.0]], macro_f1=0.4)
    assert (turned["other_choices"], turned["near_ties"]) == ([0], [0])
    far = three_ways([[-2.1, -3.0]], [[-1.9, -3.0]], lengths=((2, 3),))
    assert problems({"kobest_copa": {"0": turned, "5": far}}) == [
        "kobest_copa, 5 shots: documents [0] are chosen otherwise, and are no near-ties"
    ]


def test_the_record_of_three_ways_says_what_was_run():
    experiment = ThreeWays(data="my files/v1.0", checkpoint="runs/mine", shots=(1, 7), documents=3, batch_size=4)
    python, option, module, *arguments = shlex.split(command_of(experiment))
    assert (python, option, module) == ("python", "-m", "experiments.kobest_three_ways")
    assert tyro.cli(ThreeWays, args=arguments) == experiment
    assert "--documents" not in command_of(dataclasses.replace(experiment, documents=None))


def test_three_ways_go_on_after_a_wrong_path_and_a_kill(tmp_path):
    """Nothing is left of a preparation that failed, nor in the way of the next one."""
    model = tmp_path / "model"
    config = Config(
        model=model_config(layers=1, context=48), data=DataConfig(valid_ids=403), train=TrainConfig(sequence_length=48)
    )
    checkpoint.save(model, config, random_params(config.model, seed=3), tokenizer=small_tokenizer().to_json())
    out, data = tmp_path / "ways", kobest.write(tmp_path / "kobest")
    words = [sys.executable, "-m", "experiments.kobest_three_ways", "--out", str(out)]
    for path, folder, message in (
        (model, tmp_path / "nowhere", f"error: data={tmp_path / 'nowhere'}: "),
        (tmp_path / "nowhere", data, f"error: {tmp_path / 'nowhere'}: no such folder"),
    ):
        arguments = ["--checkpoint", str(path), "--data", str(folder)]
        done = subprocess.run([*words, *arguments], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 1
        assert done.stderr.startswith(message) and done.stderr.count("\n") == 1
        assert not list(tmp_path.glob("ways*"))
    experiment = ThreeWays(data=str(data), checkpoint=str(model), out=str(out))
    killed = f"""
import os
from experiments import harness
from experiments.kobest_three_ways import ThreeWays, prepared
harness.timed = lambda *_: os._exit(9)
prepared({experiment!r})
"""
    assert subprocess.run([sys.executable, "-c", killed], cwd=ROOT).returncode == 9
    assert not out.exists() and (tmp_path / "ways.incomplete").is_dir()
    prepared(experiment)
    assert (out / "huggingface" / "config.json").is_file() and (out / "skt" / "kobest_v1" / "README.md").is_file()
    assert [file.name for file in tmp_path.glob("ways*")] == ["ways"]
    with pytest.raises(InputError, match="holds what other settings made"):
        prepared(dataclasses.replace(experiment, batch_size=1))


@pytest.mark.slow
def test_the_demo_learns_converts_and_generates(tmp_path):
    out = tmp_path / "demo"
    done = subprocess.run(
        [sys.executable, "-m", "experiments.quickstart", "--out", str(out)],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    rows = [json.loads(line) for line in (out / "run" / "log.jsonl").read_text().splitlines()]
    heldout = [row["heldout_bits_per_byte"] for row in rows if "heldout_loss" in row]
    assert heldout[-1] < heldout[0] - 0.6
    unigram = float(done.stdout.split("unigram frequencies")[1].split()[0])
    assert heldout[-1] < unigram - 0.3
    assert "hold the same weights, bit for bit" in done.stdout
    assert (out / "run" / "curves.png").stat().st_size > 5_000
    assert (out / "huggingface" / "model.safetensors").is_file()


@pytest.mark.parametrize("size", ["1_3b", "3_8b", "5_8b", "12_8b"])
def test_a_recipe_is_the_published_run(size):
    """Its tokens are the card's, but for what rounding the batch to a power of two makes of them."""
    recipe = importlib.import_module(f"experiments.pretrain_{size}").RECIPE
    train = PRESETS[recipe.preset].train
    assert recipe.name == f"pretrain_{size}"
    assert train.steps * train.batch_size * train.sequence_length == pytest.approx(recipe.tokens, rel=0.06)
    estimates = json.loads((record.FOLDER / f"{recipe.name}.json").read_text(encoding="utf-8"))["estimates"]
    assert {topology: found["flags"] for topology, found in estimates.items()} == recipe.meshes
    text = plan(recipe, estimates)
    for topology, flags in recipe.meshes.items():
        assert f"train --preset {recipe.preset} {flags} --data" in text
        found = estimates[topology]
        assert found["gib_of_a_chip"] < found["gib_free_on_a_chip"] and f"{found['days']} days on" in text
