"""One flipped bit in each kind of file that the package writes and reads again is found, or changes nothing."""

from __future__ import annotations

import json
import logging
import random
from collections import Counter

import pytest
import torch

from lowrank_pl.factors.components import NestedComponents
from lowrank_pl.factors.decomposition import decompose
from lowrank_pl.factors.store import FactorStore
from lowrank_pl.methods.allocate.strs import _Record
from lowrank_pl.methods.prune.base import _read
from lowrank_pl.models import digests
from lowrank_pl.models.digests import check_files, write_digests
from lowrank_pl.models.hf_layers import LowRankLinear
from lowrank_pl.models.tiny import byte_tokenizer, tiny_model
from lowrank_pl.plans.component_order import ComponentOrder
from lowrank_pl.plans.plan import ModulePlan, RankPlan
from lowrank_pl.report.comparison import read_results, write_comparison
from lowrank_pl.report.evidence import read_evidence
from lowrank_pl.report.scores import Row, read_summary, write_summary
from lowrank_pl.training.checkpointing import AtomicCheckpoints, read_checkpoint
from lowrank_pl.utils.files import write_json
from lowrank_pl.utils.json_files import sealed
from lowrank_pl.utils.tensor_store import TensorStore

FLIPS = 24
PLAN = RankPlan(
    method="hand",
    keep=0.5,
    modules={"a.0.q": ModulePlan((8, 8), 3, (0, 1, 5)), "a.1.q": ModulePlan((8, 8))},
    model_parameters=300,
    origin={"base": "random:llama"},
    notes=("a note",),
    order=ComponentOrder({"a.0.q": torch.arange(8.0)}),
)


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    from lowrank_pl.export.export import save_compressed

    folder = tmp_path_factory.mktemp("flips") / "small"
    model = tiny_model("llama")
    model.model.layers[0].mlp.up_proj = LowRankLinear(32, 96, 8, bias=False)
    save_compressed(model, folder, tokenizer=byte_tokenizer(), plan=PLAN, card="# A card", verify=False)
    return folder


def store(folder, *, spectrum=False):
    made = FactorStore({"model": "a"}, folder)
    made.add("a.0.q", decompose(torch.randn(8, 8, generator=torch.Generator().manual_seed(0))), notes={"seconds": "1"})

    def read():
        again = FactorStore.existing(folder)
        if spectrum:
            return again.fingerprint, again.sigma("a.0.q").tolist(), again.notes("a.0.q")
        found = again.factors("a.0.q")
        return again.fingerprint, again.notes("a.0.q")["seconds"], [part.tolist() for part in (found.left, found.right)]

    return read


def statistics(folder):
    TensorStore("statistics", {"text": "b"}, folder).write("x", {"sum": torch.arange(16.0)})
    return lambda: TensorStore("statistics", {"text": "b"}, folder).read("x", "sum").tolist()


def checkpoint(folder):
    AtomicCheckpoints().save_checkpoint({"step": 3, "masks": {"a": torch.arange(64.0)}}, folder / "last.ckpt")

    def read():
        found = read_checkpoint(folder / "last.ckpt")
        return found["step"], found["masks"]["a"].tolist()

    return read


def plan(folder):
    PLAN.save(folder / "plan.json")
    return lambda: RankPlan.load(folder / "plan.json").to_json()


def summary(folder):
    write_summary(folder, [Row("learned", 23.4, 0.1)], command="lowrank fit", protocol={"text": "a.txt"})
    return lambda: read_summary(folder)


def comparison(folder):
    row = {"method": "ara", "keep": {"asked": 0.5, "targeted": 0.5, "model": 0.6}, "bytes": 9, "perplexity": {}}
    write_comparison(folder, [{**row, "excess": {}, "seconds": {"scores": 1.0}, "peak_memory": 1}], command="x")
    return lambda: read_results(folder)


def figures(folder):
    findings = {"weights": {"health": "healthy", "said": "all are finite", "tensors": 9}}
    write_json(folder / "doctor.json", sealed({"directory": "small", "findings": findings, "samples": []}))
    return lambda: read_evidence([folder / "doctor.json"]).health.diagnosis.to_dict()


def pruned(folder):
    base, record = folder / "narrowed", folder / "narrowed.json"
    base.mkdir()
    for part in (tiny_model("llama"), byte_tokenizer()):
        part.save_pretrained(base)
    write_digests(base)
    write_json(
        record, sealed({"base": "random:llama", "narrower": True, "width": ["8", 16], "left": 0.5, "seconds": 1.5})
    )
    return lambda: _read(record, base)


def sensitivity(folder):
    factors, tokens = FactorStore({"model": "a"}, folder), torch.arange(8).view(2, 4)
    record = _Record(factors, tokens)
    for rank in (2, 4):
        record.add(("a.0.q", rank), 0.25 * rank)
    # A line that is lost is measured again.
    return lambda: {key: nats for key, nats in _Record(factors, tokens).known.items() if nats != 0.25 * key[1]}


def components(folder):
    made = RankPlan(
        method="hand",
        keep=1.0,
        modules={"a.0.q": ModulePlan((8, 8))},
        model_parameters=64,
        storage="factored",
        fingerprint={"model": "a"},
        order=ComponentOrder({"a.0.q": torch.arange(8.0)}),
    )
    store(folder / "store")
    nested = NestedComponents.of_export(folder, made)
    nested.write(FactorStore.existing(folder / "store"), torch.float32)
    return lambda: nested.kept("a.0.q", ModulePlan((8, 8), 2, (6, 7))).left.tolist()


KINDS = {
    "factors": (store, "a.0.q.safetensors"),
    "spectrum": (lambda folder: store(folder, spectrum=True), "a.0.q.safetensors"),
    "manifest of factors": (store, "manifest.json"),
    "statistics": (statistics, "x.safetensors"),
    "manifest of statistics": (statistics, "manifest.json"),
    "checkpoint": (checkpoint, "last.ckpt"),
    "plan": (plan, "plan.json"),
    "summary": (summary, "summary.json"),
    "results of compare": (comparison, "results.json"),
    "figures": (figures, "doctor.json"),
    "pruned base": (pruned, "narrowed/model.safetensors"),
    "config of a pruned base": (pruned, "narrowed/config.json"),
    "record of a pruned base": (pruned, "narrowed.json"),
    "components of an export": (components, "nested/a.0.q.safetensors"),
    "losses of STRS": (sensitivity, "sensitivity/*.jsonl"),
}
EXPORTED = ["model.safetensors", "config.json", "generation_config.json", "plan.json", "tokenizer.json"]
EXPORTED += [
    "tokenizer_config.json",
    "chat_template.jinja",
    "hf_format.py",
    "hf_layers.py",
    "hf_experts.py",
    "hf_quantized.py",
    "digests.py",
]


def count_flips(file, read, caplog):
    """Return how many of ``FLIPS`` flipped bits in ``file`` are detected, harmless and silent."""
    whole, expected, chance, found = file.read_bytes(), read(), random.Random(0), Counter()
    for _ in range(FLIPS):
        place = chance.randrange(len(whole))
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << chance.randrange(8)]) + whole[place + 1 :])
        # Writes within a few milliseconds get the same time.
        digests._digest.cache_clear()
        caplog.clear()
        try:
            got = read()
        except ValueError:
            found["detected"] += 1
            continue
        warned = any(record.levelno >= logging.WARNING for record in caplog.records)
        found["detected" if warned else "harmless" if got == expected else "silent"] += 1
    file.write_bytes(whole)
    digests._digest.cache_clear()
    print(f"{file.name}: {dict(found)}")
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_no_flipped_bit_is_silent(tmp_path, caplog, kind):
    make, name = KINDS[kind]
    read = make(tmp_path)
    found = count_flips(next(tmp_path.glob(name)), read, caplog)
    assert found["silent"] == 0
    assert found["detected"] > FLIPS // 4


@pytest.mark.parametrize("name", [*EXPORTED, "lowrank.sha256"])
def test_every_flipped_bit_in_an_export_is_found(export, caplog, name):
    assert count_flips(export / name, lambda: check_files(export), caplog) == {"detected": FLIPS}


def test_all_files_of_an_export_but_the_card_are_tried(export):
    assert {file.name for file in export.iterdir()} == {*EXPORTED, "lowrank.sha256", "README.md"}
    assert json.loads((export / "config.json").read_text())["quantization_config"]["quant_method"] == "lowrank"
