"""The check that a folder reloads as exactly the model in memory: the half that runs beside that model.

The other half is reload_check.py, in a fresh process. What is special: logits are compared by the hash of their
bytes, so a lost bias, a cast buffer or a transposed square matrix can't hide in a tolerance. Only on a GPU, whose
libraries promise no such thing from process to process, is there one, and there every tensor has to be the same.
"""

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
from lowrank_pl.utils.tensor_store import tensor_digest

__all__ = ["ORIGIN_KEY", "Origin", "base_class", "model_fingerprint", "parent_name"]


def base_class(model: PreTrainedModel) -> type[PreTrainedModel] | None:
    """Return transformers' own class of ``model``; None for a model that came with code of its own."""
    base = getattr(transformers, type(model).__name__, None)
    return base if isinstance(base, type) and isinstance(model, base) else None


ORIGIN_KEY = "lowrank_narrowed"
"""Where ``config.json`` says what the model was before."""


@dataclass(frozen=True)
class Origin:
    """What a narrowed model was before.

    Args:
        base: Its name.
        targeted: Parameters of the linear maps of its decoder blocks.
        parameters: Parameters of all of it.
        width: Hidden features of each of its MLPs.
        left: How many of them are left, by the name of the MLP.
        maps: The maps of an MLP, by their names inside a block.
    """

    base: str
    targeted: int
    parameters: int
    width: int
    left: Mapping[str, int]
    maps: tuple[str, ...]

    @classmethod
    def of(cls, model: PreTrainedModel) -> Origin | None:
        """Return what ``model`` says of itself, or None where it was not narrowed.

        Raises:
            ValueError: What it says is not what ``write`` wrote.
        """
        said = getattr(model.config, ORIGIN_KEY, None)
        if said is None:
            return None
        try:
            return cls(**{**said, "left": dict(said["left"]), "maps": tuple(said["maps"])})
        except (TypeError, KeyError, ValueError):
            raise ValueError(
                f"config.json says {said} under {ORIGIN_KEY}: expected what `lowrank prune` of this version writes; narrow "
                "the base again"
            ) from None

    def write(self, model: PreTrainedModel) -> None:
        """Let the config of ``model`` say it."""
        setattr(model.config, ORIGIN_KEY, {**vars(self), "left": dict(self.left), "maps": list(self.maps)})

    def left_out(self, targets: Targets) -> int:
        """Return how many parameters ``targets`` of the narrowed model had more before."""
        gone = 0
        for target in targets.modules:
            if target.kind in self.maps and parent_name(target) in self.left:
                left = self.left[parent_name(target)]
                gone += target.shape[0] * target.shape[1] // left * (self.width - left)
        return gone

    @property
    def widths(self) -> str:
        """How many hidden features are left, in words."""
        least, most = min(self.left.values()), max(self.left.values())
        return f"{most:,}" if least == most else f"{least:,} to {most:,}"

    @property
    def one_width(self) -> bool:
        """Whether all MLPs have the same, which a plain config can say."""
        return len(set(self.left.values())) == 1

    def remaining(self, targets: Targets, parameters: int) -> str:
        """Return in words what ``targets`` of the narrowed model and ``parameters`` in all are of what there was."""
        now = sum(target.shape[0] * target.shape[1] for target in targets.modules)
        shares = percent(now / (now + self.left_out(targets))), percent(parameters / self.parameters)
        return f"{shares[0]} of the targeted parameters of {self.base} and {shares[1]} of all"


def parent_name(target: Target) -> str:
    return target.name.rpartition(".")[0]


_NOT_COMPUTED_WITH = {
    "_name_or_path",
    "transformers_version",
    "architectures",
    "dtype",
    "use_cache",
    "auto_map",
    ORIGIN_KEY,
}


def model_fingerprint(model: PreTrainedModel, parameters: Iterable[tuple[str, Tensor]] | None = None) -> dict[str, str]:
    """Return SHA-256 digests of all that a model computes with.

    ``model`` covers the names, types, shapes and values of all parameters, ``config`` what else decides on the outputs
    (rotary base, norm epsilon, ...).

    Args:
        model: The model.
        parameters: Its named parameters in their order, looked at one at a time, where it does not hold them itself.
    """
    config = {key: value for key, value in model.config.to_dict().items() if key not in _NOT_COMPUTED_WITH}
    return {
        "model": tensor_digest(model.named_parameters() if parameters is None else parameters),
        "config": sha256_of(json.dumps(config, sort_keys=True, default=str)),
    }
