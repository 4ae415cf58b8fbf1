"""Fixtures: a private cache folder, tiny random models and a few sequences of Python's own documentation."""

from __future__ import annotations

import os
import subprocess

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from types import SimpleNamespace

import pytest
import torch

from tests.helpers.fork_server import OURS, STRANGER, ForkServer
from tests.helpers.novel import LINES


@pytest.fixture(scope="session", autouse=True)
def _private_cache(tmp_path_factory):
    os.environ["LOWRANK_HOME"] = str(tmp_path_factory.mktemp("lowrank_home"))
    torch.set_num_threads(1)


MADE_FRESH = {"lowrank_pl.export.reload.subprocess": STRANGER, "lowrank_pl.report.finish.subprocess": OURS}
"""Where processes are started that are fresh for a reason, and what they import."""


@pytest.fixture(scope="session", autouse=True)
def _fresh_processes_are_forked():
    """Let the processes that check and score exports be forked, which takes a second each and not ten."""
    servers = {place: ForkServer(imports) for place, imports in MADE_FRESH.items()}
    with pytest.MonkeyPatch.context() as patch:
        for place, server in servers.items():
            patch.setattr(place, SimpleNamespace(run=server.run))
        yield
    for server in servers.values():
        server.stop()


@pytest.fixture(autouse=True)
def _but_for_some_that_are_new(request, monkeypatch):
    if request.node.get_closest_marker("new_processes"):
        for place in MADE_FRESH:
            monkeypatch.setattr(place, subprocess)


@pytest.fixture
def tokenizer():
    from lowrank_pl.models.tiny import byte_tokenizer

    return byte_tokenizer()


@pytest.fixture(scope="session")
def sequences():
    """Sixteen sequences of 64 byte tokens of Python's documentation."""
    from pydoc_data.topics import topics

    data = "".join(topics[key] for key in sorted(topics)[:20]).encode()[: 16 * 64]
    return torch.tensor(list(data)).view(16, 64)


@pytest.fixture
def llama():
    from lowrank_pl.models.tiny import tiny_model

    return tiny_model("llama")


@pytest.fixture
def novel(tmp_path):
    """A file with the lines of ``novel``."""
    path = tmp_path / "novel.txt"
    path.write_text(LINES, encoding="utf-8")
    return path
