"""What a model is: its class, a fingerprint of all that it computes with, and what it was before pruning."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain

import transformers
from torch import Tensor
from transformers import PreTrainedModel

from lowrank_pl.models.targets import Target, Targets
from lowrank_pl.utils.files import sha256_of
from lowrank_pl.utils.formatting import percent
from lowrank_pl.utils.json_files import checked_json
from lowrank_pl.utils.tensor_store import tensor_digest

__all__ = ["ORIGIN_KEY", "ROTATION_KEY", "Origin", "base_class", "model_fingerprint", "parent_name"]


def base_class(model: PreTrainedModel) -> type[PreTrainedModel] | None:
    """Return the class of ``model`` in transformers; None for a model that came with its own code."""
    base = getattr(transformers, type(model).__name__, None)
    return base if isinstance(base, type) and isinstance(model, base) else None


ORIGIN_KEY = "lowrank_narrowed"
"""Key of ``config.json`` under which a pruned model says what it was before."""

ROTATION_KEY = "lowrank_rotated"
"""Key of ``config.json`` under which a rotated model names its base and the seed of its rotation."""


@dataclass(frozen=True)
class Origin:
    """What a pruned model was before its MLPs or its attention heads were pruned.

    Args:
        base: Name of the base.
        targeted: Parameters of the linear layers in the decoder blocks of the base.
        parameters: Parameters of the whole base.
        width: Hidden neurons of each MLP of the base; 0 if MLPs were not pruned.
        left: Hidden neurons that each MLP still has, by name of the MLP.
        maps: Names of an MLP's linear layers inside a block.
        heads: Key/value heads of each attention module of the base; 0 if heads were not pruned.
        heads_left: Key/value heads that each attention module still has, by name of the module.
        head_maps: Names of an attention module's linear layers inside a block.
        method: How it was pruned, where that is not the width pruning of this package: ``llm_pruner``.
    """

    base: str
    targeted: int
    parameters: int
    width: int
    left: Mapping[str, int]
    maps: tuple[str, ...]
    heads: int = 0
    heads_left: Mapping[str, int] = field(default_factory=dict)
    head_maps: tuple[str, ...] = ()
    method: str = ""

    @classmethod
    def of(cls, model: PreTrainedModel) -> Origin | None:
        """Return the origin that the config of ``model`` holds; None if the model was not pruned.

        Raises:
            ValueError: The entry is not one that ``write`` made.
        """
        stored = getattr(model.config, ORIGIN_KEY, None)
        if stored is None:
            return None
        try:
            checked_json(json.dumps(stored), cls)
            tuples = {key: tuple(stored[key]) for key in ("maps", "head_maps") if key in stored}
            origin = cls(**{**stored, **tuples})
            heads = origin.heads_left
            if not (origin.left or heads) or not all(0 < left <= origin.width for left in origin.left.values()):
                raise ValueError(f"left is {origin.left} of {origin.width} hidden neurons")
            if not all(0 < left <= origin.heads for left in heads.values()):
                raise ValueError(f"heads_left is {heads} of {origin.heads} key/value heads")
            return origin
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"config.json under {ORIGIN_KEY}: expected an entry of `lowrank prune` of this version, but {error}; "
                "prune the base again"
            ) from None

    def write(self, model: PreTrainedModel) -> None:
        """Store the origin in the config of ``model``."""
        entry = {**vars(self), "left": dict(self.left), "maps": list(self.maps)}
        entry |= {"heads_left": dict(self.heads_left), "head_maps": list(self.head_maps)}
        # Only if there is something to say: older versions refuse unknown keys.
        later = ("heads", "heads_left", "head_maps", "method")
        setattr(model.config, ORIGIN_KEY, {key: value for key, value in entry.items() if value or key not in later})

    def left_out(self, targets: Targets) -> int:
        """Return how many parameters pruning has removed from ``targets`` of the pruned model."""
        removed = 0
        kinds = ((self.maps, self.left, self.width), (self.head_maps, self.heads_left, self.heads))
        for target in targets.modules:
            for names, remaining, before in kinds:
                if target.kind in names and parent_name(target) in remaining:
                    left = remaining[parent_name(target)]
                    removed += target.shape[0] * target.shape[1] // left * (before - left)
        return removed

    @property
    def widths(self) -> str:
        """The remaining hidden neurons of the MLPs, in words: one number or a range."""
        return _range(self.left)

    @property
    def described(self) -> str:
        """What remains of the MLPs and of the heads, in words, such as ``40 of 96 hidden neurons in each MLP``."""
        parts = [f"{self.widths} of {self.width:,} hidden neurons in each MLP"] if self.left else []
        if self.heads_left:
            parts.append(f"{_range(self.heads_left)} of {self.heads:,} key/value heads in each attention module")
        return " and ".join(parts)

    @property
    def one_width(self) -> bool:
        """Whether a plain config can describe the model: all MLPs have the same width, and no heads were pruned."""
        return len(set(self.left.values())) == 1 and not self.heads_left

    def remaining(self, targets: Targets, parameters: int) -> str:
        """Return in words the fractions of the base that remain in ``targets`` and in all ``parameters``."""
        now = sum(target.shape[0] * target.shape[1] for target in targets.modules)
        shares = percent(now / (now + self.left_out(targets))), percent(parameters / self.parameters)
        return f"{shares[0]} of the targeted parameters of {self.base} and {shares[1]} of all"


def _range(left: Mapping[str, int]) -> str:
    least, most = min(left.values(), default=0), max(left.values(), default=0)
    return f"{most:,}" if least == most else f"{least:,} to {most:,}"


def parent_name(target: Target) -> str:
    """Return the name of the module that contains ``target``, such as its MLP."""
    return target.name.rpartition(".")[0]


# Entries of a config that do not change what a model computes.
_DESCRIPTIVE = {
    "_name_or_path", "transformers_version", "architectures", "dtype", "use_cache", "auto_map",
    ORIGIN_KEY, ROTATION_KEY,
}  # fmt: skip


def model_fingerprint(model: PreTrainedModel, parameters: Iterable[tuple[str, Tensor]] | None = None) -> dict[str, str]:
    """Return SHA-256 digests of everything that a model computes with.

    ``model`` covers the names, types, shapes and values of all parameters and stored buffers, ``config`` everything
    else that affects the outputs (rotary base, norm epsilon, ...).

    Args:
        model: The model.
        parameters: Its named parameters in their order, read one at a time, if the model itself has no weights.
    """
    config = {key: value for key, value in model.config.to_dict().items() if key not in _DESCRIPTIVE}
    # Such as the offsets by which DeepSeek-V3 chooses experts.
    stored = model.state_dict().keys()
    buffers = ((name, buffer) for name, buffer in model.named_buffers() if name in stored)
    return {
        "model": tensor_digest(chain(model.named_parameters() if parameters is None else parameters, buffers)),
        "config": sha256_of(json.dumps(config, sort_keys=True, default=str)),
    }
