"""The entry point that vLLM calls in each of its processes (group ``vllm.general_plugins``)."""

from __future__ import annotations

__all__ = ["register"]


def register() -> None:
    """Register the quantisation method ``lowrank`` with vLLM; further calls change nothing.

    ``vllm serve DIR`` then serves a folder that :func:`lowrank_pl.save_compressed` wrote.
    """
    # Only here: nobody else calls this function, and the package works without vLLM.
    from lowrank_pl.serving import vllm_method as vllm_method
