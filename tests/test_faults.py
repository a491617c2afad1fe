"""Whatever is wrong with a source, a disk or a process: a named error or an exact result, and nothing is lost.

Random damage: 200 cases in the quick suite, 1,000 in the long one, and any number by

    python -m pytest tests/test_faults.py -k random_damage --mutations 5000 --mutation-seed 20000

Case N depends on N alone, so a failing one is run again with `--mutations 1 --mutation-seed N`.
"""

import contextlib
import json
import random
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from formats import FORMATS, Bits, read_hf, read_neox, read_orbax
from mutations import mutate

from convert.hf import orbax_to_hf
from polyglot_jax import store
from polyglot_jax.config import InputError

# --- What a result must be ---

SETTINGS = {
    "vocab_size": ("vocab", 50432),
    "num_hidden_layers": ("layers", 44),
    "hidden_size": ("embed", 6144),
    "num_attention_heads": ("heads", 64),
    "intermediate_size": ("mlp", 24576),
    "max_position_embeddings": ("context", 2048),
    "rotary_pct": ("rotary_pct", 0.25),
    "rotary_emb_base": ("rotary_base", 10000),
    "use_parallel_residual": ("residual", True),
    "hidden_act": ("activation", "gelu"),
    "tie_word_embeddings": ("tied", False),
    "layer_norm_eps": ("norm_eps", 1e-5),
    "initializer_range": ("init_std", 0.02),
}  # fmt: skip
NEOX_SETTINGS = {
    "num_attention_heads": ("heads", None),
    "max_position_embeddings": ("context", None),
    "rotary_pct": ("rotary_pct", 1.0),
    "rotary_emb_base": ("rotary_base", 10000),
    "layernorm_epsilon": ("norm_eps", 1e-5),
    "init_method_std": ("init_std", 0.02),
}
COMPUTED = ("attention.bias", "attention.masked_bias", "rotary_emb.inv_freq")


def check_hf(source: Path, result: Path) -> None:
    """That a checkpoint holds exactly what is in the Hugging Face folder it was made from."""
    theirs, plain = read_hf(source), json.loads((source / "config.json").read_bytes())
    rotary = plain.get("rope_parameters") or {}
    plain |= {"rotary_pct": plain.get("rotary_pct", rotary.get("partial_rotary_factor")),
              "rotary_emb_base": plain.get("rotary_emb_base", rotary.get("rope_theta"))}  # fmt: skip
    model = {name: default if plain.get(key) is None else plain[key] for key, (name, default) in SETTINGS.items()}
    model["residual"] = "parallel" if model["residual"] else "sequential"
    check_holds(result, theirs, model, [source / "tokenizer.json"])


def check_neox(source: Path, result: Path) -> None:
    """The same of a checkpoint of GPT-NeoX."""
    theirs, plain = read_neox(source)
    model = {name: plain.get(key, default) for key, (name, default) in NEOX_SETTINGS.items()}
    model = {name: float(value) if isinstance(value, str) else value for name, value in model.items()}
    model["residual"] = "parallel" if plain.get("gpt_j_residual") else "sequential"
    model["activation"] = "gelu_fast" if plain.get("bias_gelu_fusion") else plain.get("activation", "gelu")
    model["tied"] = not plain.get("no_weight_tying")
    step = source / (source / "latest").read_text().strip()
    check_holds(result, theirs, model, [source / "tokenizer.json", step / "tokenizer.json"])


def check_of(name: str) -> Callable[[Path, Path], None]:
    return check_neox if name.startswith("neox") else check_hf


def check_holds(result: Path, theirs: Bits, model: dict[str, object], tokenizers: list[Path]) -> None:
    """That a checkpoint holds these weights under Hugging Face's names, settings and the first of the tokenizers."""
    ours, config = read_orbax(result), json.loads((result / "config.json").read_bytes())
    left = {key for key in theirs.keys() - ours.keys() if not key.endswith(COMPUTED)}
    assert left <= ({"embed_out.weight"} if model["tied"] else set())
    assert ours == {key: theirs[key] for key in ours}
    assert {name: config["model"][name] for name in model} == model
    expected = next((file.read_bytes() for file in tokenizers if file.is_file()), None)
    tokenizer = result / "tokenizer.json"
    assert (tokenizer.read_bytes() if tokenizer.is_file() else None) == expected
    # What was made can be converted on.
    back = result.with_name("back")
    orbax_to_hf(str(result), back)
    assert read_hf(back) == ours
    shutil.rmtree(back)


def contents(path: Path) -> dict[str, bytes | None]:
    """Every file in a folder, and its folders as None."""
    return {
        item.relative_to(path).as_posix(): item.read_bytes() if item.is_file() else None
        for item in sorted(path.rglob("*"))
    }


# --- Random damage ---


class Hang(BaseException):
    pass


@contextlib.contextmanager
def limits(seconds: int = 60, gigabytes: int = 4) -> Iterator[None]:
    """Stops what runs for too long, and gives it little more memory than the process has already."""

    def stop(*_: object) -> None:
        raise Hang(f"still running after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    status = Path("/proc/self/statm")
    if status.is_file():
        used = int(status.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + gigabytes * 2**30, hard))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> Path:
    """An undamaged folder of each format, and what each is converted to."""
    folder = tmp_path_factory.mktemp("originals")
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(store, "CHUNK", 3000)
        for name, format in FORMATS.items():
            format.make(folder / name)
            format.convert(str(folder / name), folder / f"{name} converted")
    return folder


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "number" in metafunc.fixturenames:
        count, first = metafunc.config.getoption("--mutations"), metafunc.config.getoption("--mutation-seed")
        quick = 200 if count is None else count
        cases = [pytest.param(first + i, marks=[pytest.mark.slow] if i >= quick else []) for i in range(count or 1000)]
        metafunc.parametrize("number", cases)


@pytest.mark.parametrize("name", [name for name, format in FORMATS.items() if format.may_differ])
def test_undamaged_folders_are_what_stands_there(name, originals, tmp_path):
    """What random damage is held against reads each format right."""
    check_of(name)(originals / name, shutil.copytree(originals / f"{name} converted", tmp_path / "result"))


def test_random_damage_is_refused_by_name_or_converted_as_it_stands(number, originals, tmp_path):
    rng = random.Random(number)
    name = list(FORMATS)[number % len(FORMATS)]
    source, result = tmp_path / "source", tmp_path / "result"
    shutil.copytree(originals / name, source)
    how = f"case {number}, {name}: {mutate(source, rng)}"
    damaged = contents(source)
    try:
        with limits():
            FORMATS[name].convert(str(source), result)
    except (InputError, OSError) as error:
        assert str(source) in str(error), how
        assert [item.name for item in tmp_path.iterdir()] == ["source"], how
    except BaseException as error:
        raise AssertionError(f"{how}: {type(error).__name__}: {error}") from error
    else:
        try:
            if FORMATS[name].may_differ:
                check_of(name)(source, result)
            else:
                assert contents(result) == contents(originals / f"{name} converted")
        except Exception as error:
            raise AssertionError(f"{how}: {error}") from error
        assert sorted(item.name for item in tmp_path.iterdir()) == ["result", "source"], how
    assert contents(source) == damaged, how
