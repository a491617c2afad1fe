"""Token files, held against bytes put together here from the table of the format alone."""

import struct

import numpy as np
import pytest

from polyglot_jax.config import InputError
from polyglot_jax.token_files import TokenFile, TokenFileWriter

DOCUMENTS = [[5, 6, 7, 2], [2], [300, 29_999, 30_002, 2]]
LETTERS = {1: "B", 2: "b", 3: "h", 4: "i", 5: "q", 8: "H"}


def packed(documents, code=8, version=1, magic=b"MMIDIDX\x00\x00"):
    """The .bin and the .idx of one sequence per document."""
    letter = LETTERS[code]
    flat = [i for document in documents for i in document]
    sizes = [len(document) for document in documents]
    pointers = [sum(sizes[:k]) * struct.calcsize(letter) for k in range(len(sizes))]
    index = magic + struct.pack("<Q", version) + struct.pack("<B", code)
    index += struct.pack("<Q", len(sizes)) + struct.pack("<Q", len(sizes) + 1)
    index += struct.pack(f"<{len(sizes)}i", *sizes) + struct.pack(f"<{len(sizes)}q", *pointers)
    index += struct.pack(f"<{len(sizes) + 1}q", *range(len(sizes) + 1))
    return struct.pack(f"<{len(flat)}{letter}", *flat), index


def put(folder, data, index):
    (folder / "a.bin").write_bytes(data)
    (folder / "a.idx").write_bytes(index)
    return folder / "a"


def write(prefix, documents, vocab=30_003):
    with TokenFileWriter(prefix, vocab) as writer:
        for document in documents:
            writer.add_document(document)
    return writer


@pytest.mark.parametrize("vocab, code", [(30_003, 8), (65_499, 8), (65_500, 4)])
def test_written_bytes_are_those_of_the_format(tmp_path, vocab, code):
    writer = write(tmp_path / "a", DOCUMENTS, vocab)
    data, index = packed(DOCUMENTS, code)
    assert (tmp_path / "a.bin").read_bytes() == data
    assert (tmp_path / "a.idx").read_bytes() == index
    assert len(index) == 34 + 12 * 3 + 8 * 4
    assert (writer.documents, writer.tokens) == (3, 9)
    assert {file.name for file in tmp_path.iterdir()} == {"a.bin", "a.idx"}


def test_an_index_longer_than_a_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr("polyglot_jax.token_files._CHUNK", 4)
    documents = [[k] * (k % 3 + 1) for k in range(11)]
    write(tmp_path / "a", documents)
    assert ((tmp_path / "a.bin").read_bytes(), (tmp_path / "a.idx").read_bytes()) == packed(documents)
    assert TokenFile(tmp_path / "a").tokens.tolist() == [i for document in documents for i in document]


@pytest.mark.parametrize("code", LETTERS)
def test_every_integer_type_is_read(tmp_path, code):
    file = TokenFile(put(tmp_path, *packed([[1, 2], [3, 4, 5]], code)))
    assert file.tokens.tolist() == [1, 2, 3, 4, 5]
    assert file.tokens.dtype == np.dtype(LETTERS[code])
    assert file.sizes.tolist() == [2, 3] and file.sizes.dtype == np.int32
    assert file.documents.tolist() == [0, 1, 2] and file.documents.dtype == np.int64
    assert file.document_starts.tolist() == [0, 2, 5]


def test_documents_of_several_sequences(tmp_path):
    data, index = packed([[1, 2], [3], [4, 5, 6]])
    index = index[:26] + struct.pack("<Q", 3) + index[34 : 34 + 36] + struct.pack("<3q", 0, 2, 3)
    file = TokenFile(put(tmp_path, data, index))
    assert file.documents.tolist() == [0, 2, 3]
    assert file.document_starts.tolist() == [0, 3, 6]


def at(position, new):
    """Change the index at `position`."""
    return lambda data, index: (data, index[:position] + new + index[position + len(new) :])


@pytest.mark.parametrize(
    "damage, message",
    [
        (at(0, b"TNTIDX\x00\x00"), r"a\.idx: GPT-NeoX's old format \(TNTIDX.*--dataset-impl mmap"),
        (at(0, b"PK\x03\x04"), r"a\.idx: not a token index of GPT-NeoX"),
        (at(9, struct.pack("<Q", 2)), r"a\.idx: version=2"),
        (at(17, b"\x06"), r"a\.idx: dtype code=6: not one of the integers"),
        (at(17, b"\x63"), r"a\.idx: dtype code=99"),
        (lambda data, index: (data, index[:20]), r"a\.idx: truncated, 20 bytes"),
        (lambda data, index: (data, b""), r"a\.idx: not a token index"),
        (lambda data, index: (data, index[:-1]), r"a\.idx: truncated, 101 bytes where its header asks for 102"),
        (lambda data, index: (data, index + b"\0"), r"a\.idx: too long, 103 bytes"),
        (lambda data, index: (data[:-2], index), r"a\.bin: truncated, 16 bytes where a\.idx counts 9 tokens of 2"),
        (lambda data, index: (data + b"\0", index), r"a\.bin: too long, 19 bytes"),
        (lambda data, index: (b"", index), r"a\.bin: truncated, 0 bytes"),
        (at(34, struct.pack("<i", 3)), r"a\.idx: damaged, its pointers are not the running sum"),
        (at(34, struct.pack("<i", -4)), r"a\.idx: damaged, its pointers"),
        (at(34, struct.pack("<3i3q", 5, -1, 5, 0, 10, 8)), r"a\.idx: damaged, its pointers"),
        (at(46 + 8, struct.pack("<q", 9)), r"a\.idx: damaged, its pointers"),
        (at(70, struct.pack("<q", 1)), r"a\.idx: damaged, its document index"),
        (at(78, struct.pack("<q", 3)), r"a\.idx: damaged, its document index"),
        (at(94, struct.pack("<q", 2)), r"a\.idx: damaged, its document index"),
        (lambda data, index: packed([]), r"a\.idx: holds no documents"),
        (lambda data, index: packed([[], []]), r"a\.idx: holds no tokens"),
    ],
)
def test_damaged_files_are_refused(tmp_path, damage, message):
    prefix = put(tmp_path, *damage(*packed(DOCUMENTS)))
    with pytest.raises(InputError, match=message):
        TokenFile(prefix)


@pytest.mark.parametrize("missing", ["a.bin", "a.idx"])
def test_a_missing_file_is_named(tmp_path, missing):
    prefix = put(tmp_path, *packed(DOCUMENTS))
    (tmp_path / missing).unlink()
    with pytest.raises(InputError, match=f"{missing}: no such file"):
        TokenFile(prefix)


@pytest.mark.parametrize(
    "document, message",
    [
        ([], "document 1: holds no tokens"),
        ([1, 30_003], "document 1: has ids from 1 to 30003, but vocab=30003"),
        (np.array([-1, 5]), "document 1: has ids from -1 to 5"),
    ],
)
def test_a_failed_writer_leaves_what_was_there(tmp_path, document, message):
    before = put(tmp_path, b"old", b"older")
    with pytest.raises(InputError, match=message):
        write(before, [[1], document])
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"a.bin": b"old", "a.idx": b"older"}


def test_no_documents_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"a\.bin: no documents to write"):
        write(tmp_path / "a", [])
    assert not list(tmp_path.iterdir())
