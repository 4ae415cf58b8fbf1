"""What a model is: its class, a fingerprint of all that it computes with, and what it was before width pruning."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import transformers
from torch import Tensor
from transformers import PreTrainedModel

from lowrank_pl.models.targets import Target, Targets
from lowrank_pl.utils.files import sha256_of
from lowrank_pl.utils.formatting import percent
from lowrank_pl.utils.json_files import checked_json
from lowrank_pl.utils.tensor_store import tensor_digest

__all__ = ["ORIGIN_KEY", "Origin", "base_class", "model_fingerprint", "parent_name"]


def base_class(model: PreTrainedModel) -> type[PreTrainedModel] | None:
    """Return the class of ``model`` in transformers; None for a model that came with its own code."""
    base = getattr(transformers, type(model).__name__, None)
    return base if isinstance(base, type) and isinstance(model, base) else None


ORIGIN_KEY = "lowrank_narrowed"
"""Key of ``config.json`` under which a pruned model says what it was before."""


@dataclass(frozen=True)
class Origin:
    """What a pruned model was before its MLPs were pruned in width.

    Args:
        base: Name of the base.
        targeted: Parameters of the linear layers in the decoder blocks of the base.
        parameters: Parameters of the whole base.
        width: Hidden neurons of each MLP of the base.
        left: Hidden neurons that each MLP still has, by name of the MLP.
        maps: Names of an MLP's linear layers inside a block.
    """

    base: str
    targeted: int
    parameters: int
    width: int
    left: Mapping[str, int]
    maps: tuple[str, ...]

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
            origin = cls(**{**stored, "maps": tuple(stored["maps"])})
            if not origin.left or not all(0 < left <= origin.width for left in origin.left.values()):
                raise ValueError(f"left is {origin.left} of {origin.width} hidden neurons")
            return origin
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"config.json under {ORIGIN_KEY}: expected an entry of `lowrank prune` of this version, but {error}; "
                "prune the base again"
            ) from None

    def write(self, model: PreTrainedModel) -> None:
        """Store the origin in the config of ``model``."""
        setattr(model.config, ORIGIN_KEY, {**vars(self), "left": dict(self.left), "maps": list(self.maps)})

    def left_out(self, targets: Targets) -> int:
        """Return how many parameters pruning has removed from ``targets`` of the pruned model."""
        removed = 0
        for target in targets.modules:
            if target.kind in self.maps and parent_name(target) in self.left:
                left = self.left[parent_name(target)]
                removed += target.shape[0] * target.shape[1] // left * (self.width - left)
        return removed

    @property
    def widths(self) -> str:
        """The remaining hidden neurons of the MLPs, in words: one number or a range."""
        least, most = min(self.left.values()), max(self.left.values())
        return f"{most:,}" if least == most else f"{least:,} to {most:,}"

    @property
    def one_width(self) -> bool:
        """Whether all MLPs have the same width, so that a plain config can describe the model."""
        return len(set(self.left.values())) == 1

    def remaining(self, targets: Targets, parameters: int) -> str:
        """Return in words the fractions of the base that remain in ``targets`` and in all ``parameters``."""
        now = sum(target.shape[0] * target.shape[1] for target in targets.modules)
        shares = percent(now / (now + self.left_out(targets))), percent(parameters / self.parameters)
        return f"{shares[0]} of the targeted parameters of {self.base} and {shares[1]} of all"


def parent_name(target: Target) -> str:
    """Return the name of the module that contains ``target``, such as its MLP."""
    return target.name.rpartition(".")[0]


# Entries of a config that do not change what a model computes.
_DESCRIPTIVE = {"_name_or_path", "transformers_version", "architectures", "dtype", "use_cache", "auto_map", ORIGIN_KEY}


def model_fingerprint(model: PreTrainedModel, parameters: Iterable[tuple[str, Tensor]] | None = None) -> dict[str, str]:
    """Return SHA-256 digests of everything that a model computes with.

    ``model`` covers the names, types, shapes and values of all parameters, ``config`` everything else that affects the
    outputs (rotary base, norm epsilon, ...).

    Args:
        model: The model.
        parameters: Its named parameters in their order, read one at a time, if the model itself has no weights.
    """
    config = {key: value for key, value in model.config.to_dict().items() if key not in _DESCRIPTIVE}
    return {
        "model": tensor_digest(model.named_parameters() if parameters is None else parameters),
        "config": sha256_of(json.dumps(config, sort_keys=True, default=str)),
    }
