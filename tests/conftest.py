"""Fixtures: real models are loaded once per run, tiny ones are built where they are used."""

from __future__ import annotations

import os

import pytest
import torch
from browsing import browser, visit  # noqa: F401  (fixtures)
from transformer_lens.model_bridge import TransformerBridge
from wording import TEXT_A

import sinklens as sl

if "PYTEST_XDIST_WORKER" in os.environ:  # one thread each: waiting for one another costs more than it brings
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for notebooks and commands in processes of their own


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--architectures-table", action="store_true", help="write docs/architectures.md from this run")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.getoption("--architectures-table"):
        import architecture_table
        from architecture_table import NAMES, TABLE

        found = session.config.stash.get(TABLE, {})
        if set(found) == set(NAMES) and all(one.ok for one in found.values()):
            architecture_table.write({name: found[name] for name in NAMES})


@pytest.fixture(scope="session")
def text_a() -> str:
    return TEXT_A


@pytest.fixture(scope="session")
def smollm2() -> TransformerBridge:
    return sl.load_model("smollm2-135m")


@pytest.fixture(scope="session")
def gemma() -> TransformerBridge:
    return sl.load_model("gemma3-270m")


@pytest.fixture(scope="session")
def minilm() -> TransformerBridge:
    return sl.load_model("minilm-l6")
