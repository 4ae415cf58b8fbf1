"""Compress large language models with low-rank factors whose ranks are learned.

Importing this package registers the ``lowrank`` format with transformers, so that plain ``from_pretrained`` loads
exports. What needs Lightning (``RankLearner``, ``CalibrationData``, the callbacks) or draws pictures is imported on
first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lowrank_pl.base_model import load_base, load_tokenizer
from lowrank_pl.budget import Budget
from lowrank_pl.compress import compress, compressed, restore_dense
from lowrank_pl.decomposition import Decomposition
from lowrank_pl.draw import allocate_ranks
from lowrank_pl.evaluate import Score, excess_nats, perplexity
from lowrank_pl.export import load_compressed, save_compressed
from lowrank_pl.generation import generate_samples
from lowrank_pl.hf_layers import LowRankLinear, PivotedLinear
from lowrank_pl.plan import ModulePlan, RankPlan
from lowrank_pl.prepare import build_factors
from lowrank_pl.targets import find_targets
from lowrank_pl.windows import token_windows

if TYPE_CHECKING:
    from lowrank_pl.callbacks import FinishRun
    from lowrank_pl.comparison import comparison_plot
    from lowrank_pl.data import CalibrationData
    from lowrank_pl.module import RankLearner
    from lowrank_pl.plan_report import rank_map, rank_table
    from lowrank_pl.rank_monitor import RankMonitor
    from lowrank_pl.report import Row, row_table
    from lowrank_pl.text_samples import TextSamples

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "CalibrationData",
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
    "CalibrationData": "data",
    "FinishRun": "callbacks",
    "RankLearner": "module",
    "RankMonitor": "rank_monitor",
    "Row": "report",
    "TextSamples": "text_samples",
    "comparison_plot": "comparison",
    "rank_map": "plan_report",
    "rank_table": "plan_report",
    "row_table": "report",
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that loading an export never imports Lightning or matplotlib."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"lowrank_pl.{_LAZY[name]}"), name)
