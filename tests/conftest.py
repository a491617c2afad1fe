"""Tests run on 8 simulated CPU devices; warnings are errors (pyproject.toml)."""

import os

# Before anything imports JAX.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with the real tokenizer and the real corpora, beside the checkout where there is one."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("no ../shared: the real tokenizer and corpora are not part of the project")
    return folder


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which tests that ask for `compiled_once` keep compiled programs."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def compiled_once(compiled: Path) -> Iterator[None]:
    """Programs that are equal are compiled once for all tests that ask for this."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    jax.config.update("jax_compilation_cache_dir", str(compiled))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def unmeasured_device() -> Iterator[None]:
    """The large product that measures a CPU takes longer than a run here."""
    from polyglot_jax import report

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(report, "peak_flops", lambda dtype, devices: (1e12, "assumed"))
        yield


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--mutations", type=int, help="cases of random damage in test_faults.py, instead of the usual")
    parser.addoption("--mutation-seed", type=int, default=0, help="number of the first of these cases")
