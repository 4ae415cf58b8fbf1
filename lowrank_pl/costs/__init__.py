"""What a run needs, forecast for ``--dry_run``, and how fast things are, measured for ``lowrank bench``."""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "forecast": ["estimate", "print_forecast"],
        "speed": ["measure_speed"],
        "statistics_pass": ["measure_statistics"],
        "step": ["measure_step"],
    },
)
