"""Checkpoints keep every bit, on any mesh, appear whole or not at all, and say what is wrong with a damaged one."""

import dataclasses
import errno
import json
import os
import shutil
import stat
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import optax
import pytest
import tensorstore
from disks import small_disk
from runs import bits, make_config

from polyglot_jax import checkpoint, store
from polyglot_jax.checkpoint import Checkpoint, flatten, newest, newest_whole, prune, save
from polyglot_jax.config import Config, InputError, MeshConfig
from polyglot_jax.files import new_folder
from polyglot_jax.model import Transformer, abstract_params
from polyglot_jax.optimizer import make_optimizer
from polyglot_jax.sharding import make_mesh, shardings

MESHES = {
    "one": MeshConfig(1, 1, 1),
    "data": MeshConfig(8, 1, 1),
    "fsdp": MeshConfig(1, 8, 1),
    "tensor": MeshConfig(1, 1, 8),
    "mixed": MeshConfig(2, 2, 2),
}


@pytest.fixture(scope="module")
def config() -> Config:
    return make_config()


def random_bits(abstract, seed=0):
    """Arrays of random bytes, so with every kind of NaN, and with both zeros at the front of each."""
    rng = np.random.default_rng(seed)

    def fill(leaf):
        array = np.frombuffer(rng.bytes(leaf.size * leaf.dtype.itemsize), leaf.dtype).reshape(leaf.shape).copy()
        array.reshape(-1)[:2] = [0, -0.0] if leaf.dtype != np.int32 and leaf.size > 1 else 0
        return array

    return jax.tree.map(fill, abstract)


def random_params(config, dtype="float32", seed=0):
    return random_bits(abstract_params(config.model, dtype), seed)


def random_optimizer(config, dtype="float32", seed=1):
    optimizer = make_optimizer(config.optimizer, 10, Transformer(config.model).axes())
    return random_bits(jax.eval_shape(optimizer.init, abstract_params(config.model, dtype)), seed)


def layout(config, mesh):
    return shardings(make_mesh(mesh), Transformer(config.model).axes(), config.model.sizes)


def abstract_of(tree, places=None):
    """ShapeDtypeStructs of `tree`, laid out by the tree `places` (default: all on the first device)."""
    first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    places = jax.tree.map(lambda _: first, tree) if places is None else places
    return jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree, places)


@pytest.fixture
def saved(tmp_path, config):
    """A checkpoint with optimizer state and tokenizer, and its parameters."""
    params, path = random_params(config), tmp_path / "checkpoint"
    save(path, config, params, optimizer=random_optimizer(config), tokenizer="{}", step=7)
    return path, params


def data_file(path: Path) -> Path:
    """The largest file of the parameters."""
    return max((file for file in (path / "params").rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


# --- Bits ---


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_bit_comes_back(tmp_path, config, dtype):
    params, optimizer = random_params(config, dtype), random_optimizer(config, dtype)
    kernel = params["layers"]["mlp"]["up"]["kernel"].reshape(-1)
    with np.errstate(invalid="ignore"):
        kinds = np.unique(kernel.view(f"u{kernel.itemsize}")[np.isnan(kernel)])
    assert kernel.dtype == np.dtype(dtype) and len(kinds) > 9
    assert np.signbit(kernel[:2]).tolist() == [False, True] and not kernel[:2].any()
    path = tmp_path / "checkpoint"
    save(path, config, params, optimizer=optimizer, tokenizer="한글\r\n", step=12)

    found = Checkpoint(path)
    assert (found.step, found.config) == (12, config)
    assert (path / "tokenizer.json").read_bytes() == "한글\r\n".encode()
    assert bits(found.restore_params(abstract_of(params))) == bits(params)
    restored = found.restore_optimizer(abstract_of(optimizer))
    assert jax.tree.structure(restored) == jax.tree.structure(optimizer)
    assert bits(restored) == bits(optimizer)
    for name, array in flatten(params).items():
        assert found.params[name] == jax.ShapeDtypeStruct(array.shape, array.dtype)
        assert bits(found.read(name)) == bits(array)


def test_the_text_of_the_tokenizer_comes_back_exactly(tmp_path, config):
    text = '{"a": "\u1100\\r"}\r\n\n'
    save(tmp_path / "checkpoint", config, random_params(config), tokenizer=text)
    assert Checkpoint(tmp_path / "checkpoint").tokenizer == text


def test_a_layer_read_alone_is_that_slice(saved):
    path, params = saved
    found = Checkpoint(path)
    for name, layer in (pieces := list(store.pieces(found.params))):
        whole = flatten(params)[name]
        assert (layer is not None) == name.startswith("layers/")
        assert bits(found.read(name, layer)) == bits(whole if layer is None else whole[layer])
    stacked = sum(name.startswith("layers/") for name in found.params)
    assert len(set(pieces)) == len(pieces) == len(found.params) + stacked * (found.config.model.layers - 1)


@pytest.mark.parametrize("mesh", ["one", "mixed", "fsdp"])
def test_no_chunk_spans_two_layers(tmp_path, config, mesh):
    """Of parameters and of Adam's moments, whatever mesh wrote them: listed from the files themselves."""
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, layers=3))
    places = layout(config, MESHES[mesh])
    params = jax.device_put(random_params(config), places)
    optimizer = optax.adam(1e-3).init(params)
    path = tmp_path / "checkpoint"
    save(path, config, params, optimizer=optimizer)
    for part, copies in (("params", 1), ("optimizer", 2)):
        base = {"driver": "ocdbt", "base": f"file://{path}/{part}/"}
        keys = tensorstore.KvStore.open(base).result().list().result()
        arrays = [key.decode().removesuffix("/zarr.json") for key in keys if key.endswith(b"/zarr.json")]
        stacked = [name for name in arrays if "layers" in name.split(".")]
        assert len(stacked) == 16 * copies
        for name in stacked:
            spec = {"driver": "zarr3", "kvstore": base | {"path": name}}
            array = tensorstore.open(spec, open=True, read=True).result()
            assert array.shape[0] == 3 and array.ndim > 1
            assert array.chunk_layout.read_chunk.shape[0] == array.chunk_layout.write_chunk.shape[0] == 1


# --- Meshes ---


def check_meshes(tmp_path, config, before, after):
    params = random_params(config)
    path = tmp_path / "checkpoint"
    save(path, config, jax.device_put(params, layout(config, MESHES[before])))
    places = layout(config, MESHES[after])
    restored = Checkpoint(path).restore_params(abstract_of(params, places))
    assert jax.tree.map(lambda leaf: leaf.sharding, restored) == places
    assert bits(restored) == bits(params)


PAIRS = [("data", "one"), ("one", "mixed"), ("mixed", "tensor"), ("tensor", "fsdp"), ("fsdp", "data")]


@pytest.mark.parametrize("before, after", PAIRS)
def test_what_one_mesh_wrote_another_reads(tmp_path, config, before, after):
    check_meshes(tmp_path, config, before, after)


@pytest.mark.slow
@pytest.mark.parametrize("before, after", [(a, b) for a in MESHES for b in MESHES if (a, b) not in PAIRS])
def test_what_any_mesh_wrote_any_reads(tmp_path, config, before, after):
    check_meshes(tmp_path, config, before, after)


def test_a_restored_dtype_is_the_one_asked_for(tmp_path, config):
    params = jax.tree.map(lambda leaf: np.full(leaf.shape, 1 / 3, np.float32), abstract_params(config.model))
    save(tmp_path / "checkpoint", config, params)
    wanted = abstract_of(jax.tree.map(lambda leaf: leaf.astype(ml_dtypes.bfloat16), params))
    restored = Checkpoint(tmp_path / "checkpoint").restore_params(wanted)
    assert bits(restored) == bits(jax.tree.map(lambda leaf: leaf.astype(ml_dtypes.bfloat16), params))


# --- What is wrong ---


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(InputError, match=rf"^{path}: no checkpoint: it has no manifest\.json"):
            Checkpoint(path)


def test_a_missing_file_is_named(saved):
    file = data_file(saved[0])
    file.unlink()
    with pytest.raises(InputError, match=rf"^{file}: is missing; the checkpoint is damaged"):
        Checkpoint(saved[0])


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_missing_text_file_is_named(saved, name):
    (saved[0] / name).unlink()
    with pytest.raises(InputError, match=rf"^{saved[0] / name}: is missing; the checkpoint is damaged"):
        Checkpoint(saved[0])


def test_a_truncated_file_is_named(saved):
    file = data_file(saved[0])
    size = file.stat().st_size
    os.truncate(file, size - 1)
    with pytest.raises(InputError, match=rf"^{file}: has {size - 1} bytes instead of {size}; the checkpoint is dam"):
        Checkpoint(saved[0])


def test_a_deleted_manifest_is_named(saved):
    (saved[0] / "manifest.json").unlink()
    with pytest.raises(InputError, match=rf"^{saved[0]}: a half-written checkpoint: it has no manifest\.json"):
        Checkpoint(saved[0])


@pytest.mark.parametrize(
    "damage",
    [b"", b'{"format": 1, "st', bytes(100), b"\xff\xfe", b"[]", b'{"format": "polyglot-jax-checkpoint"}', b"7"],
)
def test_a_damaged_manifest_is_named(saved, damage):
    file = saved[0] / "manifest.json"
    file.write_bytes(damage)
    with pytest.raises(InputError, match=rf"^{file}: .*the checkpoint is damaged, use another one$"):
        Checkpoint(saved[0])


def test_another_format_is_refused_by_its_number(saved):
    file = saved[0] / "manifest.json"
    manifest = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(manifest | {"version": 1}), encoding="utf-8")
    with pytest.raises(InputError, match=rf"^{file}: version=1: this program reads 2; use the one that wrote it$"):
        Checkpoint(saved[0])
    file.write_text(json.dumps(manifest | {"format": "polyglot-jax-corpus"}), encoding="utf-8")
    with pytest.raises(InputError, match=rf"^{file}: format=polyglot-jax-corpus: this program reads polyglot-jax-ch"):
        Checkpoint(saved[0])
    assert not checkpoint.is_checkpoint(saved[0])


@pytest.mark.parametrize(
    "changes, first",
    [
        # The first leaf in the order of the names.
        ({"embed": 64}, r"embed/kernel is \(384, 32\) there, \(384, 64\) in this model"),
        ({"mlp": 128}, r"layers/mlp/down/kernel is \(2, 64, 32\) there, \(2, 128, 32\) in this model"),
        ({"layers": 3}, r"layers/attention/k/bias is \(2, 8, 4\) there, \(3, 8, 4\) in this model"),
        ({"tied": True}, r"head/kernel is \(384, 32\) there, absent in this model"),
    ],
)
def test_another_models_checkpoint_is_refused_by_its_first_leaf(saved, config, changes, first):
    other = abstract_params(dataclasses.replace(config.model, **changes))
    with pytest.raises(InputError, match=rf"^{saved[0]}: another model's checkpoint: {first}$"):
        Checkpoint(saved[0]).restore_params(abstract_of(other))


def test_a_leaf_that_is_not_there_is_named(tmp_path, config):
    tied = dataclasses.replace(config, model=dataclasses.replace(config.model, tied=True))
    save(tmp_path / "tied", tied, random_params(tied))
    with pytest.raises(InputError, match=r"another model's checkpoint: head/kernel is absent there, \(384, 32\) in"):
        Checkpoint(tmp_path / "tied").restore_params(abstract_of(abstract_params(config.model)))


def test_a_checkpoint_without_optimizer_state_says_so(tmp_path, config):
    path = tmp_path / "weights"
    save(path, config, random_params(config))
    with pytest.raises(InputError, match=rf"^{path}: holds no optimizer state; .* --init only$"):
        Checkpoint(path).restore_optimizer(abstract_of(random_optimizer(config)))


# --- Whole or not at all ---


def test_what_exists_is_refused_and_replaced_only_when_asked(saved, config):
    path, params = saved
    second = random_params(config, seed=5)
    with pytest.raises(InputError, match=rf"^{path}: exists; choose another place, or replace it with --overwrite$"):
        save(path, config, second)
    assert bits(Checkpoint(path).restore_params(abstract_of(params))) == bits(params)
    save(path, config, second, step=9, overwrite=True)
    found = Checkpoint(path)
    assert bits(found.restore_params(abstract_of(params))) == bits(second)
    # Nothing of the old one is left, inside or beside it.
    assert (found.step, found.tokenizer) == (9, None) and not (path / "optimizer").exists()
    assert [item.name for item in path.parent.iterdir()] == [path.name]


def test_an_empty_folder_is_no_obstacle(tmp_path, config):
    (tmp_path / "checkpoint").mkdir()
    save(tmp_path / "checkpoint", config, random_params(config), step=3)
    assert Checkpoint(tmp_path / "checkpoint").step == 3


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_disk_of_tensorstore(*_):
    raise ValueError('RESOURCE_EXHAUSTED: Error writing "/x/d/1": No space left on device [28]')


def interrupted(*_):
    raise KeyboardInterrupt


def broken(*_):
    raise RuntimeError("broken")


@pytest.mark.parametrize(
    "part, failure, expected",
    [
        ("params", full_disk, InputError),
        ("optimizer", full_disk_of_tensorstore, InputError),
        ("manifest", full_disk, InputError),
        ("params", interrupted, KeyboardInterrupt),
        ("optimizer", broken, RuntimeError),
    ],
)
def test_a_failed_save_leaves_no_part_of_itself_and_the_old_one(saved, config, monkeypatch, part, failure, expected):
    path, params = saved
    start_tree, write_text = checkpoint._start_tree, Path.write_text

    def failing_tree(folder, tree):
        wait = start_tree(folder, tree)

        def wait_and_fail():
            wait()  # written, and then it fails
            failure()

        return wait_and_fail if folder.name == part else wait

    def failing_text(file, *args, **kwargs):
        write_text(file, *args, **kwargs)
        if file.stem == part:
            failure()

    new = path.with_name("new")
    with monkeypatch.context() as patches:
        patches.setattr(checkpoint, "_start_tree", failing_tree)
        patches.setattr(Path, "write_text", failing_text)
        for place, overwrite in ((new, False), (path, True)):
            with pytest.raises(expected) as caught:
                save(place, config, params, optimizer=random_optimizer(config, seed=3), overwrite=overwrite)
            if expected is InputError:
                assert str(caught.value).startswith(f"{place}: the disk is full")
    assert [item.name for item in path.parent.iterdir()] == [path.name]
    assert Checkpoint(path).step == 7
    assert bits(Checkpoint(path).restore_params(abstract_of(params))) == bits(params)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_loss_of_power_leaves_no_torn_checkpoint(saved, config, monkeypatch, overwrite):
    """All that it holds, and every folder's names, have been made sure of when it takes its name; then the name is."""
    path = saved[0] if overwrite else saved[0].with_name("new")
    fsync, rename, sure, states = os.fsync, Path.rename, {}, []

    def fsync_noted(opened):
        fsync(opened)
        status = os.fstat(opened)
        sure[status.st_ino] = status.st_mtime_ns  # of its last change

    def rename_checked(self, target):
        if target == path:
            inside = {self, *self.rglob("*")}
            states.append({file.relative_to(self).as_posix(): sure.get(file.stat().st_ino) == file.stat().st_mtime_ns
                           for file in inside})  # fmt: skip
            sure.clear()
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", fsync_noted)
    monkeypatch.setattr(Path, "rename", rename_checked)
    save(path, config, random_params(config), optimizer=random_optimizer(config), tokenizer="{}", overwrite=overwrite)
    [state] = states
    assert {"manifest.json", "params", "optimizer", "tokenizer.json"} < state.keys()
    assert {name for name, is_sure in state.items() if not is_sure} <= {"."}  # from which a hidden mark just went
    assert path.parent.stat().st_ino in sure


def test_a_disk_that_fills_as_it_is_made_sure_of_leaves_nothing(tmp_path, config, monkeypatch):
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(InputError, match=rf"^{tmp_path}/new: the disk is full"):
        save(tmp_path / "new", config, random_params(config))
    assert not list(tmp_path.iterdir())


def test_a_disk_may_be_unable_to_make_sure_of_folders_but_not_of_files(tmp_path, monkeypatch):
    fsync, number = os.fsync, errno.EINVAL

    def of_files_only(opened):
        if stat.S_ISDIR(os.fstat(opened).st_mode) or number == errno.EIO:
            raise OSError(number, os.strerror(number))
        fsync(opened)

    monkeypatch.setattr(os, "fsync", of_files_only)
    with new_folder(tmp_path / "new", lambda _: True) as folder:
        (folder / "file").touch()
    number = errno.EIO
    with (
        pytest.raises(OSError, match=f"^.Errno 5. Input/output error: '{tmp_path}/other.incomplete"),
        new_folder(tmp_path / "other", lambda _: True) as folder,
    ):
        (folder / "file").touch()
    assert [item.name for item in tmp_path.iterdir()] == ["new"]


@pytest.mark.parametrize("failing", [1, 2])
def test_a_failed_rename_keeps_the_old_one(tmp_path, monkeypatch, failing):
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").touch()
    rename, calls = Path.rename, []

    def sometimes(self, target):
        calls.append(target)
        if len(calls) == failing:
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", sometimes)
    with pytest.raises(OSError, match="Input/output error"), new_folder(path, lambda _: True, overwrite=True) as folder:
        (folder / "new").touch()
    assert len(calls) >= failing
    assert [item.name for item in tmp_path.iterdir()] == ["folder"]
    assert [item.name for item in path.iterdir()] == ["old"]


def test_leftovers_of_a_killed_save_do_not_stop_the_next(tmp_path):
    path = tmp_path / "folder"
    for name in ("folder", "folder.incomplete", "folder.replaced"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "old").touch()
    with new_folder(path, lambda _: True, overwrite=True) as folder:
        (folder / "new").touch()
    assert [item.name for item in tmp_path.iterdir()] == ["folder"]
    assert [item.name for item in path.iterdir()] == ["new"]


def test_only_a_folder_of_ours_is_replaced(tmp_path):
    path = tmp_path / "home"
    path.mkdir()
    (path / "letter").touch()
    with (
        pytest.raises(InputError, match=rf"^{path}: was not made by this command"),
        new_folder(path, lambda _: False, overwrite=True),
    ):
        pass
    file = path / "letter"
    with pytest.raises(InputError, match=rf"^{file}: is a file"), new_folder(file, lambda _: True, overwrite=True):
        pass
    assert [item.name for item in tmp_path.iterdir()] == ["home"] and file.is_file()


def test_a_link_goes_on_leading_to_the_new_folder(tmp_path):
    path, place = tmp_path / "link", tmp_path / "place"
    place.mkdir()
    (place / "old").touch()
    path.symlink_to(place)
    with new_folder(path, lambda _: True, overwrite=True) as folder:
        (folder / "new").touch()
    assert sorted(item.name for item in tmp_path.iterdir()) == ["link", "place"] and path.is_symlink()
    assert [item.name for item in place.iterdir()] == ["new"]


def make_run(run: Path, *names: str) -> Path:
    for name in names:
        (run / "checkpoints" / name).mkdir(parents=True)
    return run


def test_the_newest_is_that_of_the_highest_step_that_is_whole(tmp_path):
    assert newest(tmp_path) is None
    run = make_run(
        tmp_path, "9", "10", "8", "11.incomplete", "12.replaced", "notes", "\N{SUPERSCRIPT TWO}", "\u0661\u0662"
    )
    (run / "checkpoints" / "13").touch()
    assert newest(run) == run / "checkpoints" / "10"


def another_version(folder):
    file = folder / "manifest.json"
    file.write_text(file.read_text(encoding="utf-8").replace('"version": 2', '"version": 3'), encoding="utf-8")


@pytest.mark.parametrize(
    "change, message",
    [
        (
            another_version,
            r"^{run}/checkpoints/7/manifest\.json: version=3: this program reads 2; use the one that wrote",
        ),
        (
            lambda folder: (folder / "notes").touch(),
            r"^{run}/checkpoints/7/notes: does not belong to the checkpoint; move",
        ),
        (
            None,
            r"^\[Errno 24\] Too many open files: '{run}/checkpoints/7/.*'; a checkpoint cannot be checked; mend that",
        ),
    ],
    ids=["version", "surplus", "unreadable"],
)
def test_what_is_no_damage_sets_no_checkpoint_aside(saved, tmp_path, monkeypatch, change, message):
    run = tmp_path / "run"
    for step in ("3", "7"):
        shutil.copytree(saved[0], run / "checkpoints" / step)
    assert newest_whole(run).path.name == "7"

    def unreadable(file):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(file))

    if change:
        change(run / "checkpoints" / "7")
    else:
        monkeypatch.setattr(checkpoint, "file_crc32", unreadable)
    with pytest.raises(InputError, match=message.format(run=run)):
        newest_whole(run)
    assert {item.name for item in (run / "checkpoints").iterdir()} == {"3", "7"}


@pytest.mark.parametrize("keep, left", [(0, "1 2 10 20"), (1, "20"), (2, "10 20"), (3, "2 10 20"), (9, "1 2 10 20")])
def test_pruning_keeps_the_newest(tmp_path, keep, left):
    """And nothing of a save that was killed; a damaged one is kept for whoever wants to look."""
    run = make_run(tmp_path, "1", "2", "10", "20", "30.incomplete", "15.damaged")
    (run / "checkpoints" / "x.incomplete").touch()  # somebody's
    prune(run, keep)
    names = {item.name for item in (run / "checkpoints").iterdir()}
    assert names == {*left.split(), "15.damaged", "x.incomplete"}


@pytest.mark.slow
# Orbax's threads fail one by one, after the loop they would report to is closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_disk_that_is_really_full(tmp_path, config):
    with small_disk(tmp_path / "disk", 700 * 2**10) as disk:
        params, path = random_params(config), disk / "checkpoint"
        save(path, config, params, step=4)
        with pytest.raises(InputError, match=rf"^{disk}/second: the disk is full, nothing was written there"):
            save(disk / "second", config, params, optimizer=random_optimizer(config))
        with pytest.raises(InputError, match=rf"^{path}: the disk is full, nothing was written there"):
            save(path, config, params, optimizer=random_optimizer(config), overwrite=True)
        assert [item.name for item in disk.iterdir()] == ["checkpoint"]
        assert Checkpoint(path).step == 4
        assert bits(Checkpoint(path).restore_params(abstract_of(params))) == bits(params)


@pytest.mark.parametrize("name", ["run#1", "q?x", "a%41b", "봄 날"])
def test_any_folder_name_is_read(tmp_path, config, name):
    save(tmp_path / name, config, random_params(config))
    opened = Checkpoint(tmp_path / name)
    assert opened.read("embed/kernel").shape == opened.params["embed/kernel"].shape


def test_overwrite_spares_what_is_no_checkpoint(tmp_path, config):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "manifest.json").write_text('{"format": "polyglot-jax-corpus"}', encoding="utf-8")
    with pytest.raises(InputError, match="was not made by this command"):
        save(corpus, config, random_params(config), overwrite=True)
    assert (corpus / "manifest.json").is_file()


def test_what_appears_meanwhile_is_spared(tmp_path):
    with pytest.raises(InputError, match="exists"), new_folder(tmp_path / "new", lambda _: True) as folder:
        (folder / "mine").write_text("1", encoding="utf-8")
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / "precious").write_text("2", encoding="utf-8")
    assert (tmp_path / "new" / "precious").read_text(encoding="utf-8") == "2"
    assert not list(tmp_path.glob("*.incomplete"))
