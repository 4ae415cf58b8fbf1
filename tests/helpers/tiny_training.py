"""What the tests of the outer ring share: a small learner, its data, and a Trainer that keeps to itself."""

from __future__ import annotations

import torch
from lightning.pytorch import Trainer

from lowrank_pl import CalibrationData, RankLearner
from lowrank_pl.models.tiny import byte_tokenizer

LENGTH = 32


def make_data(**changes):
    settings = {"length": LENGTH, "sequences": 8, "validation_sequences": 3, "seed": 3}
    return CalibrationData("python-docs", byte_tokenizer(), **{**settings, **changes})


def validated():
    """Return the sequences that a run on ``make_data()`` is scored on."""
    data = make_data()
    data.setup("fit")
    return data.validation_sequences


def make_learner(base="random:llama", **changes):
    settings = {"keep": 0.5, "optimizer": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.0)}
    return RankLearner(base, **{**settings, **changes})


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
