"""The model card of a folder without a plan: a base that was pruned, rotated or made into a mixture."""

from __future__ import annotations

__all__ = ["plain_card"]


def plain_card(title: str, text: str) -> str:
    """Return a model card with the metadata that every export has.

    Args:
        title: The heading, in Markdown.
        text: What was made, from what and how, in Markdown.
    """
    head = "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- lowrank_pl\n---\n\n"
    return f"{head}# {title}\n\n{text}\n"
