"""Words that jsonargparse can't read end in a sentence that names what it would have read."""

from __future__ import annotations

import re

import pytest

from tests.helpers import SMOKE
from tests.helpers.commands import failing


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--model.mask Nope", "--model.mask is 'Nope': expected one of ARA, ARS, DobiSVD, Fermi, LLRC, Rescaled"),
        ("--model.mask lowrank_pl.methods.masks.Nope", "expected one of ARA, ARS, DobiSVD, Fermi, LLRC, Rescaled"),
        ("--model.mask.init_args.nope 3", "--model.mask: ARA has no option 'nope'; it has steps, top, .*weight"),
        ("--model.mask.init_args.steps abc", "--model.mask: steps of ARA: Expected a int. Got value: abc"),
        ("--model.optimizer Nope", "--model.optimizer is 'Nope': expected one of .* AdamW, .* SGD"),
        ("--model.optimizer.init_args.nope 2", "--model.optimizer: AdamW has no option 'nope'; it has lr, betas"),
        ("--model.lr_scheduler nope", "--model.lr_scheduler is 'nope': expected one of .* StepLR, .*cosine"),
        ("--trainer.callbacks Nope", "--trainer.callbacks is 'Nope': expected one of .* EarlyStopping, "),
        ("--trainer.precision 17", "--trainer.precision is '17': expected one of 64, 32, 16, "),
        ("--finish.refit.nope 3", "--finish.refit: Refit has no option 'nope'; it has sequences, "),
    ],
)
def test_an_unknown_name_is_told_those_that_exist(capsys, words, said):
    message = failing(capsys, "fit", "-c", SMOKE, *words.split(), status=2)
    assert re.search(said, message)
    assert "Subtypes" not in message


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("fit", r"--model\.base \(a hub id, .*\) must be given"),
        ("heal --model.plan x", r"--model\.settings\.tokens \(how many .*\) must be given"),
        (
            "allocate random:llama -c best",
            r"best\.yaml is a configuration of `lowrank fit`.*: name one of this",
        ),
    ],
)
def test_what_is_missing_or_of_another_command_is_named_as_it_is_typed(capsys, words, said):
    assert re.search(said, failing(capsys, *words.split(), status=2))
