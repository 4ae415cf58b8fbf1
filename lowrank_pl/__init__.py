"""Compress large language models with low-rank factors whose ranks are learned.

Importing this package registers the ``lowrank`` format with transformers, so that plain ``from_pretrained`` loads
exports. What needs Lightning (``RankLearner``, ``CalibrationData``, the callbacks) or draws pictures is imported on
first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lowrank_pl.calibration.build import build_factors
from lowrank_pl.calibration.subject import Subject
from lowrank_pl.evaluate.generation import generate_samples
from lowrank_pl.evaluate.likelihood import Score, excess_nats, perplexity
from lowrank_pl.export.export import load_compressed, save_compressed
from lowrank_pl.factors.compression import compress, compressed, restore_dense
from lowrank_pl.factors.settings import Decomposition
from lowrank_pl.methods.allocate.run import allocate_ranks
from lowrank_pl.models.base import Base, load_base, load_tokenizer
from lowrank_pl.models.hf_layers import LowRankLinear, PivotedLinear
from lowrank_pl.models.targets import find_targets
from lowrank_pl.plans.budget import Budget
from lowrank_pl.plans.constraints import Constraints
from lowrank_pl.plans.plan import ModulePlan, RankPlan
from lowrank_pl.text.sequences import Calibration, token_windows
from lowrank_pl.version import __version__ as __version__

if TYPE_CHECKING:
    from lowrank_pl.report.comparison import comparison_plot
    from lowrank_pl.report.rank_map import rank_map, rank_table
    from lowrank_pl.report.scores import Row, row_table
    from lowrank_pl.training.data import CalibrationData
    from lowrank_pl.training.finish_run import FinishRun
    from lowrank_pl.training.module import RankLearner
    from lowrank_pl.training.rank_monitor import RankMonitor
    from lowrank_pl.training.text_samples import TextSamples


__all__ = [
    "Base",
    "Budget",
    "Calibration",
    "CalibrationData",
    "Constraints",
    "Decomposition",
    "FinishRun",
    "LowRankLinear",
    "ModulePlan",
    "PivotedLinear",
    "RankLearner",
    "RankMonitor",
    "RankPlan",
    "Row",
    "Score",
    "Subject",
    "TextSamples",
    "allocate_ranks",
    "build_factors",
    "comparison_plot",
    "compress",
    "compressed",
    "excess_nats",
    "find_targets",
    "generate_samples",
    "load_base",
    "load_compressed",
    "load_tokenizer",
    "perplexity",
    "rank_map",
    "rank_table",
    "restore_dense",
    "row_table",
    "save_compressed",
    "token_windows",
]

_LAZY = {
    "CalibrationData": "training.data",
    "FinishRun": "training.finish_run",
    "RankLearner": "training.module",
    "RankMonitor": "training.rank_monitor",
    "Row": "report.scores",
    "TextSamples": "training.text_samples",
    "comparison_plot": "report.comparison",
    "rank_map": "report.rank_map",
    "rank_table": "report.rank_map",
    "row_table": "report.scores",
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that loading an export never imports Lightning or matplotlib."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"lowrank_pl.{_LAZY[name]}"), name)
