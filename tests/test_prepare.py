"""From files of every kind to token files, and every way in which the input can be bad."""

import errno
import gzip
import hashlib
import io
import json
import struct
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import tyro
import zstandard
from conftest import ROOT

from polyglot_jax.config import InputError
from polyglot_jax.prepare import corpus
from polyglot_jax.prepare.command import PrepareConfig, prepare
from polyglot_jax.prepare.corpus import TextCorpus
from polyglot_jax.prepare.readers import LONGEST, LONGEST_LINE, ReaderConfig
from polyglot_jax.prepare.train_tokenizer import TokenizerConfig, make_tokenizer
from polyglot_jax.token_files import TokenFile, TokenFileWriter
from polyglot_jax.tokenizer import Tokenizer, train_tokenizer

TEXTS = ["바람이 분다.", '그가 말했다: "가자", 라고', "세 번째, 그리고 끝"]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """Path of a small tokenizer."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(train_tokenizer(TEXTS * 2, 280, show_progress=False).to_json(), encoding="utf-8")
    return path


@pytest.fixture
def run(tmp_path, tokenizer):
    """run(*files, **settings) -> (manifest, texts of the documents read back from the token files)."""

    def run(*files, out=tmp_path / "out", **settings):
        config = PrepareConfig(text=tuple(map(str, files)), tokenizer=str(tokenizer), out=str(out), **settings)
        manifest = prepare(config)
        return manifest, documents(out)

    return run


def documents(out):
    """Texts of the documents, each seen to end with the end of text and to hold no other."""
    loaded, file = Tokenizer.load(out), TokenFile(out / "text_document")
    assert len(file.sizes) == len(file.documents) - 1
    texts = []
    for start, end in zip(file.document_starts[:-1], file.document_starts[1:], strict=True):
        ids = file.tokens[start:end].tolist()
        assert ids[-1] == loaded.eos_id and loaded.eos_id not in ids[:-1]
        texts.append(loaded.decode(ids[:-1]))
    return texts


def bad_rows(folder):
    return [json.loads(line) for line in (folder / "bad_rows.jsonl").read_text(encoding="utf-8").splitlines()]


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def quoted(text):
    return '"' + text.replace('"', '""') + '"' if '"' in text or "," in text else text


TXT = "".join(text + "\n" for text in TEXTS)
JSONL = "".join(json.dumps({"id": i, "text": text}, ensure_ascii=False) + "\n" for i, text in enumerate(TEXTS))
CSV = "id,text\n" + "".join(f"{i},{quoted(text)}\n" for i, text in enumerate(TEXTS))
TSV = "document\tlabel\n" + "".join(f"{quoted(text)}\t1\n" for text in TEXTS)


def packed(data, suffix):
    if suffix == ".gz":
        return gzip.compress(data[:20]) + gzip.compress(data[20:])  # two members, as concatenated files have
    if suffix == ".zst":
        compress = zstandard.ZstdCompressor().compress
        return compress(data[:20]) + compress(data[20:])
    return data


# Reading


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind, content", [(".txt", TXT), (".jsonl", JSONL), (".csv", CSV), (".tsv", TSV)])
def test_every_kind_of_file(run, tmp_path, kind, content, suffix):
    file = tmp_path / f"a{kind}{suffix}"
    file.write_bytes(packed(content.encode(), suffix))
    manifest, texts = run(file)
    assert texts == TEXTS
    assert manifest["documents"] == 3 and manifest["bad_rows"] == manifest["empty_rows"] == 0
    assert not (tmp_path / "out" / "bad_rows.jsonl").exists()


@pytest.mark.parametrize("kind, content", [(".txt", TXT), (".jsonl", JSONL), (".csv", CSV), (".tsv", TSV)])
def test_windows_files(run, tmp_path, kind, content):
    file = tmp_path / f"a{kind}"
    file.write_bytes(b"\xef\xbb\xbf" + content.replace("\n", "\r\n").encode())
    assert run(file)[1] == TEXTS


def test_a_txt_as_lines_paragraphs_or_whole(run, tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("\n하나\n  둘 \n\n \n셋\n", encoding="utf-8")
    manifest, texts = run(file)
    assert texts == ["하나", "  둘 ", "셋"] and manifest["empty_rows"] == 3
    manifest, texts = run(file, out=tmp_path / "out2", txt_documents="paragraph")
    assert texts == ["하나\n  둘 ", "셋"] and manifest["empty_rows"] == 0
    assert run(file, out=tmp_path / "out3", txt_documents="file")[1] == ["\n하나\n  둘 \n\n \n셋\n"]


def test_a_folder_is_walked_in_order_and_skips_are_told(run, tmp_path, capsys):
    corpus = tmp_path / "corpus"
    (corpus / "b").mkdir(parents=True)
    for name, text in (("c.txt", "셋"), ("b/z.txt", "둘"), ("a.txt", "하나"), (".a.txt", "숨은"), ("LICENSE", "MIT")):
        (corpus / name).write_text(text, encoding="utf-8")
    manifest, texts = run(corpus)
    assert texts == ["하나", "둘", "셋"]
    assert manifest["skipped_files"] == 2 and "skipped 2 hidden or other files" in capsys.readouterr().err


def test_folders_that_link_to_each_other_are_read_once(run, tmp_path):
    corpus = tmp_path / "corpus"
    names = [f"f{k}" for k in range(6)]
    for name in names:
        (corpus / name).mkdir(parents=True)
        (corpus / name / "a.txt").write_text(name, encoding="utf-8")
    for name in names:  # each way through all of them would be walked: 6! and more
        for other in names:
            (corpus / name / f"to_{other}").symlink_to(corpus / other)
    (corpus / "f0" / ".hidden").symlink_to(corpus / "f5")
    assert sorted(run(corpus)[1]) == names


def test_column_and_its_defaults(run, tmp_path):
    file = tmp_path / "a.csv"
    file.write_text("document,text,body\n하나,둘,셋\n", encoding="utf-8")
    assert run(file)[1] == ["둘"]
    assert run(file, column="body", out=tmp_path / "out2")[1] == ["셋"]
    file.write_text("Q,A\n하나,둘\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"a\.csv: no column text or document among Q, A; .*--column"):
        run(file, out=tmp_path / "out3")
    with pytest.raises(InputError, match=r"a\.csv: no column B among Q, A"):
        run(file, column="B", out=tmp_path / "out3")
    file.write_text("text,body,text\n하나,둘,셋\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"a\.csv: 2 columns are named text; rename"):
        run(file, out=tmp_path / "out3")
    assert run(file, column="body", out=tmp_path / "doubled")[1] == ["둘"]
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"body": "하나"}\n', encoding="utf-8")
    reason = r"a\.jsonl: 1 of 1 rows are bad, such as line 1 \(no 'text' or 'document' among body\); .*--column"
    with pytest.raises(InputError, match=reason):
        run(lines, out=tmp_path / "out3")
    assert run(lines, column="body", out=tmp_path / "out3")[1] == ["하나"]
    lines.write_text('{"meta": 1}\n{"text": "둘"}\n{"document": "셋"}\n', encoding="utf-8")
    manifest, texts = run(lines, out=tmp_path / "out4")  # each row on its own
    assert (texts, manifest["bad_rows"]) == (["둘", "셋"], 1)


def test_other_encodings(run, tmp_path):
    for encoding in ("cp949", "utf-16"):
        file = tmp_path / "a.csv"
        file.write_bytes(CSV.encode(encoding))
        assert run(file, encoding=encoding, out=tmp_path / encoding)[1] == TEXTS


def test_fields_of_many_lines_and_of_great_length(run, tmp_path):
    poem, long = "나 보기가 역겨워, 가실 때에는\n" * 15, "가" * 200_000
    file = tmp_path / "a.csv"
    file.write_text(f'text,n\n"{poem}",1\n{long},2\n', encoding="utf-8")
    assert run(file)[1] == [poem, long]


def test_quoting_none_takes_quotes_as_they_are(run, tmp_path):
    file = tmp_path / "a.tsv"
    file.write_text('id\ttext\n1\t"앤" 내 스타일\n2\t"반쪽\n3\t그"는"\n', encoding="utf-8")
    assert run(file, quoting="none")[1] == ['"앤" 내 스타일', '"반쪽', '그"는"']


# Writing


def test_token_files_are_what_the_format_asks_for(run, tmp_path, tokenizer):
    """The two files, put together from the texts and the table of the format."""
    file = tmp_path / "a.txt"
    file.write_text(TXT, encoding="utf-8")
    run(file)
    encoded = [[*Tokenizer.load(tokenizer).encode(text), 2] for text in TEXTS]
    sizes = [len(ids) for ids in encoded]
    flat = [i for ids in encoded for i in ids]
    assert (tmp_path / "out" / "text_document.bin").read_bytes() == struct.pack(f"<{len(flat)}H", *flat)
    assert (tmp_path / "out" / "text_document.idx").read_bytes() == b"MMIDIDX\0\0" + struct.pack(
        "<QBQQ3i3q4q", 1, 8, 3, 4, *sizes, 0, 2 * sizes[0], 2 * (sizes[0] + sizes[1]), 0, 1, 2, 3
    )


def test_text_is_brought_to_nfc(run, tmp_path):
    (tmp_path / "nfd.txt").write_text(unicodedata.normalize("NFD", TXT), encoding="utf-8")
    manifest, texts = run(tmp_path / "nfd.txt")
    assert texts == TEXTS
    assert manifest["characters"] == sum(map(len, TEXTS))
    assert manifest["utf8_bytes"] == sum(len(text.encode()) for text in TEXTS)


def test_batches_change_nothing(run, tmp_path, monkeypatch):
    file = tmp_path / "a.txt"
    file.write_text(TXT * 5, encoding="utf-8")
    run(file)
    monkeypatch.setattr(corpus, "BATCH_CHARACTERS", 20)
    run(file, out=tmp_path / "small")
    for name in ("text_document.bin", "text_document.idx", "manifest.json"):
        assert (tmp_path / "small" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_two_runs_give_the_same_bytes_and_a_manifest_that_adds_up(run, tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text(TXT, encoding="utf-8")
    (tmp_path / "b.jsonl").write_text(JSONL + "{}\n\n", encoding="utf-8")
    files = (tmp_path / "a.txt", tmp_path / "b.jsonl")
    manifest, _ = run(*files)
    run(*files, out=tmp_path / "again")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {"text_document.bin", "text_document.idx", "tokenizer.json", "manifest.json", "bad_rows.jsonl"}
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == tokenizer.read_bytes()
    assert (tmp_path / "out" / "manifest.json").read_text(encoding="utf-8").rstrip() == json.dumps(
        manifest, ensure_ascii=False, indent=2
    )
    assert (manifest["documents"], manifest["bad_rows"], manifest["empty_rows"]) == (6, 1, 1)
    assert manifest["tokens"] == len(TokenFile(tmp_path / "out" / "text_document").tokens)
    assert [count["documents"] for count in manifest["inputs"]] == [3, 3]
    hashes = {count["path"]: count["sha256"] for count in manifest["inputs"]}
    hashes |= {str(tmp_path / "out" / name): value for name, value in manifest["sha256"].items()}
    assert len(hashes) == 5 and hashes == {path: sha256(path) for path in hashes}
    assert (manifest["valid_ids"], manifest["eos_id"], manifest["version"]) == (283, 2, 1)
    assert manifest["settings"]["txt_documents"] == "line" and manifest["settings"]["text"] == tuple(map(str, files))


def test_hash_of_a_packed_input_is_that_of_the_whole_file(run, tmp_path):
    for suffix in (".gz", ".zst"):
        file = tmp_path / f"a.txt{suffix}"
        file.write_bytes(packed(TXT.encode(), suffix))
        [count] = run(file, out=tmp_path / suffix)[0]["inputs"]
        assert count["sha256"] == sha256(file)


# Bad rows


def test_bad_rows_are_recorded_with_line_and_reason(run, tmp_path, capsys):
    good = [json.dumps({"text": f"문장 {k}"}, ensure_ascii=False).encode() for k in range(8)]
    bad = [b'{"text": "\xb0\xa1"}', b"{text}", b'["a"]', b'{"text": 5}', b'{"body": "b"}', b'{"text": "\\ud800"}']
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"\n".join([*good, *bad, b"", b'{"text": " "}']) + b"\n")
    manifest, texts = run(file)
    assert texts == [f"문장 {k}" for k in range(8)]
    assert (manifest["bad_rows"], manifest["empty_rows"]) == (6, 2)
    rows = bad_rows(tmp_path / "out")
    assert {row["file"] for row in rows} == {str(file)} and [row["line"] for row in rows] == [*range(9, 15)]
    starts = ["byte 0xb0 is not utf-8", "not JSON: ", "not a JSON object but list", "'text' is not a string but int",
              "no 'text' or 'document' among body", "half of a surrogate pair"]  # fmt: skip
    assert all(row["reason"].startswith(start) for row, start in zip(rows, starts, strict=True))
    printed = capsys.readouterr().err
    assert (
        f"bad row: {file}: line 13: no 'text' or" in printed and "line 14" not in printed and "more bad rows" in printed
    )


def test_rows_of_a_wrong_number_of_fields(run, tmp_path):
    file = tmp_path / "a.csv"
    file.write_text('text,n\n하나,1\n둘\n"셋\n넷",3\n다섯,여섯,5\n\n', encoding="utf-8")
    manifest, texts = run(file)
    assert texts == ["하나", "셋\n넷"] and manifest["empty_rows"] == 1
    assert [(row["line"], row["reason"]) for row in bad_rows(tmp_path / "out")] == [
        (3, "1 fields where the header has 2"), (6, "3 fields where the header has 2"),
    ]  # fmt: skip


def test_a_bad_paragraph_is_named_by_its_first_line(run, tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes("하나\n둘\n\n\n셋\n".encode() + b"\xff\n\n" + "넷\n".encode())
    assert run(file, txt_documents="paragraph")[1] == ["하나\n둘", "넷"]
    assert bad_rows(tmp_path / "out") == [{"file": str(file), "line": 5, "reason": "byte 0xff is not utf-8"}]


@pytest.mark.parametrize("documents", ["line", "paragraph", "file"])
def test_a_document_too_long_for_the_memory_is_a_bad_row(run, tmp_path, documents):
    long, file = "말 " * (LONGEST // 2), tmp_path / "a.txt"
    file.write_text(f"하나\n\n{long}끝\n\n둘\n\n{long}\n", encoding="utf-8")  # the second is just short enough
    if documents == "file":
        with pytest.raises(
            InputError, match=r"1 of 1 rows are bad, such as line 1 \(longer than 16,777,216 characters"
        ):
            run(file, txt_documents=documents)
        return
    corpus = TextCorpus(ReaderConfig(text=(str(file),), txt_documents=documents))
    assert [len(text) for text in corpus.documents(tmp_path / "bad.jsonl", lambda size: None)] == [2, 1, LONGEST]
    assert corpus.counts[0].sha256 == sha256(file)
    row = json.loads((tmp_path / "bad.jsonl").read_text(encoding="utf-8"))
    assert (row["line"], row["reason"]) == (3, "longer than 16,777,216 characters")


def test_a_long_row_of_a_jsonl_is_not_taken_for_damage(run, tmp_path):
    file = tmp_path / "a.jsonl"
    long = [json.dumps({"text": "말" * (LONGEST + 1)}, ensure_ascii=False), "x" * (LONGEST_LINE + 1)]
    file.write_text(JSONL + "".join(line + "\n" for line in long), encoding="utf-8")
    assert run(file)[1] == TEXTS
    reasons = [row["reason"] for row in bad_rows(tmp_path / "out")]
    assert reasons == ["longer than 16,777,216 characters", "a line longer than 101,711,872 characters"]


def test_a_row_of_a_jsonl_is_measured_without_its_escapes(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "말" * LONGEST}) + "\n", encoding="utf-8")
    [text] = TextCorpus(ReaderConfig(text=(str(tmp_path / "a.jsonl"),))).documents(tmp_path / "bad", lambda size: None)
    assert len(text) == LONGEST


@pytest.mark.parametrize("quote", ["", '"'])
def test_a_long_field_of_a_csv_costs_no_other_row(run, tmp_path, quote):
    (tmp_path / "a.csv").write_text(f"text\n하나\n{quote}{'말' * (LONGEST + 1)}{quote}\n둘\n", encoding="utf-8")
    assert run(tmp_path / "a.csv")[1] == ["하나", "둘"]
    [row] = bad_rows(tmp_path / "out")
    assert (row["line"], row["reason"]) == (3, "longer than 16,777,216 characters")


# A process takes over, as its own peak, that of the process that started it: hence a small one between.
PEAK = """import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"""


def memory(file, tokenizer, out):
    """Most MiB that `prepare` takes over a file, as a command."""
    command = [sys.executable, "-m", "polyglot_jax", "prepare", "--text", file, "--tokenizer", tokenizer, "--out", out]
    done = subprocess.run([sys.executable, "-c", PEAK, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout) / 1024


@pytest.mark.slow
def test_a_line_of_200_mb_takes_no_memory(tmp_path, tokenizer):
    """Whole, it would be half a GB of characters, and ten of the tokenizer's."""
    with open(tmp_path / "a.txt", "w", encoding="utf-8") as file:
        file.writelines("말 그대로 " * 1000 for _ in range(15_000))
        file.write("\n둘\n")
    assert (tmp_path / "a.txt").stat().st_size > 200e6
    assert memory(tmp_path / "a.txt", tokenizer, tmp_path / "out") < 400
    assert documents(tmp_path / "out") == ["둘"] and bad_rows(tmp_path / "out")[0]["line"] == 1


@pytest.mark.slow
def test_a_million_tiny_documents(tmp_path, tokenizer):
    with open(tmp_path / "a.txt", "w", encoding="utf-8") as file:
        file.writelines(f"말 {k}\n" for k in range(1_000_000))
    assert memory(tmp_path / "a.txt", tokenizer, tmp_path / "out") < 400
    assert len(TokenFile(tmp_path / "out" / "text_document").sizes) == 1_000_000


def test_a_bad_key_of_another_encoding_is_recorded(run, tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(JSONL.encode() + '{"본문": "가"}\n'.encode("cp949"))
    assert run(file)[1] == TEXTS
    assert bad_rows(tmp_path / "out")[0]["line"] == 4


@pytest.mark.parametrize(
    "name, content, message",
    [
        (
            "a.txt",
            TXT.encode("cp949"),
            r"3 of 3 rows are bad, .*byte 0x.. is not utf-8\); pass --encoding cp949.*iconv",
        ),
        ("a.tsv", TSV.encode("cp949"), r"3 of 3 rows are bad, .* line 2 .*; pass --encoding cp949"),
        ("a.jsonl", TXT.encode(), r"3 of 3 rows are bad, .*not JSON.*one JSON object on each line"),
        ("a.jsonl", b'{"text": "a"}\n{"b": "c"}\n{"b": "d"}\n', r"2 of 3 rows are bad, .* line 2 .*--column"),
        (
            "a.csv",
            "text,n\n하나\n".encode(),
            r"1 of 1 rows are bad, .*1 fields where the header has 2\); pass --quoting",
        ),
        ("a.csv", "글,수\n하나,1\n".encode("cp949"), r"no column text or document among .*--encoding"),
        ("a.csv", b"\ntext\nb\n", r"a\.csv: line 1: no header"),
        ("a.csv", b"", r"a\.csv: line 1: no header"),
        ("a.txt", b" \n\n", r"no document in 1 files \(2 empty rows, 0 bad ones\)"),
        ("a.jsonl", b"", r"no document in 1 files \(0 empty rows, 0 bad ones\)"),
    ],
)
def test_files_that_are_mostly_bad_or_empty(run, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        run(tmp_path / name)
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_half_of_the_rows_may_be_bad(run, tmp_path):
    (tmp_path / "a.jsonl").write_text(JSONL + "{}\n" * 3, encoding="utf-8")
    assert run(tmp_path / "a.jsonl")[1] == TEXTS


ROWS = "".join(f"{k},아무개,문장 {k}\n" for k in range(2000))


@pytest.mark.parametrize(
    "content, line, reason",
    [
        ('id,who,text\n1,나,"열린 말\n' + ROWS, 2, "looks like a row of its own"),
        ('id,who,text\n1,나,"열린 말\n' + ROWS[:60], 2, "unexpected end of data"),
        ('id,who,text\n1,나,"끝" 뒤에 더\n' + ROWS, 2, "expected after"),
        (f'id,who,text\n{ROWS}1,나,"열린 말\n' + "문장\n" * 2000, 2002, "still open 1,000 lines later"),
    ],
)
def test_a_quote_that_is_not_closed_names_its_line(run, tmp_path, content, line, reason):
    (tmp_path / "a.csv").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=rf"a\.csv: line {line}: a quoted field .*{reason}.*--quoting none"):
        run(tmp_path / "a.csv")


# Bad input of other kinds


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.zst"])
@pytest.mark.parametrize(
    "damage",
    [lambda data: data[:-9], lambda data: data[:30] + b"\0\1\2\3" * 9 + data[66:], lambda data: b"no archive at all"],
    ids=["cut", "changed", "foreign"],
)
def test_damaged_archives(run, tmp_path, name, damage):
    content = "".join(f"문장 {k * 7919 % 1000}\n" for k in range(1000)).encode()
    (tmp_path / name).write_bytes(damage(packed(content, "." + name.rsplit(".", 1)[1])))
    with pytest.raises(InputError, match=rf"{name}: damaged or truncated archive"):
        run(tmp_path / name)
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_paths_that_cannot_be_read(run, tmp_path):
    (tmp_path / "a.txt").write_text(TXT, encoding="utf-8")
    (tmp_path / "a.json").write_text("{}", encoding="utf-8")
    (tmp_path / "none").mkdir()
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "b.txt").symlink_to(tmp_path / "gone.txt")
    for names, message in [
        (["gone.txt"], r"text=.*gone\.txt: no such file or folder"),
        (["a.json"], r"text=.*a\.json: unknown extension; known are \.txt \.jsonl"),
        (["none"], r"text=.*none: no file in this folder"),
        (["links"], r"text=.*b\.txt: cannot be read"),
        (["a.txt", "a.txt"], r"text=.*a\.txt: given twice"),
        ([], "text: name at least one"),
    ]:
        with pytest.raises(InputError, match=message):
            run(*(tmp_path / name for name in names))
    assert not (tmp_path / "out").exists()


def test_encodings_that_do_not_exist_or_do_not_fit(run, tmp_path):
    (tmp_path / "a.txt").write_text("abcd\n", encoding="utf-8")
    with pytest.raises(InputError, match="encoding=cp9490: Python knows no such text encoding"):
        run(tmp_path / "a.txt", encoding="cp9490")
    for name in ("undefined", "utf\0-8"):  # the one codec that is none, and no name
        with pytest.raises(InputError, match=f"encoding={name}: Python knows no such text encoding"):
            run(tmp_path / "a.txt", encoding=name)
    with pytest.raises(InputError, match=r"a\.txt: encoding=utf-16: .*pass the one it is in"):
        run(tmp_path / "a.txt", encoding="utf-16")


def test_a_missing_tokenizer(tmp_path):
    (tmp_path / "a.txt").write_text(TXT, encoding="utf-8")
    with pytest.raises(InputError, match=r"tokenizer=.*gone\.json: cannot read"):
        prepare(PrepareConfig(text=(str(tmp_path / "a.txt"),), tokenizer=str(tmp_path / "gone.json"), out="unused"))


def test_an_existing_out_is_only_replaced_when_it_may_be(run, tmp_path):
    (tmp_path / "a.txt").write_text(TXT, encoding="utf-8")
    (tmp_path / "b.txt").write_text(TXT * 2, encoding="utf-8")
    (tmp_path / "out").mkdir()  # an empty one is fine
    run(tmp_path / "a.txt")
    with pytest.raises(InputError, match=r"out: exists; .*--overwrite"):
        run(tmp_path / "b.txt")
    assert documents(tmp_path / "out") == TEXTS
    assert run(tmp_path / "b.txt", overwrite=True)[1] == TEXTS * 2
    assert {file.name for file in tmp_path.iterdir()} == {"a.txt", "b.txt", "out"}

    with pytest.raises(InputError, match=r"a\.txt: is a file"):
        run(tmp_path / "b.txt", out=tmp_path / "a.txt", overwrite=True)
    with pytest.raises(InputError, match=r"out: lies in a file"):
        run(tmp_path / "b.txt", out=tmp_path / "a.txt" / "out")
    home = tmp_path / "home"
    home.mkdir()
    (home / "letter.txt").write_text("편지", encoding="utf-8")
    with pytest.raises(InputError, match=r"home: was not made by this command"):
        run(tmp_path / "b.txt", out=home, overwrite=True)
    with pytest.raises(InputError, match=r"home: exists"):
        run(tmp_path / "b.txt", out=home)
    inside = tmp_path / "out" / "c.txt"
    inside.write_text(TXT, encoding="utf-8")
    with pytest.raises(InputError, match=r"out=.*out: holds the input .*c\.txt"):
        run(inside, overwrite=True)
    assert inside.exists() and (home / "letter.txt").exists()


@pytest.mark.parametrize(
    "error, raised, message",
    [
        (OSError(errno.ENOSPC, "No space left on device"), InputError, "out: the disk is full"),
        (KeyboardInterrupt("stop"), KeyboardInterrupt, "stop"),
    ],
    ids=["full disk", "Ctrl-C"],
)
def test_a_run_that_breaks_leaves_the_old_result(run, tmp_path, monkeypatch, error, raised, message):
    (tmp_path / "a.txt").write_text(TXT, encoding="utf-8")
    run(tmp_path / "a.txt")
    add = TokenFileWriter.add_document

    def breaks(self, ids):
        if self.documents == 2:
            raise error
        add(self, ids)

    monkeypatch.setattr(TokenFileWriter, "add_document", breaks)
    for out, overwrite in (("out", True), ("new", False)):
        with pytest.raises(raised, match=message.replace("out", out)):
            run(tmp_path / "a.txt", out=tmp_path / out, overwrite=overwrite)
    assert {file.name for file in tmp_path.iterdir()} == {"a.txt", "out"}
    assert documents(tmp_path / "out") == TEXTS


# Commands


def test_flags(tmp_path, tokenizer, capsys):
    args = [
        "--text",
        "a.txt",
        "b",
        "--tokenizer",
        "t.json",
        "--out",
        "o",
        "--txt-documents",
        "file",
        "--quoting",
        "none",
    ]
    assert tyro.cli(PrepareConfig, args=args) == PrepareConfig(
        text=("a.txt", "b"), tokenizer="t.json", out="o", txt_documents="file", quoting="none"
    )
    with pytest.raises(SystemExit):
        tyro.cli(PrepareConfig, args=["--help"])
    assert "cp949 for old" in capsys.readouterr().out


def test_a_tokenizer_is_trained_from_the_same_files(run, tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(unicodedata.normalize("NFD", JSONL) * 3 + "{}\n", encoding="utf-8")
    config = TokenizerConfig(text=(str(file),), out=str(tmp_path / "tok"), vocab_size=290)
    made = make_tokenizer(config)
    assert made.to_json() == train_tokenizer(TEXTS * 3, 290, show_progress=False).to_json()
    assert (tmp_path / "tok" / "tokenizer.json").read_bytes() == made.to_json().encode()
    manifest = json.loads((tmp_path / "tok" / "manifest.json").read_text(encoding="utf-8"))
    assert (manifest["documents"], manifest["bad_rows"], manifest["valid_ids"]) == (9, 1, 293)
    assert manifest["sha256"] == {"tokenizer.json": made.sha256}
    assert bad_rows(tmp_path / "tok")[0]["line"] == 10
    with pytest.raises(InputError, match="exists"):
        make_tokenizer(config)


def test_a_tokenizer_from_too_little_text(tmp_path):
    (tmp_path / "a.txt").write_text(TXT, encoding="utf-8")
    with pytest.raises(InputError, match=r"vocab_size=30000: .*--vocab-size \d+"):
        make_tokenizer(TokenizerConfig(text=(str(tmp_path / "a.txt"),), out=str(tmp_path / "tok")))
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize(
    "name, settings, count",
    [
        ("chatbot_data/ChatbotData.csv", {"column": "A"}, 11_823),
        ("kobest/v1.0/COPA/test.tsv", {"column": "sentence"}, 1000),
        ("kobest/v1.0/BoolQ/test.tsv", {"column": "Text", "quoting": "none"}, 1404),
    ],
)
def test_real_files(run, shared, tmp_path, name, settings, count):
    manifest, texts = run(shared / "data" / name, **settings)
    assert manifest["documents"] == len(texts) == count and manifest["bad_rows"] == 0
    assert manifest["characters"] == sum(map(len, texts))


def test_quotes_in_nsmc_are_plain_characters(run, shared, tmp_path):
    """Its reviews begin with quotes now and then; read as CSV, some would take in the reviews after them."""
    with gzip.open(shared / "data" / "nsmc" / "nsmc_raw_reviews.tsv.gz", "rb") as whole:
        lines = io.BytesIO(whole.read(400_000)).readlines()[:-1]
    (tmp_path / "nsmc.tsv").write_bytes(b"".join(lines))
    with pytest.raises(InputError, match=r"nsmc\.tsv: line 498: .*--quoting none"):
        run(tmp_path / "nsmc.tsv")
    manifest, texts = run(tmp_path / "nsmc.tsv", quoting="none")
    assert manifest["bad_rows"] == 0 and len(texts) + manifest["empty_rows"] == len(lines) - 1
