"""What tests of training share: a small learner, its data, and a Trainer that keeps to itself."""

from __future__ import annotations

from dataclasses import fields

import torch
from lightning.pytorch import Trainer

from lowrank_pl import Base, Calibration, CalibrationData, Constraints, RankLearner
from lowrank_pl.models.tiny import byte_tokenizer
from lowrank_pl.training.data import StatisticsText, ValidationText
from lowrank_pl.training.module import Compute, Start

LENGTH = 32


def make_data(text="python-docs", **changes):
    """Return data whose settings are given flat: ``statistics_length`` is the length of the statistics' text."""
    settings = {"length": LENGTH, "sequences": 8, "validation_sequences": 3, "seed": 3, **changes}
    learning = Calibration(text, settings.pop("length"), settings.pop("sequences"))
    statistics = _taken(settings, StatisticsText, prefix="statistics_")
    validation = _taken(settings, ValidationText, prefix="validation_")
    return CalibrationData(learning, byte_tokenizer(), statistics=statistics, validation=validation, **settings)


def validated():
    """Return the sequences that a run on ``make_data()`` is scored on."""
    data = make_data()
    data.setup("fit")
    return data.validation_sequences


def make_learner(base="random:llama", dtype="float32", **changes):
    """Return a learner whose settings are given flat: ``multiple_of`` is one of its constraints, and so on."""
    settings = {"keep": 0.5, "optimizer": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.0), **changes}
    start = _taken(settings, Start, names={"plan": "start", "keep": "keep_start", "steps": "keep_steps"})
    groups = {"constraints": _taken(settings, Constraints), "start": start, "compute": _taken(settings, Compute)}
    return RankLearner(Base(base, dtype=dtype), **groups, **settings)


def _taken(settings, group, *, prefix="", names=None):
    """Take out of ``settings`` what belongs to ``group``, and return the group."""
    known = {field.name: (names or {}).get(field.name, prefix + field.name) for field in fields(group)}
    return group(**{name: settings.pop(given) for name, given in known.items() if given in settings})


def make_trainer(**settings):
    quiet = {"logger": False, "enable_checkpointing": False, "num_sanity_val_steps": 0, "log_every_n_steps": 1}
    quiet |= {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "devices": 1}
    return Trainer(**{**quiet, **settings})


def fit(learner, data=None, *, ckpt_path=None, **settings):
    trainer = make_trainer(**settings)
    trainer.fit(learner, data or make_data(), ckpt_path=ckpt_path)
    return trainer


def logits_of(learner):
    return {name: mask.logits.detach().clone() for name, mask in learner.masks.items()}
