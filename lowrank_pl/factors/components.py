"""Components that lie beside an export, so that smaller sizes can be cut from layers that it stores dense or pivoted.

The weights of such layers do not hold the components of the plan's order. The subfolder ``nested`` does: it has one
safetensors file a layer, with a checksum. Loaders that look for weights do not look there.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm.auto import tqdm

from lowrank_pl.factors.decomposition import Factors, truncate
from lowrank_pl.factors.store import FactorStore
from lowrank_pl.models.digests import NESTED
from lowrank_pl.plans.plan import ModulePlan, RankPlan
from lowrank_pl.plans.resize import component_bytes, components_below
from lowrank_pl.utils.files import atomic_write, canonical_json, sha256_of
from lowrank_pl.utils.tensor_store import DamagedError, verify_checksum, with_checksum

__all__ = ["AnySize", "NestedComponents"]

_log = logging.getLogger(__name__)

_SUFFIX = ".safetensors"
_KEY = "factors"


@dataclass(frozen=True)
class AnySize:
    """A plan with its factors, for an export that serves every size down from its own.

    Args:
        plan: The plan of the exported model, with a component order.
        factors: The factors that the plan is for.

    Raises:
        ValueError: No smaller size follows from the plan, or it was made for other factors.
    """

    plan: RankPlan
    factors: FactorStore

    def __post_init__(self) -> None:
        components_below(self.plan)
        self.factors.check_plan(self.plan)

    def to_json(self) -> str:
        """Return the plan as JSON."""
        return self.plan.to_json()


@dataclass(frozen=True)
class NestedComponents:
    """The components in the subfolder ``nested`` of an export.

    Args:
        folder: The subfolder; absent in exports that hold no components.
        plan: The plan of the export.
    """

    folder: Path
    plan: RankPlan

    @classmethod
    def of_export(cls, directory: str | Path, plan: RankPlan) -> NestedComponents:
        """Return the components in the export ``directory``, whose plan is ``plan``."""
        return cls(Path(directory) / NESTED, plan)

    @property
    def names(self) -> frozenset[str]:
        """Names of the layers whose components are there."""
        return frozenset(file.name.removesuffix(_SUFFIX) for file in self.folder.glob(f"*{_SUFFIX}"))

    @property
    def bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.stat().st_size for file in self.folder.glob(f"*{_SUFFIX}"))

    def write(self, store: FactorStore, dtype: torch.dtype) -> None:
        """Write the components of all layers that smaller sizes cut and the weights hold dense or pivoted.

        Components that are only ever stored as two factors are written in ``dtype``. Pivots are computed from the
        components in float32, as they lie in ``store``: computed from rounded ones, they would have other bits.

        Args:
            store: The factors that the plan is for.
            dtype: Type of the model's weights.
        """
        wanted = components_below(self.plan)
        if not wanted:
            _log.info("the weights hold the components of all layers, so none are written beside them")
            return
        self.folder.mkdir()
        kind = dtype if self.plan.storage == "factored" else torch.float32
        for name, entry in tqdm(wanted.items(), desc="components", unit="module", leave=False):
            factors = store.kept(name, entry)
            tensors = {
                "left": factors.left.to(kind),
                "right": factors.right.to(kind),
                "sigma": factors.sigma,
                "components": torch.tensor(entry.indices or range(factors.sigma.numel()), dtype=torch.int32),
            }
            ready = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
            atomic_write(self._path(name), with_checksum(ready, {_KEY: self._factors_digest()}))
        _log.info("wrote %s", self.describe())

    def kept(self, name: str, entry: ModulePlan) -> Factors:
        """Return the components of the layer ``name`` that ``entry`` keeps.

        Raises:
            ValueError: They are not there, damaged, or those of other factors.
        """
        factors, numbers = self._read(name)
        places = {number: place for place, number in enumerate(numbers.tolist())}
        assert entry.rank is not None
        wanted = entry.indices or range(entry.rank)
        absent = [number for number in wanted if number not in places]
        if absent:
            raise ValueError(f"{self._path(name)} lacks component {absent[0]}: {_AGAIN}")
        return truncate(factors, torch.tensor([places[number] for number in wanted]))

    def check(self) -> list[str]:
        """Return what is wrong with the components, a sentence a layer; each file is read once.

        Raises:
            ValueError: No smaller size follows from the plan.
        """
        wrong = []
        for name, entry in tqdm(components_below(self.plan).items(), desc="components", unit="module", leave=False):
            try:
                factors = self.kept(name, entry)
            except ValueError as error:
                wrong.append(f"{name}: {error}")
                continue
            if not (factors.left.isfinite().all() and factors.right.isfinite().all()):
                wrong.append(f"{name} has components that are NaN or infinite")
        return wrong

    def describe(self) -> str:
        """Return in words how many layers have components, and the bytes of these."""
        return f"components of {len(self.names)} layers for smaller sizes, {component_bytes(self.plan):,} bytes"

    def _read(self, name: str) -> tuple[Factors, Tensor]:
        """Return all components of ``name``, and their numbers, after a check of file, origin and shapes."""
        path = self._path(name)
        try:
            verify_checksum(path)
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get(_KEY) != self._factors_digest():
                    raise DamagedError("it holds components of other factors than the plan's")
                parts: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            left, right, sigma, numbers = (parts[key] for key in ("left", "right", "sigma", "components"))
            outputs, inputs = self.plan.modules[name].shape
            if (left.shape, right.shape) != ((outputs, len(numbers)), (len(numbers), inputs)):
                raise DamagedError(f"its factors have the shapes {list(left.shape)} and {list(right.shape)}")
        except FileNotFoundError:
            raise ValueError(f"{path} is missing: {_AGAIN}") from None
        except (SafetensorError, DamagedError, KeyError) as error:
            raise ValueError(f"{path} is damaged ({error}): {_AGAIN}") from None
        return Factors(left, right, sigma), numbers

    def _path(self, name: str) -> Path:
        if Path(name).name != name:
            raise ValueError(f"{name!r} can't be the name of a file in {self.folder}: expected a module's name")
        return self.folder / f"{name}{_SUFFIX}"

    def _factors_digest(self) -> str:
        return sha256_of(canonical_json(dict(self.plan.fingerprint)))


_AGAIN = f"copy the folder again, with its subfolder {NESTED}, or export it again with `--any_size true`"
