"""Two processes share the work of preparation: what they make together is what one makes alone."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

from lowrank_pl import Decomposition, find_targets
from lowrank_pl.calibration.build import build_factors, build_gradients, statistics_of
from lowrank_pl.calibration.subject import Subject
from lowrank_pl.factors.store import FactorStore
from lowrank_pl.models.tiny import byte_tokenizer, tiny_model
from lowrank_pl.utils.distributed import (
    LostProcessError,
    broadcast_from_first,
    cooperating,
    explain_lost_process,
    my_balanced_share,
    my_share,
    one_process_at_a_time,
    sum_across_processes,
    total_across_processes,
    world_size,
)
from tests.helpers.two_processes import in_two_processes

LENGTH = 48


def sequences():
    """Five sequences, so that one process has more of them."""
    return torch.randint(256, (5, LENGTH), generator=torch.Generator().manual_seed(0))


def prepare(folder):
    """Build factors and all statistics in ``folder``; return the names of the modules decomposed here."""
    model, tokenizer, added = tiny_model("llama"), byte_tokenizer(), []
    targets, add = find_targets(model), FactorStore.add
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FactorStore, "add", lambda store, name, *a, **k: (added.append(name), add(store, name, *a, **k)))
        for weights, place in ((True, folder), (False, folder / "alike")):
            settings = Decomposition("two_sided", at_keep=0.5, token_weights=weights)
            build_factors(
                Subject(model, tokenizer, sequences(), known_targets=targets), settings=settings, directory=place
            )
    build_gradients(Subject(model, tokenizer, sequences(), known_targets=targets), directory=folder)
    statistics_of(Subject(model, tokenizer, sequences()), directory=folder).collect(
        "gradient_norms", targets.modules, "sampled"
    )
    return added


def work_together(rank, folder):
    with cooperating():
        assert world_size() == 2
        assert my_share("abcde") == [["a", "c", "e"], ["b", "d"]][rank]
        assert my_balanced_share("abcd", [1, 6, 2, 3]) == [["b"], ["a", "c", "d"]][rank]
        numbers = torch.tensor([rank + 1.0, 2.0])
        sum_across_processes(numbers)
        assert numbers.tolist() == [3.0, 4.0]
        assert total_across_processes(rank + 3) == 7
        assert broadcast_from_first(lambda: f"said by {rank}") == "said by 0"
        with one_process_at_a_time():
            (folder / "order").open("a").write(str(rank))
        (folder / f"added{rank}.json").write_text(json.dumps(prepare(folder / "together")))
        with pytest.raises(
            ValueError, match=r"same folder; put LOWRANK_HOME or the store .* on a file system that all nodes share"
        ):
            prepare(folder / f"own{rank}")
    assert world_size() == 1
    assert my_share("abcde") == list("abcde")


def test_only_errors_about_other_processes_are_told_as_such():
    def failing(error):
        with explain_lost_process(lambda: "go on with it"):
            raise error

    said = r"ended or can't be reached \(Read error \[::1\]:9: Connection reset by peer\): see .*; go on with it"
    with pytest.raises(LostProcessError, match=said):
        failing(RuntimeError("[/x/gloo/transport/tcp/pair.cc:5] Read error [::1]:9: Connection reset by peer. GLHF!"))
    with pytest.raises(LostProcessError, match="Broken pipe"):
        failing(torch.distributed.DistNetworkError("sendBytes failed: Broken pipe"))
    with pytest.raises(RuntimeError, match=r"^shapes differ$"):
        failing(RuntimeError("shapes differ"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("pair")
    in_two_processes(work_together, found)
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    found = tmp_path_factory.mktemp("alone") / "factors"
    prepare(found)
    return found


def test_the_first_process_goes_first(folder):
    assert (folder / "order").read_text() == "01"


def same_files(folder, alone):
    """Yield the tensors and the metadata of each file, of two processes and of one."""
    names = sorted(path.name for path in alone.glob("*.safetensors"))
    assert names
    assert names == sorted(path.name for path in folder.glob("*.safetensors"))
    for name in names:
        with safe_open(folder / name, framework="pt") as ours, safe_open(alone / name, framework="pt") as theirs:
            tensors = [{key: file.get_tensor(key) for key in file.keys()} for file in (ours, theirs)]  # noqa: SIM118
            yield *tensors, ours.metadata(), theirs.metadata()


KINDS = ["weighted_moments", "compressed/weighted_moments", "weight_gradients", "gradient_norms"]
KINDS += [f"alike/{point}{kind}" for point in ("", "compressed/") for kind in ("statistics", "output_gradients")]


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_are_those_of_one_process(folder, alone, kind):
    for ours, theirs, noted, expected in same_files(folder / "together" / kind, alone / kind):
        # Two sums of the same numbers in another order, rounded to float32.
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)
        counted = {"weight_gradients": "batches", "gradient_norms": None}.get(kind, "tokens")
        assert counted is None or noted[counted] == expected[counted]


def test_factors_are_those_of_one_process(folder, alone):
    for ours, theirs, noted, expected in same_files(folder / "together", alone):
        torch.testing.assert_close(ours["sigma"], theirs["sigma"], rtol=1e-5, atol=1e-8)
        for rank in (4, len(ours["right"])):
            products = [part["left"][:, :rank] @ part["right"][:rank] for part in (ours, theirs)]
            torch.testing.assert_close(*products, rtol=1e-4, atol=1e-5)
        assert noted["weight"] == expected["weight"]


def test_each_module_is_decomposed_once_and_those_that_share_a_root_in_one_process(folder):
    first, second = (json.loads((folder / f"added{rank}.json").read_text()) for rank in (0, 1))
    targets = find_targets(tiny_model("llama")).modules
    # At first for the plan of the compressed model, then for good; with tokens weighted, and alike.
    assert sorted(first + second) == sorted(4 * [target.name for target in targets])
    assert not {target.group for target in targets if target.name in first} & {
        target.group for target in targets if target.name in second
    }
