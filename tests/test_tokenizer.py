"""The tokenizer: the released one gives the published ids; a trained one has its shape."""

import csv
import json

import numpy as np
import pytest

from polyglot_jax.config import InputError
from polyglot_jax.tokenizer import Tokenizer, train_tokenizer

SENTENCES = [
    f"{who} {what} {when}{end}"
    for who in ("고양이가", "아이들이", "선생님이")
    for what in ("노래를 불렀다", "밥을 먹었다")
    for when in ("아침에", "저녁에")
    for end in (".", "!")
]


@pytest.fixture(scope="module")
def released(shared):
    return Tokenizer.load(shared / "tokenizer" / "tokenizer.json")


@pytest.fixture(scope="module")
def kobest(shared):
    """Every field of the KoBEST test sets, one text each."""
    texts = []
    for file in sorted((shared / "data" / "kobest").rglob("test.tsv")):
        with open(file, encoding="utf-8", newline="") as lines:
            texts += [field for row in csv.reader(lines, delimiter="\t") for field in row if field]
    return texts


@pytest.fixture(scope="module")
def trained():
    return train_tokenizer(SENTENCES, vocab_size=300, show_progress=False)


@pytest.mark.parametrize(
    "text, ids",
    [
        ("### 답변:", [6, 6, 6, 4253, 29]),
        ("(답변 시작) ### 답변:", [11, 1477, 1078, 1016, 12, 6501, 6, 6, 4253, 29]),
        ("(답변 종료)", [11, 1477, 1078, 4833, 12]),
    ],
)
def test_released_tokenizer_gives_the_published_ids(released, text, ids):
    assert released.encode(text) == ids
    assert released.encode_batch([text, "", text]) == [ids, [], ids]
    assert released.decode(ids) == text


def test_released_special_tokens_and_sizes(released):
    assert released.special == {
        "<|endoftext|>": 2, "<|sep|>": 3, "<|acc|>": 30_000, "<|tel|>": 30_001, "<|rrn|>": 30_002,
    }  # fmt: skip
    assert released.eos_id == 2
    assert (released.valid_ids, released.padded()) == (30_003, 30_080)
    assert released.padded(256) == 30_208
    assert released.encode("전화 <|tel|>") == [*released.encode("전화 "), 30_001]
    assert released.decode([2, 6, 30_001]) == "#"
    assert released.decode([2, 6, 30_001], skip_special_tokens=False) == "<|endoftext|>#<|tel|>"


def test_round_trip_and_byte_lengths_on_real_text(released, kobest):
    assert len(kobest) > 10_000
    lengths = released.byte_lengths()
    assert lengths.shape == (released.valid_ids,) and lengths.dtype == np.int32
    for text, ids in zip(kobest, released.encode_batch(kobest), strict=True):
        assert released.decode(ids) == text
        assert lengths[ids].sum() == len(text.encode())
    assert not lengths[list(released.special.values())].any()


def test_the_boundary_character_is_deleted(released):
    assert released.decode(released.encode("학교ೱ에")) == "학교에"


def test_json_is_kept_byte_for_byte(released, shared, tmp_path):
    file = shared / "tokenizer" / "tokenizer.json"
    assert released.to_json().encode() == file.read_bytes()
    assert released.sha256 == "7c787236a4f39f812bfa1a8b2cedfbbb7eb6647f6b7a1b5340ab9feb30838a30"
    assert Tokenizer.load(file.parent).encode("학교") == released.encode("학교")  # a folder that holds one
    crlf = tmp_path / "tokenizer.json"
    crlf.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    assert Tokenizer.load(crlf).to_json().encode() == crlf.read_bytes()


def test_truncation_and_padding_saved_in_the_file_are_not_obeyed(trained):
    value = json.loads(trained.to_json())
    value["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    value["padding"] = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                        "pad_type_id": 0, "pad_token": "<pad>"}  # fmt: skip
    text = " ".join(SENTENCES[:3])
    assert Tokenizer.from_json(json.dumps(value)).encode(text) == trained.encode(text)


@pytest.mark.parametrize("boundary", ["ೱ", None])
def test_trained_tokenizer_has_the_shape_of_the_released_one(shared, boundary):
    new = json.loads(train_tokenizer(SENTENCES, 300, boundary, show_progress=False).to_json())
    old = json.loads((shared / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))
    new_model, old_model = new.pop("model"), old.pop("model")
    for token in old["added_tokens"]:
        token["id"] -= 30_000 - 300 if token["id"] >= 30_000 else 0
    if boundary is None:
        del old["pre_tokenizer"]["pretokenizers"][0]
    assert new == old

    old_ids, new_ids = ({i: token for token, i in m.pop("vocab").items()} for m in (old_model, new_model))
    assert [new_ids[i] for i in range(260)] == [old_ids[i] for i in range(260)]
    merges, _ = new_model.pop("merges"), old_model.pop("merges")
    assert [new_ids[260 + rank] for rank in range(40)] == ["".join(pair) for pair in merges]
    # The library's newer versions write two more fields, with the values that their absence means.
    assert new_model == old_model | {"byte_fallback": False, "ignore_merges": False}
    assert len(old_ids) == 30_000 and len(new_ids) == 300


def test_no_merge_crosses_a_boundary():
    # 학교에 and " 간다" are 9 and 7 bytes: 8 and 6 merges to one token each; cut in 학교 and 에, one fewer.
    whole = train_tokenizer(["학교에 간다"] * 9, 260 + 14, show_progress=False)
    cut = train_tokenizer(["학교ೱ에 간다"] * 9, 260 + 13, "ೱ", show_progress=False)
    assert len(whole.encode("학교에 간다")) == 2
    assert [cut.decode([i]) for i in cut.encode("학교에 간다")] == ["학교", "에", " 간다"]
    assert cut.decode(cut.encode("학교ೱ에")) == "학교에" and whole.decode(whole.encode("학교ೱ에")) == "학교ೱ에"


def test_training_is_reproducible_and_reads_a_stream_once(trained):
    assert train_tokenizer(iter(SENTENCES), 300, show_progress=False).to_json() == trained.to_json()
    assert (trained.valid_ids, trained.padded(), trained.eos_id) == (303, 384, 2)


def test_a_smaller_vocabulary_is_refused_with_the_size_that_fits():
    with pytest.raises(InputError, match=r"vocab_size=30000: .* only (\d+) ids") as error:
        train_tokenizer(SENTENCES, show_progress=False)
    reached = int(str(error.value).rsplit(" ", 1)[1])
    assert train_tokenizer(SENTENCES, reached, show_progress=False).valid_ids == reached + 3
    with pytest.raises(InputError, match="only 260 ids"):  # a pair seen once is not merged
        train_tokenizer(["가나다"], 261, show_progress=False)
    with pytest.raises(InputError, match=r"vocab_size=259: .* alone are 260"):
        train_tokenizer(SENTENCES, 259, show_progress=False)


def test_errors_of_the_texts_pass_through_training():
    def texts():
        yield from SENTENCES
        raise InputError("the file is damaged")

    with pytest.raises(InputError, match="the file is damaged"):
        train_tokenizer(texts(), 300, show_progress=False)


@pytest.mark.parametrize("i", [303, 383, -1])
def test_ids_of_no_token_are_refused(trained, i):
    with pytest.raises(InputError, match=f"id={i}: .* 0 to 302"):
        trained.decode([5, i])


def test_what_is_no_tokenizer_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"tokenizer=.*gone.*: cannot read"):
        Tokenizer.load(tmp_path / "gone.json")
    with pytest.raises(InputError, match=r"cannot read .*tokenizer\.json"):
        Tokenizer.load(tmp_path)
    for content in (b"{}", b"\xff\xfe", "안녕".encode()):
        (tmp_path / "tokenizer.json").write_bytes(content)
        with pytest.raises(InputError, match=r"tokenizer\.json.* not a tokenizer\.json"):
            Tokenizer.load(tmp_path)


def test_a_tokenizer_of_another_kind_has_no_end_and_no_byte_lengths(trained):
    value = json.loads(trained.to_json())
    value["added_tokens"] = [t for t in value["added_tokens"] if t["content"] != "<|endoftext|>"]
    del value["model"]["vocab"]["<|endoftext|>"]
    value["decoder"] = {"type": "Fuse"}
    other = Tokenizer.from_json(json.dumps(value))
    assert "<|endoftext|>" not in other.special
    with pytest.raises(InputError, match=r"has no <\|endoftext\|>"):
        _ = other.eos_id
    with pytest.raises(InputError, match="not byte-level"):
        other.byte_lengths()


def test_what_a_tokenizer_puts_around_a_text_is_there_if_asked(trained):
    plain = json.loads(trained.to_json())
    end = {"SpecialToken": {"id": "<eos>", "type_id": 0}}
    plain["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [end, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [end, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<eos>": {"id": "<eos>", "ids": [1], "tokens": ["<eos>"]}},
    }
    xglm_like, ids = Tokenizer.from_json(json.dumps(plain)), trained.encode("마을")
    assert xglm_like.encode("마을") == xglm_like.encode_batch(["마을"])[0] == ids
    assert xglm_like.encode("마을", add_special_tokens=True) == [1, *ids]
    assert trained.encode("마을", add_special_tokens=True) == ids
