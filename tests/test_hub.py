"""Models by hub name, fetched from a server on this machine that speaks the hub's protocol (hub_server.py)."""

import errno
import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from conftest import ROOT
from hub_server import TOKEN, Hub, Repository
from huggingface_hub import constants
from models import model_config, small_tokenizer
from parity import transformers_model
from safetensors.torch import load_file
from transformers import GPTNeoXConfig

import polyglot_jax
from convert.verify import differences
from polyglot_jax import hub
from polyglot_jax.config import InputError
from polyglot_jax.weights import open_source

NAME = "EleutherAI/polyglot-ko-tiny"
MODEL = model_config(embed=32, heads=2, mlp=48, context=32)


def save(path: Path, seed: int, **options) -> None:
    """A random model as transformers saves it, and a tokenizer."""
    theirs = GPTNeoXConfig(
        vocab_size=MODEL.vocab,
        num_hidden_layers=MODEL.layers,
        hidden_size=MODEL.embed,
        num_attention_heads=MODEL.heads,
        intermediate_size=MODEL.mlp,
        max_position_embeddings=MODEL.context,
    )
    transformers_model(theirs, seed)[0].save_pretrained(path, **options)
    (path / "tokenizer.json").write_text(small_tokenizer().to_json(), encoding="utf-8")


def as_bin(path: Path, safetensors: Path, shards: int) -> None:
    """The model in a folder of safetensors, as PyTorch's files."""
    path.mkdir()
    tensors = load_file(safetensors / "model.safetensors")
    names = [f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin" for i in range(shards)]
    where = {key: names[i % shards] for i, key in enumerate(tensors)}
    if shards == 1:
        torch.save(tensors, path / "pytorch_model.bin")
    else:
        for name in names:
            torch.save({key: tensors[key] for key in tensors if where[key] == name}, path / name)
        (path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    for name in ("config.json", "tokenizer.json"):
        (path / name).write_bytes((safetensors / name).read_bytes())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One model in every form, and another."""
    path = tmp_path_factory.mktemp("models")
    save(path / "one", seed=1)
    save(path / "shards", seed=1, max_shard_size="100KB")
    save(path / "other", seed=2)
    as_bin(path / "bin", path / "one", shards=1)
    as_bin(path / "bins", path / "one", shards=2)
    return path


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A hub that huggingface_hub takes for the only one, with an empty cache; nothing else can be reached."""
    connect = socket.socket.connect

    def only_here(self, address):
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1"):
            raise AssertionError(f"a connection to {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", only_here)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    served = Hub()
    with served.running() as address:
        for name, value in {
            "ENDPOINT": address,
            "HUGGINGFACE_CO_URL_TEMPLATE": address + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_TOKEN_PATH": str(tmp_path / "token"),
            "HF_HUB_OFFLINE": False,
            "DOWNLOAD_CHUNK_SIZE": 1000,  # what a break may lose; the models are smaller than the usual 10 MB
        }.items():
            monkeypatch.setattr(constants, name, value)
        huggingface_hub.close_session()  # it would keep another test's proxies
        yield served
    huggingface_hub.close_session()


@pytest.fixture
def repository(server, folders):
    """The model under NAME, at main."""
    server.repositories[NAME] = Repository()
    server.repositories[NAME].commit(files(folders / "one"), "main")
    return server.repositories[NAME]


def environment(server_address: str, home: Path) -> dict[str, str]:
    return os.environ | {
        "HF_ENDPOINT": server_address,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1,localhost",
    }


# --- Names ---


@pytest.mark.parametrize(
    "name", [NAME, f"{NAME}@main", f"{NAME}@f7a396b6", f"{NAME}@refs/pr/1", "a/b@v1.0", "a_b/c-d.e"]
)
def test_names_of_the_hub(name):
    assert hub.is_hub_name(name)


@pytest.mark.parametrize(
    "name",
    ["runs", "./runs", "../runs/a", "runs/a/b", "/a/b", "연습/모델", "a/b@", "a/b@..", "a/b@x/../../y", "a@b", ""],
)
def test_what_is_no_name_of_the_hub(name, server):
    assert not hub.is_hub_name(name)
    with pytest.raises(InputError, match=r"must name a run|neither a checkpoint|no such folder \(and not a name"):
        open_source(name)
    assert not server.requests


# --- Fetching ---


@pytest.mark.parametrize("form, fetched", [
    ("one", ["model.safetensors"]),
    ("shards", None),
    ("bin", ["pytorch_model.bin"]),
    ("bins", ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "pytorch_model.bin.index.json"]),
])  # fmt: skip
def test_a_model_comes_in_whichever_form_it_has(server, folders, form, fetched):
    server.repositories[NAME] = Repository()
    there = files(folders / form)
    server.repositories[NAME].commit(
        {**there, "README.md": b"#", "model.fp32.safetensors": b"", "flax.msgpack": b""}, "main"
    )
    folder = hub.download(NAME)
    if fetched is None:
        fetched = [name for name in there if name.startswith("model")]
        assert len(fetched) > 2
    assert set(server.fetched()) == {*fetched, "config.json", "tokenizer.json"}
    assert all((folder / name).read_bytes() == there[name] for name in server.fetched())
    assert (folder / fetched[0]).is_symlink()
    assert not list(differences(NAME, str(folders / "one")))


def test_of_both_forms_only_safetensors_are_fetched_and_only_once(server, folders):
    server.repositories[NAME] = Repository()
    server.repositories[NAME].commit(files(folders / "bins") | files(folders / "bin") | files(folders / "one"), "main")
    hub.download(NAME)
    fetched = ["config.json", "model.safetensors", "tokenizer.json"]
    assert sorted(set(server.fetched())) == fetched
    server.requests.clear()
    hub.download(NAME)
    assert [path for _, path, _ in server.requests] == [f"/api/models/{NAME}/revision/main"]


def test_a_revision_is_a_branch_a_tag_a_commit_or_the_beginning_of_one(server, repository, folders):
    commit = repository.commit(files(folders / "other"), "v1.0", "refs/pr/1")
    for revision in ("v1.0", "refs/pr/1", commit, commit[:8]):
        assert hub.download(f"{NAME}@{revision}").name == commit
    assert not list(differences(f"{NAME}@v1.0", str(folders / "other")))
    assert list(differences(f"{NAME}@v1.0", NAME))
    # Each is found again without the hub.
    server.status = 503
    for revision in ("v1.0", "refs/pr/1", commit, commit[:8]):
        assert hub.download(f"{NAME}@{revision}").name == commit


def test_load_takes_a_name(repository, folders):
    lm = polyglot_jax.load(f"{NAME}@main")
    tokens = [lm.tokenizer.encode("봄이 오면")]
    assert np.array_equal(lm.logits(tokens), polyglot_jax.load(folders / "one").logits(tokens))


def test_the_command_line_takes_names_and_a_cache_in_any_folder(server, repository, folders, tmp_path):
    home = tmp_path / "내 모델 모음"
    code = (
        "import sys; from convert.__main__ import VERBS; from polyglot_jax.cli import run\n"
        f"assert run(VERBS, 'convert', ['hf-to-orbax', '{NAME}@main', sys.argv[1]]) == 0\n"
        f"assert run(VERBS, 'convert', ['verify', '{NAME}', sys.argv[1]]) == 0\n"
        f"assert run(VERBS, 'convert', ['verify', '{NAME}@nowhere', sys.argv[1]]) == 1\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "checkpoint")],
        cwd=ROOT,
        env=environment(constants.ENDPOINT, home),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: {NAME}@nowhere: ")
    assert list((home / "hub").glob("models--*/snapshots/*/model.safetensors"))
    assert not list(differences(str(tmp_path / "checkpoint"), str(folders / "one")))


def test_two_at_once_fetch_each_file_once(server, repository):
    with ThreadPoolExecutor() as pool:
        first, second = pool.map(hub.download, [NAME, NAME])
    assert first == second
    stored = [path for method, path, _ in server.requests if method == "GET" and path.startswith("/storage/")]
    assert len(stored) == 1


# --- Going on ---


def stored(tmp_path: Path, pattern: str) -> list[Path]:
    return sorted((tmp_path / "cache").glob(f"models--*/{pattern}"))


def ranges(server: Hub) -> list[str | None]:
    return [asked for method, path, asked in server.requests if method == "GET" and path.startswith("/storage/")]


def test_a_broken_download_loads_as_nothing_and_the_next_goes_on(server, repository, folders, tmp_path):
    whole = (folders / "one" / "model.safetensors").read_bytes()
    server.breaks_at = len(whole) // 2
    with pytest.raises(InputError, match=rf"^{NAME}: .*; the same command goes on from here$"):
        hub.download(NAME)
    (partial,) = stored(tmp_path, "blobs/*.incomplete")
    begun = partial.stat().st_size
    assert 0 < begun <= len(whole) // 2
    assert not stored(tmp_path, "snapshots/*/config.json") and not stored(tmp_path, "snapshots/*/*.safetensors")
    with pytest.raises(InputError, match="none fetched before"):  # nor as a copy, while the hub is away
        hub.download(NAME)

    server.status = None
    server.requests.clear()
    folder = hub.download(NAME)
    assert ranges(server) == [f"bytes={begun}-"]
    assert (folder / "model.safetensors").read_bytes() == whole
    assert not stored(tmp_path, "blobs/*.incomplete")
    assert not list(differences(NAME, str(folders / "one")))


def test_a_killed_download_goes_on(server, repository, folders, tmp_path):
    whole = (folders / "one" / "model.safetensors").read_bytes()
    server.breaks_at, server.is_stalling = len(whole) // 2, True
    code = (
        "from huggingface_hub import constants; from polyglot_jax import hub\n"
        f"constants.DOWNLOAD_CHUNK_SIZE = 1000; hub.download({NAME!r})"
    )
    home = tmp_path / "home"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment(constants.ENDPOINT, home))
    assert server.stalled.wait(60)
    cache = home / "hub"
    for _ in range(600):  # until what was sent has been written
        if any(file.stat().st_size for file in cache.glob("models--*/blobs/*.incomplete")):
            break
        server.ended.wait(0.1)
    process.kill()
    process.wait()
    server.ended.set()
    cache.rename(tmp_path / "cache")
    begun = stored(tmp_path, "blobs/*.incomplete")[0].stat().st_size

    server.breaks_at, server.status, server.is_stalling = None, None, False
    server.requests.clear()
    assert (hub.download(NAME) / "model.safetensors").read_bytes() == whole
    assert ranges(server) == [f"bytes={begun}-"] and begun > 0


def test_a_file_that_comes_damaged_is_fetched_anew(server, repository, folders, tmp_path):
    whole = (folders / "one" / "model.safetensors").read_bytes()
    server.swaps[whole] = b"\xff" * 100 + whole[100:]
    with pytest.raises(InputError, match=r"/model\.safetensors: came damaged and was removed; run the same"):
        hub.download(NAME)
    assert not stored(tmp_path, "blobs/*.incomplete") and not stored(tmp_path, "snapshots/*/*.safetensors")
    server.swaps.clear()
    assert (hub.download(NAME) / "model.safetensors").read_bytes() == whole
    assert ranges(server) == [None, None]


def test_a_file_that_is_damaged_on_the_hub_is_named(server, repository, folders):
    there = files(folders / "one")
    repository.commit(there | {"model.safetensors": b"\xff" * 100 + there["model.safetensors"][100:]}, "main")
    with pytest.raises(InputError, match=r"model\.safetensors: damaged or not safetensors"):
        open_source(NAME)


def test_more_than_the_whole_is_begun_anew(server, repository, folders, tmp_path):
    hub.download(NAME)
    (blob,) = (link.resolve() for link in stored(tmp_path, "snapshots/*/model.safetensors"))
    whole = blob.read_bytes()
    for link in stored(tmp_path, "snapshots/*/model.safetensors"):
        link.unlink()
    blob.rename(f"{blob}.incomplete").write_bytes(whole * 2)
    assert (hub.download(NAME) / "model.safetensors").read_bytes() == whole


def test_a_full_disk_is_reported_as_one(repository, monkeypatch):
    def http_get(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hub, "http_get", http_get)
    with pytest.raises(OSError) as caught:
        hub.download(NAME)
    assert caught.value.errno == errno.ENOSPC


# --- The hub away ---


def test_without_the_hub_the_copy_is_taken(server, repository, folders, monkeypatch):
    folder = hub.download(NAME)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        away = f"http://127.0.0.1:{unused.getsockname()[1]}"  # bound, not listening: refuses
        monkeypatch.setattr(constants, "ENDPOINT", away)
        assert hub.download(NAME) == folder
        assert not list(differences(NAME, str(folders / "one")))
        with pytest.raises(
            InputError, match=rf"^a/b: no such folder here, .* {away} cannot be reached \(.*\); connect, or"
        ):
            hub.download("a/b")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.download(NAME) == folder
    with pytest.raises(InputError, match=r"^a/b: .*HF_HUB_OFFLINE is set; unset it, or give the folder of a copy$"):
        hub.download("a/b")


def test_a_broken_update_leaves_the_copy_before_it(server, repository, folders):
    before = hub.download(NAME)
    repository.commit(files(folders / "other"), "main")
    server.breaks_at = 1000
    with pytest.raises(InputError, match="goes on from here"):
        hub.download(NAME)
    assert hub.download(NAME) == before  # the hub is away since
    server.status = None
    assert hub.download(NAME) != before
    assert not list(differences(NAME, str(folders / "other")))


# --- Refusals ---


@pytest.mark.parametrize("name, access, reason", [
    ("EleutherAI/none", "open", r"no such folder here, .*/EleutherAI/none is not there, or is private; .*HF_TOKEN"),
    (NAME, "private", rf"{NAME} is not there, or is private; .* set HF_TOKEN"),
    (NAME, "gated", rf"its licence must be accepted first, at http://.*/{NAME}; then set HF_TOKEN"),
    (NAME, "forbidden", rf"{NAME} may not be read \(status 403\); set HF_TOKEN"),
    (f"{NAME}@v9", "open", rf"{NAME} has no revision v9; name a branch, a tag or a commit"),
])  # fmt: skip
def test_a_refusal_says_what_to_do(repository, name, access, reason):
    repository.access = access
    with pytest.raises(InputError, match=rf"^{name}: {'' if reason[0] == 'n' else '.*'}{reason}") as caught:
        open_source(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("access", ["private", "gated"])
def test_a_token_opens_what_is_closed(server, repository, monkeypatch, access):
    repository.access = access
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(InputError, match=r"may not be read \(status 401\); set HF_TOKEN"):
        hub.download(NAME)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert (hub.download(NAME) / "model.safetensors").is_file()


def test_a_failing_hub_is_reported(server):
    server.status = 500
    with pytest.raises(InputError, match=r"answered with status 500; try again later$"):
        hub.download(NAME)


@pytest.mark.parametrize("without", ["config.json", "model.safetensors"])
def test_a_repository_that_holds_no_model_is_refused(server, folders, without):
    there = {name: content for name, content in files(folders / "one").items() if name != without}
    server.repositories[NAME] = Repository()
    server.repositories[NAME].commit(there, "main")
    with pytest.raises(InputError, match=rf"^{NAME}: is on the hub, but not with a config\.json and weights"):
        hub.download(NAME)
    assert not server.fetched()
