"""How good a model is: perplexity, divergence from its base, samples, tasks."""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "divergence": ["score_texts", "where_diverged"],
        "generation": ["generate_samples"],
        "likelihood": ["Score", "excess_nats", "perplexity"],
        "size_curve": ["score_curve"],
        "zero_shot": ["ZeroShot"],
    },
)
