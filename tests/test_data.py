"""Samples are cut by GPT-NeoX's rule, checked against plain Python; batches are a pure function of the step."""

import dataclasses
import itertools
import shutil
import struct
from collections import Counter

import numpy as np
import pytest
from runs import EOS, TRAIN, make_config, random_corpus, text_corpus, write_corpus

from polyglot_jax.config import DataConfig, InputError
from polyglot_jax.data import Batches, Corpus, find_corpus, find_tokenizer
from polyglot_jax.tokenizer import train_tokenizer

LENGTH = TRAIN["sequence_length"]
VOCAB = 65_000
SIZES = [7, 40, 1, 23, 90, 15, 2, 60, 33, 11, 5, 120, 48, 17, 29, 64, 3, 80, 21, 50, 9, 31]


def numbered(sizes=SIZES, first=100):
    """Documents in which no id occurs twice: each token tells where it is from."""
    ids = itertools.count(first)
    return [list(itertools.islice(ids, size)) for size in sizes]


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(tmp_path / "corpus", numbered())


def batches_of(*corpora, **changes):
    return Batches(make_config(*corpora, model__vocab=VOCAB, **changes))


def rows(samples):
    return [tuple(row.tolist()) for row in samples]


# --- The rule ---


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_samples_are_the_shuffled_documents_joined_and_cut(corpus, seed):
    documents = numbered()
    loaded = Corpus(corpus, 0.0, LENGTH, VOCAB)
    samples = rows(loaded.samples(seed))
    # Each piece begins with the token the one before ended with, so without the first tokens they are one stream.
    stream = [samples[0][0], *itertools.chain.from_iterable(sample[1:] for sample in samples)]
    # Its documents follow each other whole, in an order that their first tokens show; what is missing is the tail.
    home = {document[0]: document for document in documents}
    order = [home[token] for token in stream if token in home]
    order += [document for document in documents if document not in order]
    assert sorted(order) == documents and order != documents
    joined = list(itertools.chain.from_iterable(order))
    pieces = [tuple(joined[i : i + LENGTH + 1]) for i in range(0, len(joined) - LENGTH, LENGTH)]
    assert samples == pieces
    assert len(samples) == (sum(SIZES) - 1) // LENGTH


def test_the_order_of_documents_is_the_seeds(corpus):
    loaded = Corpus(corpus, 0.0, LENGTH, VOCAB)
    assert rows(loaded.samples(3)) == rows(loaded.samples(3))
    assert rows(loaded.samples(3)) != rows(loaded.samples(4))


def test_every_training_token_but_a_few_is_predicted_once_in_a_pass(corpus):
    batches = batches_of(corpus, train__batch_size=1)
    seen = Counter(token for step in range(batches.samples_per_pass) for token in batches(step)[0, 1:].tolist())
    heldout = {token for tokens, weights in batches.heldout() for token in [tokens[0], *tokens[1:][weights > 0]]}
    training = set(range(100, 100 + sum(SIZES))) - heldout
    assert set(seen.values()) == {1}
    assert set(seen) <= training
    # The very first token has none before it to be predicted from; the last ones do not fill a sample.
    assert len(training - set(seen)) <= LENGTH


def test_the_held_out_part_is_the_last_documents_each_token_predicted_once(corpus):
    documents = numbered()
    loaded = Corpus(corpus, 0.1, LENGTH, VOCAB)
    # The boundary of documents nearest to where the last tenth begins.
    starts = list(itertools.accumulate(SIZES, initial=0))
    cut = min(starts, key=lambda start: abs(start - round(sum(SIZES) * 0.9)))
    kept = list(itertools.chain.from_iterable(documents))[cut:]
    assert loaded.heldout_tokens == len(kept) > LENGTH
    targets, inputs = [], []
    for tokens, weights in loaded.heldout():
        assert tokens.shape == (LENGTH + 1,) and weights.shape == (LENGTH,)
        assert tokens.dtype == np.int32 and weights.dtype == np.float32
        count = int(weights.sum())
        assert weights.tolist() == [1] * count + [0] * (LENGTH - count)
        inputs += tokens[:count].tolist()
        targets += tokens[1 : count + 1].tolist()
    assert targets == kept[1:]
    assert inputs == kept[:-1]
    trained = set(itertools.chain.from_iterable(rows(loaded.samples(0))))
    assert not trained & set(kept)


def test_without_a_held_out_share_everything_is_trained_on(corpus):
    batches = batches_of(corpus, data__heldout=0.0)
    assert list(batches.heldout()) == []
    assert batches.samples_per_pass == (sum(SIZES) - 1) // LENGTH


@pytest.mark.parametrize("tokens, heldout, cut", [(1000, 0.1, 900), (1000, 0.001, 998), (100, 0.5, 50)])
def test_one_long_document_is_cut_inside(tmp_path, tokens, heldout, cut):
    loaded = Corpus(write_corpus(tmp_path / "one", numbered([tokens])), heldout, LENGTH, VOCAB)
    assert loaded.heldout_tokens == tokens - cut
    samples = rows(loaded.samples(0))
    assert samples == [tuple(range(100 + i, 117 + i)) for i in range(0, cut - LENGTH, LENGTH)]
    targets = [token for row, weights in loaded.heldout() for token in row[1:][weights > 0]]
    assert targets == list(range(100 + cut + 1, 100 + tokens))


def test_a_corpus_of_one_sample_is_enough_and_of_less_is_refused(tmp_path):
    enough = Corpus(write_corpus(tmp_path / "enough", numbered([10, 7])), 0.0, LENGTH, VOCAB)
    assert len(enough.samples(0)) == 1
    little = write_corpus(tmp_path / "little", numbered([10, 6]))
    with pytest.raises(InputError, match=rf"^data\.paths={little}: 16 tokens to train on, but a sample takes 17; "):
        Corpus(little, 0.0, LENGTH, VOCAB)


# --- Batches ---


def test_a_batch_is_a_pure_function_of_the_step(corpus):
    batches = batches_of(corpus)
    first = [batches(step) for step in range(20)]
    assert all(batch.shape == (8, LENGTH + 1) and batch.dtype == np.int32 for batch in first)
    again = batches_of(corpus)
    for step in np.random.default_rng(0).permutation(20):
        np.testing.assert_array_equal(again(int(step)), first[step])
        np.testing.assert_array_equal(batches(int(step)), first[step])


@pytest.mark.parametrize("hosts", [1, 2, 4, 8])
def test_hosts_read_their_rows_of_the_same_batch(corpus, hosts):
    whole, each = batches_of(corpus), 8 // hosts
    for step in (0, 5, 13):
        parts = [batches_of(corpus).rows(step, host * each, (host + 1) * each) for host in range(hosts)]
        np.testing.assert_array_equal(np.concatenate(parts), whole(step))
    np.testing.assert_array_equal(whole.rows(3, 5, 7), whole(3)[5:7])


def test_samples_of_a_batch_size_are_those_of_another(corpus):
    """The order of samples does not depend on how many make a batch."""
    small, large = batches_of(corpus, train__batch_size=2), batches_of(corpus, train__batch_size=6)
    np.testing.assert_array_equal(np.concatenate([small(step) for step in range(6)]),
                                  np.concatenate([large(step) for step in range(2)]))  # fmt: skip


def test_each_pass_has_every_sample_once_in_an_order_of_its_own(corpus):
    batches = batches_of(corpus, train__batch_size=1)
    count = batches.samples_per_pass
    passes = [rows(batches(step)[0] for step in range(i * count, (i + 1) * count)) for i in range(3)]
    expected = sorted(passes[0])
    assert len(set(expected)) == count
    assert [sorted(one) for one in passes] == [expected] * 3
    assert passes[0] != passes[1] != passes[2] != passes[0]
    assert passes[0] != expected


def test_the_seed_changes_the_batches_and_nothing_that_is_held_out(corpus):
    one, two = batches_of(corpus, train__seed=1), batches_of(corpus, train__seed=2)
    assert not np.array_equal(one(0), two(0))
    assert rows(row for row, _ in one.heldout()) == rows(row for row, _ in two.heldout())


# --- Mixing ---


@pytest.fixture
def three(tmp_path):
    """Corpora of 960, 480 and 240 tokens whose ids begin at 1,000, 10,000 and 20,000."""
    firsts = {1_000: 960, 10_000: 480, 20_000: 240}
    return [write_corpus(tmp_path / str(first), numbered([12] * (size // 12), first)) for first, size in firsts.items()]


def shares(batches, samples):
    """How many of the first samples are from each corpus of `three`, and that none mixes two."""
    counts = Counter()
    for step in range(samples):
        homes = set(np.digitize(batches(step)[0], [10_000, 20_000]).tolist())
        assert len(homes) == 1
        counts.update(homes)
    return [counts[home] for home in range(3)]


@pytest.mark.parametrize("weights", [[1, 1, 1], [5, 3, 2], [0.2, 0.3, 0.5], [0.1, 100, 1]])
def test_corpora_are_mixed_by_their_weights(three, weights):
    batches = batches_of(*three, data__weights=weights, train__batch_size=1)
    for samples in (40, 200):
        wanted = np.array(weights) / sum(weights) * samples
        assert np.abs(np.array(shares(batches, samples)) - wanted).max() <= 1


def test_without_weights_corpora_are_mixed_by_their_size(three):
    batches = batches_of(*three, train__batch_size=1, data__heldout=0.0)
    sizes = [959 // LENGTH, 479 // LENGTH, 239 // LENGTH]
    assert batches.samples_per_pass == sum(sizes)
    assert np.abs(np.array(shares(batches, sum(sizes))) - sizes).max() <= 1


def test_equal_corpora_are_read_in_different_orders(tmp_path):
    corpora = [write_corpus(tmp_path / name, numbered()) for name in "ab"]
    batches = batches_of(*corpora, train__batch_size=2)
    pairs = [batches(step) for step in range(10)]
    assert not all(np.array_equal(a, b) for a, b in pairs)


def test_held_out_rows_come_in_equal_numbers_from_each_corpus(three):
    batches = batches_of(*three, data__heldout=0.3)
    homes = [int(np.digitize(row[0], [10_000, 20_000])) for row, _ in batches.heldout(6)]
    assert homes == [0, 0, 1, 1, 2, 2]
    everything = rows(row for row, _ in batches.heldout())
    assert len(everything) == sum(-(-(corpus.heldout_tokens - 1) // LENGTH) for corpus in batches.corpora) > 6
    assert rows(row for row, _ in batches.heldout(6))[:2] == everything[:2]


# --- Foreign and wrong files ---


def test_bare_files_of_gpt_neox_need_no_manifest(tmp_path):
    """Files packed by hand as its source says, with an empty document and a document of two sequences."""
    sequences = [[5, 6, 7], [], list(range(10, 40)), list(range(50, 90)), [91, EOS]]
    prefix = tmp_path / "ko.v1_text_document"
    prefix.with_name(prefix.name + ".bin").write_bytes(b"".join(struct.pack(f"<{len(s)}H", *s) for s in sequences))
    starts = [0, 6, 6, 66, 146]
    index = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, 5, 5)
    index += struct.pack("<5i", *map(len, sequences)) + struct.pack("<5q", *starts) + struct.pack("<5q", 0, 1, 2, 4, 5)
    prefix.with_name(prefix.name + ".idx").write_bytes(index)

    for path in (prefix, f"{prefix}.bin", f"{prefix}.idx", tmp_path):
        assert find_corpus(path) == prefix
    assert find_tokenizer(DataConfig(paths=(str(prefix),))) is None
    samples = rows(Corpus(prefix, 0.0, 8, VOCAB).samples(0))
    stream = [samples[0][0], *itertools.chain.from_iterable(sample[1:] for sample in samples)]
    documents = [sequences[0], sequences[2] + sequences[3], sequences[4]]
    orders = [list(itertools.chain.from_iterable(order)) for order in itertools.permutations(documents)]
    assert len(stream) == 73 and stream in [order[:73] for order in orders]
    assert batches_of(prefix)(0).shape == (8, LENGTH + 1)


def test_ids_beyond_the_tokenizers_are_refused_by_file_place_and_id(tmp_path):
    document = [*range(3, 203), 299, *range(3, 103)]
    corpus = write_corpus(tmp_path / "corpus", [document])
    config = make_config(corpus, data__valid_ids=299, data__heldout=0.0, train__batch_size=18)
    message = rf"^{corpus}/text_document\.bin: token 200 is 299, but the tokenizer's ids end at 298; "
    with pytest.raises(InputError, match=message):
        Batches(config)(0)
    allowed = dataclasses.replace(config, data=dataclasses.replace(config.data, valid_ids=300))
    assert Batches(allowed)(0).max() == 299


def test_ids_beyond_the_models_vocabulary_are_refused(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", numbered([400]))
    with pytest.raises(InputError, match="token 284 is 384, but the tokenizer's ids end at 383"):
        list(Batches(make_config(corpus, data__heldout=0.5)).heldout())


def test_corpora_of_one_tokenizer_go_together_and_of_two_do_not(tmp_path):
    one, tokenizer = text_corpus(tmp_path / "one", seed=1)
    two, _ = text_corpus(tmp_path / "two", seed=2)
    bare = random_corpus(tmp_path / "bare")
    assert find_tokenizer(DataConfig(paths=(str(one), str(bare), str(two)))).sha256 == tokenizer.sha256
    other = train_tokenizer(["산이 높고 물이 맑다"] * 4, vocab_size=270, show_progress=False)
    (two / "tokenizer.json").write_text(other.to_json(), encoding="utf-8")
    message = rf"^data\.paths: {one}/tokenizer\.json and {two}/tokenizer\.json differ"
    with pytest.raises(InputError, match=message):
        find_tokenizer(DataConfig(paths=(str(one), str(bare), str(two))))


def fingerprint(folder):
    return Corpus(folder, 0.1, LENGTH, VOCAB).fingerprint


def test_other_tokens_in_documents_of_the_same_lengths_have_another_fingerprint(tmp_path):
    """Every token up to 4 MiB; in a larger file those at both ends and in between."""
    corpus = random_corpus(tmp_path / "corpus")
    before, file = fingerprint(corpus), corpus / "text_document.bin"
    content = file.read_bytes()
    for at in (0, len(content) // 2, len(content) - 2):
        file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        assert fingerprint(corpus) != before
    file.write_bytes(content)
    assert fingerprint(corpus) == before == fingerprint(shutil.copytree(corpus, tmp_path / "copy"))

    large = write_corpus(tmp_path / "large", [np.full(2**22, 7)])  # 8 MiB
    before, size = fingerprint(large), 2**23
    with open(large / "text_document.bin", "r+b") as file:
        for at in (0, (size - 2**16) * 31 // 63, size - 2):
            file.seek(at)
            file.write(b"\x06")
            file.flush()
            assert fingerprint(large) != before
            before = fingerprint(large)


def test_a_folder_that_is_missing_empty_or_ambiguous_is_refused(tmp_path):
    with pytest.raises(InputError, match=rf"^data\.paths={tmp_path}/none: neither a folder of `prepare` nor the"):
        batches_of(tmp_path / "none")
    with pytest.raises(InputError, match=rf"^data\.paths={tmp_path}: no \.idx file; make one with `python"):
        batches_of(tmp_path)
    corpus = random_corpus(tmp_path / "corpus")
    (corpus / "second.idx").write_bytes((corpus / "text_document.idx").read_bytes())
    with pytest.raises(InputError, match=rf"^data\.paths={corpus}: several \.idx files"):
        batches_of(corpus)
    with pytest.raises(InputError, match=r"^data\.paths=\(\): nothing to train on; give --data DIR"):
        batches_of()
