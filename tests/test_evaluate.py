"""KoBEST's files, prompts, protocols, choices and metrics; bits per byte; the command."""

import contextlib
import csv
import io
import json
import math
import random
import re
import sys
import types

import jax
import kobest
import numpy as np
import pytest
from models import KOREAN, model_config, random_params, random_tensors, small_tokenizer
from safetensors.numpy import save_file

import polyglot_jax
from convert.__main__ import VERBS as CONVERT
from polyglot_jax import checkpoint, names, weights
from polyglot_jax.__main__ import VERBS
from polyglot_jax.cli import run
from polyglot_jax.config import PRESETS, Config, DataConfig, InputError, TrainConfig
from polyglot_jax.evaluate import data, metrics, perplexity, published
from polyglot_jax.evaluate.protocol import encode, make_prompts
from polyglot_jax.evaluate.tasks import TASKS, find_tasks
from polyglot_jax.files import locked
from polyglot_jax.scoring import Pair
from polyglot_jax.token_files import TokenFileWriter
from polyglot_jax.tokenizer import Tokenizer

# KoBEST's own files


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return kobest.write(tmp_path_factory.mktemp("kobest"))


def rows_of(files, task, split="test"):
    return data.read(str(files), task, split)


def test_files_are_read_as_they_are(files):
    boolq = rows_of(files, "kobest_boolq", "train")
    assert [row["label"] for row in boolq] == [0, 1, 1, 0]  # False, TRUE, True, FALSE
    assert boolq[0]["paragraph"] == "고양이는 마당에서 논다. "  # never stripped
    assert boolq[1] == {"paragraph": '"봄"이 오면 꽃이 핀다.', "question": "봄에 꽃이 피나요? ", "label": 1}
    assert [row["label"] for row in rows_of(files, "kobest_copa")] == [0, 1, 0]  # 1, 2, 1
    assert [row["label"] for row in rows_of(files, "kobest_hellaswag")] == [0, 1, 2]
    assert rows_of(files, "kobest_wic")[1]["context_2"] == " [밤]이 깊었다."
    # The test file's Text, not Text_origin; its Label, not Label_origin; the other files' columns in another order.
    assert rows_of(files, "kobest_sentineg") == rows_of(files, "kobest_sentineg", "train")
    assert rows_of(files, "kobest_sentineg")[1] == {"sentence": " 아주 좋아요", "label": 1}


def test_the_folder_above_is_found_too(files, tmp_path):
    (tmp_path / "v1.0").symlink_to(files)
    assert rows_of(tmp_path, "kobest_copa") == rows_of(files, "kobest_copa")


@pytest.mark.parametrize(
    ("line", "text", "message"),
    [
        (0, "ID\tsentence\tquestion\t1\t2", "line 1: no column Answer among ID, sentence, question, 1, 2"),
        (2, "2\t아이가 울었다.\t원인\t넘어졌다.\t2", "line 3: 5 fields where the header has 6"),
        (
            2,
            "2\t아이가 울었다.\t원인\t넘어졌다.\t먹었다.\t3",
            "line 3: Answer='3' is not understood; it is one of 1, 2",
        ),
        (1, "1\t눈이 내렸다.\t이유\t길이.\t꽃이.\t1", "line 2: question='이유' is not understood"),
        (3, "3\t \t원인\t추웠다.\t더웠다.\t1", "line 4: sentence is empty; take the file as KoBEST has it"),
        (1, '1\t"눈이 내렸다.\t결과\t길이.\t꽃이.\t1', "line 2: a quoted cell begins here and ends in line 4; take"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, text, message):
    file = kobest.write(tmp_path) / "COPA" / "test.tsv"
    lines = file.read_text(encoding="utf-8").splitlines()
    lines[line] = text
    file.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(InputError) as error:
        data.read(str(tmp_path), "kobest_copa", "test")
    assert str(error.value).startswith(f"{file}: {message}")


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    folder = kobest.write(tmp_path)
    (folder / "WiC" / "train.tsv").unlink()
    with pytest.raises(
        InputError, match=r"WiC/train\.tsv: cannot be read \(No such file .* BoolQ/test\.tsv .* --data$"
    ):
        data.read(str(folder), "kobest_wic", "train")
    (folder / "WiC" / "test.tsv").write_bytes(b"ID\tTarget\n" + "1\t눈".encode("cp949"))
    with pytest.raises(InputError, match=r"WiC/test\.tsv: line 2: is not UTF-8"):
        data.read(str(folder), "kobest_wic", "test")
    (folder / "WiC" / "test.tsv").write_text("\t".join(kobest.ROWS["WiC"][0]) + "\n")
    with pytest.raises(InputError, match=r"WiC/test\.tsv: holds no documents"):
        data.read(str(folder), "kobest_wic", "test")
    (folder / "WiC" / "test.tsv").write_text("ID\t" + "x" * 2**18)
    before = csv.field_size_limit(2**17)  # of the whole process, which reading a corpus raises
    try:
        with pytest.raises(InputError, match=r"WiC/test\.tsv: line 1: field larger than field limit"):
            data.read(str(folder), "kobest_wic", "test")
    finally:
        csv.field_size_limit(before)


def test_tasks_by_name():
    assert find_tasks("kobest_copa, kobest_boolq,kobest_copa") == ["kobest_copa", "kobest_boolq"]
    assert find_tasks("kobest") == list(TASKS)
    with pytest.raises(InputError, match=r"tasks=kobest_nli: no such task; there are kobest_boolq, kobest_copa, "):
        find_tasks("kobest_copa,kobest_nli")


def test_all_of_the_real_files(shared):
    counts, spaces = {}, 0
    for name, task in TASKS.items():
        for split in ("train", "validation", "test"):
            rows = data.read(str(shared / "data" / "kobest"), name, split)
            counts[name, split] = len(rows)
            for row in rows if split == "test" else ():
                spaces += sum(row[field] != row[field].strip() for field in task.columns)
    assert [counts[name, "test"] for name in TASKS] == [1404, 1000, 1260, 500, 397]
    assert [counts[name, "train"] for name in TASKS] == [3665, 3076, 3318, 2029, 3649]
    assert spaces == 135


# Prompts


def zero_shot(files, task, protocol="branch"):
    return make_prompts(TASKS[task], rows_of(files, task), [], 0, protocol)


def test_prompts_to_the_letter(files):
    boolq = zero_shot(files, "kobest_boolq")[0]
    assert boolq.context == "고양이는 마당에서 논다.  질문: 고양이는 방에 있나요? 답변: "
    assert (boolq.continuations, boolq.gold) == ((" 아니오", " 예"), 0)
    copa = zero_shot(files, "kobest_copa")
    assert [prompt.context for prompt in copa] == [
        "눈이 내렸다. 그래서",
        "아이가 울었다. 왜냐하면",
        "문을 닫았다. 왜냐하면",
    ]
    assert (copa[1].continuations, copa[1].gold) == (("  넘어졌다.", " 밥을 먹었다."), 1)
    wic = zero_shot(files, "kobest_wic")[1]
    assert wic.context == "문장1: [밤]에 잔다. 문장2:  [밤]이 깊었다. 두 문장에서 밤가 같은 뜻으로 쓰였나?"
    assert (wic.continuations, wic.gold) == ((" 아니오", " 예"), 1)
    hellaswag = zero_shot(files, "kobest_hellaswag")[2]
    assert hellaswag.context == "문장: 눈이 내린다."
    assert hellaswag.continuations == (" 꽃이 핀다.", " 덥다.", " 아이들이 눈사람을 만든다.", " 배를 탄다.")
    sentineg = zero_shot(files, "kobest_sentineg")[1]
    assert sentineg.context == "문장:  아주 좋아요 긍부정:"
    assert (sentineg.continuations, sentineg.gold) == ((" 부정", " 긍정"), 1)
    # Today's harness: the same but for COPA.
    for task in TASKS:
        if task != "kobest_copa":
            assert zero_shot(files, task, "harness") == zero_shot(files, task)
    assert zero_shot(files, "kobest_copa", "harness")[0].context == "눈이 내렸다.  그래서"


def as_the_branch_does(documents, train, shots):
    """The loop of its evaluator, over documents themselves: contexts, by document."""
    docs = list(documents)
    rnd = random.Random()
    rnd.seed(42)
    rnd.shuffle(docs)
    contexts = {}
    for doc in docs:
        examples = rnd.sample(train, k=shots)
        labelled = "\n\n".join(example + ["A", "B"][i % 2] for i, example in examples) + "\n\n" if shots else ""
        contexts[doc] = labelled + f"문장: {doc[1]} 긍부정:"
    return [contexts[doc] for doc in documents]


@pytest.mark.parametrize("shots", [0, 1, 7])
def test_examples_are_drawn_as_the_branch_draws_them(shots):
    tests = [{"sentence": f"시험 {i}", "label": 0} for i in range(50)]
    train = [{"sentence": f"보기 {i}", "label": i % 2} for i in range(30)]
    found = make_prompts(TASKS["kobest_sentineg"], tests, train, shots, "branch")
    expected = as_the_branch_does(
        [(i, row["sentence"]) for i, row in enumerate(tests)],
        [(i, f"문장: {row['sentence']} 긍부정: ") for i, row in enumerate(train)],
        shots,
    )
    assert [prompt.context.replace("부정\n", "A\n").replace("긍정\n", "B\n") for prompt in found] == expected
    with pytest.raises(InputError, match="shots=31: there are only 30 training documents of SentiNeg"):
        make_prompts(TASKS["kobest_sentineg"], tests, train, 31, "branch")


def test_the_two_protocols_draw_other_examples():
    tests = [{"sentence": "시험", "label": 0}] * 3
    train = [{"sentence": f"{i}", "label": i % 2} for i in range(100)]
    drawn = {
        protocol: [
            [int(part.split()[1]) for part in prompt.context.split("\n\n")[:-1]]
            for prompt in make_prompts(TASKS["kobest_sentineg"], tests, train, 2, protocol)
        ]
        for protocol in ("branch", "harness")
    }
    # Known answers of CPython's generator; shuffling three documents has drawn from it before, and reorders them.
    assert drawn == {"branch": [[35, 31], [3, 94], [28, 17]], "harness": [[99, 56], [14, 0], [11, 74]]}


def test_tokens_of_both_protocols(shared, files):
    tokenizer = Tokenizer.load(shared / "tokenizer")
    prompts = zero_shot(files, "kobest_boolq")[:1]
    space, colon = tokenizer.encode(" ")[0], tokenizer.encode(":")[0]
    [[no, yes]] = encode(prompts, tokenizer, "branch")
    assert (no.continuation, yes.continuation) == ([769, 638], [566])
    assert no.context[-2:] == [colon, space]
    # Spaces at the end move over, and the whole is encoded at once.
    [[no, yes]] = encode(prompts, tokenizer, "harness")
    assert no.context[-1] == colon
    assert no.context + no.continuation == tokenizer.encode(prompts[0].context + " 아니오")
    assert tokenizer.decode(yes.continuation) == "  예"
    for protocol in ("branch", "harness"):
        for pair in encode(zero_shot(files, "kobest_copa"), tokenizer, protocol)[0]:
            assert pair.context == tokenizer.encode("눈이 내렸다. 그래서")


# Choices and metrics


def test_choices():
    assert metrics.choose([-2.0, -1.0, -1.0]) == 1  # ties go to the first
    assert metrics.choose([-4.0, -5.0], [2, 5]) == 1
    assert metrics.is_near_tie([-5.0, -1.0, -1.00009])
    assert not metrics.is_near_tie([-5.0, -1.0, -1.00011])
    # Per character: half of 1e-4 is of each, divided by its length.
    assert metrics.is_near_tie([-10.00009, -10.0], [10, 10])
    assert not metrics.is_near_tie([-10.00011, -10.0], [10, 10])
    assert metrics.is_near_tie([-2.0, -40.0004], [2, 40])  # 1e-5 apart of 2.6e-5
    assert not metrics.is_near_tie([-2.0, -40.0011], [2, 40])
    # The next best is far enough away, and one after it, shorter, is not.
    assert metrics.is_near_tie([-100.0, -100.002, -1.00003], [100, 100, 1])


def f1_by_hand(gold, predicted):
    scores = []
    for label in set(gold) | set(predicted):
        hits = sum(g == p == label for g, p in zip(gold, predicted, strict=True))
        scores.append(2 * hits / (gold.count(label) + predicted.count(label)))
    return sum(scores) / len(scores)


def test_metrics_by_hand():
    rng = np.random.default_rng(0)
    for choices, size in ((2, 40), (4, 25), (4, 3)):
        gold, predicted = rng.integers(0, choices, (2, size)).tolist()
        found = metrics.summary(gold, predicted, choices, 10)
        assert found["macro_f1"][""] == pytest.approx(f1_by_hand(gold, predicted))
        assert found["acc"][""] == pytest.approx(np.mean(np.equal(gold, predicted)))
    # A label that nobody has is no label: as scikit-learn counts.
    assert metrics.summary([0, 0], [0, 0], 4, 10)["macro_f1"][""] == 1
    assert metrics.summary([0, 1], [0, 0], 2, 10)["macro_f1"][""] == pytest.approx((2 / 3) / 2)


def test_the_interval_is_that_of_resampled_documents():
    rng = np.random.default_rng(1)
    gold = rng.integers(0, 4, 300)
    predicted = np.where(rng.random(300) < 0.6, gold, rng.integers(0, 4, 300))
    found = metrics.summary(gold.tolist(), predicted.tolist(), 4, 4000)["macro_f1"]
    drawn = []
    for _ in range(1500):
        at = rng.integers(0, 300, 300)
        drawn.append(f1_by_hand(gold[at].tolist(), predicted[at].tolist()))
    low, high = np.quantile(drawn, (0.025, 0.975))
    assert found["_low"] == pytest.approx(low, abs=0.01)
    assert found["_high"] == pytest.approx(high, abs=0.01)
    assert found["_low"] < found[""] < found["_high"]


def test_published_values_are_found_by_architecture():
    assert set(published.REVISED) == set(PRESETS) - {"tiny"}
    for name in published.REVISED:
        assert published.name_of(PRESETS[name].model) == name
        for values in published.REVISED[name].values():
            assert len(values) == len(published.SHOTS)
    assert published.name_of(model_config()) is None
    small = "polyglot-ko-1.3b"
    assert published.value(small, "kobest_copa", 0, "macro_f1") == 0.7196
    assert published.value(small, "kobest_copa", 0, "macro_f1_norm") is None
    assert published.value(small, "kobest_hellaswag", 5, "macro_f1") == 0.3984
    assert published.value(small, "kobest_hellaswag", 5, "macro_f1_norm") == 0.5260
    assert published.value(small, "kobest_hellaswag", 3, "macro_f1") is None
    assert published.value(None, "kobest_copa", 0, "macro_f1") is None


# Bits per byte


def test_windows_score_each_token_once_and_see_what_fits():
    for context, stride, size in ((8, 8, 30), (8, 3, 30), (8, 1, 9), (8, 4, 5), (8, 5, 0)):
        tokens = list(range(100, 100 + size))
        pairs = list(perplexity.windows(tokens, 2, context, stride))
        assert [token for pair in pairs for token in pair.continuation] == tokens
        for number, pair in enumerate(pairs):
            assert len(pair.context) + len(pair.continuation) <= context + 1
            if number:
                assert len(pair.context) >= context + 1 - stride
                assert len(pair.continuation) <= stride


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


@pytest.fixture(scope="module")
def path(tmp_path_factory, tokenizer):
    """A random model with a context of 48 tokens."""
    model = model_config(layers=1, context=48)
    config = Config(model=model, data=DataConfig(valid_ids=403), train=TrainConfig(sequence_length=48))
    folder = tmp_path_factory.mktemp("model") / "checkpoint"
    checkpoint.save(folder, config, random_params(model, seed=3), tokenizer=tokenizer.to_json())
    return folder


@pytest.fixture(scope="module")
def lm(path):
    return polyglot_jax.load(path)


def log_probability(lm, ids, count):
    """Of the last `count` of `ids`, from all logits."""
    padded = [*ids[:-1], *[0] * (49 - len(ids))]  # of one shape, so that only one is compiled
    logits = np.asarray(lm.logits([padded])[0, : len(ids) - 1], np.float64)
    logs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    return logs[np.arange(len(ids) - 1), ids[1:]][-count:].sum()


def command(*arguments):
    return run(VERBS, "python -m polyglot_jax", ["evaluate", *map(str, arguments)])


def test_bits_per_byte_of_texts_and_corpora(path, lm, tokenizer, tmp_path, capsys):
    texts = [KOREAN[0] * 6, "ab", KOREAN[1] + "\n" + KOREAN[2]]
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "texts" / f"{number}.txt").write_text(text, encoding="utf-8")
    with TokenFileWriter(tmp_path / "corpus", tokenizer.valid_ids) as writer:
        for text in texts:
            writer.add_document([*tokenizer.encode(text), tokenizer.eos_id])
    out = tmp_path / "out.json"
    places = (tmp_path / "texts", tmp_path / "corpus")
    assert command("--checkpoint", path, "--text", *places, "--stride", 20, "--out", out, "--mesh.data", "1") == 0
    found = json.loads(out.read_text(encoding="utf-8"))["text"]
    nats = 0.0
    for text in texts:
        ids = [2, *tokenizer.encode(text)]
        nats -= log_probability(lm, ids[:49], len(ids[:49]) - 1)
        for at in range(49, len(ids), 20):
            nats -= log_probability(lm, ids[max(0, min(at + 20, len(ids)) - 49) : at + 20], len(ids[at : at + 20]))
    assert len(tokenizer.encode(texts[0])) > 48
    for place in places:
        values = found[str(place)]
        assert values["documents"] == 3
        assert values["bytes"] == sum(len(text.encode()) for text in texts)
        assert values["tokens"] == sum(len(tokenizer.encode(text)) for text in texts)
        assert values["nats"] == pytest.approx(nats, rel=1e-5)
        assert values["bits_per_byte"] == pytest.approx(nats / math.log(2) / values["bytes"], rel=1e-5)
        assert values["perplexity"] == pytest.approx(math.exp(nats / values["tokens"]), rel=1e-4)
    assert f"{found[str(places[0])]['bits_per_byte']:.4f} bits per byte" in capsys.readouterr().out


# The command

SCORED = ("kobest_copa", "kobest_hellaswag", "kobest_sentineg")


def evaluate(path, files, out, *more, tasks="kobest_copa,kobest_sentineg"):
    mesh = () if "--mesh.data" in more else ("--mesh.data", "1")
    return command(
        "--checkpoint", path, "--data", files, "--tasks", tasks, "--shots", "0,2", "--out", out, *mesh, *more
    )


@pytest.fixture(scope="module")
def evaluated(path, files, tmp_path_factory):
    """The record of three tasks, and what was printed."""
    out = tmp_path_factory.mktemp("record") / "out.json"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert evaluate(path, files, out, tasks=",".join(SCORED)) == 0
    assert [file.name for file in out.parent.iterdir()] == ["out.json"]
    return json.loads(out.read_text(encoding="utf-8")), printed.getvalue()


@pytest.fixture(scope="module")
def record(evaluated):
    return evaluated[0]


def assert_same(other, record):
    """The other record, of two of the tasks, has the scores and results of the first."""
    assert set(other["documents"]) == {"kobest_copa", "kobest_sentineg"}
    for task, cells in other["documents"].items():
        assert other["results"][task] == record["results"][task]
        for shots, documents in cells.items():
            for ours, theirs in zip(documents, record["documents"][task][shots], strict=True):
                np.testing.assert_allclose(ours["scores"], theirs["scores"], atol=1e-4)


def test_every_document_is_scored(record, lm, files):
    for name in SCORED:
        task = TASKS[name]
        tests, train = rows_of(files, name), rows_of(files, name, "train")
        for shots in (0, 2):
            prompts = make_prompts(task, tests, train, shots, "branch")
            documents = record["documents"][name][str(shots)]
            truncated = 0
            for prompt, document in zip(prompts, documents, strict=True):
                expected, longest = [], 0
                for text in prompt.continuations:
                    after = lm.tokenizer.encode(text)
                    ids = lm.tokenizer.encode(prompt.context) + after
                    expected.append(log_probability(lm, ids[-49:], len(after)))
                    longest = max(longest, len(ids))
                truncated += longest > 49
                np.testing.assert_allclose(document["scores"], expected, atol=1e-4)
                assert document["gold"] == prompt.gold
                assert document["prediction"] == int(np.argmax(document["scores"]))
                lengths = [len(choice) for choice in task.choices(tests[prompts.index(prompt)])]
                assert document["prediction_norm"] == int(np.argmax(np.divide(document["scores"], lengths)))
            cell = record["results"][name][str(shots)]
            hits = [document["prediction"] == document["gold"] for document in documents]
            assert cell["acc"] == pytest.approx(np.mean(hits))
            assert (cell["documents"], cell["truncated"]) == (3, truncated)
        assert truncated == 3


def test_a_record_explains_itself(record, path):
    assert record["settings"]["protocol"] == "branch"
    assert record["dtype"] == "float32"
    assert record["model"]["context"] == 48
    assert len(record["weights_sha256"]) == len(record["tokenizer_sha256"]) == 64
    assert set(record["versions"]) >= {"jax", "numpy", "tokenizers"}


def test_a_mesh_changes_nothing(record, path, files, tmp_path):
    mesh = ("--mesh.data", "2", "--mesh.fsdp", "2", "--mesh.tensor", "2")
    assert evaluate(path, files, tmp_path / "out.json", *mesh) == 0
    assert_same(json.loads((tmp_path / "out.json").read_text(encoding="utf-8")), record)


def test_an_interrupted_evaluation_goes_on(record, path, files, tmp_path, monkeypatch, capsys):
    out, calls = tmp_path / "out.json", []
    scored = polyglot_jax.LanguageModel.scored

    def interrupted(self, pairs, batch_size=None):
        for batch in scored(self, pairs, 1):
            if len(calls) == 7:
                raise KeyboardInterrupt
            calls.append(len(batch.numbers))
            yield batch

    monkeypatch.setattr(polyglot_jax.LanguageModel, "scored", interrupted)
    assert evaluate(path, files, out) == 130
    assert not out.exists()
    partial = tmp_path / "out.json.partial"
    with open(partial, "ab") as file:
        file.write(b'{"pairs": "0')  # killed while writing
    # From another model nothing is taken over.
    assert evaluate(path, files, out, "--dtype", "bfloat16") == 1
    assert f"error: {partial}: left by an evaluation of another model" in capsys.readouterr().err
    whole = partial.read_bytes()
    partial.write_bytes(whole.replace(b'"numbers"', b'"number"', 1))
    assert evaluate(path, files, out) == 1
    assert f"error: {partial}: is damaged" in capsys.readouterr().err
    partial.write_bytes(whole)
    left = []

    def counted(self, pairs, batch_size=None):
        left.append(len(pairs))
        yield from scored(self, pairs, batch_size)

    monkeypatch.setattr(polyglot_jax.LanguageModel, "scored", counted)
    assert evaluate(path, files, out) == 0
    assert sum(left) + sum(calls) == 2 * (2 + 2) * 3
    assert not partial.exists()
    assert_same(json.loads(out.read_text(encoding="utf-8")), record)
    # What is there is not replaced unless asked.
    assert evaluate(path, files, out) == 1
    assert f"error: {out}: exists" in capsys.readouterr().err


def test_a_quick_look_says_so_and_is_not_taken_for_the_whole(record, path, files, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out.json"
    with monkeypatch.context() as patches:
        patches.setattr(polyglot_jax.evaluate.command, "_print", lambda *_: sys.exit(9))  # stopped before it is written
        with pytest.raises(SystemExit):
            evaluate(path, files, out, "--limit", "2")
    assert (tmp_path / "out.json.partial").is_file()
    # The whole takes nothing over from the part, and the part has the prompts that its documents have in the whole.
    assert evaluate(path, files, out) == 0
    assert "only the first" not in capsys.readouterr().out
    assert_same(json.loads(out.read_text(encoding="utf-8")), record)
    assert evaluate(path, files, out, "--limit", "2", "--overwrite") == 0
    assert "### COPA (macro-F1, only the first 2 of 3 documents)" in capsys.readouterr().out
    part = json.loads(out.read_text(encoding="utf-8"))
    assert part["settings"]["limit"] == 2
    for task, cells in part["documents"].items():
        for shots, documents in cells.items():
            found = part["results"][task][shots]
            assert (found["documents"], found["of"], len(documents)) == (2, 3, 2)
            for ours, theirs in zip(documents, record["documents"][task][shots][:2], strict=True):
                np.testing.assert_allclose(ours["scores"], theirs["scores"], atol=1e-4)


def test_the_table(evaluated, path):
    record, printed = evaluated
    cell = record["results"]["kobest_copa"]["2"]
    text = f"{cell['macro_f1']:.4f} [{cell['macro_f1_low']:.3f}, {cell['macro_f1_high']:.3f}]"
    copa = printed.split("### COPA (macro-F1)")[1].split("###")[0]
    assert "| Model | params | n=0 | n=2 |" in copa
    assert text in copa
    assert f"| {path} (per character) |" in printed.split("### HellaSwag")[1]
    assert "kobest_copa, 2 shots: 3 of 3 contexts lost their beginning" in printed


def test_the_table_beside_what_was_published():
    from polyglot_jax.evaluate.report import markdown

    cell = {"macro_f1": 0.7201, "macro_f1_low": 0.69, "macro_f1_high": 0.75, "documents": 1000, "of": 1000}
    table = markdown({"kobest_copa": {"0": cell, "3": cell}}, "mine", 1_331_810_304, "polyglot-ko-1.3b")
    assert table.splitlines()[-3:] == [
        "| mine | 1.3B | 0.7201 [0.690, 0.750] | 0.7201 [0.690, 0.750] |",
        "| polyglot-ko-1.3b, published |  | 0.7196 |  |",
        "| difference |  | +0.0005 |  |",
    ]


def test_near_ties_are_listed(path, tmp_path, lm):
    """A model of zeros gives every token the same probability: choices of as many tokens tie, or of as many each."""
    folder = tmp_path / "zeros"
    params = jax.tree.map(np.zeros_like, random_params(lm.config.model, seed=0))
    checkpoint.save(folder, lm.config, params, tokenizer=lm.tokenizer.to_json())
    out, files = tmp_path / "out.json", kobest.write(tmp_path / "kobest")
    file = files / "COPA" / "test.tsv"
    text = file.read_text(encoding="utf-8").replace("추웠다.", "잠든다.").replace("더웠다.", "배를 탄다.")
    file.write_text(text, encoding="utf-8")
    choices = [TASKS["kobest_copa"].choices(row) for row in rows_of(files, "kobest_copa")]
    counts = [[len(lm.tokenizer.encode(f" {choice}")) for choice in both] for both in choices]
    per_character = [list(np.divide(counts[n], [len(choice) for choice in choices[n]])) for n in range(3)]
    assert [len(set(both)) for both in counts] == [2, 1, 2]
    assert [len(set(both)) for both in per_character] == [2, 2, 1]
    assert command("--checkpoint", folder, "--data", files, "--tasks", "kobest_copa", "--out", out) == 0
    record = json.loads(out.read_text(encoding="utf-8"))
    cell = record["results"]["kobest_copa"]["0"]
    assert (cell["near_tie_documents"], cell["near_ties"]) == ([1, 2], 2)
    for document, both in zip(record["documents"]["kobest_copa"]["0"], counts, strict=True):
        np.testing.assert_allclose(document["scores"], np.multiply(both, -math.log(512)), rtol=1e-6)
        assert document["prediction"] == int(np.argmin(both))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tasks", "kobest_copa", "--shots", "4"), "shots=4: there are only 3 training documents of COPA"),
        (("--text", "nowhere.txt"), "text=nowhere.txt: no such file or folder"),
    ],
)
def test_bad_input_is_one_line(path, files, capsys, arguments, message):
    assert command("--checkpoint", path, "--data", files, *arguments) == 1
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("error: ") and message in err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "text=: no such file or folder"),
        ("nowhere.txt", "text=nowhere.txt: no such file or folder"),
        ("empty", "text=empty: holds neither .txt files nor token files"),
    ],
)
def test_texts_are_looked_for_before_the_model(tmp_path, monkeypatch, capsys, text, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert command("--checkpoint", "nowhere", "--text", text) == 1
    assert capsys.readouterr().err.startswith(f"error: {message}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--text", "good.txt", "--stride", "49"), "stride=49: is above model.context=48"),
        (("--text", "good.txt", "void.txt"), "text=void.txt: holds no text"),
        (("--text", "good.txt", "cp949.txt"), "text=cp949.txt: is not UTF-8"),
        (("--text", "foreign"), "text=foreign: has the id 450, which this model's tokenizer does not know"),
    ],
)
def test_texts_are_read_before_the_model(path, files, tokenizer, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    for name, content in (("good", KOREAN[0].encode()), ("void", b""), ("cp949", KOREAN[0].encode("cp949"))):
        (tmp_path / f"{name}.txt").write_bytes(content)
    with TokenFileWriter(tmp_path / "foreign", 500) as writer:
        writer.add_document([5, 450, tokenizer.eos_id])
    monkeypatch.setattr(polyglot_jax.evaluate.command, "load", None)
    assert command("--checkpoint", path, "--data", files, "--tasks", "kobest_copa", *arguments) == 1
    assert capsys.readouterr().err.startswith(f"error: {message}")


@pytest.mark.parametrize("folder", ["/proc", "file.txt", "file.txt/folder"])
def test_a_place_that_cannot_be_written_is_refused_before_anything_is_read(tmp_path, monkeypatch, capsys, folder):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.txt").write_text("봄")
    assert command("--checkpoint", "nowhere", "--tasks", "kobest", "--out", f"{folder}/out.json") == 1
    assert capsys.readouterr().err.startswith(f"error: {folder}/out.json: cannot be written (")


def test_a_place_has_one_writer_and_holds_nothing_if_it_fails(path, files, tmp_path, capsys):
    out = tmp_path / "folder" / "out.json"
    assert evaluate("nowhere", files, out) == 1
    assert list(out.parent.iterdir()) == []
    with locked(out.with_name(".out.json.lock")):
        assert evaluate(path, files, out) == 1
        assert re.search(r"out\.json\.lock: process \d+ on .* is writing there", capsys.readouterr().err)
        assert [file.name for file in out.parent.iterdir()] == [".out.json.lock"]


def test_a_folder_is_refused_before_anything_is_read(tmp_path, capsys):
    assert command("--checkpoint", "nowhere", "--tasks", "kobest", "--out", tmp_path, "--overwrite") == 1
    assert capsys.readouterr().err == f"error: {tmp_path}: is a folder; name the file to write\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "tasks=: nothing to do"),
        (
            ("--tasks", "kobest_nli"),
            "tasks=kobest_nli: no such task; there are kobest_boolq, kobest_copa, kobest_wic, ",
        ),
        (("--tasks", "kobest_copa", "--shots", "0;5"), "shots=0;5: must be numbers with commas"),
        (("--tasks", "kobest_copa", "--shots", "9" * 5000), "must be numbers with commas, such as 0,5,10,50, of at"),
        (("--tasks", "kobest_copa", "--batch-size", "-1"), "batch_size=-1: must be at least 1"),
        (("--tasks", "kobest_copa", "--batch-size", "0"), "batch_size=0: must be at least 1"),
        (("--text", "a.txt", "--stride", "0"), "stride=0: must be at least 1"),
        (("--tasks", "kobest_copa", "--limit", "0"), "limit=0: must be at least 1"),
        (("--text", "a.txt", "--limit", "5"), "limit=5: there are no --tasks that it could limit"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_read(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        command("--checkpoint", "nowhere", *arguments)
    assert stop.value.code == 2
    assert message in " ".join(re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().err).split())


def test_weights_that_are_no_numbers_are_no_result(path, files, tmp_path, lm, capsys):
    params = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), random_params(lm.config.model, seed=0))
    checkpoint.save(tmp_path / "nan", lm.config, params, tokenizer=lm.tokenizer.to_json())
    assert command("--checkpoint", tmp_path / "nan", "--data", files, "--tasks", "kobest_copa") == 1
    assert "log-probabilities that are no numbers in float32" in capsys.readouterr().err


def test_the_hubs_dataset_needs_its_library(path, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert command("--checkpoint", path, "--data", tmp_path, "--tasks", "kobest_copa") == 1
    assert "pip install datasets" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"sentence": "좋아요"}, "label is missing among sentence; give"),
        ({"sentence": "좋아요", "label": 1.0}, "Label=1.0 is not understood; it is one of 0, 1; give"),
        ({"sentence": "좋아요", "label": None}, "Label=None is not understood"),
        ({"text": "좋아요", "label": 1}, "Text is empty; give"),
    ],
)
def test_a_row_of_the_hubs_dataset_that_cannot_be_used_is_named(monkeypatch, row, message):
    whole = {"sentence": "좋아요", "label": 1}
    library = types.SimpleNamespace(load_dataset=lambda data, name, split: [whole, row])
    monkeypatch.setitem(sys.modules, "datasets", library)
    with pytest.raises(InputError, match=rf"^data=hub/name: sentineg/test: row 1: {message}"):
        data.read("hub/name", "kobest_sentineg", "test")


# Scoring


def test_a_pair_scores_what_it_scores_alone(lm):
    rng = np.random.default_rng(5)
    contexts = [rng.integers(4, 403, size).tolist() for size in (1, 17, 30, 48, 70)]
    pairs = [
        Pair(context, rng.integers(4, 403, size).tolist())
        for context in contexts
        for size in rng.integers(1, 9, rng.integers(1, 5))
    ]
    pairs = [pairs[i] for i in rng.permutation(len(pairs))]
    expected = [
        log_probability(lm, [*pair.context, *pair.continuation][-49:], len(pair.continuation)) for pair in pairs
    ]
    for batch_size in (None, 3):
        found = np.zeros(len(pairs))
        for batch in lm.scored(pairs, batch_size):
            found[batch.numbers] = batch.log_probabilities
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_context_is_read_once(lm, monkeypatch):
    shapes = []
    score = lm._scorer._score
    monkeypatch.setitem(lm._scorer.__dict__, "_score", lambda *args: shapes.append(args[1].shape) or score(*args))
    pairs = [Pair([5, 6, 7], [i, 9]) for i in range(10, 14)] + [Pair([5, 6, 8], [i]) for i in range(4)]
    assert sum(len(batch.numbers) for batch in lm.scored(pairs)) == 8
    assert shapes == [(2, 16)]


def test_pairs_that_cannot_be_scored(lm):
    for pair, message in (
        (Pair([], [5]), "context: holds no tokens"),
        (Pair([5], []), "continuation of 0 tokens"),
        (Pair([5], [6] * 49), r"continuation of 49 tokens; it must have 1 to model\.context=48"),
        (Pair([5], [512]), "ids are 0 to 511"),
        (Pair([-1], [5]), "from -1 to 5"),
    ):
        with pytest.raises(InputError, match=message):
            list(lm.scored([pair]))


def test_weights_have_one_fingerprint_in_every_format(tmp_path):
    model = model_config()
    config = Config(model=model, data=DataConfig(valid_ids=403), train=TrainConfig(sequence_length=128))
    found = []
    for seed in (0, 1):
        folder = tmp_path / f"hf{seed}"
        folder.mkdir()
        save_file(random_tensors(model, seed), folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(names.config_to_theirs(config, "float32")))
        assert run(CONVERT, "python -m convert", ["hf-to-orbax", str(folder), str(tmp_path / f"orbax{seed}")]) == 0
        found += [weights.fingerprint(weights.open_source(tmp_path / f"{kind}{seed}")) for kind in ("hf", "orbax")]
    assert found[0] == found[1] != found[2] == found[3]
