"""The factors of every module on disk, under a fingerprint of what they were made from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowrank_pl.factors.decomposition import Factors, truncate
from lowrank_pl.models.hf_layers import Side
from lowrank_pl.models.hf_quantized import Grid, Rounded
from lowrank_pl.plans.plan import ModulePlan, RankPlan
from lowrank_pl.utils.files import canonical_json, sha256_of
from lowrank_pl.utils.tensor_store import DamagedError, TensorStore, aligned, as_slice, read_manifest, tensor_digest

__all__ = ["FactorStore"]

# Written by earlier versions; the second one does not cover the note of how long the factors took.
_FORMER = ("sha256_of_sigma", "sha256_of_sigma_and_notes")
_HEAD = "sha256_of_sigma_and_all_notes"
_ROUNDED = "rounded"


def _head_digest(sigma: Tensor, notes: Mapping[str, str]) -> str:
    return sha256_of(tensor_digest([("", sigma)]), canonical_json(notes))


class FactorStore(TensorStore):
    """The full-rank factors of every module, of which any components can be read alone.

    Args:
        fingerprint: Model, tokenizer, text and settings that the factors depend on.
        directory: As in ``TensorStore``.
    """

    def __init__(self, fingerprint: Mapping[str, Any], directory: str | Path | None = None) -> None:
        super().__init__("factors", fingerprint, directory)

    @classmethod
    def existing(cls, directory: str | Path) -> FactorStore:
        """Return the store in ``directory`` under its own fingerprint.

        Raises:
            ValueError: There is none.
        """
        return cls(read_manifest(Path(directory))["fingerprint"], directory)

    def check_plan(self, plan: RankPlan) -> None:
        """Check that ``plan`` was made for these factors.

        Raises:
            ValueError: It was made for others.
        """
        differ = [key for key, value in plan.fingerprint.items() if self.fingerprint.get(key) != value]
        if differ:
            raise ValueError(
                f"the plan was made for other factors than those in {self.directory}: {', '.join(differ)} differ. "
                "Allocate again on this store, or name the store that the plan was made on"
            )

    def derived(self, step: str, settings: Mapping[str, Any]) -> tuple[dict[str, Any], Path]:
        """Return fingerprint and folder of factors that ``step`` makes from these; the folder lies inside this one.

        Args:
            step: Name of the step, such as ``refit``.
            settings: All that the new factors depend on besides these factors, as JSON values.
        """
        fingerprint = {**self.fingerprint, step: settings}
        return fingerprint, self.directory / step / sha256_of(canonical_json(fingerprint))[:20]

    def add(self, name: str, factors: Factors, *, notes: Mapping[str, str] | None = None) -> None:
        """Write the factors of module ``name`` in float32, sigma in float64."""
        tensors = {"left": factors.left.float(), "right": factors.right.float(), "sigma": factors.sigma.double()}
        noted = dict(notes or {})
        self.write(name, tensors, notes={**noted, _HEAD: _head_digest(tensors["sigma"], noted)})

    def add_rounded(
        self,
        name: str,
        parts: Mapping[str, Rounded],
        *,
        pivots: tuple[Tensor, Side] | None = None,
        notes: Mapping[str, str] | None = None,
    ) -> None:
        """Write the rounded matrices of module ``name``.

        Args:
            name: The module, or an embedding.
            parts: The matrices by their names in the layer, ``weight`` and perhaps ``right``.
            pivots: The pivots of a pivoted layer, and whether they are outputs or inputs.
            notes: What to note beside them.
        """
        tensors: dict[str, Tensor] = {}
        columns = {}
        for part, rounded in parts.items():
            tensors[f"{part}.packed"], tensors[f"{part}.scales"] = rounded.packed, rounded.scales
            if rounded.zeros is not None:
                tensors[f"{part}.zeros"] = rounded.zeros
            columns[part] = rounded.columns
        stored = {"columns": columns, **next(iter(parts.values())).grid.to_json()}
        if pivots is not None:
            tensors["pivots"], stored["side"] = pivots
        self.write(name, tensors, notes={**(notes or {}), _ROUNDED: json.dumps(stored)})

    def rounded(self, name: str) -> tuple[dict[str, Rounded], tuple[Tensor, Side] | None]:
        """Return what ``add_rounded`` wrote: the rounded matrices of module ``name``, and its pivots if it has any.

        Raises:
            ValueError: The module is absent, damaged, or not rounded.
        """
        found = super().notes(name).get(_ROUNDED)
        if found is None:
            raise ValueError(
                f"{name} is not rounded in {self.directory}, but the plan gives it bits: round the plan with `lowrank "
                "quantize`, or leave its bits out"
            )
        stored = json.loads(found)
        grid = Grid(stored["bits"], stored.get("group"))
        parts = {}
        for part, columns in stored["columns"].items():
            zeros = self.read(name, f"{part}.zeros") if grid.has_zeros else None
            packed, scales = self.read(name, f"{part}.packed"), self.read(name, f"{part}.scales")
            parts[part] = Rounded(grid, columns, packed, scales, zeros)
        return parts, (self.read(name, "pivots"), stored["side"]) if "side" in stored else None

    def notes(self, name: str) -> dict[str, str]:
        """Return the notes that were stored with ``name``; raise the errors of ``sigma``."""
        noted = self._head(name)[1]
        return {key: value for key, value in noted.items() if key not in (*_FORMER, _ROUNDED)}

    def sigma(self, name: str) -> Tensor:
        """Return all singular values of module ``name``, float64, descending; factors are not read for them.

        Raises:
            ValueError: The file is absent or damaged.
        """
        found = self._head(name)[0]
        return self.read(name, "sigma") if found is None else found

    def _head(self, name: str) -> tuple[Tensor | None, dict[str, str]]:
        """Return singular values and notes of module ``name``, which have a digest of their own.

        Without this digest, in rounded modules and in files of earlier versions, there are notes only, and the checksum
        of the whole file is compared.
        """
        with self._open(name, check=False) as file:
            noted = self._noted(file)
            if _HEAD in noted:
                sigma = aligned(file.get_tensor("sigma"))
                if noted.pop(_HEAD) != _head_digest(sigma, noted):
                    raise DamagedError("the digest of its singular values and notes is wrong")
                return sigma, noted
        return None, super().notes(name)

    def factors(self, name: str, components: int | slice | Tensor | None = None) -> Factors:
        """Return some components of module ``name``; by default all of them.

        Args:
            name: The module.
            components: How many, from the first; or a slice; or an index tensor ``[rank]``.
        """
        if _ROUNDED in super().notes(name):
            raise ValueError(
                f"{name} is rounded in {self.directory}, but the plan gives it no bits: use the plan as it was made, "
                "or the one from before rounding"
            )
        part = as_slice(None if isinstance(components, Tensor) else components)
        whole = Factors(
            self.read(name, "left", columns=part), self.read(name, "right", rows=part), self.sigma(name)[part]
        )
        if isinstance(components, Tensor):
            return truncate(whole, components)
        return whole

    def kept(self, name: str, entry: ModulePlan) -> Factors:
        """Return the components of module ``name`` that ``entry`` keeps; all of them where it stays dense.

        Raises:
            ValueError: The factors were trained, and ``entry`` keeps other components than all of them.
        """
        if "heal" in self.fingerprint and entry.rank is not None:
            trained = len(self.sigma(name))
            if entry.rank != trained or entry.indices is not None:
                raise ValueError(
                    f"the factors of {name} in {self.directory} were healed at rank {trained}, and training mixes "
                    f"components: rank {entry.rank} can't be cut from them; heal a plan of that rank"
                )
        return self.factors(name, entry.rank if entry.indices is None else torch.tensor(entry.indices))
