"""The schema of plan files, for what people write into one. Only the reader of plans imports it: pydantic is slow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from lowrank_pl.models.hf_quantized import Grid
from lowrank_pl.models.settings import DType
from lowrank_pl.plans.component_order import ComponentOrder
from lowrank_pl.plans.constraints import Form, StorageChoice
from lowrank_pl.plans.plan import SCHEMA, ModulePlan

__all__ = ["ModuleEntry", "PlanFile"]

Fraction = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Figure = Annotated[float, Field(ge=0)]
# The default of fields that may be absent, but not null.
ABSENT: Any = Field(default=None)


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class _Open(BaseModel):
    """A part in which methods and later versions may write more; only what is read again is checked."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)


def _rank(value: Any) -> Any:
    if value == "dense":
        return None
    if value == "dropped":
        return 0
    if type(value) is not int or value == 0:
        raise ValueError(f'the rank is {value!r}: expected a whole number of at least 1, "dense" or "dropped"')
    return value


class ModuleEntry(_Part):
    """The entry of one linear layer."""

    shape: Annotated[list[Annotated[int, Field(gt=0, lt=2**31)]], Field(min_length=2, max_length=2)]
    rank: Annotated[int | None, BeforeValidator(_rank)]
    indices: list[int] = ABSENT
    storage: Form = "factored"
    bits: int | None = Field(default=None)
    group: int | None = Field(default=None)
    layers: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _fits(self) -> ModuleEntry:
        self.plan()
        return self

    def plan(self) -> ModulePlan:
        """Return the plan of the layer.

        Raises:
            ValueError: Rank, indices and storage do not fit the shape, or the bits are impossible.
        """
        if self.bits is None and self.group is not None:
            raise ValueError(f"a group of {self.group} was given without bits: add bits, or leave out group")
        indices = None if self.indices is None else tuple(self.indices)
        grid = None if self.bits is None else Grid(self.bits, self.group)
        return ModulePlan((self.shape[0], self.shape[1]), self.rank, indices, self.storage, grid, tuple(self.layers))


class _Keep(_Part):
    asked: Fraction
    targeted: Figure = 0
    model: Figure = 0


class _Targeted(_Part):
    dense: Count = 0
    kept: Count = 0


class _Model(_Part):
    dense: Annotated[int, Field(gt=0, lt=2**63)]
    kept: Count = 0


class _Parameters(_Part):
    targeted: _Targeted = _Targeted()
    model: _Model
    left_out: Count = 0


class _Bytes(_Part):
    dense: Count = 0
    kept: Count = 0
    per_parameter: Annotated[int, Field(ge=1, le=8)]


class _Counts(_Part):
    modules: Count = 0
    dense: Count = 0
    any_k: Count = 0
    pivoted: Count = 0
    dropped: Count = 0


class _Constraints(_Part):
    multiple_of: Annotated[int, Field(ge=1, lt=2**31)]
    floors: dict[str, Annotated[float, Field(ge=0, le=1)]]
    # Plans of schema 1 have factored storage only.
    storage: StorageChoice = "factored"
    embeddings: list[str] = Field(default_factory=list)
    alike_experts: bool = False


class _Pruned(_Open):
    base: str
    # 0 if only attention heads were pruned.
    width: Annotated[int, Field(ge=0)]
    left: str


class _Calibration(_Open):
    text: str
    length: Annotated[int, Field(gt=0)]
    windows: Annotated[int, Field(gt=0)]


class _Decomposition(_Open):
    kind: str = ""
    damping: float = 0
    output_damping: float = 0
    alpha: float = 0
    fisher_side: str = ""
    labels: str = ""
    token_weights: bool = False
    at_keep: float | None = None
    at_weight: float = 0


class _Origin(_Open):
    base: str = ""
    narrowed: _Pruned = ABSENT
    # Empty where it is not known; a model that was given as it is in memory may be of float64.
    dtype: DType | Literal["float64", ""] = ""
    calibration: _Calibration = ABSENT
    decomposition: _Decomposition = _Decomposition()
    store: str = ""


class _Changed(_Open):
    keep: Fraction


class _Fingerprint(_Open):
    tokenizer: str = ""
    correction: _Changed = ABSENT
    refit: _Changed = ABSENT


class PlanFile(_Part):
    """A plan file. Counts that follow from the ranks may be out of date or absent, but not nonsense."""

    version: int = Field(alias="schema")
    method: str
    keep: _Keep
    parameters: _Parameters
    bytes: _Bytes
    counts: _Counts = _Counts()
    # The first plans have no constraints.
    constraints: _Constraints = _Constraints(multiple_of=1, floors={})
    notes: list[str]
    origin: _Origin
    fingerprint: _Fingerprint
    sha256: str = ""
    modules: Annotated[dict[str, ModuleEntry], Field(min_length=1)]
    embeddings: dict[str, ModuleEntry] = Field(default_factory=dict)
    order: Annotated[dict[str, str], Field(min_length=1)] = ABSENT

    @model_validator(mode="before")
    @classmethod
    def _version(cls, data: Any) -> Any:
        """Refuse other versions first, since the fields of a later one are unknown."""
        given = data.get("schema") if isinstance(data, Mapping) else type(data).__name__
        if type(given) is not int or not 1 <= given <= SCHEMA:
            raise ValueError(f"the plan has schema {given!r}: this version of lowrank_pl reads schemas 1 to {SCHEMA}")
        return data

    @field_validator("order")
    @classmethod
    def _readable(cls, order: dict[str, str]) -> dict[str, str]:
        ComponentOrder.from_json(order)
        return order

    @model_validator(mode="after")
    def _consistent(self) -> PlanFile:
        counted = [*self.modules.values(), *self.embeddings.values()]
        targeted = sum(entry.shape[0] * entry.shape[1] for entry in counted) + self.parameters.left_out
        if self.parameters.model.dense < targeted:
            raise ValueError(
                f"parameters.model.dense is {self.parameters.model.dense}: expected at least {targeted}, the "
                "parameters of the plan's modules and embeddings"
            )
        layers = [layer for name, entry in self.modules.items() for layer in entry.layers or (name,)]
        if len(set(layers)) < len(layers):
            twice = next(layer for layer in layers if layers.count(layer) > 1)
            raise ValueError(f"modules has {twice} twice, by itself or among layers: expected every layer once")
        for name in self.constraints.embeddings:
            if name not in self.modules or self.modules[name].storage != "factored":
                raise ValueError(
                    f"constraints.embeddings names {name}: expected a module of the plan, dense or stored factored"
                )
        for name, scores in ComponentOrder.from_json(self.order or {}).scores.items():
            if name in self.modules and len(scores) > min(self.modules[name].shape):
                raise ValueError(
                    f"order[{name!r}] has {len(scores)} scores for shape {self.modules[name].shape}: allocate again"
                )
        return self
