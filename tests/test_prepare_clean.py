"""The cleaning steps, and the pipeline they are part of: duplicates, resuming, damaged input, several workers."""

import gzip
import hashlib
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
import zlib
from pathlib import Path

import pytest
from conftest import ROOT
from disks import remount, small_disk

from polyglot_jax.config import InputError
from polyglot_jax.prepare import engine, pipeline
from polyglot_jax.prepare.clean_report import LENGTHS, Histograms, Samples, Summary, _histogram
from polyglot_jax.prepare.cleaning import STEPS, CleanConfig, Cleaner, _without_hidden
from polyglot_jax.prepare.command import PrepareConfig, prepare
from polyglot_jax.prepare.readers import ReaderConfig, Source, read_rows
from polyglot_jax.token_files import TokenFile
from polyglot_jax.tokenizer import Tokenizer, train_tokenizer

# Ray starts its processes by fork, and tests that ran before in this process may have started JAX.
pytestmark = pytest.mark.filterwarnings(r"ignore:os\.fork\(\) was called:RuntimeWarning")

WORDS = [
    "바람이",
    "나무를",
    "흔들고",
    "아이들은",
    "마당에서",
    "노래하며",
    "저녁을",
    "기다렸다",
    "할머니는",
    "부엌에서",
    "된장국을",
    "끓이고",
    "강아지는",
    "문간에",
    "누워",
    "있었다",
]


def story(number, length=40):
    """A text of its own for each number."""
    words = (WORDS[(number * 7 + k * (number % 5 + 1)) % len(WORDS)] + str(number * k % 97) for k in range(length))
    return " ".join(words)


def step(name, **settings):
    return STEPS[name](CleanConfig(**settings))


@pytest.mark.parametrize(
    "name, text, result",
    [
        ("html", "<p>가</p>나<br/>다 <b class='x'>라</b>", "\n가\n나\n다 라"),
        ("html", "<3 좋아요 <영화> a<b &lt;b&gt; &amp;", "<3 좋아요 <영화> a<b <b> &"),
        ("html", "앞<script>var a = 1 < 2;</script><!-- 말 -->뒤", "앞뒤"),
        ("emoticons", "ㅋㅋㅋㅋㅋㅋ ㅠㅠㅠ ㅋㅋ ㅎ ㅇㅋㅇㅋㅇㅋ", "ㅋㅋ ㅠㅠ ㅋㅋ ㅎ ㅇㅋㅇㅋ"),
        ("whitespace", " 가\xa0 나\t다 \n\n\n\n 라 ", "가 나\t다\n\n라"),
        ("repeats", "사과 배 감 사과 배 감 사과 배 감 귤", "사과 배 감 귤"),
        ("repeats", "와 와 와 와 와 좋다", "와 와 와 좋다"),
        ("repeats", "한 줄\n두 줄", "한 줄\n두 줄"),
        ("spam", "기사 끝. 무단 전재 및 재배포 금지 광고", "기사 끝."),
        ("length", "짧다", None),
        ("length", "가" * 50, "가" * 50),
        ("length", "가" * 100_001, None),
        ("word_length", "가 나 다", None),
        ("word_length", "가나다 라마바", "가나다 라마바"),
        ("symbols", "가 나 다 라 마 바 사 아 자 차...", "가 나 다 라 마 바 사 아 자 차..."),
        ("symbols", "가 나 다 라 마 바 사 아 자...", "가 나 다 라 마 바 사 아 자..."),
        ("symbols", "가 나 다… 라 마 바 사 아 자...", None),
        ("emoticons", "와.......... 정말!!!!! ^^ ... 뭐,,,,, ;;;;;", "와... 정말!!! ^^ ... 뭐,,, ;;;"),
        ("lines", "* 가\n· 나\n• 다", None),
        ("lines", "* 가\n나\n* 다", "* 가\n나\n* 다"),
        ("lines", "가…\n나\n다…", None),
        ("lines", "가…", "가…"),
        ("korean", "가bcd", "가bcd"),
        ("korean", "가bcde", None),
    ],
)
def test_steps(name, text, result):
    if name == "html":
        pytest.importorskip("resiliparse")
    assert step(name)(text) == result


def test_comments_and_scripts_are_found_as_one_pattern_would():
    pattern = re.compile(r"<(script|style)\b[^<>]*>.*?</\1\s*>|<!--.*?-->", re.DOTALL | re.IGNORECASE)
    pieces = [
        "<!--",
        "-->",
        "<script>",
        "</SCRIPT >",
        "<style a='b'>",
        "</style>",
        "<script",
        ">",
        "-",
        "가",
        "\n",
        "<",
    ]
    generator = random.Random(6)
    for _ in range(5000):
        text = "".join(generator.choices(pieces, k=12))
        assert _without_hidden(text) == pattern.sub("", text), text
    for piece in ("<!-- 글 ", "<script> 글 ", "<style></script>"):  # of one that is closed, and 100,000 that are not
        text = "<script></script><style></style><!-- -->" + piece * 100_000
        assert _without_hidden(text) == piece * 100_000


def test_unicode_is_mended():
    pytest.importorskip("ftfy")
    mend = step("unicode")
    assert mend("안녕하세요".encode().decode("cp1252")) == "안녕하세요"
    assert mend("봄날".encode().decode("latin-1")) == "봄날"
    assert mend("가\x07나\u1100 각") == "가나 각"
    assert mend("“따옴표”와 \uff21\uff22 &amp;") == "“따옴표”와 \uff21\uff22 &amp;"


def test_lists_of_words_and_markers(tmp_path):
    (tmp_path / "bad.txt").write_text("나쁜말\n\n광고.\n", encoding="utf-8")
    assert step("bad_words", bad_words=str(tmp_path / "bad.txt"))("이것은 나쁜말이다") is None
    assert step("bad_words", bad_words=str(tmp_path / "bad.txt"))("광고와") == "광고와"
    assert step("spam", spam_markers=str(tmp_path / "bad.txt"))("가나 광고.라") == "가나"
    decomposed = unicodedata.normalize("NFD", "나쁜말\n")
    (tmp_path / "nfd.txt").write_text(decomposed, encoding="utf-8-sig")  # a mark first, as Windows has it
    assert step("bad_words", bad_words=str(tmp_path / "nfd.txt"))("이것은 나쁜말이다") is None
    (tmp_path / "empty.txt").write_text("\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"cleaning\.bad_words=.*empty\.txt: is empty; leave the flag out"):
        step("bad_words", bad_words=str(tmp_path / "empty.txt"))
    with pytest.raises(InputError, match=r"cleaning\.spam_markers=.*gone: cannot be read"):
        step("spam", spam_markers=str(tmp_path / "gone"))


def test_the_order_is_the_config_s_and_counts_add_up():
    texts = ["ㅋㅋㅋㅋㅋㅋ", "가나다라마바", "가나다라마바ㅋㅋㅋㅋ"]
    for steps, dropped in (("length emoticons", 0), ("emoticons length", 1)):
        cleaner = Cleaner(CleanConfig(steps=tuple(steps.split()), min_length=6))
        left = [text for text, dropped in map(cleaner, texts) if not dropped]
        assert list(cleaner.counts) == steps.split() and len(left) == 3 - dropped
        assert cleaner.counts["length"].dropped == dropped and cleaner.counts["emoticons"].changed == 2
        first, last = cleaner.counts.values()
        assert first.seen == 3 and last.seen == 3 - first.dropped
        assert last.bytes == sum(len(text.encode()) for text in left)


def test_the_step_that_leaves_nothing_has_dropped_it():
    cleaner = Cleaner(CleanConfig(steps=("spam", "whitespace", "word_length")))
    advert = "클린봇이 부적절한 표현을 감지한 댓글입니다."
    assert [cleaner(text) for text in (advert, " \n", "가나다")] == [
        (advert, "spam"),
        (" \n", "whitespace"),
        ("가나다", ""),
    ]
    assert [count.dropped for count in cleaner.counts.values()] == [1, 1, 0]


def test_settings_that_make_no_sense():
    for settings, message in (
        ({"steps": ("lenght",)}, r"cleaning\.steps=lenght: unknown; known are unicode html"),
        ({"min_length": 0}, r"cleaning\.min_length=0"),
        ({"min_korean": float("nan")}, r"cleaning\.min_korean=nan: must be a finite number"),
        ({"max_word_length": float("inf")}, r"cleaning\.max_word_length=inf: must be a finite number"),
        ({"min_length": 9, "max_length": 5}, r"cleaning\.min_length=9: above max_length=5"),
    ):
        with pytest.raises(InputError, match=message):
            CleanConfig(**settings)
    with pytest.raises(InputError, match="change nothing without --clean"):
        PrepareConfig(text=("a",), tokenizer="t", out="o", workers=2)


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    def write(name, **columns):
        parquet.write_table(pyarrow.table(columns), tmp_path / name)
        return tmp_path / name

    def read(path, **settings):
        config = ReaderConfig(text=(str(path),), **settings)
        source = Source(path, lambda size: None)
        rows = list(read_rows(path, source, config))
        assert source.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        return [(row.line, row.text) for row in rows]

    path = write("a.parquet", id=[1, 2, 3], text=["하나", None, "셋"])
    assert read(path) == [(1, "하나"), (2, ""), (3, "셋")]
    assert len(read(write("b.parquet", body=["글"] * 3000), column="body")) == 3000
    with pytest.raises(InputError, match=r"a\.parquet: column 'id' is not text but int64"):
        read(path, column="id")
    with pytest.raises(InputError, match=r"a\.parquet: no column body among id, text"):
        read(path, column="body")
    doubled = pyarrow.Table.from_arrays([pyarrow.array(["하나"]), pyarrow.array(["둘"])], names=["text", "text"])
    parquet.write_table(doubled, tmp_path / "c.parquet")
    with pytest.raises(InputError, match=r"c\.parquet: 2 columns are named text"):
        read(tmp_path / "c.parquet")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match=r"a\.parquet: damaged or no parquet"):
        read(path)


# The pipeline


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(train_tokenizer([story(1)] * 2, 280, show_progress=False).to_json(), encoding="utf-8")
    return path


@pytest.fixture
def clean(tmp_path, tokenizer):
    """clean(*files, **settings) -> (folder, manifest, texts)."""
    pytest.importorskip("datatrove")
    pytest.importorskip("ftfy")
    pytest.importorskip("resiliparse")

    def clean(*files, out="out", workers=1, masks=True, **settings):
        config = PrepareConfig(
            text=tuple(map(str, files)), tokenizer=str(tokenizer), out=str(tmp_path / out), clean=True, workers=workers,
            mask_personal_data=masks, cleaning=CleanConfig(**settings),
        )  # fmt: skip
        manifest = prepare(config)
        loaded, file = Tokenizer.load(tmp_path / out), TokenFile(tmp_path / out / "text_document")
        starts = file.document_starts
        texts = [loaded.decode(file.tokens[a:b]) for a, b in itertools.pairwise(starts)]
        return tmp_path / out, manifest, texts

    return clean


def write(path, *texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    return path


def same(a, b):
    assert {file.name for file in a.iterdir()} == {file.name for file in b.iterdir()}
    for file in a.iterdir():
        assert file.read_bytes() == (b / file.name).read_bytes(), file.name


def test_duplicates_go_within_and_across_files(clean, tmp_path):
    near = story(1, 200).replace("문간에3 ", "문간에서 ")
    a = write(tmp_path / "a.jsonl", story(1, 200), story(2), story(2).upper() + "!", "짧은 글 하나 그리고 끝")
    b = write(tmp_path / "b.jsonl", near, story(3), "짧은 글 하나 그리고 끝", "짧은 글 하나 그리고 끝내")
    _, manifest, texts = clean(a, b, min_length=5, min_word_length=1)
    assert manifest["cleaning"]["duplicates"] == 3 and manifest["documents"] == 5 == len(texts)
    assert (story(1, 200) in texts) + (near in texts) == 1
    assert texts.count("짧은 글 하나 그리고 끝") == 1 and "짧은 글 하나 그리고 끝내" in texts and story(3) in texts
    assert len(clean(a, b, out="all", min_length=5, min_word_length=1, deduplicate=False)[2]) == 8


def test_the_manifest_adds_up_and_the_report_hides_personal_data(clean, tmp_path):
    call = "전화는 010-1234-5678로 하시면 됩니다 "
    file = write(tmp_path / "a.jsonl", call + story(1), call + "abc " * 200, "짧다", story(2), story(3) + " <b>끝</b>")
    folder, manifest, texts = clean(file)
    cleaning = manifest["cleaning"]
    assert cleaning["read"] == 5 and manifest["documents"] == 3
    assert sum(count["dropped"] for count in cleaning["steps"].values()) + cleaning["duplicates"] == 2
    assert cleaning["steps"]["html"]["changed"] == 1 and manifest["personal_data"]["tel"]["count"] == 1
    assert manifest["utf8_bytes"] == sum(len(text.encode()) for text in texts) + len("<|tel|>")
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "1 dropped by length, such as</h2>\n<ul><li>짧다</ul>" in page and "1 tel: &lt;|tel|&gt;" in page
    assert "3 of 5 documents" in page and "&lt;|tel|&gt;" in page and "1234" not in page
    assert not (tmp_path / "out.work").exists()


def test_samples_come_from_anywhere_and_are_the_same_in_any_order():
    texts = [story(k) for k in range(500)]
    found = []
    for order in (texts, texts[::-1], [*texts, *texts]):
        samples = Samples(20, lambda text: text[:10])
        for text in order:
            samples.add(text)
        found.append(samples.least)
    assert found[0] == found[1] == found[2] and len(found[0]) == 20
    places = [k for k, text in enumerate(texts) if [zlib.crc32(text.encode()), text[:10]] in found[0]]
    assert min(places) < 100 and max(places) > 400
    none = Samples(0, str)
    none.add("가")
    assert none.least == []


def test_the_report_hides_personal_data_even_where_the_result_does_not(clean, tmp_path):
    call = " 전화 010-1234-5678"
    file = write(tmp_path / "a.jsonl", story(1) + call, "짧은" + call, *[story(2) + call] * 2)
    folder, manifest, texts = clean(file, masks=False)
    assert manifest["personal_data"] == {} and "010-1234-5678" in texts[0]
    assert "1234-5678" not in (folder / "report.html").read_text(encoding="utf-8")


def test_bad_files_and_rows_are_told_and_cost_no_others(clean, tmp_path):
    corpus = tmp_path / "corpus"
    write(corpus / "a.jsonl", story(1))
    write(corpus / "b" / "a.jsonl", story(2))  # the same name elsewhere
    (corpus / "c.txt").write_bytes(b"")
    (corpus / "d.txt").write_bytes("가나다라\n".encode("cp949") * 3)
    packed = gzip.compress((story(3) + "\n").encode() * 500)
    (corpus / "e.txt.gz").write_bytes(packed[: len(packed) // 2])
    (corpus / "f.jsonl").write_text(json.dumps({"text": story(4)}) + '\n{"no": 1}\n', encoding="utf-8")
    (corpus / "g.txt").write_text("가나다라 " * 40_000, encoding="utf-8")  # one long line
    (corpus / "loop").symlink_to(corpus)
    folder, manifest, texts = clean(corpus)
    assert {story(1), story(2), story(4)} <= set(texts)
    damaged = manifest["cleaning"]["damaged"]
    assert len(damaged) == 2
    assert "d.txt: 3 of 3 rows are bad" in damaged[0] and "e.txt.gz: damaged or truncated" in damaged[1]
    rows = [json.loads(line) for line in (folder / "bad_rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [f"{Path(row['file']).name} {row['line']}" for row in rows] == ["d.txt 1", "d.txt 2", "d.txt 3", "f.jsonl 2"]
    assert manifest["cleaning"]["steps"]["length"]["dropped"] == 1


def test_the_tasks_of_a_process_share_one_tokenizer(clean, tmp_path, monkeypatch):
    """Each that has encoded keeps some memory for good, so that it would grow with the number of files."""
    used, encode = [], Tokenizer.encode_batch
    monkeypatch.setattr(Tokenizer, "encode_batch", lambda self, texts: used.append(self) or encode(self, texts))
    clean(*(write(tmp_path / f"{k}.jsonl", story(k)) for k in range(3)))
    assert len(used) == 3 and len(set(map(id, used))) == 1


def test_old_work_that_is_half_deleted_is_deleted_and_not_gone_on_with(clean, tmp_path, monkeypatch):
    file, real, unlink, gone = write(tmp_path / "a.jsonl", story(1), story(2)), shutil.rmtree, os.unlink, []

    def stops(*path, **settings):
        gone.append(path)
        if len(gone) == 20:
            raise KeyboardInterrupt
        unlink(*path, **settings)

    def rmtree(path, **settings):
        with monkeypatch.context() as patch:
            if ".work" in str(path):
                patch.setattr(os, "unlink", stops)
            real(path, **settings)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    with pytest.raises(KeyboardInterrupt):
        clean(file)
    monkeypatch.undo()
    assert (tmp_path / "out.work" / "claim").read_text() == ""
    shutil.rmtree(tmp_path / "out")
    assert len(clean(file)[2]) == 2 and not (tmp_path / "out.work").exists()


def test_bars_of_a_histogram_are_never_longer_than_their_column():
    summary, before, after = Summary(), Histograms(), Histograms()
    for length in (100, 1000, 10_000):
        before.add("가" * length)
        after.add("가" * 100)
    summary.histograms = {"before": before.counts, "after": after.counts}
    page = _histogram(summary, "length", list(map(str, range(len(LENGTHS) + 1))))
    assert max(map(float, re.findall(r"width:([\d.]+)%", page))) == 100


@pytest.mark.parametrize("cleaned", [True, False])
def test_a_result_in_a_folder_that_is_read_is_refused(tmp_path, tokenizer, cleaned):
    write(tmp_path / "corpus" / "a.jsonl", story(1))
    (tmp_path / "link").symlink_to(tmp_path / "corpus")
    out = str(tmp_path / "link" / "new" / "out")
    with pytest.raises(InputError, match=r"out=.*out: lies in text=.*corpus, where it would be read"):
        prepare(PrepareConfig(text=(str(tmp_path / "corpus"),), tokenizer=str(tokenizer), out=out, clean=cleaned))
    assert [file.name for file in (tmp_path / "corpus").iterdir()] == ["a.jsonl"]


def test_nothing_left_says_what_dropped_it(clean, tmp_path):
    with pytest.raises(InputError, match=r"no document is left of 2; .*length 2"):
        clean(write(tmp_path / "a.jsonl", "하나", "둘"))
    assert not (tmp_path / "out").exists()


def test_nothing_left_says_what_was_damaged(clean, tmp_path, capsys):
    (tmp_path / "bad.txt").write_bytes("가나다라\n".encode("cp949") * 3)
    with pytest.raises(InputError, match=r"no document could be read in 1 files: .*bad\.txt: 3 of 3 rows are bad"):
        clean(tmp_path / "bad.txt")
    with pytest.raises(InputError, match=r"no document is left of 1; .*length 1"):
        clean(tmp_path / "bad.txt", write(tmp_path / "a.jsonl", "하나"))
    assert capsys.readouterr().err.count("damaged: ") == 2


def test_a_run_that_stops_goes_on_and_gives_the_same(clean, tmp_path, monkeypatch):
    files = [write(tmp_path / f"{k}.jsonl", story(k), story(k + 1), story(k + 9)) for k in range(6)]
    whole, _, _ = clean(*files, out="whole")
    real, calls, stops = engine.run, [], [3, 9, 12, 0]

    def breaks(name, function, tasks, workers, work):
        def counted(rank):
            calls.append((name, rank))
            if len(calls) == stops[0]:
                raise KeyboardInterrupt
            function(rank)

        real(name, counted, tasks, workers, work)

    monkeypatch.setattr(engine, "run", breaks)
    while stops[0]:
        with pytest.raises(KeyboardInterrupt):
            clean(*files)
        assert not (tmp_path / "out").exists()
        calls.clear()
        stops.pop(0)
    out, _, _ = clean(*files)
    assert ("clean", 0) not in calls and ("tokenise", 5) in calls
    same(whole, out)


def test_other_settings_do_not_go_on_with_old_work(clean, tmp_path, monkeypatch):
    files = [write(tmp_path / f"{k}.jsonl", story(k), "가나다라마바사 아자차카타파하") for k in range(2)]
    monkeypatch.setattr(engine, "run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        clean(*files)
    monkeypatch.undo()
    assert len(clean(*files, min_length=5)[2]) == 3
    monkeypatch.setattr(engine, "run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    bad = tmp_path / "bad.txt"
    bad.write_text("이런말", encoding="utf-8")
    with pytest.raises(KeyboardInterrupt):
        clean(*files, out="listed", bad_words=str(bad))
    keys = [(tmp_path / "listed.work" / "claim").read_text()]
    bad.write_text("나무를", encoding="utf-8")  # the same path, another list
    with pytest.raises(KeyboardInterrupt):
        clean(*files, out="listed", bad_words=str(bad))
    monkeypatch.setattr(pipeline, "WORK_VERSION", pipeline.WORK_VERSION + 1)
    keys.append((tmp_path / "listed.work" / "claim").read_text())
    with pytest.raises(KeyboardInterrupt):
        clean(*files, out="listed", bad_words=str(bad))
    keys.append((tmp_path / "listed.work" / "claim").read_text())
    assert len(set(keys)) == 3
    monkeypatch.undo()
    manifest = clean(*files, out="listed", min_length=5, bad_words=str(bad))[1]
    assert manifest["cleaning"]["lists_sha256"] == {"bad_words": hashlib.sha256("나무를".encode()).hexdigest()}
    (tmp_path / "new.work").mkdir()
    with pytest.raises(InputError, match=r"new\.work: is in the way"):
        clean(*files, out="new")


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_and_gives_the_same(clean, tmp_path, tokenizer):
    files = [write(tmp_path / f"{k}.jsonl", *(story(k * 50 + j) for j in range(200))) for k in range(8)]
    whole, _, _ = clean(*files, out="whole")
    command = [sys.executable, "-m", "polyglot_jax", "prepare", "--clean", "--text", *map(str, files),
               "--tokenizer", str(tokenizer), "--out", str(tmp_path / "out")]  # fmt: skip
    kills = 0
    for wait in (1, 3, 5, 9, 15):  # tasks done before it is killed
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while process.poll() is None and sum(1 for _ in (tmp_path / "out.work").glob("done/*/*")) < wait:
            time.sleep(0.002)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills >= 3
    if not (tmp_path / "out").exists():
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    same(whole, tmp_path / "out")


@pytest.mark.slow
def test_two_workers_give_the_same_and_a_killed_one_is_replaced(clean, tmp_path):
    pytest.importorskip("ray")
    files = [write(tmp_path / f"{k}.jsonl", *(story(k * 3 + j) for j in range(20))) for k in range(4)]
    one, _, _ = clean(*files, out="one")
    two, _, _ = clean(*files, out="two", workers=2)
    same(one, two)

    mark = tmp_path / "killed"

    def dies_once(rank, mark=mark):
        if rank == 1 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    with engine.engine(2):
        engine.run("dies", dies_once, range(4), 2, tmp_path / "work")
    assert mark.exists() and len(list((tmp_path / "work" / "done" / "dies").iterdir())) == 4


@pytest.mark.slow
def test_the_file_whose_workers_keep_dying_is_named_and_the_function_is_sent_once(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    made, remote = [], ray.remote

    def dies(rank):
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(ray, "remote", lambda **options: made.append(options) or remote(**options))
    with engine.engine(2), pytest.raises(InputError, match=r"clean: b\.txt: its worker died 4 times"):
        engine.run("clean", dies, ("a.txt", "b.txt", "c.txt"), 2, tmp_path / "work")
    assert len(made) == 1


def test_more_files_than_may_be_open_are_matched_or_refused_at_once(clean, tmp_path, monkeypatch):
    files = [write(tmp_path / f"{k}.jsonl", story(k)) for k in range(40)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd"))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 30, hard))
        clean(*files)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (220, 220))
    with pytest.raises(InputError, match=r"a file for each of text's 40 at once, and 220 are allowed"):
        clean(*files, out="more")
    assert not (tmp_path / "more.work").exists()
    assert clean(*files, out="more", deduplicate=False)[1]["documents"] == 40


def test_a_full_disk_is_said_and_once_there_is_room_the_run_goes_on(clean, tmp_path):
    files = [write(tmp_path / f"{k}.jsonl", *(story(k * 50 + j) for j in range(200))) for k in range(3)]
    whole, _, _ = clean(*files, out="whole")
    with small_disk(tmp_path / "disk", 300_000) as disk:
        with pytest.raises(InputError, match=r"disk/out: the disk is full"):
            clean(*files, out="disk/out")
        assert not (disk / "out").exists()
        remount(disk, "size=20m")
        same(whole, clean(*files, out="disk/out")[0])
