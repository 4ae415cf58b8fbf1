"""Compress large language models with low-rank factors whose ranks are learned.

Importing this package teaches transformers the format of exports, so that plain ``from_pretrained`` loads them. The
public names are imported on first use: ``__init__.pyi`` lists them, for type checkers as well.
"""

from __future__ import annotations

import lazy_loader

from lowrank_pl.models.registration import register_format
from lowrank_pl.version import __version__ as __version__

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

register_format()
