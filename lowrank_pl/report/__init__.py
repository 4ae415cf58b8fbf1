"""What a run leaves behind: plan, scores, rank maps, model card and page."""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "comparison": ["comparison_plot"],
        "finish": ["finish_run"],
        "model_card": ["model_card"],
        "page": ["run_page"],
        "rank_map": ["rank_map", "rank_table"],
        "scores": ["Row", "row_table"],
    },
)
