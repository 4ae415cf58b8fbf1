"""Documents from anywhere, cut into sequences of tokens."""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "sources": ["named_texts", "parse_text", "read_stream"],
        "sequences": ["Calibration", "token_windows"],
    },
)
