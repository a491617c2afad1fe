"""Web archives and pages: which records are read, in which encoding, and what of a page is its text."""

import functools
import gzip
import itertools
import json
import random
import sys

import pytest
import zstandard

from polyglot_jax.config import InputError
from polyglot_jax.prepare.cleaning import STEPS, CleanConfig
from polyglot_jax.prepare.command import PrepareConfig, prepare
from polyglot_jax.prepare.readers import LONGEST, ReaderConfig, Source, read_rows
from polyglot_jax.prepare.train_tokenizer import TokenizerConfig, make_tokenizer
from polyglot_jax.prepare.web import DEEPEST, decoded, is_page
from polyglot_jax.tokenizer import train_tokenizer

brotli = pytest.importorskip("brotli")
pytest.importorskip("warcio")
pytest.importorskip("resiliparse")

NEWS = """<!DOCTYPE html>
<html lang="ko"><head><meta charset="utf-8"><title>산마을 소식</title><style>p { color: #333 }</style>
<script>document.write("<p>광고입니다</p>")</script></head>
<body><header><nav><ul><li><a href="/">홈</a></li><li><a href="/news">뉴스</a></li><li><a href="/login">로그인</a></li>
</ul></nav></header><aside class="sidebar"><h3>많이 본 기사</h3><ol><li><a href="/1">벚꽃 축제 일정</a></li>
<li><a href="/2">주말 날씨 전망</a></li></ol></aside>
<main><article><h1>산마을에 봄이 왔다</h1>
<p>산 아래 작은 마을에 봄이 왔다. 아이들은 개울가에서 돌을 던지며 놀았고, 어른들은 밭을 갈기 시작했다.</p>
<p>할머니는 마루에 앉아 <b>쑥</b>을 다듬으며 <a href="/word">말</a>했다.
&quot;올해는 비가 알맞게 와서 농사가 잘될 게다.&quot;</p>
<table><tr><td>봄</td><td>3월</td></tr><tr><td>여름</td><td>6월</td></tr></table>
<p>사람들은 저녁마다 느티나무 아래에 모여 &lt;옛날이야기&gt;를 나눈다.</p></article></main>
<footer><p>이용약관 개인정보처리방침 전화번호부</p></footer></body></html>"""
SENTENCES = [
    "산마을에 봄이 왔다",
    "아이들은 개울가에서 돌을 던지며 놀았고, 어른들은 밭을 갈기 시작했다.",
    '할머니는 마루에 앉아 쑥을 다듬으며 말했다. "올해는 비가 알맞게 와서 농사가 잘될 게다."',
    "사람들은 저녁마다 느티나무 아래에 모여 <옛날이야기>를 나눈다.",
]
AROUND = ["광고입니다", "color", "로그인", "벚꽃 축제", "주말 날씨", "개인정보처리방침"]
BOARD = """<html><head><title>게시판</title></head><body bgcolor=white><font size=2>
오늘은 똠방각하라는 소설을 읽었습니다. 날씨가 맑아서 멀리까지 보였습니다.<br>
내려오는 길에 국수를 먹었는데 참 맛있었습니다. 다음에는 같이 가요.</font></body></html>"""
HTML = "text/html; charset=utf-8"


def record(page, kind="response", status="200 OK", http=f"Content-Type: {HTML}\r\n", address="http://a.kr/"):
    body = page.encode() if isinstance(page, str) else page
    if kind == "response":
        body = f"HTTP/1.1 {status}\r\n{http}\r\n".encode() + body
    head = {
        "WARC-Type": kind, "WARC-Target-URI": address, "WARC-Date": "2023-01-01T00:00:00Z",
        "WARC-Record-ID": "<urn:uuid:00000000-0000-0000-0000-000000000001>", "Content-Length": len(body),
        "Content-Type": "application/http; msgtype=response" if kind == "response" else "text/plain",
    }  # fmt: skip
    return b"WARC/1.0\r\n" + "".join(f"{k}: {v}\r\n" for k, v in head.items()).encode() + b"\r\n" + body + b"\r\n\r\n"


PACKED = f"Content-Type: {HTML}\r\nContent-Encoding: gzip\r\n"


def rows(path):
    return list(read_rows(path, Source(path, lambda size: None), ReaderConfig(text=(str(path),))))


def html(text):
    return STEPS["html"](CleanConfig())(text)


def test_pages_are_read_and_other_records_left_out(tmp_path):
    chunked = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (BOARD.encode()[:99], BOARD.encode()[99:], b""))
    content = [
        record("software: none\r\n", "warcinfo"),
        record("GET / HTTP/1.1\r\n\r\n", "request"),
        record(NEWS),
        record("그런 쪽은 없습니다", status="404 Not Found"),
        record(b"\x89PNG", http="Content-Type: image/png\r\n"),
        record(gzip.compress(BOARD.encode()), http=PACKED),
        record(chunked, http=f"Content-Type: {HTML}\r\nTransfer-Encoding: chunked\r\n"),
        record("이미 글인 것", "conversion"),
        record(gzip.compress(BOARD.encode()) + b"\0" * 100_000, http=PACKED),
    ]
    found = [(3, NEWS), (6, BOARD), (7, BOARD), (8, "이미 글인 것"), (9, BOARD)]
    for name, data in (
        ("a.warc", b"".join(content)),
        ("a.warc.gz", b"".join(map(gzip.compress, content))),  # a member for each record, as crawlers write them
        ("a.warc.wet.gz", b"".join(map(gzip.compress, content))),
    ):
        (tmp_path / name).write_bytes(data)
        assert [(row.line, row.text) for row in rows(tmp_path / name)] == found


@pytest.mark.parametrize(
    "charset, declared, meta",
    [
        ("utf-8", "", ""),
        ("cp949", "text/html; charset=EUC-KR", ""),
        ("cp949", "text/html", '<meta http-equiv="Content-Type" content="text/html; charset=ks_c_5601-1987">'),
        ("cp949", "text/html; charset=UTF-8", "<meta charset='euc-kr'>"),  # the server is wrong
        ("utf-8", "text/html; charset=euc-kr", "<meta charset=euc-kr>"),  # both are
        ("cp949", "text/html; charset=nonsense", ""),
        ("cp949", "", ""),
        ("shift_jis", "", "<meta charset=Shift_JIS>"),
    ],
)
def test_encodings(charset, declared, meta):
    page = f"<html><head>{meta}</head>{'こんにちは' if charset == 'shift_jis' else BOARD}</html>"
    assert decoded(page.encode(charset), declared) == page


def test_a_page_that_was_cut_inside_a_character_and_one_of_no_encoding():
    for charset in ("utf-8", "cp949"):
        cut = BOARD.encode(charset)
        cut = cut[: cut.index("먹었".encode(charset)) + 1]
        text = decoded(cut, f"text/html; charset={charset}")
        assert text[:-1] == BOARD[: len(text) - 1] and text[-1] == "\ufffd"
    assert decoded(b"\xff\x80" * 99, "text/html") is None


def test_main_text():
    text = html(NEWS)
    assert [sentence for sentence in SENTENCES if sentence not in text] == []
    assert [words for words in AROUND if words in text] == []
    assert "봄" in text.split() and "여름" in text.split() and "\u2060" not in text
    assert [line.strip() for line in html(BOARD).split("\n")] == [
        "오늘은 똠방각하라는 소설을 읽었습니다. 날씨가 맑아서 멀리까지 보였습니다.",
        "내려오는 길에 국수를 먹었는데 참 맛있었습니다. 다음에는 같이 가요.",
    ]


def test_half_of_a_surrogate_pair_is_no_character_of_the_main_text():
    assert "봄이 ?왔다" in html(NEWS.replace("왔다", "\ud800왔다"))


def test_what_is_a_whole_page():
    for text in (
        "<html>가",
        "\ufeff\n<!DOCTYPE html>",
        "<!-- a --><!-- b -->\n<HTML lang=ko>",
        "<?xml version='1.0'?><!doctype html>",
    ):
        assert is_page(text)
    for text in ("가 <html> 나", "<p>가</p>", "<htmlx>", "", "<!-- <html>"):
        assert not is_page(text)
    is_page("<!-- a -->" * 50_000)  # a pattern that backtracks would not come back from this


def test_a_page_too_deep_for_the_extraction_is_taken_whole():
    """Nobody's page: with 50,000 in each other the search for the main text takes a minute."""
    menu = "<html><body><nav><a href='/'>처음으로 가기</a></nav>"
    shallow, deep = (html(menu + "<div>" * depth + "깊은 곳의 글") for depth in (DEEPEST // 2, 50 * DEEPEST))
    for around in ("</div>" * 50 * DEEPEST + "<div>" * 50 * DEEPEST, "<ul>" + "<li>항목" * 2 * DEEPEST + "</ul>"):
        taken = "처음으로" in html(menu + around + "깊은 곳의 글")
        assert taken == ("</div>" in around)  # an end without a beginning is none, a list's elements are side by side
    assert "처음으로" not in shallow and "처음으로" in deep and "깊은 곳의 글" in deep


def test_pages_of_an_archive_and_of_a_column_through_the_pipeline(tmp_path):
    pytest.importorskip("datatrove")
    pytest.importorskip("ftfy")
    (tmp_path / "t.json").write_text(train_tokenizer([NEWS] * 2, 280, show_progress=False).to_json(), encoding="utf-8")
    pages = [record(NEWS), record(BOARD.encode("cp949"), http="Content-Type: text/html; charset=euc-kr\r\n")]
    bad = [record(b"\xff\x80" * 99, address="http://b.kr/"), record("가" * LONGEST)]
    (tmp_path / "a.warc.gz").write_bytes(b"".join(map(gzip.compress, [*pages, *bad])))
    lines = (json.dumps({"html": page}, ensure_ascii=False) + "\n" for page in (NEWS, BOARD.replace("국수", "만두")))
    (tmp_path / "b.jsonl").write_text("".join(lines), encoding="utf-8")
    cleaning = CleanConfig(min_word_length=1)
    config = {"tokenizer": str(tmp_path / "t.json"), "cleaning": cleaning, "clean": True, "column": "html"}
    files = (str(tmp_path / "a.warc.gz"), str(tmp_path / "b.jsonl"))
    manifest = prepare(PrepareConfig(text=files, out=str(tmp_path / "out"), **config))
    assert manifest["cleaning"]["read"] == 4 and manifest["cleaning"]["steps"]["html"]["changed"] == 4
    assert manifest["documents"] == 3 and manifest["cleaning"]["duplicates"] == 1  # the news, of both files
    assert (manifest["bad_rows"], manifest["cleaning"]["damaged"]) == (2, [])
    reasons = [
        json.loads(line) for line in (tmp_path / "out" / "bad_rows.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [(row["file"], row["line"]) for row in reasons] == [(files[0], 3), (files[0], 4)]
    assert reasons[0]["reason"].startswith("http://b.kr/: in no encoding") and "longer than" in reasons[1]["reason"]
    report = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "로그인" not in report and "쑥을 다듬으며" in report


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("a.warc", b"".join([record(NEWS), record(BOARD)])[:-99], "damaged or truncated archive .*cut off"),
        ("a.warc.gz", gzip.compress(record(NEWS) + record(BOARD))[:-30], "damaged or truncated archive"),
        ("a.warc", record(NEWS) + b"what is this?\r\n" * 3, "damaged or no web archive"),
        ("a.warc", b"a text, not an archive\n" * 9, "damaged or no web archive"),
    ],
    ids=["cut", "cut gzip", "damaged", "foreign"],
)
def test_damaged_archives(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=rf"{name}: {message}"):
        rows(tmp_path / name)


@pytest.mark.parametrize("kind", ["plain", "members", "whole"])
def test_no_damage_is_anything_but_an_input_error_and_no_cut_is_silent(tmp_path, kind):
    records = [record("software: none\r\n", "warcinfo")]
    for k in range(4):
        packed = record(gzip.compress(BOARD.encode() * (k + 1), mtime=0), http=PACKED)
        records += [record(NEWS), packed, record(f"글 {k}", "conversion")]
    pack = functools.partial(gzip.compress, mtime=0)
    whole = {"plain": b"".join(records), "members": b"".join(map(pack, records)), "whole": pack(b"".join(records))}
    path = tmp_path / ("a.warc" if kind == "plain" else "a.warc.gz")
    path.write_bytes(whole[kind])
    expected, ends = rows(path), list(itertools.accumulate(map(len, records)))
    assert len(expected) == 12
    generator, errors = random.Random(6), 0
    for _ in range(300):
        data, at = bytearray(whole[kind]), generator.randrange(1, len(whole[kind]))
        how = generator.choice(["flip", "cut", "delete", "insert", "zero"])
        size = generator.randrange(1, 50)
        if how == "flip":
            data[at] ^= 1 << generator.randrange(8)
        elif how == "insert":
            data[at:at] = generator.randbytes(size)
        else:
            data[at : None if how == "cut" else at + size] = bytes(size) if how == "zero" else b""
        path.write_bytes(data)
        try:
            found = rows(path)
        except InputError as error:
            assert "damaged or" in str(error)
            errors += 1
            continue
        if kind != "plain":
            assert found == expected  # a packed file has checksums
        elif how == "cut":
            assert min(end - at for end in ends if end >= at) <= 4  # in the blank lines between two records
    assert errors > 100


@pytest.mark.parametrize(
    "old, new, message",
    [
        (b"Content-Length", b"Content-L\0ngth", "record 2 has no WARC-Type or no possible Content-Length"),
        (b"Content-Length: ", b"Content-Length: -", "record 2 has no WARC-Type or no possible Content-Length"),
        (b"Length: ", b"Length: " + b"9" * 27, "record 2 has no WARC-Type or no possible Content-Length"),
        (b"WARC-Type", b"WARC-Tyqe", "record 2 has no WARC-Type or no possible Content-Length"),
        (b"WARC-Date", b"\r\nWARC-Date", "record 2 has no WARC-Type or no possible Content-Length"),
        (b"WARC-Target-URI:", b"WARC-Target-URI ", "record 2 has no WARC-Target-URI"),
        (b"</html>", b"</html><!-- more than its head says -->", "record 2 does not end where its head says"),
    ],
)
def test_damaged_heads(tmp_path, old, new, message):
    (tmp_path / "a.warc").write_bytes(record(NEWS) + record(NEWS).replace(old, new, 1) + record(NEWS))
    with pytest.raises(InputError, match=rf"a\.warc: damaged or no web archive \(.*{message}"):
        rows(tmp_path / "a.warc")


def test_only_cleaning_reads_archives(tmp_path):
    (tmp_path / "a.warc").write_bytes(record(NEWS))
    with pytest.raises(InputError, match=r"a\.warc: holds pages, not text; only `prepare --clean`"):
        make_tokenizer(TokenizerConfig(text=(str(tmp_path),), out=str(tmp_path / "out")))


@pytest.mark.parametrize("name, module", [("a.warc", "warcio.archiveiterator"), ("a.parquet", "pyarrow")])
def test_a_missing_library_is_no_damage(tmp_path, monkeypatch, name, module):
    pytest.importorskip("datatrove")
    pytest.importorskip("ftfy")
    (tmp_path / "t.json").write_text(train_tokenizer([NEWS] * 2, 280, show_progress=False).to_json(), encoding="utf-8")
    (tmp_path / name).write_bytes(b"")
    (tmp_path / "b.txt").write_text("산 아래 작은 마을에 봄이 왔다. " * 9, encoding="utf-8")
    files = (str(tmp_path / name), str(tmp_path / "b.txt"))
    monkeypatch.setitem(sys.modules, module, None)
    config = PrepareConfig(text=files, tokenizer=str(tmp_path / "t.json"), out=str(tmp_path / "out"), clean=True)
    with pytest.raises(
        InputError, match=rf"{name}: .* needs? {module.split('.')[0]}; pip install -r requirements-corpus"
    ):
        prepare(config)


@pytest.mark.parametrize(
    "answer, reason",
    [
        (b"", "the answer is empty"),
        (b"HTTP/1.1 20", "the answer is cut off within its head"),
        (b"HTTP/1.1 200 OK\r\nContent-Ty", "the answer is cut off within its head"),
        (f"HTTP/1.1 200 OK\r\nContent-Type: {HTML}\r\n".encode(), "the answer is cut off within its head"),
        (NEWS.encode(), "the answer does not begin as one of HTTP does"),
    ],
)
def test_an_answer_without_a_whole_head_costs_no_other(tmp_path, answer, reason):
    whole = record("", http=f"Content-Type: {HTML}\r\n")  # an empty page is no damage
    head, _ = record(answer, "conversion").replace(b"conversion", b"response").split(b"\r\n\r\n", 1)
    (tmp_path / "a.warc").write_bytes(head + b"\r\n\r\n" + answer + b"\r\n\r\n" + whole + record(NEWS))
    [bad, empty, good] = rows(tmp_path / "a.warc")
    assert (bad.line, bad.problem, bad.reason) == (1, "page", f"http://a.kr/: {reason}")
    assert (empty.text, empty.problem) == ("", None) and good.text == NEWS


def test_a_body_that_cannot_be_unpacked_costs_no_other(tmp_path):
    packed = record(b"no brotli", http=f"Content-Type: {HTML}\r\nContent-Encoding: br\r\n", address="http://b.kr/")
    (tmp_path / "a.warc").write_bytes(packed + record(NEWS))
    [bad, good] = rows(tmp_path / "a.warc")
    assert good.text == NEWS and bad.problem == "page" and bad.reason.startswith("http://b.kr/: ")


@pytest.mark.parametrize("name, pack", [("gzip", gzip.compress), ("x-gzip", gzip.compress), ("br", brotli.compress)])
def test_a_packed_body_that_is_damaged_or_cut_says_so(tmp_path, name, pack):
    whole, http = pack(NEWS.encode()), PACKED.replace("gzip", name)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0x55
    bodies = (whole, bytes(flipped), *(whole[:size] for size in (20, len(whole) // 2, len(whole) - 1)))
    (tmp_path / "a.warc").write_bytes(b"".join(record(body, http=http) for body in bodies))
    [good, *bad] = rows(tmp_path / "a.warc")
    assert good.text == NEWS and [row.problem for row in bad] == ["page"] * 4
    assert all(row.reason.startswith(f"http://a.kr/: cannot be unpacked from {name!r} (") for row in bad)
    assert all(row.reason.endswith("(cut off)") for row in bad[1:])


def test_a_body_that_is_not_packed_as_its_head_says(tmp_path):
    bomb = gzip.compress(b"a" * (2 * LONGEST))
    (tmp_path / "a.warc").write_bytes(record(NEWS, http=PACKED) + record(bomb, http=PACKED))
    [plain, long] = rows(tmp_path / "a.warc")
    assert plain.text == NEWS and long.problem == "length"


def test_pages_packed_by_what_warcio_does_not_unpack(tmp_path, monkeypatch):
    heads = {name: f"Content-Type: {HTML}\r\nContent-Encoding: {name}\r\n" for name in ("zstd", "br")}
    page = zstandard.compress(NEWS.encode())
    chunks = b"%x\r\n%s\r\n0\r\n\r\n" % (len(page), page)
    data = record(page, http=heads["zstd"]) + record(chunks, http=heads["zstd"] + "Transfer-Encoding: chunked\r\n")
    bomb = zstandard.compress(b"a" * (2 * LONGEST))
    (tmp_path / "a.warc").write_bytes(data + record(bomb, http=heads["zstd"]))
    *good, long = rows(tmp_path / "a.warc")
    assert [row.text for row in good] == [NEWS, NEWS] and long.problem == "length"

    (tmp_path / "a.warc").write_bytes(record(brotli.compress(NEWS.encode()), http=heads["br"]))
    assert [row.text for row in rows(tmp_path / "a.warc")] == [NEWS]
    (tmp_path / "a.warc").write_bytes(record(brotli.compress(b"a" * (2 * LONGEST)), http=heads["br"]))
    assert [row.problem for row in rows(tmp_path / "a.warc")] == ["length"]
    monkeypatch.setitem(sys.modules, "brotli", None)
    (tmp_path / "a.warc").write_bytes(record(b"packed", http=heads["br"]))
    [bad] = rows(tmp_path / "a.warc")
    assert bad.problem == "page" and "from 'br' (needs brotli; pip install -r requirements-corpus.txt)" in bad.reason
    (tmp_path / "a.warc").write_bytes(record(b"\xff\x80" * 99, http=heads["br"].replace("br", "xz")))
    assert rows(tmp_path / "a.warc")[0].reason.endswith(", which is packed as 'xz'")
