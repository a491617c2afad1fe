"""What is taken for personal data and what is not; masks in token files; the audit that looks for what is left."""

import json
import re
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
import tyro

from polyglot_jax.config import InputError
from polyglot_jax.prepare.audit import AuditConfig, audit
from polyglot_jax.prepare.command import PrepareConfig, prepare
from polyglot_jax.prepare.personal_data import KINDS, find, mask, replacements
from polyglot_jax.token_files import TokenFile
from polyglot_jax.tokenizer import Tokenizer, train_tokenizer

TEXT = (
    "문의는 010-1234-5678로, 자료는 a.b@c.co.kr로, 회비는 국민 123456-78-123456에. "
    "신분증 900101-1234567, 카드 4111-1111-1111-1111."
)
MASKED = "문의는 <|tel|>로, 자료는 [이메일]로, 회비는 국민 <|acc|>에. 신분증 <|rrn|>, 카드 [카드번호]."
ONE_EACH = dict.fromkeys(KINDS, 1)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(train_tokenizer([TEXT] * 2, 280, show_progress=False).to_json(), encoding="utf-8")
    return path


def wide(text):
    """ASCII in the full-width forms that Korean keyboards also make."""
    return "".join(chr(ord(character) + 0xFEE0) for character in text)


def pieces(text):
    return [(kind, text[start:end]) for kind, start, end in find(text)]


@pytest.mark.parametrize(
    "text, found",
    [
        (wide("010-1234-5678") + "이요", [("tel", wide("010-1234-5678"))]),
        ("(02) 123-4567 또는 02)123-4567", [("tel", "(02) 123-4567"), ("tel", "02)123-4567")]),
        ("+82 (0)10 1234 5678", [("tel", "+82 (0)10 1234 5678")]),
        ("0 1 0 - 1 2 3 4 - 5 6 7 8", [("tel", "0 1 0 - 1 2 3 4 - 5 6 7 8")]),
        ("공일공 일이삼사 오육칠팔", [("tel", "공일공 일이삼사 오육칠팔")]),
        ("전쟁은 1592-1598년, 문의는 1588-1592", [("tel", "1588-1592")]),
        ("회사는 1588-0000", [("tel", "1588-0000")]),
        ("010203-3123456과 900101-5123456", [("rrn", "010203-3123456"), ("rrn", "900101-5123456")]),
        ("900230-1234567, 991231-3123456, 900101-9123456", []),  # no such day, not yet born, not of this age
        ("000229-3123456, 000229-1123456", [("rrn", "000229-3123456")]),  # 1900 was no leap year
        ("SM-900101-1234567, 900101-1234567-8, A900101-1234567", []),
        ("법인등록번호 110111-1234567", []),
        ("110-123-456789", [("acc", "110-123-456789")]),
        ("우리 1002123456789", [("acc", "1002123456789")]),
        ("12345678901234를 12345678901234로 입금", [("acc", "12345678901234")]),
        ("2022-09-15, 20220915123000, 2023-09-1234567", []),
        ("주문번호 123-456-789012, 사업자 123-45-67890, ISBN 978-89-01-12345-6", []),
        ("입금액 1000000000원, 1,234,567원", []),
        ("5500 0000 0000 0004", [("card", "5500 0000 0000 0004")]),
        ("5500000000000004, 5500000000000005", [("card", "5500000000000004")]),  # the second fails Luhn's check
        ("쿠폰번호 1234-5678-9012-3456", []),
        ("그림.icon@2x.png, git@github.com:a/b, @나", []),
        ("A.B-C@naver.com으로", [("email", "A.B-C@naver.com")]),
        ("https://a.com/item/01012345678", []),
    ],
)
def test_what_is_found(text, found):
    assert pieces(text) == found


def test_masking_keeps_the_rest_and_counts():
    counts = Counter()
    masks = {**KINDS, "tel": "<|tel|>", "rrn": "<|rrn|>", "acc": "<|acc|>"}
    assert mask(TEXT, masks, counts) == MASKED
    assert counts == ONE_EACH
    assert mask(MASKED, masks, counts) == MASKED and counts == ONE_EACH
    assert mask("전화 없음", masks, counts) == "전화 없음"


def test_masks_are_tokens_where_the_vocabulary_has_them():
    assert replacements({"<|tel|>": 1, "<|acc|>": 2}) == {
        "tel": "<|tel|>", "rrn": "[주민등록번호]", "acc": "<|acc|>", "email": "[이메일]", "card": "[카드번호]",
    }  # fmt: skip


def test_long_digits_and_long_lines_take_no_time():
    """A pattern that backtracks would not come back from these."""
    for text in ("1" * 200_000, "1-" * 100_000, "0 1 " * 50_000, "a." * 100_000 + "@", "010-" * 50_000, "82 " * 50_000):
        find(text)


# The patterns of the corpus's first preparation, in mid-2022, in the order in which they were applied.
ORIGINAL = {
    "card": r"5[1-5][0-9]{14}|4[0-9]{12}(?:[0-9]{3})?|3[47][0-9]{13}|6011[0-9]{12}|[0-9]{4}-[0-9]{4}-[0-9]{4}-[0-9]{4}",
    "rrn": r"[0-9]{6}-[0-9]{7}",
    "tel": r"[0-9]{2,3}-[0-9]{3,4}-[0-9]{4}",
    "acc": r"^\d+(?:-\d+)+|[0-9]{12,15}|[0-9]{3,4}-[0-9]{3,4}-[0-9]{5,6}|[0-9]{3}-[0-9]{2,4}-[0-9]{4,6}-[0-9]{1,2}"
    r"|[0-9]{3}-[0-9]{6}-[0-9]{2,4}-[0-9]{3}",
    "email": r"[a-z0-9._%+-]+@[a-z0-9.-]+\.[a-z]{2,}",
}


def original(text):
    found = []
    for kind, pattern in ORIGINAL.items():
        spans = [match.span() for match in re.finditer(pattern, text)]
        found += [(kind, *span) for span in spans if not any(span[0] < b and a < span[1] for _, a, b in found)]
    return found


def core(text):
    """What identifies a piece: a number's digits in any script, an address without blanks."""
    flat = unicodedata.normalize("NFKC", text)
    return "".join(flat.split()).lower() if "@" in flat else re.sub(r"[\W_]", "", flat)


def score(cases, finder):
    """Per kind: precision and recall, and the cases that were wrong. A piece counts when its kind and digits do."""
    right, said, wanted, wrong = Counter(), Counter(), Counter(), []
    for case in cases:
        want = Counter((kind, core(piece)) for kind, piece in case["spans"])
        got = Counter((kind, core(case["text"][start:end])) for kind, start, end in finder(case["text"]))
        right.update(kind for kind, _ in (want & got).elements())
        said.update(kind for kind, _ in got.elements())
        wanted.update(kind for kind, _ in want.elements())
        if want != got:
            wrong.append((case["text"], sorted(want - got), sorted(got - want)))
    kinds = [*KINDS, "all"]
    for counter in (right, said, wanted):
        counter["all"] = counter.total()
    return {kind: (right[kind] / max(said[kind], 1), right[kind] / max(wanted[kind], 1)) for kind in kinds}, wrong


def test_cases_of_someone_who_had_not_seen_the_patterns():
    """1,501 invented texts; those that people would disagree about are not counted. `pytest -s` prints the table."""
    lines = (Path(__file__).parent / "personal_data_cases.jsonl").read_text(encoding="utf-8").splitlines()
    cases = [case for line in lines if not (case := json.loads(line)).get("ambiguous")]
    with_data = [case for case in cases if case["spans"]]
    assert len(with_data) >= 400 and len(cases) - len(with_data) >= 400
    ours, wrong = score(cases, find)
    theirs, _ = score(cases, original)
    for kind in ours:
        print(f"{kind:6}", *(f"{value:.4f}" for value in (*ours[kind], *theirs[kind])))
        assert ours[kind][0] >= 0.99 and ours[kind][1] >= 0.98, wrong
        assert ours[kind] > theirs[kind]


@pytest.fixture
def prepared(tmp_path, tokenizer):
    def prepared(*texts, out="out", **settings):
        file = tmp_path / "a.txt"
        file.write_text("".join(text + "\n" for text in texts), encoding="utf-8")
        folder = tmp_path / out
        return folder, prepare(PrepareConfig(text=(str(file),), tokenizer=str(tokenizer), out=str(folder), **settings))

    return prepared


def test_prepare_masks_unless_told_not_to(prepared):
    folder, manifest = prepared(TEXT, "봄이 오면")
    loaded, file = Tokenizer.load(folder), TokenFile(folder / "text_document")
    assert loaded.decode(file.tokens, skip_special_tokens=False) == f"{MASKED}<|endoftext|>봄이 오면<|endoftext|>"
    for name in ("<|tel|>", "<|rrn|>", "<|acc|>"):
        assert file.tokens.tolist().count(loaded.special[name]) == 1
    assert {kind: entry["count"] for kind, entry in manifest["personal_data"].items()} == ONE_EACH
    assert manifest["personal_data"]["acc"]["mask"] == "<|acc|>"
    folder, manifest = prepared(TEXT, out="plain", mask_personal_data=False)
    plain = loaded.decode(TokenFile(folder / "text_document").tokens)
    assert plain == TEXT and manifest["personal_data"] == {}


def test_personal_data_is_in_no_file_of_the_folder(prepared):
    folder, _ = prepared(TEXT)
    for file in folder.iterdir():
        assert b"1234-5678" not in file.read_bytes() and b"900101" not in file.read_bytes()


def test_the_flag():
    args = ["--text", "a", "--tokenizer", "t", "--out", "o", "--no-mask-personal-data"]
    assert not tyro.cli(PrepareConfig, args=args).mask_personal_data
    assert tyro.cli(PrepareConfig, args=args[:-1]).mask_personal_data


def test_audit_of_masked_and_of_plain_tokens(prepared, tmp_path, capsys):
    folder, _ = prepared(TEXT, "봄이 오면", "그 수는 314159265358979")
    report = audit(AuditConfig(data=str(folder), json=str(tmp_path / "audit.json")))
    assert report == {
        "documents": {"all": 3, "with personal data": 0}, "masks": ONE_EACH, "left": dict.fromkeys(KINDS, 0),
        "long_numbers": 1,
    }  # fmt: skip
    assert json.loads((tmp_path / "audit.json").read_text(encoding="utf-8")) == report
    folder, _ = prepared(TEXT, "봄이 오면", out="plain", mask_personal_data=False)
    capsys.readouterr()
    with pytest.raises(
        InputError, match=r"text_document: 1 documents hold personal data \(tel, rrn, acc, email, card\)"
    ):
        audit(AuditConfig(data=str(folder / "text_document")))
    printed = "".join(capsys.readouterr())
    assert "personal data left: 1 tel, 1 rrn, 1 acc, 1 email, 1 card" in printed and "1234-5678" not in printed


def test_audit_takes_no_other_tokenizer_than_the_data_s(prepared, tmp_path, tokenizer):
    folder, manifest = prepared(TEXT, mask_personal_data=False)
    other = tmp_path / "other.json"
    other.write_text(tokenizer.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    used = manifest["sha256"]["tokenizer.json"]
    message = rf"other\.json: its SHA-256 is {Tokenizer.load(other).sha256}, but .*text_document was made with {used}"
    with pytest.raises(InputError, match=message):
        audit(AuditConfig(data=str(folder), tokenizer=str(other)))
    for file in folder.glob("text_document.*"):  # of others, beside which the manifest says nothing of them
        file.rename(folder / f"foreign{file.suffix}")
    with pytest.raises(InputError, match="1 documents hold personal data"):
        audit(AuditConfig(data=str(folder), tokenizer=str(other)))


def test_audit_finds_at_the_start_that_it_cannot_write(prepared, tmp_path, capsys):
    folder, _ = prepared(TEXT)
    for place in (tmp_path, tmp_path / "gone" / "a.json", tmp_path / "a.txt" / "a.json"):
        capsys.readouterr()
        with pytest.raises(InputError, match=rf"json={re.escape(str(place))}: cannot be written \(.*another"):
            audit(AuditConfig(data=str(folder), json=str(place)))
        assert "documents" not in "".join(capsys.readouterr())
    with pytest.raises(OSError, match="No space left on device"):
        audit(AuditConfig(data=str(folder), json="/dev/full"))
    assert "masks: 1 tel" in capsys.readouterr().out  # what was counted is told, whatever becomes of the file


def test_real_text_holds_little_personal_data(shared):
    """Film reviews: hardly any of them has a telephone number, none a resident number, an account or a card."""
    path = shared / "data" / "korean_hate_speech" / "unlabeled" / "unlabeled_comments_5.txt"
    kinds = Counter(kind for line in path.read_text(encoding="utf-8").splitlines() for kind, _, _ in find(line))
    assert sum(kinds.values()) < 20 and not {"rrn", "acc", "card"} & set(kinds)
