"""What the dotted name of a module says: its block, its kind, and the expert that it belongs to."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["block_and_kind", "expert_number", "without_expert"]


def block_and_kind(name: str) -> tuple[int | None, str]:
    """Return a module's block index and its name inside the block; the index is ``None`` outside any block.

    The experts of a block are of one kind: their numbers are left out.

    >>> block_and_kind("model.layers.3.self_attn.q_proj"), block_and_kind("lm_head")
    ((3, 'self_attn.q_proj'), (None, 'lm_head'))
    >>> block_and_kind("model.layers.3.mlp.experts.17.gate_proj")
    (3, 'mlp.experts.gate_proj')
    """
    parts = name.split(".")
    place = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    if place is None:
        return None, name
    return int(parts[place]), ".".join(part for part in parts[place + 1 :] if not part.isdecimal())


def expert_number(name: str) -> int | None:
    """Return the number of the expert that a module of a block belongs to; None if it belongs to none.

    >>> expert_number("model.layers.3.mlp.experts.17.gate_proj"), expert_number("model.layers.3.self_attn.q_proj")
    (17, None)
    """
    place = _expert_place(name.split("."))
    return None if place is None else int(name.split(".")[place])


def without_expert(name: str) -> str:
    """Return the name of a module without the number of its expert; the names of other modules are as they are.

    >>> without_expert("model.layers.3.mlp.experts.17.gate_proj"), without_expert("model.layers.3.self_attn.q_proj")
    ('model.layers.3.mlp.experts.gate_proj', 'model.layers.3.self_attn.q_proj')
    """
    parts = name.split(".")
    place = _expert_place(parts)
    return name if place is None else ".".join([*parts[:place], *parts[place + 1 :]])


def _expert_place(parts: Sequence[str]) -> int | None:
    """Return which part of a name is the number of an expert: the second number, since the first is the block's."""
    numbers = [place for place, part in enumerate(parts) if part.isdecimal()]
    return numbers[1] if len(numbers) > 1 else None
