"""Fresh processes load exports whatever they import first, and importing the package imports next to nothing."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from importlib.machinery import SourceFileLoader

import pytest

from lowrank_pl import Subject, allocate_ranks, compressed, save_compressed
from lowrank_pl.models import registration
from lowrank_pl.models.tiny import byte_tokenizer, tiny_model
from tests.helpers.fork_server import STRANGER

LOADED = """
model = AutoModelForCausalLM.from_pretrained(folder)
assert type(model.model.layers[0].mlp.up_proj).__name__ in ("LowRankLinear", "PivotedLinear")
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory, sequences):
    """A tiny dense model and an export of it."""
    folder, model = tmp_path_factory.mktemp("registration"), tiny_model("llama")
    model.save_pretrained(folder / "dense")
    plan, factors = allocate_ranks(Subject(model, byte_tokenizer(), sequences[:2]), keep=0.5, allocator="uniform")
    with compressed(model, plan, factors):
        save_compressed(model, folder / "export", tokenizer=byte_tokenizer())
    return folder


def in_process(code, start=subprocess.run, **names):
    """Run ``code`` with ``names`` defined in a process of its own; return the names of the modules that it imported."""
    given = "".join(f"{name} = {str(value)!r}\n" for name, value in names.items())
    report = "\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = start([sys.executable, "-c", given + code + report], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_the_package_imports_neither_torch_nor_transformers():
    loaded = in_process("import lowrank_pl\nassert lowrank_pl.__version__ and 'RankPlan' in dir(lowrank_pl)")
    assert not loaded & {"torch", "transformers", "numpy", "scipy", "matplotlib", "lightning"}


@pytest.mark.parametrize(
    ("imports", "start"),
    [
        ("import lowrank_pl\nfrom transformers import AutoModelForCausalLM", subprocess.run),
        # A process in which transformers is there already is what a stranger is.
        ("from transformers import AutoModelForCausalLM\nimport lowrank_pl", STRANGER.run),
        (
            "from transformers import AutoModelForCausalLM\nAutoModelForCausalLM.from_pretrained(dense)\n"
            "import lowrank_pl",
            STRANGER.run,
        ),
    ],
    ids=["lowrank_pl first", "transformers first", "after a model was loaded"],
)
def test_plain_from_pretrained_loads_an_export_in_either_order_of_imports(folders, imports, start):
    in_process(imports + LOADED, start, folder=folders / "export", dense=folders / "dense")


def test_a_watched_module_is_imported_as_ever_and_the_format_registered_after_it(monkeypatch):
    registered = []
    monkeypatch.setattr(registration, "WATCHED", ("colorsys",))
    monkeypatch.setattr(registration, "_register", lambda: registered.append("colorsys" in sys.modules))
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    assert "def rgb_to_yiq" in importlib.util.find_spec("colorsys").loader.get_source("colorsys")
    assert registered == []
    module = importlib.import_module("colorsys")
    assert registered == [True]
    assert type(module.__loader__) is type(module.__spec__.loader) is SourceFileLoader


def test_threads_that_import_both_at_once_do_not_disturb_each_other():
    # transformers replaces its own module at the end of its import. Without this package too, a second thread may see
    # the module of before, without a single name: the threads here find it imported.
    in_process("""
import threading
from concurrent.futures import ThreadPoolExecutor
import transformers
import lowrank_pl
both = threading.Barrier(2)
def one():
    both.wait()
    from transformers import LlamaForCausalLM
def other():
    both.wait()
    from lowrank_pl import load_compressed
with ThreadPoolExecutor(2) as pool:
    [found.result() for found in [pool.submit(one), pool.submit(other)]]
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
assert "lowrank" in AUTO_QUANTIZER_MAPPING
""")


def test_a_loaded_export_survives_pickling_into_a_spawned_process(folders, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(f"""
import multiprocessing
import lowrank_pl
from transformers import AutoModelForCausalLM

def rank(model):
    again = AutoModelForCausalLM.from_pretrained({str(folders / "export")!r})
    return model.model.layers[0].mlp.up_proj.rank, again.model.layers[0].mlp.up_proj.rank

if __name__ == "__main__":
    model = AutoModelForCausalLM.from_pretrained({str(folders / "export")!r})
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(rank, (model,)) == (model.model.layers[0].mlp.up_proj.rank,) * 2
""")
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_registering_again_changes_nothing():
    before = list(sys.meta_path)
    registration.register_format()
    assert sys.meta_path == before
