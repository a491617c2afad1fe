"""Tests run on 8 simulated CPU devices; warnings are errors (pyproject.toml)."""

import os

# Before anything imports JAX.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

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


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--mutations", type=int, help="cases of random damage in test_faults.py, instead of the usual")
    parser.addoption("--mutation-seed", type=int, default=0, help="number of the first of these cases")
