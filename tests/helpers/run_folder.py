"""Folders of runs and comparisons, written by hand: tiny ones, and ones that fill every part of a page."""

from __future__ import annotations

import json
import math

import torch
from safetensors.torch import save_file

from lowrank_pl.factors.store import FactorStore
from lowrank_pl.plans.plan import ModulePlan, RankPlan
from lowrank_pl.report.scores import Row, write_summary

HOSTILE = '<script>alert("x")</script><img src="http://evil.example/a.png" onerror=alert(1)>"\'&\x00\x1b'
LONG_FOLDER = "/a/very/long/name/of/a/folder/on/some/cluster/with/many/levels"
ROWS = [
    Row("dense", 15.13, 0.0, 1.0, 1.0, 8000, 0.0),
    Row("uniform", 18.47, 0.2, 0.8, 0.84, 7300, 30.5),
    Row("learned", 16.34, 0.077, 0.643, 0.92, 7360, 1375.4),
]
MODULES = {
    "model.layers.0.q": ModulePlan((8, 8), 2, storage="pivoted"),
    "model.layers.0.up": ModulePlan((16, 8), 3),
    "model.layers.1.q": ModulePlan((8, 8), 2, (0, 5), "pivoted"),
    "model.layers.1.up": ModulePlan((16, 8)),
    "head": ModulePlan((4, 8), 1, storage="pivoted"),
}
DOCTOR = {
    "directory": "model",
    "health": "warning",
    "findings": {
        "weights": {"health": "healthy", "said": "all 9 tensors are finite"},
        "quality": {"health": "warning", "said": HOSTILE, "kl": 0.0812, "agreement": 0.864, "tokens": 4088},
    },
    "samples": [{"prompt": "P", "model": "after", "dense": "before"}],
    "protocol": {"text": "python-docs", "windows": 8, "length": 512},
}
TASKS = {
    "results": {
        "piqa": {"alias": "piqa", "acc,none": 0.6789, "acc_stderr,none": 0.0109, "acc_norm,none": 0.7},
        "boolq": {"alias": "boolq", "acc,none": 0.5123, "acc_stderr,none": "N/A"},
    },
    "model_name": "mine",
}


def plan_of(**changes):
    """A plan of MODULES, with changes."""
    given = {
        "method": "ara",
        "keep": 0.65,
        "modules": MODULES,
        "model_parameters": 2000,
        "storage": "auto",
        "origin": {"base": "org/model", "dtype": "float32"},
    }
    return RankPlan(**{**given, **changes})


def write_weights(folder):
    """Intact low-rank weights of MODULES, and a config that describes them."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors, entries = {}, {}
    for name, module in MODULES.items():
        out, into = module.shape
        if module.rank is None:
            tensors[f"{name}.weight"] = torch.ones(out, into)
        elif module.storage == "factored":
            entries[name] = module.rank
            tensors |= {f"{name}.weight": torch.ones(out, module.rank), f"{name}.right": torch.ones(module.rank, into)}
        else:
            entries[name] = {"rank": module.rank, "storage": "pivoted", "side": "out"}
            tensors[f"{name}.weight"] = torch.ones(out - module.rank, module.rank)
            tensors[f"{name}.right"] = torch.ones(module.rank, into)
    save_file(tensors, folder / "model.safetensors")
    config = {"quant_method": "lowrank", "modules": entries}
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))


def write_run(folder):
    """A finished run of MODULES, with an export and a summary."""
    write_weights(folder / "model")
    plan_of(notes=("model.layers.0.q: damped", "model.layers.1.q: damped", "scaled by 0.9")).save(folder / "plan.json")
    write_summary(
        folder, ROWS, command="lowrank fit -c x.yaml", protocol={"text": "wiki.txt", "windows": 20, "length": 1024},
        samples=[["A list", "is long", "is short"]], versions={"torch": "2.13.0"}, verified=True,
        tokens_per_second={"dense": 800.0, "learned": 1000.0}, date="2026-11-26T12:00:00+00:00",
    )  # fmt: skip
    (folder / "config.yaml").write_text("seed_everything: 7\n")
    return folder


def write_store(folder, modules=MODULES):
    """A factor store whose singular values halve from one to the next, or more slowly in wide layers."""
    store = FactorStore({"made": "up"}, folder)
    for name, module in modules.items():
        count = min(module.shape)
        store.write(name, {"sigma": 2.0 ** -(torch.arange(count).double() * min(1.0, 16 / count))})
    return folder


def wide_plan(blocks, *, store=None):
    """A plan with the layers of a small Llama, of every form of storage and with layers that are not targeted."""
    shapes = {
        "self_attn.q_proj": (576, 576), "self_attn.k_proj": (192, 576), "self_attn.v_proj": (192, 576),
        "self_attn.o_proj": (576, 576), "mlp.gate_proj": (1536, 576), "mlp.up_proj": (1536, 576),
        "mlp.down_proj": (576, 1536),
    }  # fmt: skip
    modules = {}
    for block in range(blocks):
        for number, (kind, shape) in enumerate(shapes.items()):
            if block == 3 and kind == "self_attn.k_proj":
                continue
            rank = min(shape) * (1 + (block * 5 + number * 3) % 13) // 14
            name = f"model.layers.{block}.{kind}"
            if rank == min(shape) // 14:
                modules[name] = ModulePlan(shape)
            elif number == 6:
                modules[name] = ModulePlan(shape, rank, (*range(rank - 1), rank), "pivoted")
            else:
                modules[name] = ModulePlan(shape, rank, storage="factored" if block % 9 == 1 else "pivoted")
    base = "a-rather-long-organization-name/Some-Model-With-A-Long-Name-135M-Instruct-v0.3-checkpoint-20000"
    notes = [f"{name}: damped, since its inputs span fewer dimensions than it has" for name in list(modules)[:40]]
    origin = {
        "base": base, "dtype": "bfloat16", "decomposition": {"kind": "two_sided", "damping": 0.01},
        "calibration": {"text": f"{LONG_FOLDER}/wikitext-103-train.jsonl::part=0%-50%", "windows": 256, "length": 2048},
    }  # fmt: skip
    return RankPlan(
        method="ara", keep=0.8, modules=modules, model_parameters=blocks * 4_000_000, bytes_per_parameter=2,
        storage="auto", origin=origin | ({"store": str(store)} if store else {}), notes=(*notes, "x" * 300),
        fingerprint={"model": "0123456789abcdef" * 4, "text": "fedcba9876543210" * 4},
    )  # fmt: skip


def write_wide_run(folder, *, blocks):
    """A finished run with every section that a page can have, and with long names and long words in all of them."""
    store = folder / "store"
    plan = wide_plan(blocks, store=store)
    write_weights(folder / "model")
    write_store(store, plan.modules)
    plan.save(folder / "plan.json")
    base, text = plan.origin["base"], f"{LONG_FOLDER}/wikitext-103-validation.jsonl"
    write_summary(
        folder, [*ROWS[:2], Row("learned, no refit", 17.0, 0.11, 0.8, 0.84, 231_000_000, 4000.0), ROWS[2]],
        command=f"lowrank fit -c configs/best.yaml --model.base {base} --data.text {text} --run {folder}",
        protocol={"text": text, "windows": 128, "length": 2048}, verified=True, date="2026-11-26T12:00:00+00:00",
        samples=[["A list is", " a data structure " * 20, " " + "x" * 400], ["مرحبا", "שלום" * 10, "<b>" * 30]],
        versions={"lowrank_pl": "0.2.0", "torch": "2.13.0+cpu", "transformers": "5.23.0"},
        tokens_per_second={"dense": 14657.3, "uniform": 11139.8, "learned": 9240.6},
        machine={"processor": "Intel(R) Xeon(R) Platinum 8175M CPU @ 2.50GHz with a long name", "accelerator": None},
    )  # fmt: skip
    config = "\n".join(f"setting_{number}: {'value ' * (number % 30)}" for number in range(60))
    (folder / "config.yaml").write_text(config)
    (folder / "doctor.json").write_text(json.dumps(DOCTOR))
    (folder / "tasks.json").write_text(json.dumps(TASKS))
    (folder / "a-file-of-scores-with-a-rather-long-name.json").write_text(json.dumps(TASKS))
    score = {"model": str(folder / "model"), "text": text, "windows": 4, "length": 64, "dtype": "float32"}
    (folder / "c4.json").write_text(json.dumps({**score, "perplexity": 33.333, "tokens_per_second": 50.5}))
    row = {"case": "decode", "base": base, "dtype": "float32", "batch": 1, "length": 256, "keep": 0.8}
    row |= {"tokens_per_second": 17.5, "ratio_to_dense": 0.99}
    rows = [{**row, "storage": form} for form in ("dense", "pivoted")]
    (folder / "bench.json").write_text(json.dumps({"rows": rows}))
    return folder


def comparison_results(low=0.1):
    """Results of two methods at two sizes."""
    rows = []
    for method, keep, excess in (
        ("dense", 1.0, 0.0),
        ("a", 0.8, low),
        ("a", 0.6, 0.4),
        ("<b>", 0.8, 0.2),
        ("<b>", 0.6, 0.9),
    ):
        rows.append(_result(method, keep, {"wiki": excess}))
    return rows


def write_wide_comparison(folder):
    """A comparison of more methods than there are colours, on two texts."""
    rows = [_result("dense", 1.0, {"wikitext-103-validation": 0.0, "c4": 0.0})]
    for number in range(18):
        for keep in (0.9, 0.8, 0.6, 0.4):
            excess = (1 - keep) * (1 + number / 5) / 3
            method = f"a-method-with-settings-{number}+refit+pivoted"
            rows.append(_result(method, keep, {"wikitext-103-validation": excess, "c4": excess * 1.1}))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(rows))
    return folder


def _result(method, keep, excess):
    return {
        "method": method, "keep": {"asked": keep, "targeted": keep, "model": keep}, "bytes": 5_000_000,
        "perplexity": {text: math.exp(value) for text, value in excess.items()}, "excess": excess,
        "seconds": {"plan": 3.0}, "peak_memory": 10**9, "machine": {"processor": "AMD EPYC", "accelerator": None},
    }  # fmt: skip
