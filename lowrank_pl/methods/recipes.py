"""Every published method by name: a decomposition, and an allocator or a learned mask that chooses the ranks."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import reduce
from typing import Any

from lowrank_pl.factors.settings import EMBEDDING_KINDS, Decomposition
from lowrank_pl.methods.allocate import make_allocator
from lowrank_pl.methods.healing import Healing
from lowrank_pl.methods.masks.ara import ARA
from lowrank_pl.methods.masks.ars import ARS
from lowrank_pl.methods.masks.base import MaskMethod
from lowrank_pl.methods.masks.dobi_svd import DobiSVD
from lowrank_pl.methods.masks.fermi import Fermi
from lowrank_pl.methods.masks.llrc import LLRC
from lowrank_pl.methods.masks.objectives import DataTerms
from lowrank_pl.methods.masks.rescaled import Rescaled
from lowrank_pl.methods.masks.start import check_start
from lowrank_pl.methods.prune.settings import LLMPruner, WidthPruning
from lowrank_pl.methods.quantize.settings import ByteBudget, Rounding
from lowrank_pl.methods.refit.refitting import Refit
from lowrank_pl.methods.refit.settings import Joint
from lowrank_pl.plans.constraints import Constraints
from lowrank_pl.plans.storage import StorageChoice
from lowrank_pl.utils.checks import check_counts, check_numbers

__all__ = ["RECIPES", "VARIANTS", "Learning", "Recipe", "recipe"]


@dataclass(frozen=True)
class Learning:
    """How a mask learns.

    Args:
        mask: The mask method with its settings.
        steps: Optimizer steps.
        lr: Step size of AdamW, without weight decay.
        sequences: Sequences of the calibration text to learn from; more steps repeat them.
        batch_size: Sequences in a step.
        data_terms: The loss terms that the masks learn from.
        start: The allocator whose plan the masks start from; ``None`` starts from the same ratio everywhere.
        cosine: Let the step size fall to 0 along a cosine.
        inactive_gate_stride: Use every N-th token for the gradients of inactive gates: unbiased and cheaper. 1 is
            exact.

    Raises:
        ValueError: ``steps``, ``sequences``, ``batch_size`` or ``inactive_gate_stride`` below 1, ``lr`` not above 0, or
            an unknown allocator, or one for masks that have a start of their own.
    """

    mask: MaskMethod
    steps: int = 150
    lr: float = 0.03
    sequences: int = 256
    batch_size: int = 1
    data_terms: DataTerms = DataTerms()
    start: str | None = None
    cosine: bool = False
    inactive_gate_stride: int = 1

    def __post_init__(self) -> None:
        counts = ("steps", "sequences", "batch_size", "inactive_gate_stride")
        check_counts({f"{name} of a recipe's learning": getattr(self, name) for name in counts})
        check_numbers({"lr of a recipe's learning": (self.lr, 0)}, above=True)
        if self.start is not None:
            check_start(make_allocator(self.start), self.mask)


@dataclass(frozen=True)
class Recipe:
    """One method: how weights are decomposed, and an allocator or a learned mask that chooses the ranks.

    Args:
        decomposition: How weights are decomposed.
        allocator: The allocator that makes the plan without training; unused when ``learning`` is given. With
            ``bytes`` sizes are fractions of the model's bytes, and every module gets a rank and bits.
        settings: The allocator's settings; for ``bytes``, those of ``ByteBudget``.
        learning: How a mask learns the plan instead.
        storage: How low-rank modules are stored: factored in all papers but those about pivoting.
        alike_experts: Whether the experts of a block of a mixture get equal ranks.
        drop_experts: Whether experts of a mixture may be dropped.
        shared_experts: Whether the experts of a block share one right factor for their gates and another for their ups.
        refit: How the plan's factors are refitted to the compressed model's own inputs; None for no refit.
        rounding: How the plan's matrices are rounded at the end; None leaves them as they are.
        dense: Leave every module dense, so that rounding alone makes the model smaller. The one size is that of its
            bits, whatever size is asked for.
        prune: How the base is pruned first; None for no pruning. LLM-Pruner alone reaches the final size, unless its
            ``keep`` leaves something to ranks.
        heal: How the factors are trained against the dense model's logits at the end; None for no training. Where
            pruning alone makes the model, an adapter is trained and merged, as in LLM-Pruner's paper. Tables mark such
            rows.

    Raises:
        ValueError: An allocator or a setting that does not exist; factors that the allocator, the masks or shared
            experts can't use; learning or a refit where pruning leaves no ranks to choose; or healing of factors where
            there are none, and by an adapter where there are.
    """

    decomposition: Decomposition = Decomposition()
    allocator: str = "uniform"
    settings: Mapping[str, Any] = field(default_factory=dict)
    learning: Learning | None = None
    storage: StorageChoice = "factored"
    alike_experts: bool = False
    drop_experts: bool = False
    shared_experts: bool = False
    refit: Refit | None = None
    prune: WidthPruning | LLMPruner | None = None
    rounding: Rounding | None = None
    dense: bool = False
    heal: Healing | None = None

    def constrained(self, constraints: Constraints) -> Constraints:
        """Return ``constraints`` with the storage of this recipe, and with what it asks for of experts."""
        asked = {
            name: getattr(self, name) or getattr(constraints, name)
            for name in ("alike_experts", "drop_experts", "shared_experts")
        }
        return replace(constraints, storage=self.storage, **asked)

    @property
    def takes_embeddings(self) -> bool:
        """Whether embeddings and head may be among the targets."""
        made_by = self.decomposition
        if self.learning is not None or self.prune is not None or self.in_bytes or made_by.at_keep is not None:
            return False
        allocates = make_allocator(self.allocator, **self.settings).takes_embeddings
        return made_by.kind in EMBEDDING_KINDS and (self.dense or allocates)

    def __post_init__(self) -> None:
        # Refuses what can't be asked for at once.
        self.constrained(Constraints())
        if self.in_bytes:
            ByteBudget(keep=1.0, **self.settings)
            others = self.learning, self.refit, self.heal, self.rounding, self.dense
            if self.decomposition.kind != "two_sided" or any(others):
                raise ValueError(
                    "bytes chooses ranks and bits on two-sided factors and rounds them: give it that decomposition, "
                    "and leave out learning, refit, heal, rounding and dense"
                )
        else:
            self._check_decomposition()
        factored = self.storage == "factored" and not (self.learning or self.refit)
        if self.dense and (self.rounding is None or self.heal or self.prune or not factored):
            raise ValueError(
                "dense leaves every module as it is but for its bits: give rounding, and leave out learning, refit, "
                "heal, prune and storage"
            )
        if self.drop_experts and (self.learning or self.in_bytes or self.dense or not self._allocates_experts):
            raise ValueError(
                "drop_experts is given to a method that does not know what dropping costs: give it to one that "
                "allocates by fisher, without learning"
            )
        if self.only_prunes and (self.rounding or not factored):
            raise ValueError(
                "llm_pruner prunes to the final size, which leaves no ranks to learn and no factors to refit, to round "
                "or to store: give prune.keep, larger than the final one, or leave out learning, refit, rounding and "
                "storage"
            )
        if self.shared_experts:
            self._check_sharing()
        if self.heal is not None and self.heal.train != (trained := "lora" if self.only_prunes else "factors"):
            raise ValueError(
                f"heal.train is {self.heal.train}, where a recipe like this has {trained}: pruning alone leaves no "
                "factors, and takes an adapter; `lowrank heal` trains an adapter on any model"
            )

    def _check_decomposition(self) -> None:
        """Refuse factors that the allocator or the masks can't read, before a comparison builds them."""
        allocator = make_allocator(self.allocator, **self.settings)
        if self.learning is None:
            allocator.check_decomposition(self.decomposition)
            return
        self.learning.mask.check_base(self.decomposition.kind)
        if self.learning.start is not None:
            make_allocator(self.learning.start).check_decomposition(self.decomposition)

    def _check_sharing(self) -> None:
        joint = None if self.refit is None else self.refit.joint
        others = self.learning, joint, self.heal, self.rounding, self.prune, self.in_bytes, self.dense
        if any(others) or not make_allocator(self.allocator, **self.settings).takes_shared:
            raise ValueError(
                "shared_experts gives the experts of a block one right factor, which no mask, joint refit, healing, "
                "rounding or pruning knows, and of the allocators fisher, energy and uniform: leave out the others, or "
                "shared_experts"
            )
        self.decomposition.check_sharing()

    @property
    def _allocates_experts(self) -> bool:
        return make_allocator(self.allocator, **self.settings).drops_experts

    @property
    def in_bytes(self) -> bool:
        """Whether sizes are fractions of the model's bytes."""
        return self.allocator == "bytes"

    @property
    def needs_weight_gradients(self) -> bool:
        """Whether ranks, or those that learning starts from, are allocated by mean weight gradients."""
        if self.learning is not None:
            return self.learning.start is not None and make_allocator(self.learning.start).needs_gradients
        return not self.in_bytes and make_allocator(self.allocator, **self.settings).needs_gradients

    @property
    def only_prunes(self) -> bool:
        """Whether pruning alone makes the model as small as it is to be, so that there are no factors."""
        return isinstance(self.prune, LLMPruner) and self.prune.keep is None

    def describe(self) -> dict[str, Any]:
        """Return all settings that the result depends on, as JSON values."""
        base: dict[str, Any] = {"decomposition": self.decomposition.identity()}
        if self.storage != "factored":
            base["storage"] = self.storage
        if self.alike_experts:
            base["alike_experts"] = True
        if self.drop_experts:
            base["drop_experts"] = True
        if self.shared_experts:
            base["shared_experts"] = True
        if self.refit is not None:
            base["refit"] = self.refit.identity()
        if self.heal is not None:
            adapts = self.heal.train == "lora"
            base["heal"] = _jsonable({k: v for k, v in asdict(self.heal).items() if adapts or k != "lora"})
        if self.rounding is not None:
            base["rounding"] = asdict(self.rounding)
        if self.dense:
            return {**base, "dense": True}
        if self.prune is not None:
            base["prune"] = self.prune.describe()
            if self.only_prunes:
                return {name: base[name] for name in ("prune", "heal") if name in base}
        if self.learning is None:
            return {**base, "allocator": self.allocator, "settings": dict(self.settings)}
        learning = self.learning
        mask = {
            key: value
            for key, value in vars(learning.mask).items()
            if not key.startswith("_") and (key, value) not in _FIRST_VALUES
        }
        described = {f: getattr(learning, f) for f in ("steps", "lr", "sequences", "batch_size", "start", "cosine")}
        if learning.inactive_gate_stride > 1:
            described["inactive_gate_stride"] = learning.inactive_gate_stride
        terms = _jsonable(asdict(learning.data_terms))
        return {**base, "learning": {**described, "mask": {"name": learning.mask.name, **mask}, "data_terms": terms}}


_FIRST_VALUES = (("alignment", "share"),)
"""Settings of masks at their first value. They are left out, so that results from before they existed are found."""


def _jsonable(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}


_ASVD = Decomposition("asvd")
_TWO_SIDED = Decomposition("two_sided")


def _llrc(decomposition: Decomposition, *, any_k: bool = True, start: str | None = None) -> Recipe:
    # Many temperatures above 0, a logit gets no gradient from the loss, and all logits just fall by one step size a
    # step. From the paper's start, 6 to 3, a short run would end like that, so this one starts lower, and from a plan
    # so low that noise turns the last kept components off and the first dropped ones on.
    high, low = (3.2, 0.2) if start is None else (1.2, 0.2)
    mask = LLRC(
        any_k=any_k, start_high=high, start_low=low, pressure="layers", pressure_low=1.0, pressure_high=3.0,
        pressure_growth=1.25, period=50, patience=None,
    )  # fmt: skip
    # The mean squared error at the middle block is that of one token, the attention sink (docs/laboratory.md).
    terms = DataTerms(cross_entropy=0.0, divergence=0.5, divergence_kind="token_normalised_mse")
    return Recipe(decomposition, learning=Learning(mask, steps=300, lr=0.02, data_terms=terms, start=start))


RECIPES: dict[str, Recipe] = {
    "svd": Recipe(Decomposition("svd")),
    "fwsvd": Recipe(Decomposition("fwsvd")),
    "fwsvd_outputs": Recipe(Decomposition("fwsvd", fisher_side="outputs")),
    "asvd": Recipe(_ASVD),
    "strs": Recipe(_ASVD, "strs"),
    "uniform": Recipe(),
    "svdllm_v2": Recipe(allocator="svdllm_v2"),
    "energy": Recipe(allocator="energy"),
    # Scopes by name, so that results of the time when `model` was the default are not taken for those of `type`.
    "drank": Recipe(allocator="drank", settings={"scope": "type"}),
    "drank_model": Recipe(allocator="drank", settings={"scope": "model"}),
    "zs_svd": Recipe(allocator="zs_svd"),
    "zs_svd_corrected": Recipe(allocator="zs_svd", settings={"rounds": 1}),
    "zs_svd_released": Recipe(
        allocator="zs_svd", settings={"rounds": 5, "batch": 1, "reprofile": True, "random_batch": True}
    ),
    "two_sided": Recipe(_TWO_SIDED),
    "fisher": Recipe(_TWO_SIDED, "fisher"),
    "ara": Recipe(learning=Learning(ARA())),
    "llrc": _llrc(_ASVD),
    "llrc_prefix": _llrc(_ASVD, any_k=False),
    "llrc_whitened": _llrc(Decomposition()),
    "llrc_two_sided": _llrc(_TWO_SIDED),
    "fisher_llrc": _llrc(_TWO_SIDED, start="fisher"),
    "ars": Recipe(learning=Learning(ARS(), lr=5e-3)),
    "dobi_svd": Recipe(learning=Learning(DobiSVD(), lr=5e-3)),
    "fermi": Recipe(learning=Learning(Fermi(anneal_steps=120), lr=1e-2)),
    "fisher_ara": Recipe(_TWO_SIDED, learning=Learning(ARA(), start="fisher")),
    "rescaled": Recipe(_TWO_SIDED, learning=Learning(Rescaled(), cosine=True)),
    "llm_pruner": Recipe(prune=LLMPruner()),
    "llm_pruner_mlp": Recipe(prune=LLMPruner(attention=False)),
    "int8": Recipe(_TWO_SIDED, rounding=Rounding(8), dense=True),
    "int4": Recipe(_TWO_SIDED, rounding=Rounding(4), dense=True),
    "int4_128": Recipe(_TWO_SIDED, rounding=Rounding(4, group=128), dense=True),
    "int4_gptq": Recipe(rounding=Rounding(4), dense=True),
    "int4_gptq_128": Recipe(rounding=Rounding(4, group=128), dense=True),
    "int4_nearest": Recipe(rounding=Rounding(4, compensate=False), dense=True),
    "int4_nearest_128": Recipe(rounding=Rounding(4, group=128, compensate=False), dense=True),
    "bytes": Recipe(_TWO_SIDED, "bytes"),
    "best": Recipe(_TWO_SIDED, learning=Learning(Rescaled(), cosine=True), storage="auto", refit=Refit()),
}
"""The recipes of ``lowrank compare``, whose learning is short. ``configs/*.yaml`` have the papers' lengths."""


def _pruned_in_width(plain: Recipe) -> Recipe:
    if plain.prune is not None:
        raise ValueError(f"+prune stands behind a recipe that prunes already ({plain.prune}): leave it out")
    return replace(plain, prune=WidthPruning())


VARIANTS: dict[str, Callable[[Recipe], Recipe]] = {
    "pivoted": lambda plain: replace(plain, storage="auto"),
    "alike": lambda plain: replace(plain, alike_experts=True),
    "drop": lambda plain: replace(plain, drop_experts=True),
    "shared": lambda plain: replace(plain, shared_experts=True),
    "refit": lambda plain: replace(plain, refit=Refit()),
    "joint": lambda plain: replace(plain, refit=replace(plain.refit or Refit(), joint=Joint())),
    "prune": _pruned_in_width,
    "int8": lambda plain: replace(plain, rounding=Rounding(8)),
    "int4": lambda plain: replace(plain, rounding=Rounding(4)),
}
"""What ``+WORD`` after a recipe's name changes in it."""

_RENAMED = {
    "tanh": "dobi_svd", "zero_sum": "zs_svd", "zero_sum_corrected": "zs_svd_corrected", "narrow": "prune",
}  # fmt: skip
"""Names of earlier versions, and the present ones."""


def recipe(name: str, own: Mapping[str, Recipe] | None = None) -> Recipe:
    """Return the recipe called ``name``: one of ``own``, or one that ships with the package, or a variant of one.

    ``NAME+pivoted`` is the recipe ``NAME`` with pivoted storage, ``NAME+refit`` with its factors refitted layer by
    layer, ``NAME+joint`` with a joint refit of each block after that, ``NAME+prune`` on a base with pruned MLPs, and
    ``NAME+prune+pivoted+refit`` three of these. ``+int8`` or ``+int4`` rounds the matrices at the end. ``+alike`` gives
    the experts of a block equal ranks, ``+shared`` right factors in common, and ``+drop`` may drop some.

    Args:
        name: The recipe's name; results go to a folder of this name.
        own: Recipes that this package does not have, by name.

    Raises:
        ValueError: No such recipe, with the existing ones in the message, or a name that no folder can have.

    >>> recipe("ara+pivoted").storage
    'auto'
    """
    # Results go to a folder of this name, and `dense` is the row that all others are compared with.
    if not re.fullmatch(r"\w[\w.+-]*", name) or name == "dense":
        raise ValueError(f"a method is called {name!r}: expected letters, digits and _.+-, other than dense")
    known = {**RECIPES, **(own or {})}
    plain, *words = [name] if name in known else name.split("+")
    if plain not in known or any(word not in VARIANTS for word in words):
        variants = ", ".join(f"+{word}" for word in VARIANTS)
        renamed = "".join(f"{old} is called {new} now; " for old, new in _RENAMED.items() if old in (plain, *words))
        raise ValueError(
            f"no method is called {name!r}: {renamed}expected one of {', '.join(known)}, each also with {variants} "
            "behind it"
        )
    return reduce(lambda changed, word: VARIANTS[word](changed), words, known[plain])
