"""The page of a run: figures, escaping, no network, and clear messages where something is missing."""

from __future__ import annotations

import json
import logging
import math
import os
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lowrank_pl.cli.evaluate import evaluate
from lowrank_pl.cli.report import report
from lowrank_pl.export.health.diagnosis import Diagnosis
from lowrank_pl.factors.store import FactorStore
from lowrank_pl.models.hf_quantized import Grid
from lowrank_pl.plans.plan import ModulePlan
from lowrank_pl.report.comparison import comparison_page
from lowrank_pl.report.evidence import read_evidence
from lowrank_pl.report.model_card import model_card
from lowrank_pl.report.page import run_page
from lowrank_pl.report.page_cells import HEIGHT, WIDTH, Experts, by_place, cells, grid, read_spectra, spectrum_groups
from lowrank_pl.report.rank_map import rank_map, rank_table
from lowrank_pl.report.run_record import RunRecord, digests_of, read_run
from lowrank_pl.report.scores import Row, Summary, write_summary
from lowrank_pl.utils.formatting import megabytes
from tests.helpers.run_folder import (
    DOCTOR,
    HOSTILE,
    MODULES,
    ROWS,
    TASKS,
    comparison_results,
    plan_of,
    write_run,
    write_store,
)


class Page(HTMLParser):
    """Cells of tables by row, texts by tag, and every address that the page names."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.addresses, self.tags, self.text, self.titles = [], [], [], [], {}
        self.inside = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.tags.append(tag)
        self.addresses += [(tag, found[key]) for key in ("src", "href", "action", "data") if key in found]
        assert not [key for key in found if key.startswith("on")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            if "data-n" in found:
                self.titles[int(found["data-n"])] = (found["title"], found["class"].split())
        if tag not in ("meta", "path", "rect", "br"):
            self.inside.append(tag)

    def handle_endtag(self, tag):
        while self.inside and self.inside.pop() != tag:
            pass

    def handle_data(self, data):
        if not {"script", "style"} & set(self.inside):
            self.text.append(data)
            if self.rows and {"td", "th"} & set(self.inside):
                self.rows[-1][-1] += data

    def row(self, first):
        return next([cell.strip() for cell in row] for row in self.rows if row and row[0].strip() == first)

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run")


def page_of(folder, **settings):
    return Page(run_page(read_run(folder, **settings)))


# -- figures -------------------------------------------------------------------------------------------------------


def test_page_holds_the_figures_of_the_summary(run):
    page = page_of(run)
    assert page.row("dense")[1:] == ["15.13", "+0.000", "100.0 %", "100.0 %", "0.0 MB", "0.0"]
    assert page.row("learned (this model)")[1:5] == ["16.34", "+0.077", "64.3 %", "92.0 %"]
    assert page.row("learned (this model)")[6] == "1,375.4"
    for said in (
        "wiki.txt, 20 sequences of 1024 tokens",
        "lowrank fit -c x.yaml",
        "seed_everything: 7",
        "torch 2.13.0",
    ):
        assert said in page.words
    assert "2026-11-26 12:00" in page.words
    assert "is long" in page.words
    assert "is short" in page.words
    assert "2 layers: damped model.layers.0.q, model.layers.1.q" in page.words
    assert "scaled by 0.9" in page.words
    assert "1,000 tokens/s while scoring; 1.25 x the dense model" in page.words


def test_the_page_says_bits_and_both_sizes_of_a_rounded_plan():
    modules = {name: replace(module, grid=Grid(4, 8)) for name, module in MODULES.items()}
    plan = plan_of(modules=modules, embeddings={"embed": ModulePlan((10, 16), grid=Grid(8))})
    summary = Summary((), {"date": "2026-11-26T12:00:00+00:00"})
    page = Page(run_page(RunRecord(Path("run"), plan, None, summary)))
    assert f"{len(modules)} linear layers with 4 bits in groups of 8, embed with 8 bits" in page.words
    assert f"{megabytes(plan.memory)} in memory" in page.words
    assert page.titles[3][0].endswith("128 of 128 parameters, 0.00 MB, 4 bits in groups of 8")
    assert page.row("model.layers.0.up")[5].endswith(", 4 bits in groups of 8")
    assert "bits" not in Page(run_page(RunRecord(Path("run"), plan_of(), None, summary))).words
    rounded = Row("learned", 3.0, 0.1, 0.5, 0.6, 2_000_000, bits=(4, 8), memory=3_000_000)
    summary = replace(summary, rows=(Row("dense", 2.7, 0.0, 1.0, 1.0, 9_000_000), rounded))
    page = Page(run_page(RunRecord(Path("run"), plan, None, summary)))
    assert page.row("learned (this model)")[5:8] == ["4, 8", "2.0 MB", "3.0 MB"]


def test_rank_map_says_of_every_module_what_became_of_it(run):
    page = page_of(run)
    assert len(page.titles) == len(MODULES)
    # 8 x 8 at rank 2, pivoted: 2 (8 + 8 - 2) numbers and two indices of four bytes.
    said, classes = page.titles[0]
    assert said.startswith("q, block 0: rank 2 of 8, 46.9 % kept (30 of 64 parameters, 0.00 MB), stored pivoted")
    assert classes == ["cell", "h4"]
    assert "fallback" in page.titles[1][1], "two factors, where auto would have pivoted"
    assert "pivoted storage would be inaccurate" in page.titles[1][0]
    assert "anyk" in page.titles[2][1]
    assert page.titles[3] == ("up, block 1: left dense, full rank 8, 128 of 128 parameters, 0.00 MB", ["cell", "dense"])
    assert page.titles[4][0].startswith("head, outside the blocks: rank 1 of 4")
    assert page.row("model.layers.0.up")[1:6] == [
        "16 x 8".replace("x", "\u00d7"),
        "3",
        "8",
        "56.2 %",
        "factored, fallback",
    ]


def test_grid_has_a_place_for_every_block_and_type():
    blocks, rows = grid(cells(plan_of(), {}))
    assert blocks == [0, 1, None]
    assert {kind: [cell and cell.number for cell in row] for kind, row in rows.items()} == {
        "q": [0, 2, None],
        "up": [1, 3, None],
        "head": [None, None, 4],
    }


def test_experts_of_a_block_share_a_cell_and_a_line():
    modules = {
        f"h.{block}.experts.{expert}.up": ModulePlan((40, 40), 4 + expert) for block in (0, 1) for expert in range(3)
    }
    shown = cells(plan_of(modules=modules), {})
    lines = by_place(shown)
    assert [line.name for line in lines] == ["h.0.experts.up", "h.1.experts.up"]
    blocks, rows = grid(lines)
    assert (blocks, [*rows]) == ([0, 1], ["experts.up"])
    first = lines[0]
    assert isinstance(first, Experts)
    assert (first.ranks, first.curve) == ("4 to 6", "M0 1V0.700H1V0.750H2V0.800H3V1Z")
    assert "rank 4 to 6 of 40 in 3 experts, 25.0 % kept" in first.description
    assert "most by expert 2 (30.0 %), least by expert 0 (20.0 %)" in first.description
    spectra = {cell.name: torch.ones(40) for cell in shown}
    [group] = spectrum_groups(shown, spectra)
    assert [drawn.cell.expert for drawn in group.drawings] == [0, 2, 0, 2]


def test_dropped_experts_are_shown_as_dropped():
    modules = {f"h.0.experts.{expert}.up": ModulePlan((40, 40), rank) for expert, rank in enumerate((0, 4, None))}
    plan = plan_of(modules=modules)
    shown = cells(plan, {name: torch.ones(40) for name in modules})
    assert [(cell.ranks, cell.storage) for cell in shown] == [
        ("dropped", "dropped"),
        ("4", "factored"),
        ("\u2013", "dense"),
    ]
    assert "dropped with its expert, whose tokens use others" in shown[0].description
    [experts] = by_place(shown)
    assert isinstance(experts, Experts)
    assert (experts.ranks, experts.lost) == ("4, 1 dense, 1 dropped", pytest.approx(0.45))
    lines = rank_table(plan, fmt="github").splitlines()
    assert [line.split("|")[4].strip() for line in (lines[0], lines[2])] == ["dropped", "1"]
    texts = {text.get_text() for text in rank_map(plan).axes[0].texts}
    assert {"dropped", "dense"} <= texts


def test_budget_sums_to_the_plan(run):
    plan = plan_of()
    text = run_page(read_run(run))
    widths = re.search(
        r'fill" style="flex-grow:(\d+).*cut" style="flex-grow:(\d+).*rest" style="flex-grow:(\d+)', text, re.S
    )
    kept, cut, rest = map(int, widths.groups())
    assert kept == plan.kept_parameters
    assert kept + cut == plan.targeted_parameters
    assert kept + cut + rest == 2000


# -- spectra -------------------------------------------------------------------------------------------------------


def test_spectrum_is_cut_at_the_rank_and_drawn_to_scale(tmp_path):
    plan = plan_of(origin={"store": str(write_store(tmp_path / "store")), "decomposition": {"kind": "whitened"}})
    spectra, said = read_spectra(plan)
    assert said == "Singular values of every weight, weighted by inputs, on a logarithmic scale."
    shown = cells(plan, spectra)
    total = sum(4.0**-j for j in range(8))
    assert shown[0].lost == pytest.approx(1 - (1 + 1 / 4) / total)
    assert shown[2].lost == pytest.approx(1 - (1 + 4.0**-5) / total), "components 0 and 5 are kept"
    assert shown[3].lost == 0
    group = next(group for group in spectrum_groups(shown, spectra) if group.kind == "q")
    assert (group.top, group.bottom) == (1.0, 2.0**-7)
    first, other = group.drawings
    step = WIDTH / 8
    assert first.cut == [(2 * step, 6 * step)]
    assert other.cut == [(step, 4 * step), (6 * step, 2 * step)]
    # Powers of two on a logarithmic scale lie on a straight line from edge to edge.
    points = [tuple(map(float, point.split())) for point in re.findall(r"L?([\d.]+ [\d.]+)", first.area)][1:9]
    for j, (x, y) in enumerate(points):
        assert (x, y) == pytest.approx(((j + 0.5) * step, HEIGHT * j / 7), abs=0.06)


def test_long_spectra_stay_small(tmp_path):
    store = FactorStore({"made": "up"}, tmp_path)
    store.write("a.0.q", {"sigma": torch.linspace(4, 1, 4096).double()})
    modules = {"a.0.q": ModulePlan((4096, 4096), 2048, tuple(range(0, 4096, 2)))}
    plan = plan_of(modules=modules, origin={"store": str(tmp_path)}, model_parameters=2**24)
    spectra, _ = read_spectra(plan)
    [group] = spectrum_groups(cells(plan, spectra), spectra)
    assert len(group.drawings[0].area) < 600
    assert len(group.drawings[0].cut) <= 1, "alternate components are finer than the picture"


def test_spectra_with_zeros_and_of_one_value(tmp_path):
    store = FactorStore({"made": "up"}, tmp_path)
    store.write("a.0.q", {"sigma": torch.tensor([1.0, 0.0, 0.0]).double()})
    store.write("a.1.q", {"sigma": torch.zeros(3).double()})
    plan = plan_of(modules={f"a.{b}.q": ModulePlan((3, 3), 1) for b in range(2)}, origin={"store": str(tmp_path)})
    spectra, _ = read_spectra(plan)
    shown = cells(plan, spectra)
    [group] = spectrum_groups(shown, spectra)
    assert group.bottom < group.top
    assert not re.search("nan|inf", "".join(drawn.area for drawn in group.drawings))
    assert [cell.lost for cell in shown] == [0, 0]


def test_refitted_plans_show_what_they_were_refitted_from(tmp_path):
    inner = write_store(tmp_path / "store") / "refit" / "abc"
    FactorStore({"refit": 1}, inner)
    spectra, said = read_spectra(plan_of(origin={"store": str(inner)}, fingerprint={"refit": {}}))
    assert len(spectra) == len(MODULES)
    assert said.endswith("They are from before the refit.")


@pytest.mark.parametrize(
    ("store", "said"),
    [
        (None, "The plan names no factor store"),
        ("/nowhere/at/all", "The factor store /nowhere/at/all is missing or damaged"),
    ],
)
def test_spectra_that_are_gone_are_said_to_be(run, store, said):
    origin = {"base": "org/model"} | ({"store": store} if store else {})
    plan_of(origin=origin).save(run / "plan.json")
    page = page_of(run)
    assert f"{said}, so the singular values can't be shown." in page.words.replace(" ,", ",")
    assert "svg" not in page.tags


# -- other measurements --------------------------------------------------------------------------------------------


def test_files_of_scores_in_the_folder_are_found(run, caplog):
    (run / "checked.json").write_text(json.dumps(DOCTOR))
    (run / "tasks.json").write_text(json.dumps(TASKS))
    (run / "other.json").write_text("[1]")
    model = {"model": str(run / "model"), "text": "c4", "windows": 4, "length": 64, "dtype": "float32"}
    (run / "c4.json").write_text(json.dumps({**model, "perplexity": 33.333, "tokens_per_second": 50.5, "nats": 1}))
    with caplog.at_level(logging.INFO, logger="lowrank_pl"):
        record = read_run(run)
    assert "other.json holds no scores" in caplog.text
    assert record.missing == ()
    page = Page(run_page(record))
    assert page.row("piqa")[1:] == ["acc", "0.679 ± 0.011"]
    assert page.row("boolq")[1:] == ["acc", "0.512"]
    assert page.row("mean")[2] == "0.596"
    assert page.row("c4")[2:] == ["c4", "4 \u00d7 64", "33.33"]
    assert page.row("python-docs, 8 sequences of 512 tokens")[1:] == ["4,088", "0.0812", "86.4 %"]
    assert "Healthy, with warnings quality; checked by lowrank doctor, checked.json" in page.words


def test_what_evaluate_writes_is_read(run, tmp_path):
    questions = tmp_path / "sums.jsonl"
    rows = [{"query": f"Question: {n} and one?", "choices": [str(n), str(n + 1)], "gold": 1} for n in range(4)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = tmp_path / "text.txt"
    text.write_text("a text to score, long enough for a sequence or two. " * 8)
    figures = evaluate(
        "random:llama", reference="random:llama", text=[f"own={text}"], tasks=[str(questions)], length=64, sequences=2,
        device="cpu", json=run / "scores.json",
    )  # fmt: skip
    # Scores of another model say nothing of this one.
    assert read_evidence([run / "scores.json"], model=run / "model").agreement is None
    found = read_evidence([run / "scores.json"], model=Path("random:llama"))
    assert found.agreement.agreement == 1.0
    assert found.agreement.tokens == 126
    assert found.agreement.text == f"{text}, 2 sequences of 64 tokens"
    assert [(one.text.name, one.perplexity) for one in found.texts] == [
        (str(text), figures["texts"]["own"]["perplexity"])
    ]
    right = figures["tasks"]["model"]["results"]["sums"]["acc,none"]
    assert [(one.source, one.figures["sums"]["acc"][0]) for one in found.tasks] == [("dense", right), ("scores", right)]
    page = Page(run_page(read_run(run)))
    assert page.row("sums")[1] == "acc"
    assert not any("were scored" in text for text in read_run(run).missing)


def test_scores_of_the_model_are_known_from_any_folder(run, tmp_path):
    text = {"text": "t", "windows": 1, "length": 2, "perplexity": 3.0, "tokens_per_second": 1.0}
    tasks = {"model": {"results": {"piqa": {"acc,none": 0.5}}}}
    scores = {"model": "m x", "dtype": "float32", "texts": {"t": text}, "tasks": tasks}
    path = tmp_path / "s.json"
    for directory, own in ((run / "model", 1), (tmp_path, 0), (tmp_path / "gone", 0)):
        path.write_text(json.dumps({**scores, "directory": str(directory)}))
        found = read_evidence([path], model=run / "model")
        assert [len(found.own_texts), sum(map(found.is_own, found.tasks))] == [own, own]
    # What was moved is known by its name, as is what another version wrote.
    assert len(read_evidence([path], model=Path("m x")).own_texts) == 1


def test_what_evaluate_has_compared_is_not_said_to_be_unknown(run):
    (run / "summary.json").unlink()
    found = {"kl": 0.1, "agreement": 0.9, "dense_perplexity": 3.0}
    text = {"text": "t", "windows": 1, "length": 2, "perplexity": 3.5, "divergence": found}
    scores = {"model": "m", "dtype": "float32", "directory": str(run / "model"), "texts": {"t": text}}
    (run / "score.json").write_text(json.dumps(scores))
    record = read_run(run)
    assert not any("unknown" in said for said in record.missing)
    assert "name: perplexity of the dense model" in model_card(record)


def test_a_diagnosis_older_than_the_weights_is_out_of_date(run):
    path = run / "doctor.json"
    path.write_text(json.dumps(DOCTOR))
    os.utime(path, (1, 1))
    assert "Out of date" in page_of(run).words


def test_the_newest_diagnosis_counts_whatever_its_name_is(run):
    (run / "a.json").write_text(json.dumps(DOCTOR))
    (run / "z.json").write_text(json.dumps({**DOCTOR, "findings": {}}))
    os.utime(run / "z.json", (1, 1))
    assert read_run(run).evidence.health.checked_by == "lowrank doctor, a.json"


def test_a_diagnosis_of_another_model_is_not_taken_for_this_ones(run, tmp_path):
    (tmp_path / "other").mkdir()
    (run / "other.json").write_text(json.dumps({**DOCTOR, "directory": str(tmp_path / "other")}))
    health = read_run(run).evidence.health
    assert health is None or "other.json" not in health.checked_by
    with pytest.raises(ValueError, match=r"other\.json is a diagnosis of .*other', not of .*name that of this model"):
        read_run(run, scores=[run / "other.json"])


def test_a_group_stands_for_its_tasks(run):
    results = {
        "piqa": {"acc,none": 0.8}, "mmlu": {"acc,none": 0.3}, "mmlu_law": {"acc,none": 0.2},
        "mmlu_physics": {"acc,none": 0.4}, "physics_high": {"acc,none": 0.4},
    }  # fmt: skip
    groups = {"mmlu": ["mmlu_law", "mmlu_physics"], "mmlu_physics": ["physics_high"]}
    (run / "tasks.json").write_text(json.dumps({"results": results, "group_subtasks": groups}))
    (scores,) = read_run(run).evidence.tasks
    assert list(scores.figures) == ["piqa", "mmlu", "mmlu_physics"]
    assert scores.mean_accuracy == pytest.approx(0.55)


def test_code_of_the_base_is_told_of(run):
    path = run / "model" / "config.json"
    config = json.loads(path.read_text())
    for named, own in (("hf_format.LlamaForCausalLM", False), ("shouting.Shouting", True)):
        path.write_text(json.dumps({**config, "auto_map": {"AutoModelForCausalLM": named}}))
        card = model_card(read_run(run))
        assert ("The base came with modelling code of its own, which `trust_remote_code=True` runs." in card) == own
        assert ('from_pretrained("PATH_OR_ID", trust_remote_code=True)' in card) == own
        assert ("Without `lowrank_pl` installed, pass `trust_remote_code=True`" in card) != own
        words = page_of(run).words
        assert ("Without lowrank_pl installed, loading fails with a size mismatch" in words) == own
        assert ("Without lowrank_pl installed, pass trust_remote_code=True" in words) != own


def test_without_a_doctor_the_weights_are_checked(run):
    record = read_run(run)
    assert [finding.name for finding in record.evidence.health.diagnosis.findings] == [
        "export",
        "weights",
        "factors",
        "types",
        "plan",
    ]
    assert "No damage found checked by the export, lowrank report" in Page(run_page(record)).words
    assert [finding.name for finding in read_run(run, check=False).evidence.health.diagnosis.findings] == ["export"]


def test_broken_weights_are_reported(run):
    file = run / "model" / "model.safetensors"
    tensors = {f"{name}.weight": torch.full((2, 2), math.nan) for name in MODULES}
    save_file(tensors, file)
    words = page_of(run).words
    assert "Broken weights, plan; checked by" in words
    file.write_bytes(b"no tensors")
    assert "the weight files can't be read" in page_of(run).words


def test_a_diagnosis_survives_its_file():
    found = Diagnosis.from_dict(DOCTOR)
    assert Diagnosis.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert found.to_dict() == DOCTOR
    with pytest.raises(ValueError, match="'fine': expected one of"):
        Diagnosis.from_dict({**DOCTOR, "findings": {"weights": {"health": "fine", "said": ""}}})


def test_named_files_must_hold_scores(run, tmp_path):
    with pytest.raises(ValueError, match=r"gone\.json': expected .*`lowrank doctor`"):
        read_run(run, scores=[tmp_path / "gone.json"])
    for text, said in (
        ("{", "is not JSON"),
        ('{"a": 1}', "holds no scores"),
        ('{"results": {"t": 3}}', "is damaged"),
        ('{"rows": [{"base": "b", "statistics_seconds": 1.0}]}', "holds no scores"),
    ):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(ValueError, match=f"x.json {said}"):
            read_run(run, scores=[tmp_path / "x.json"])


def test_speeds_of_bench_say_what_they_are(tmp_path):
    row = {
        "case": "decode",
        "base": "b",
        "dtype": "float32",
        "batch": 1,
        "length": 256,
        "storage": "pivoted",
        "keep": 0.8,
    }
    path = tmp_path / "bench.json"
    path.write_text(json.dumps({"rows": [{**row, "tokens_per_second": 17.5, "ratio_to_dense": 0.99}]}))
    [speed] = read_evidence([path]).speeds
    assert (speed.model, speed.tokens_per_second, speed.ratio) == ("b, pivoted, keep 0.8", 17.5, 0.99)
    assert "lowrank bench decode" in speed.how
    assert "random weights" in speed.how


# -- safety --------------------------------------------------------------------------------------------------------


def test_hostile_text_stays_text(run):
    modules = {f"model.layers.0.{HOSTILE}": ModulePlan((8, 8), 2), "b": ModulePlan((8, 8))}
    hostile = plan_of(
        method=HOSTILE, modules=modules, origin={"base": HOSTILE, HOSTILE: HOSTILE, "deep": {"a": [HOSTILE]}},
        fingerprint={HOSTILE: HOSTILE}, notes=(HOSTILE, f"b: {HOSTILE}"),
    )  # fmt: skip
    hostile.save(run / "plan.json")
    write_summary(run, [Row(HOSTILE, 3.0)], command=HOSTILE, samples=[[HOSTILE] * 3], protocol={"text": HOSTILE})
    (run / "config.yaml").write_text(HOSTILE)
    (run / "doctor.json").write_text(json.dumps(DOCTOR))
    tasks = {"results": {HOSTILE: {HOSTILE: 0.5}}, "model_name": HOSTILE}
    (run / "tasks.json").write_text(json.dumps(tasks))
    text = run_page(read_run(run))
    page = Page(text)
    assert page.tags.count("script") == 1
    assert "img" not in page.tags
    assert page.words.count('alert("x")') > 12
    assert not re.search("[\x00-\x08\x0b-\x1f]", text)
    text.encode()


def test_page_loads_nothing(run, tmp_path):
    plan_of(origin={"base": "b", "store": str(write_store(tmp_path / "store"))}).save(run / "plan.json")
    text = run_page(read_run(run))
    page = Page(text)
    assert not {"link", "img", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    assert "svg" in page.tags
    outside = [(tag, address) for tag, address in page.addresses if not address.startswith("#")]
    assert outside == [("a", "https://arxiv.org/abs/2510.19389")]
    assert "default-src 'none'" in text
    assert "@import" not in text
    assert "url(" not in text
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert {address[1:] for _, address in page.addresses if address.startswith("#")} <= set(ids)


# -- folders -------------------------------------------------------------------------------------------------------


def test_folders_that_are_no_run(tmp_path, run):
    with pytest.raises(ValueError, match=r"gone': give the folder of a run"):
        report(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"plan\.json' is a file: give the folder of a run"):
        report(run / "plan.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty' .*: expected plan\.json, as `lowrank fit`"):
        report(tmp_path / "empty")
    assert list((tmp_path / "empty").iterdir()) == []
    (tmp_path / "begun" / "checkpoints").mkdir(parents=True)
    (tmp_path / "begun" / "checkpoints" / "last.ckpt").touch()
    with pytest.raises(ValueError, match=r"no plan\.json yet: .*--ckpt_path .*last\.ckpt"):
        report(tmp_path / "begun")
    for name in ("heal.json", "upcycle.json"):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        (tmp_path / name / name).touch()
        with pytest.raises(ValueError, match=f"{name}' is a finished run of .*, with its figures in {name}"):
            report(tmp_path / name)
    for size in ("keep-0.80", "keep-0.90"):
        plan_of().save(tmp_path / "sizes" / size / "plan.json")
    with pytest.raises(ValueError, match=r"several models: give .*keep-0\.80 or 1 more"):
        report(tmp_path / "sizes")
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"plain' .* without plan\.json: copy its plan there"):
        report(tmp_path / "plain")


def test_report_writes_page_and_card(run, capsys):
    card = run / "model" / "README.md"
    card.write_text("---\nlicense: mit\n---\n\n# old `lowrank_pl` card\n")
    (run / "doctor.json").write_text(json.dumps(DOCTOR))
    (run / "tasks.json").write_text(json.dumps(TASKS))
    path = report(run)
    assert path == run / "report.html"
    shown = capsys.readouterr().out
    assert f"page     {path}, " in shown
    text = card.read_text()
    assert text.startswith("---\nlicense: mit\nmodel-index:\n- name: model with ")
    assert "\n---\n\n# model with " in text
    assert "# old" not in text
    for said in (
        "Scored on `wiki.txt, 20 sequences of 1024 tokens`",
        "KL divergence 0.0812 nats per token, the same most likely token for 86.4 % of 4,088 tokens",
        "| piqa | acc | 0.679 ± 0.011 |",
        "Checked by lowrank doctor, doctor.json: warning.",
        "* weights, healthy: all 9 tensors are finite",
        "| learned | 1,000.0 | 1.25 x | predicted tokens while the run scored",
        "* date: `2026-11-26T12:00:00+00:00`",
        "Nothing else was measured: no safety",
    ):
        assert said in " ".join(text.split())
    assert "<script" not in text
    assert str(report(run, output=run / "sub" / "page.html", card=False)).endswith("page.html")


@pytest.mark.parametrize("name", ["plan.json", "model/plan.json"])
def test_a_run_whose_plan_is_of_another_run_is_refused(run, name):
    plan_of().save(run / "model" / "plan.json")
    write_summary(run, ROWS, digests=digests_of(run))
    read_run(run)
    plan_of(keep=0.5).save(run / name)
    with pytest.raises(ValueError, match="--ckpt_path"):
        read_run(run)


def test_a_configuration_of_another_run_is_left_out(run):
    write_summary(run, ROWS, digests=digests_of(run))
    (run / "config.yaml").write_text("of the next run")
    record = read_run(run)
    assert record.config == ""
    assert any("config.yaml is left out" in said for said in record.missing)


def test_cards_of_others_stay(run, caplog):
    card = run / "model" / "README.md"
    card.write_text("# My own words\n")
    report(run)
    assert card.read_text() == "# My own words\n"
    assert "was not written by lowrank_pl and is left as it is" in caplog.text


def test_an_export_says_what_it_lacks(run, capsys):
    folder = (run / "model").rename(run / "a model")
    (run / "plan.json").rename(folder / "plan.json")
    (folder / "README.md").write_text("`lowrank_pl`\n\n## How it was made\n\n```bash\nlowrank export --plan p\n```\n")
    (folder / "tokenizer.json").write_text("{}")
    report(folder)
    shown = capsys.readouterr().out
    assert f"missing  An export has no table of scores: lowrank evaluate '{folder}' --text TEXT --json '" in shown
    assert f"lowrank doctor '{folder}' --json '{folder / 'doctor.json'}'" in shown
    page = Page((folder / "report.html").read_text())
    assert "Not measured yet" in page.words
    assert "lowrank export --plan p" in page.words
    assert "lowrank export --plan p" in (folder / "README.md").read_text()


def test_a_plan_alone_has_a_page(tmp_path):
    plan_of().save(tmp_path / "plan.json")
    page = page_of(tmp_path)
    assert "Not checked no model is exported" in page.words
    assert len(page.titles) == len(MODULES)


# -- comparisons ---------------------------------------------------------------------------------------------------


def test_page_of_a_comparison(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(comparison_results()))
    text = report(tmp_path).read_text()
    page = Page(text)
    assert [row[0] for row in page.rows[1:]] == ["dense", "a", "<b>", "a", "<b>"]
    assert page.row("a")[1:6] == ["80.0 %", "80.0 %", "5.0", "1.11", "0.100"]
    lines = [
        [tuple(map(float, point.split(","))) for point in line.split()]
        for line in re.findall(r'points="([^"]+)"', text)
    ]
    (near, far), (other_near, other_far) = lines[:2]
    assert near[0] == other_near[0] < far[0] == other_far[0], "sizes ascend to the right"
    assert far[1] > near[1], "less excess is lower, and y grows downwards"
    # On a logarithmic scale equal ratios are equal distances.
    assert (other_far[1] - far[1]) / (other_near[1] - near[1]) == pytest.approx(
        math.log(2) / math.log(0.9 / 0.4), rel=0.02
    )
    assert [address for _, address in page.addresses] == []
    with pytest.raises(ValueError, match=r"--scores .* comparison"):
        report(tmp_path, scores=[tmp_path / "x"])


def test_comparisons_with_luck_and_without_results():
    assert ">-0.2<" in comparison_page(comparison_results(low=-0.05), title="t")
    with pytest.raises(ValueError, match="no results yet: run `lowrank compare`"):
        comparison_page([], title="t")
