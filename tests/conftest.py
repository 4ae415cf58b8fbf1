"""Fixtures: a private cache folder, tiny random models and a few sequences of Python's own documentation."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# There are as many workers as cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import time
from contextlib import ExitStack

import pytest
import torch

# Without a GPU, kernels run in Triton's interpreter. Triton asks when it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from hypothesis import HealthCheck, settings

from tests.helpers.fork_server import fork_fresh_processes, serving
from tests.helpers.fuzzing import OUTCOMES
from tests.helpers.novel import LINES

# A machine that does other work as well is no failure of a test, nor are examples that had to be thrown away by chance.
calm = {"deadline": None, "suppress_health_check": [HealthCheck.filter_too_much]}
settings.register_profile("tests", **calm)
settings.register_profile("fuzz", **calm, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "tests"))


def pytest_configure(config):
    servers = ExitStack()
    servers.enter_context(serving())
    config.add_cleanup(servers.close)


LONG = (
    "test_distributed.py", "test_notebooks.py", "test_fit.py", "test_export.py", "test_resume.py", "test_prune.py",
    "test_registration.py", "test_import_rule.py", "test_documentation.py", "test_module.py", "test_killed.py",
)  # fmt: skip
"""Files that take ten seconds and more, the longest first: one that begins last leaves the other workers idle."""


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONG)))


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """Repeat every test marked ``fuzz`` for an equal share of ``$FUZZ_SECONDS``, where that is set."""
    seconds = float(os.environ.get("FUZZ_SECONDS", 0))
    if not seconds or not pyfuncitem.get_closest_marker("fuzz"):
        return None
    count = sum(item.get_closest_marker("fuzz") is not None for item in pyfuncitem.session.items)
    given = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    end = time.monotonic() + seconds / count
    while time.monotonic() < end:
        pyfuncitem.obj(**given)
    return True


def pytest_terminal_summary(terminalreporter):
    if "FUZZ_SECONDS" in os.environ:
        for (what, outcome), count in sorted(OUTCOMES.items()):
            terminalreporter.write_line(f"{what}: {count:,} {outcome}")


@pytest.fixture(scope="session", autouse=True)
def _private_cache(tmp_path_factory):
    os.environ["LOWRANK_HOME"] = str(tmp_path_factory.mktemp("lowrank_home"))
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _fresh_processes_are_forked():
    """Let the processes that check and score exports be forked, which takes a second each and not ten."""
    fork_fresh_processes()


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
