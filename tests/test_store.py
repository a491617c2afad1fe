"""Parameters streamed to disk: any Orbax reads them, every bit comes back, every damaged byte is noticed."""

import json
import os
import socket
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import ROOT
from models import model_config, random_params, random_tensors, to_ours
from safetensors.numpy import save_file

from polyglot_jax import checkpoint, names, store
from polyglot_jax.checkpoint import Checkpoint, flatten
from polyglot_jax.config import Config, InputError, MeshConfig, TrainConfig
from polyglot_jax.hf_folder import HfFolder
from polyglot_jax.model import Transformer
from polyglot_jax.parallel import THREADS, in_order
from polyglot_jax.sharding import RULES, make_mesh, shardings
from polyglot_jax.source import Leaf
from polyglot_jax.weights import load_params

# Sizes that the chunks below do not divide, so that the last of each parameter is filled up.
MODEL = model_config(vocab=151, embed=48, heads=3, mlp=80, context=64)
CONFIG = Config(model=MODEL, train=TrainConfig(sequence_length=64))
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(store, "CHUNK", 3000)


class Memory:
    """A source in memory, of any bits."""

    def __init__(self, dtype, seed=0):
        self.path, self.config, self.tokenizer = "memory", CONFIG, None
        rng = np.random.default_rng(seed)
        self.values = {
            name: np.frombuffer(rng.bytes(leaf.size * np.dtype(dtype).itemsize), dtype).reshape(leaf.shape)
            for name, leaf in flatten(random_params(MODEL, 0)).items()
        }
        self.params = {name: Leaf(array.shape, array.dtype) for name, array in self.values.items()}

    def read(self, name, layer=None, index=()):
        return (self.values[name] if layer is None else self.values[name][layer])[index]


def same_bits(ours, theirs):
    ours, theirs = np.ascontiguousarray(ours), np.ascontiguousarray(theirs)
    return (ours.dtype, ours.shape, ours.tobytes()) == (theirs.dtype, theirs.shape, theirs.tobytes())


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_comes_back(tmp_path, dtype):
    source = Memory(DTYPES[dtype])
    copied = checkpoint.copy(tmp_path / "a", source)
    found = Checkpoint(tmp_path / "a")
    for name, layer in store.pieces(found.params):
        assert same_bits(found.read(name, layer), source.read(name, layer)), name
    assert copied.pieces == len(list(store.pieces(found.params)))
    assert copied.bytes == sum(array.nbytes for array in source.values.values())
    expected = {
        name: int((~np.isfinite(array.astype(np.float32))).sum())
        for name, array in source.values.items()
        if not name.startswith("layers/")
    }
    assert {name: copied.non_finite.get(name, 0) for name in expected} == expected


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_orbax_restores_it(tmp_path, dtype):
    """Onto eight devices, with Orbax's own checkpointers and nothing of ours."""
    source = Memory(DTYPES[dtype])
    checkpoint.copy(tmp_path / "a", source)
    mesh = jax.make_mesh((8,), ("x",))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    abstract = checkpoint.unflatten(
        {
            name: jax.ShapeDtypeStruct(
                array.shape, array.dtype, sharding=split if array.ndim > 1 and array.shape[1] % 8 == 0 else whole
            )
            for name, array in source.values.items()
        }
    )
    with ocp.StandardCheckpointer() as checkpointer:
        restored = flatten(checkpointer.restore(tmp_path / "a" / "params", abstract))
    assert restored.keys() == source.values.keys()
    for name, array in restored.items():
        assert same_bits(array, source.values[name]), name


def files(path):
    return [file for file in sorted(path.rglob("*")) if file.is_file()]


def test_chunks_are_small_and_keep_the_order_of_the_source(tmp_path):
    """A matrix that Hugging Face has transposed is stored transposed: the file's bytes are the source's."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    tensors = random_tensors(MODEL, seed=1)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(names.config_to_theirs(CONFIG, "float32")))
    checkpoint.copy(tmp_path / "ours", HfFolder(folder))
    chunks = [file for file in files(tmp_path / "ours" / "params") if "c" in file.relative_to(tmp_path).parts]
    # A row is never cut, so a chunk is at most the limit and a row.
    assert max(file.stat().st_size for file in chunks) < 3000 + 80 * 4 * 3
    up = tmp_path / "ours" / "params" / "layers.mlp.up.kernel" / "c" / "1"
    stored = b"".join(file.read_bytes() for file in sorted(files(up), key=lambda file: int(file.name)))
    expected = tensors["gpt_neox.layers.1.mlp.dense_h_to_4h.weight"].tobytes()
    assert len(files(up)) > 3 and stored[: len(expected)] == expected and not any(stored[len(expected) :])


@pytest.fixture
def ours(tmp_path):
    checkpoint.copy(tmp_path / "ours", Memory(np.float32))
    return tmp_path / "ours"


def read_all(path):
    found = Checkpoint(path)
    for name, layer in store.pieces(found.params):
        found.read(name, layer)


def test_a_part_read_alone_is_that_part(ours):
    found, source = Checkpoint(ours), Memory(np.float32)
    for index in ((slice(5, 17),), (slice(None), slice(3, 40)), (slice(0, 1), slice(10, 11)), (slice(47, 48),)):
        for name in ("layers/mlp/up/kernel", "layers/mlp/down/kernel"):
            assert same_bits(found.read(name, 1, index), source.read(name, 1, index)), (name, index)


def test_one_flipped_bit_anywhere_is_found(ours):
    """In any file: metadata, manifest, config, chunks, what fills the last of them up."""
    rng = np.random.default_rng(0)
    for file in files(ours):
        content = file.read_bytes()
        for at in {0, len(content) - 1, int(rng.integers(len(content)))}:
            damaged = bytearray(content)
            damaged[at] ^= 1 << int(rng.integers(8))
            file.write_bytes(damaged)
            if file.name == "manifest.json" and json_equal(content, damaged):
                continue  # white space
            with pytest.raises(InputError) as error:
                read_all(ours)
            assert str(ours) in str(error.value)
        file.write_bytes(content)
    read_all(ours)


def json_equal(a, b):
    try:
        return json.loads(a) == json.loads(bytes(b))
    except ValueError:
        return False


def test_chunks_swapped_between_layers_are_found(ours):
    first, second = (ours / "params" / "layers.mlp.up.kernel" / "c" / layer / "0" / "0" for layer in "01")
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    with pytest.raises(InputError, match="its bytes are not those that were written"):
        read_all(ours)


def test_a_flipped_bit_is_found_by_orbax_too(ours):
    """Restoring for training checks the files before Orbax reads them."""
    file = ours / "params" / "layers.mlp.up.kernel" / "c" / "1" / "0" / "0"
    content = bytearray(file.read_bytes())
    content[7] ^= 1
    file.write_bytes(content)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    found = Checkpoint(ours)
    abstract = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one) for name, leaf in found.params.items()}
    with pytest.raises(InputError, match=str(file)):
        found.restore_params(checkpoint.unflatten(abstract))


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 2, 1), (1, 4, 2)])
def test_loading_gives_each_device_its_part(tmp_path, mesh, split):
    model = model_config(vocab=152, embed=48, heads=4, mlp=80, context=64)
    params = random_params(model, seed=3)
    config = Config(model=model, train=TrainConfig(sequence_length=64))
    checkpoint.save(tmp_path / "saved", config, params)
    checkpoint.copy(tmp_path / "copied", Checkpoint(tmp_path / "saved"))
    mesh = make_mesh(MeshConfig(*mesh))
    for path in (tmp_path / "saved", tmp_path / "copied"):
        loaded = load_params(Checkpoint(path), mesh, split=split)
        for name, array in flatten(params).items():
            if split and name.startswith("layers/"):
                got = [flatten(loaded)[name.replace("layers/", f"layer_{layer}/")] for layer in range(2)]
                assert all(same_bits(one, array[layer]) for layer, one in enumerate(got)), name
            else:
                assert same_bits(flatten(loaded)[name], array), name
        layout = flatten(shardings(mesh, Transformer(model).axes(), model.sizes))
        if not split:
            assert {name: leaf.sharding for name, leaf in flatten(loaded).items()} == layout


def test_in_order_keeps_order_and_stays_near():
    started = []

    def square(number):
        started.append(number)
        return number**2

    results = in_order(square, iter(range(50)))
    assert next(results) == 0
    assert max(started) <= THREADS
    assert list(results) == [number**2 for number in range(1, 50)]


def test_in_order_passes_the_first_failure_on():
    def half(number):
        if number == 3:
            raise ValueError("three")
        return number / 2

    seen = []
    with pytest.raises(ValueError, match="three"):
        seen.extend(in_order(half, range(50)))
    assert seen == [0, 0.5, 1]


TWO_PROCESSES = """
import sys
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
import numpy as np
from polyglot_jax.checkpoint import flatten
from polyglot_jax.config import MeshConfig
from polyglot_jax.sharding import make_mesh
from polyglot_jax.weights import load_params, open_source

source = open_source(sys.argv[3])
read, total = source.read, 0
def counted(*where):
    global total
    values = read(*where)
    total += values.nbytes
    return values
source.read = counted
params = load_params(source, make_mesh(MeshConfig(1, 1, 2)), split=sys.argv[4] == "split")
for name, leaf in flatten(params).items():
    for shard in leaf.addressable_shards:
        np.save(f"{sys.argv[5]}/{name.replace('/', '.')}.{sys.argv[2]}.npy", np.asarray(shard.data))
print(total)
"""


@pytest.mark.parametrize("form", ["stacked", "split"])
def test_each_of_two_processes_reads_its_part(tmp_path, form):
    """A mesh over two real processes; what the devices of one do not hold, it does not read."""
    model = model_config(vocab=152, embed=48, heads=4, mlp=80, context=64)
    config = Config(model=model, train=TrainConfig(sequence_length=64))
    tensors = random_tensors(model, seed=1)
    folder = tmp_path / "theirs"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(names.config_to_theirs(config, "float32")))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, address, str(number), str(folder), form, str(tmp_path)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number in range(2)
    ]  # fmt: skip
    ended = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ended
    axes = flatten(Transformer(model).axes())
    split = {
        name: next((i for i, axis in enumerate(names) if "tensor" in RULES[axis].training), None)
        for name, names in axes.items()
    }
    sizes = {name: array.nbytes for name, array in flatten(to_ours(model, tensors)).items()}
    expected = sum(size if split[name] is None else size // 2 for name, size in sizes.items())
    assert [int(out) for out, _ in ended] == [expected] * 2
    assert expected < 0.52 * sum(sizes.values())
    for name, array in flatten(to_ours(model, tensors)).items():
        if form == "stacked":
            parts = [np.load(tmp_path / f"{name.replace('/', '.')}.{number}.npy") for number in range(2)]
            whole = parts[0] if split[name] is None else np.concatenate(parts, axis=split[name])
            assert same_bits(whole, array), name
