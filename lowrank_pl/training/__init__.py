"""Everything built on Lightning: LightningModule, DataModule, callbacks and checkpoints."""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "data": ["CalibrationData", "StatisticsText", "ValidationText"],
        "finish_heal": ["FinishHealing", "Healed"],
        "finish_run": ["FinishRun", "ScoreText"],
        "heal": ["Healer"],
        "module": ["Compute", "RankLearner", "Start"],
        "rank_monitor": ["RankMonitor"],
        "text_samples": ["TextSamples"],
        "upcycle": ["FinishUpcycling", "MixtureOfExperts", "Upcycler"],
    },
)
