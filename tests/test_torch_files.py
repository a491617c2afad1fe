"""PyTorch's files in every way they are saved: the same weights come out, no code runs, and torch may be absent."""

import json
import os
import pickle
from collections import OrderedDict

import pytest
import torch
from formats import FORMATS, PLAIN, bits, random_weights, read_orbax
from verbs import convert, without

from polyglot_jax import torch_files
from polyglot_jax.config import InputError

WEIGHTS = random_weights("float32")


def transposed(key, tensor):
    """Lying transposed in memory."""
    return tensor.t().contiguous().t()


def every_second(key, tensor):
    """With gaps between its values."""
    wide = torch.full((2 * tensor.shape[0], *tensor.shape[1:]), 9.0)
    wide[::2] = tensor
    return wide[::2]


def parts_of_one(tensors):
    """All tensors in one storage, one after the other."""
    storage = torch.cat([tensor.reshape(-1) for tensor in tensors.values()])
    parts = storage.split([tensor.numel() for tensor in tensors.values()])
    return {key: part.view(tensor.shape) for part, (key, tensor) in zip(parts, tensors.items(), strict=True)}


def each(change):
    return lambda tensors: {key: change(key, tensor) for key, tensor in tensors.items()}


def with_metadata(tensors):
    """As state_dict() gives it."""
    state = OrderedDict((key, torch.nn.Parameter(tensor)) for key, tensor in tensors.items())
    state._metadata = OrderedDict({"": {"version": 1}})
    return state


LAYOUTS = {
    "plain": dict,
    "transposed": each(transposed),
    "with gaps": each(every_second),
    "in one storage": parts_of_one,
    "only layer 1 transposed": each(lambda key, tensor: transposed(key, tensor) if ".1." in key else tensor),
    "parameters": with_metadata,
    "negated views": each(lambda key, tensor: torch._neg_view(-tensor)),
}


def save(folder, *parts, legacy=False, **changes):
    """A model of Hugging Face's whose weights are in a file, or in shards with an index."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(PLAIN | changes))
    names = [f"pytorch_model-{number}-of-{len(parts)}.bin" for number in range(len(parts))]
    for name, part in zip(names if len(parts) > 1 else ["pytorch_model.bin"], parts, strict=True):
        torch.save(part, folder / name, _use_new_zipfile_serialization=not legacy)
    if len(parts) > 1:
        where = {key: name for name, part in zip(names, parts, strict=True) for key in part}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


def halves(tensors):
    return {key: tensors[key] for key in list(tensors)[::2]}, {key: tensors[key] for key in list(tensors)[1::2]}


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_in_any_layout(tmp_path, layout, legacy, shards):
    """legacy: the one file, not zipped, of torch before 1.6."""
    weights = LAYOUTS[layout](WEIGHTS)
    source = save(tmp_path / "source", *([weights] if shards == 1 else halves(weights)), legacy=legacy)
    done = convert("hf-to-orbax", source, tmp_path / "result")
    assert (done.status, done.err) == (
        0,
        ["note: config.json says float16, the weights are float32, and that is what they stay"],
    )
    assert read_orbax(tmp_path / "result") == bits(WEIGHTS)
    assert convert("verify", source, tmp_path / "result").status == 0


def test_one_value_for_all(tmp_path):
    """A tensor of stride 0 is saved as one value."""
    ones = {key: torch.ones(1).expand(tensor.shape) for key, tensor in WEIGHTS.items()}
    source = save(tmp_path / "source", ones)
    assert (source / "pytorch_model.bin").stat().st_size < 30_000
    assert convert("hf-to-orbax", source, tmp_path / "result").status == 0
    assert read_orbax(tmp_path / "result") == bits(ones)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_tied_head_shares_its_storage(tmp_path, legacy):
    tied = WEIGHTS | {"embed_out.weight": WEIGHTS["gpt_neox.embed_in.weight"]}
    source = save(tmp_path / "source", tied, legacy=legacy, tie_word_embeddings=True)
    assert convert("hf-to-orbax", source, tmp_path / "result").status == 0
    del tied["embed_out.weight"]
    assert read_orbax(tmp_path / "result") == bits(tied)


@pytest.mark.parametrize(
    "tensor, message",
    [
        (torch.ones(16).to_sparse(), "is sparse or without values; weights are"),
        (torch.ones(16, device="meta"), "is sparse or without values; weights are"),
        (torch.ones(16).double(), "is float64; weights are float32, float16 or bfloat16"),
        (torch.ones(16).to(torch.complex64), "is complex64; weights are"),
        (torch.ones(16).to(torch.float8_e4m3fn), "is float8_e4m3fn; weights are"),
        (torch.ones(16).half(), "is float16"),
        (torch.ones(16, 1), "has shape (16, 1); the config makes it (16,)"),
        ([1.0] * 16, "holds more than tensors by name, so it is no model's weights"),
    ],
)
def test_other_tensors_are_refused(tmp_path, tensor, message):
    source = save(tmp_path / "source", WEIGHTS | {"gpt_neox.layers.1.input_layernorm.bias": tensor})
    error = convert("hf-to-orbax", source, tmp_path / "result").error
    assert message in error and str(source / "pytorch_model.bin") in error
    assert [item.name for item in tmp_path.iterdir()] == ["source"]


def test_a_flipped_bit_in_the_archive_gives_no_other_values(tmp_path):
    """In the directory, in the entries' own headers or in the pickle: all that says which bytes are whose."""
    tensors = {f"k{number}": torch.arange(64) + 100.5 * (number + 1) for number in range(3)}
    file = tmp_path / "x.bin"
    torch.save(tensors, file)
    content, expected, refused = file.read_bytes(), bits(tensors), 0
    starts = [content.index(tensor.numpy().tobytes()) for tensor in tensors.values()]
    values = {at for start in starts for at in range(start, start + 256)}
    for at in sorted(set(range(len(content))) - values):
        damaged = bytearray(content)
        damaged[at] ^= 1 << (at * 5 % 8)
        file.write_bytes(damaged)
        try:
            found = torch_files.load(file)
        except InputError:
            refused += 1
        else:
            assert bits(found) == expected, at
    assert refused > 500


def test_files_without_checksums_are_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        source = save(tmp_path / "source", WEIGHTS)
    finally:
        torch.serialization.set_crc32_options(True)
    assert convert("hf-to-orbax", source, tmp_path / "result").status == 0
    assert read_orbax(tmp_path / "result") == bits(WEIGHTS)


class Code:
    """Makes a file when it is unpickled."""

    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return os.mkdir, (self.canary,)


@pytest.mark.parametrize("how", ["zipped", "legacy", "pickled", "in a shard"])
def test_code_never_runs(tmp_path, how):
    canary = tmp_path / "ran"
    bad = WEIGHTS | {"more": Code(canary)}
    source = save(tmp_path / "source", *(halves(bad) if how == "in a shard" else [bad]), legacy=how == "legacy")
    (file, *_) = sorted(source.glob("*.bin"), key=lambda file: b"posix\nmkdir" not in file.read_bytes())
    if how == "pickled":
        file.write_bytes(pickle.dumps({"more": Code(canary)}))
    error = convert("hf-to-orbax", source, tmp_path / "result").error
    assert error.startswith(f"error: {file}: refused: it is damaged, or holds more than tensors and plain values (")
    assert [item.name for item in tmp_path.iterdir()] == ["source"]
    # It would have run.
    pickle.loads(file.read_bytes()) if how == "pickled" else torch.load(file, weights_only=False)
    assert canary.is_dir()


# --- Without torch ---

MISSING = ("error: torch is not installed, and PyTorch's .bin and .pt files need it: pip install torch (safetensors "
           "files need nothing)")  # fmt: skip


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("originals")
    for name in ("safetensors", "bin", "bin in shards", "neox", "neox, sequential", "trained"):
        FORMATS[name].make(folder / name)
    return folder


@pytest.mark.parametrize("verb, source, more", [
    ("hf-to-orbax", "bin", ()),
    ("hf-to-orbax", "bin in shards", ()),
    ("neox-to-orbax", "neox", ()),
    ("neox-to-orbax", "neox, sequential", ()),
    ("orbax-to-neox", "trained", ("--tensor-parallel", "1")),
])  # fmt: skip
def test_files_of_torch_need_it(originals, tmp_path, verb, source, more):
    assert without("torch", verb, originals / source, tmp_path / "result", *more).error == MISSING
    assert list(tmp_path.iterdir()) == []


def test_nothing_else_needs_it(originals, tmp_path):
    for command in (
        ("hf-to-orbax", originals / "safetensors", tmp_path / "ours"),
        ("orbax-to-hf", tmp_path / "ours", tmp_path / "hf"),
        ("verify", tmp_path / "hf", originals / "safetensors"),
        ("verify", originals / "trained", tmp_path / "ours"),
    ):
        assert without("torch transformers", *command).status == 0
