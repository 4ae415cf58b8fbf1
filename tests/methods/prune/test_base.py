"""The pruned base in the cache: made once, found again, counted by what it had before."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from lowrank_pl import FinishRun, RankLearner, save_compressed
from lowrank_pl.calibration.build import build_factors
from lowrank_pl.calibration.build_by_block import build_factors_by_block
from lowrank_pl.calibration.provenance import base_notes
from lowrank_pl.calibration.subject import Subject
from lowrank_pl.costs.model_sizes import model_sizes
from lowrank_pl.factors.settings import Decomposition
from lowrank_pl.methods.prune import base as prune_base
from lowrank_pl.methods.prune.base import LLMPruner, WidthPruning, pruned_base
from lowrank_pl.methods.prune.mlp import find_hidden_neurons
from lowrank_pl.models.base import Base, load_base
from lowrank_pl.models.identity import Origin
from lowrank_pl.models.lazy import open_skeleton
from lowrank_pl.models.targets import find_targets
from lowrank_pl.models.tiny import byte_tokenizer, tiny_model
from lowrank_pl.plans.constraints import Constraints
from lowrank_pl.report.finish import ExportForm, Protocol
from lowrank_pl.utils.distributed import cooperating
from lowrank_pl.utils.files import cache_root
from tests.helpers.pruned_models import ragged
from tests.helpers.two_processes import in_two_processes
from tests.helpers.unchanged import assert_untouched, state

HALF = WidthPruning(share=0.5)
SEQUENCES = torch.arange(256).view(8, 32)


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWRANK_HOME", str(tmp_path / "home"))


def pruned(model, settings=HALF, *, keep=0.6, sequences=SEQUENCES, constraints=Constraints()):
    subject = Subject(model, byte_tokenizer(), sequences, constraints, base=Base("random:llama"))
    return pruned_base(subject, settings, keep=keep)


# -- the folder in the cache ---------------------------------------------------------------------------------------


def test_where_nothing_is_gained_the_base_stays(llama, caplog):
    caplog.set_level("INFO", logger="lowrank_pl.methods.prune.base")
    assert pruned(llama, WidthPruning(multiple_of=48), keep=0.9)[0] == "random:llama"
    assert "at keep 0.9" in caplog.text
    assert "random:llama" in caplog.text


def test_the_model_stays_as_it_was(llama):
    before = state(llama)
    _, spent = pruned(llama)
    assert_untouched(llama, before)
    assert Origin.of(llama) is None
    assert spent > 0


def test_a_second_run_finds_the_folder_and_what_it_took(llama):
    assert pruned(llama) == pruned(llama)


def test_other_settings_and_another_text_are_folders_of_their_own(llama):
    found = [
        pruned(llama),
        pruned(llama, WidthPruning(share=0.5, damping=0.5)),
        pruned(llama, WidthPruning(share=0.75)),
        pruned(llama, sequences=SEQUENCES.flip(0)),
    ]
    assert len({folder for folder, _ in found}) == 4


def test_the_storage_of_a_run_decides_the_width(llama):
    chosen = [measured_storage(llama, Constraints(storage=storage)) for storage in ("auto", "factored")]
    assert chosen == ["auto", "factored"]
    assert prune_base._rank_costs(Constraints(), llama) == {}


def measured_storage(model, constraints):
    """The storage that widths were compared in."""
    with pytest.MonkeyPatch.context() as patched:
        seen = []
        real = prune_base.measure_widths

        def measure(*words, **options):
            found = real(*words, **options)
            seen.append(found.constraints.storage)
            return found

        patched.setattr(prune_base, "measure_widths", measure)
        pruned(model, WidthPruning(), constraints=constraints)
    (storage,) = seen
    return storage


def test_a_folder_that_is_gone_is_made_again(llama):
    folder, _ = pruned(llama)
    (Path(folder) / "config.json").unlink()
    assert pruned(llama)[0] == folder
    assert (Path(folder) / "config.json").exists()


def test_a_run_that_waited_for_another_one_takes_what_that_made(llama, monkeypatch):
    folder, spent = pruned(llama)
    read = prune_base._read
    monkeypatch.setattr(prune_base, "_make", lambda *_: pytest.fail("made again"))
    # As it looks to a run that comes first and then has to wait.
    seen = iter([lambda *_: None, read])
    monkeypatch.setattr(prune_base, "_read", lambda *words: next(seen)(*words))
    assert pruned(llama) == (folder, spent)


def prune_twice(rank, folder):
    os.environ["LOWRANK_HOME"] = str(folder / "home")
    model = tiny_model("llama")
    with cooperating():
        found = [pruned(model)[0] for _ in range(2)]
    (folder / f"found{rank}").write_text(found[0])
    assert found[0] == found[1]


def test_processes_prune_once_and_find_the_same(llama, tmp_path):
    alone, _ = pruned(llama)
    (tmp_path / "two").mkdir()
    in_two_processes(prune_twice, tmp_path / "two")
    first, second = ((tmp_path / "two" / f"found{rank}").read_text() for rank in (0, 1))
    assert first == second != alone
    assert Path(first).name == Path(alone).name
    for name, value in load_base(alone).state_dict().items():
        torch.testing.assert_close(load_base(first).state_dict()[name], value)


# -- what is kept --------------------------------------------------------------------------------------------------


def test_a_share_that_leaves_less_than_is_to_be_kept_is_refused(llama):
    with pytest.raises(ValueError, match=r"share of 0\.5 .* 0\.6\d+ .* keep 0\.9: raise the share or lower keep"):
        pruned(llama, keep=0.9)
    assert_nothing_measured()


def assert_nothing_measured():
    assert not [*cache_root().rglob("*.safetensors")]


@pytest.mark.parametrize(
    ("settings", "keep", "message"),
    [
        (WidthPruning(share=0.99), 0.5, "rounds to all 96 hidden neurons"),
        (LLMPruner(skip_first=0, skip_last=0), 1.0, r"keep is 1\.0"),
        (LLMPruner(skip_first=1, skip_last=0), 0.3, r"keep 0\.3 needs"),
    ],
)
def test_impossible_sizes_are_refused_before_anything_is_measured(llama, settings, keep, message):
    with pytest.raises(ValueError, match=message):
        pruned(llama, settings, keep=keep)
    assert_nothing_measured()


@pytest.mark.parametrize("settings", [HALF, WidthPruning(), LLMPruner(skip_first=0, skip_last=0)])
def test_floors_of_what_is_pruned_are_refused(llama, settings):
    with pytest.raises(ValueError, match=r"floor 0\.9 of '\*down_proj' holds for .*down_proj.*: give a pattern"):
        pruned(llama, settings, constraints=Constraints(floors={"*down_proj": 0.9}))
    assert_nothing_measured()


def test_a_subject_without_a_base_is_refused(llama):
    with pytest.raises(ValueError, match="give Subject its base"):
        pruned_base(Subject(llama, byte_tokenizer(), SEQUENCES), HALF, keep=0.6)


@pytest.mark.parametrize(
    ("which", "share"), [({}, "62.5 %"), ({"include": ["mlp.*"]}, "50.0 %"), ({"exclude": ["mlp.*"]}, "100.0 %")]
)
def test_notes_say_what_is_left_of_the_targeted_layers(llama, which, share):
    folder, _ = pruned(llama)
    (note,) = base_notes(Subject(load_base(folder), byte_tokenizer(), SEQUENCES, Constraints(**which)))
    assert f": {share} of the targeted parameters of random:llama" in note


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targeted": None}, "targeted: .*None"),
        ({"width": "96"}, "width: .*'96'"),
        ({"left": {"mlp": 0}}, "left is {'mlp': 0} of 96"),
        ({"maps": "up_proj"}, "maps: .*'up_proj'"),
        ({"added": 1}, "added"),
        ({"heads": 2, "heads_left": {"a": 3}}, "heads_left is {'a': 3} of 2 key/value heads"),
    ],
)
def test_a_config_that_says_something_else_is_refused(llama, changes, message):
    Origin("x", 1, 2, 96, {"mlp": 8}, ()).write(llama)
    assert Origin.of(llama) == Origin("x", 1, 2, 96, {"mlp": 8}, ())
    llama.config.lowrank_narrowed |= changes
    with pytest.raises(ValueError, match=f"lowrank_narrowed: expected .*`lowrank prune` .*{message}"):
        Origin.of(llama)


def test_a_damaged_record_is_named(llama):
    folder, _ = pruned(llama)
    record = Path(folder).with_suffix(".json")
    record.write_text(record.read_text().replace('"narrower": true', '"narrower": "yes"'))
    with pytest.raises(ValueError, match=rf"{record} .*narrower: .*'yes'.* delete it"):
        pruned(llama)


# -- MLPs of several widths ----------------------------------------------------------------------------------------


def test_dense_weights_of_several_widths_are_refused_before_learning(llama):
    hidden = find_hidden_neurons(llama, find_targets(llama))
    Origin("random:llama", 1, 2, 96, {mlp.parent: 8 * place for place, mlp in enumerate(hidden, 1)}, ()).write(llama)
    learner, finish = RankLearner(Base("random:llama"), keep=0.5), FinishRun(merge=True)
    learner.model, finish.protocol = llama, Protocol("text", torch.arange(64).view(2, 32))
    with pytest.raises(ValueError, match=r"8 to 16 hidden .* leave out --finish\.merge, or .*by_block false"):
        finish.on_fit_start(None, learner)
    finish.form = ExportForm()
    finish.on_fit_start(None, learner)


@pytest.fixture
def two_widths(tmp_path):
    """The folder of a base whose MLPs have two widths."""
    return str(save_compressed(ragged("llama"), tmp_path / "base", tokenizer=byte_tokenizer()).directory)


def test_a_base_of_two_widths_opens_without_its_weights(two_widths):
    skeleton, model = open_skeleton(two_widths).model, load_base(two_widths)
    ours, theirs = ({name: part.shape for name, part in one.named_parameters()} for one in (skeleton, model))
    assert ours == theirs


def test_factors_of_a_base_of_two_widths_are_built_block_by_block(two_widths, sequences, tmp_path):
    skeleton = open_skeleton(two_widths)
    whole = Subject(load_base(two_widths), byte_tokenizer(), sequences[:4])
    parts = Subject(skeleton.model, byte_tokenizer(), sequences[:4], known_targets=skeleton.find_targets())
    expected = build_factors(whole, directory=tmp_path / "whole")
    found = build_factors_by_block(skeleton, parts, settings=Decomposition(), directory=tmp_path / "parts")
    assert found.fingerprint == expected.fingerprint


def test_a_base_of_two_widths_is_counted_like_any_other(two_widths):
    model, found = load_base(two_widths), model_sizes(Base(two_widths), length=16)
    assert found.parameters == model.num_parameters()
    assert found.modules == find_targets(model).modules
