"""How weights are decomposed: what weights their inputs and outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from lowrank_pl.utils.checks import check_choices, check_numbers

__all__ = ["EMBEDDING_KINDS", "Decomposition", "Kind", "Labels", "Side", "Statistic"]

Labels = Literal["sampled", "text"]
"""Next tokens of the loss: sampled from the model (for the Fisher matrix) or those of the text (the empirical one)."""

Side = Literal["inputs", "outputs"]
"""The inputs of a linear layer (columns of its ``[out, in]`` weight), or its outputs (rows)."""

Statistic = Literal[
    "inputs",
    "output_gradients",
    "weighted_moments",
    "gradient_norms",
    "weight_gradients",
    "weight_fisher",
    "dropped_losses",
    "embedding_moments",
    "plain_embedding_moments",
]
"""What is measured on calibration text."""

EMBEDDING_KINDS = ("two_sided", "whitened", "svd")
"""The kinds of decomposition that have a meaning for embeddings."""

SHARING_KINDS = ("two_sided", "whitened", "svd")
"""The kinds of decomposition that make right factors that experts share."""

Kind = Literal["whitened", "two_sided", "svd", "asvd", "fwsvd"]

_NEEDS: dict[str, tuple[Statistic, ...]] = {
    "svd": (),
    "asvd": ("inputs",),
    "fwsvd": ("weight_fisher",),
    "whitened": ("inputs",),
    "two_sided": ("inputs", "output_gradients"),
}


@dataclass(frozen=True)
class Decomposition:
    """How weights are decomposed: what weights the errors of inputs and outputs.

    ================  ================================================  ==================================
    kind              inputs weighted by                                outputs weighted by
    ================  ================================================  ==================================
    ``svd``           nothing                                           nothing
    ``asvd``          mean absolute value to the power ``alpha``        nothing
    ``fwsvd``         root of summed squared weight gradients           nothing
    ``whitened``      second moment                                     nothing
    ``two_sided``     second moment, tokens weighted by the size of     second moment of output gradients, tokens
                      their output gradient                             weighted by its inverse
    ================  ================================================  ==================================

    Sources: ASVD (arXiv 2312.05821), FWSVD (arXiv 2207.00112), SVD-LLM (arXiv 2403.07378). ``two_sided`` weights by
    K-FAC's estimate of the loss (arXiv 1503.05671), so that its singular values compare across modules. K-FAC takes
    inputs and gradients to be independent. With ``token_weights`` (ours) the size of each token's gradient is split
    evenly between both sides. This is an estimate too. It is lower where sizes vary much, as if few tokens with large
    gradients counted for less, and it measures best.

    FWSVD multiplies inputs from the left, ``Z = X W``, and gives each row of ``W`` one weight: the sum of the Fisher
    information along that row. A row of ``W`` is an input, so a column of the ``[out, in]`` weight here. Published
    re-implementations weight the same side. ``fisher_side="outputs"`` sums along the rows of the ``[out, in]`` weight
    instead. This was the only choice at first, and it loses more: 9.2 nats where inputs lose 5.3 (SmolLM2-135M at keep
    0.8).

    Args:
        kind: What weights errors: ``svd`` (nothing), ``asvd``, ``fwsvd`` or ``whitened`` (the inputs), or ``two_sided``
            (inputs and outputs).
        damping: Added to what weights the inputs, relative to its mean.
        output_damping: Added to what weights the outputs, relative to its mean.
        alpha: Power of ``asvd``.
        fisher_side: ``fwsvd``: weight the ``inputs``, as its paper does, or the ``outputs``.
        labels: ``two_sided``: the loss asks for labels ``sampled`` from the model, or for the next tokens of the
            ``text``.
        token_weights: ``two_sided``: weight each token by the size of its output gradient. This keeps the few tokens
            that the loss depends on, such as attention sinks in keys and values, from dominating. Otherwise all tokens
            weigh the same, as in K-FAC.
        at_keep: ``two_sided``: measure everything a second time, in the model compressed to this fraction by the
            ``fisher`` allocator on the factors of the first time, and weight by the mean of the two: the curvature of
            the loss changes away from the dense model.
        at_weight: Weight of the second time in that mean, above 0 and at most 1.

    Raises:
        ValueError: An unknown kind or labels, a damping that is negative or not finite, a power, fraction or weight
            outside its range, ``at_keep`` with another kind, or ``at_weight`` without ``at_keep``.
    """

    kind: Kind = "whitened"
    damping: float = 1e-6
    output_damping: float = 1e-2
    alpha: float = 0.5
    fisher_side: Side = "inputs"
    labels: Labels = "sampled"
    token_weights: bool = True
    at_keep: float | None = None
    at_weight: float = 0.5

    def __post_init__(self) -> None:
        check_choices({
            "kind": (self.kind, Kind), "labels": (self.labels, Labels), "fisher_side": (self.fisher_side, Side),
        })  # fmt: skip
        check_numbers({"damping": (self.damping, 0), "output_damping": (self.output_damping, 0)})
        if not 0 < self.alpha <= 2:
            raise ValueError(f"alpha is {self.alpha}: expected a power above 0 and at most 2")
        if self.at_keep is not None:
            if not 0 < self.at_keep < 1:
                raise ValueError(f"at_keep is {self.at_keep}: expected a fraction above 0 and below 1")
            if self.kind != "two_sided":
                raise ValueError(
                    f"at_keep is given to a decomposition of the kind {self.kind!r}: only two_sided measures in the "
                    "compressed model; leave it out"
                )
        if not 0 < self.at_weight <= 1:
            raise ValueError(f"at_weight is {self.at_weight}: expected a number above 0 and at most 1")
        if self.at_keep is None and self.at_weight != Decomposition.at_weight:
            raise ValueError(
                f"at_weight is {self.at_weight} and at_keep is not given: expected at_keep with it, the fraction that "
                "is measured at a second time; give it, or leave at_weight out"
            )

    @classmethod
    def of_fingerprint(cls, fingerprint: Mapping[str, Any]) -> Decomposition:
        """Return the decomposition that factors with this ``fingerprint`` were made by; other keys are ignored."""
        kind = fingerprint.get("kind")
        # What factors of the earliest versions were made with is not named in their fingerprints.
        first = {"token_weights": kind != "two_sided", "fisher_side": "outputs" if kind == "fwsvd" else "inputs"}
        known = {**first, **fingerprint}
        return cls(**{part.name: known[part.name] for part in fields(cls) if part.name in known})

    @property
    def needs_text(self) -> bool:
        """Whether calibration text changes the result."""
        return bool(self.needs)

    @property
    def needs(self) -> tuple[Statistic, ...]:
        """The statistics that weight inputs and outputs."""
        if self.weighs_tokens:
            return ("weighted_moments",)
        return _NEEDS[self.kind]

    @property
    def needs_gradients(self) -> bool:
        """Whether these statistics need gradients of the loss."""
        return bool(set(self.needs) - {"inputs"})

    @property
    def weighs_tokens(self) -> bool:
        """Whether tokens are weighted by the size of their gradient."""
        return self.kind == "two_sided" and self.token_weights

    @property
    def shares_input_weights(self) -> bool:
        """Whether layers with the same input share what weights it."""
        return not self.weighs_tokens and not (self.kind == "fwsvd" and self.fisher_side == "inputs")

    @property
    def block_by_block(self) -> bool:
        """Whether factors can be made with one block in memory: statistics of a compressed model need all blocks."""
        return self.at_keep is None

    def check_sharing(self) -> None:
        """Check that experts can share the right factors, before any factors are built.

        Raises:
            ValueError: This kind makes no shared right factors.
        """
        if self.kind not in SHARING_KINDS or self.at_keep is not None:
            what = self.kind if self.at_keep is None else f"{self.kind} with at_keep"
            raise ValueError(
                f"shared_experts is true, but the decomposition is {what}, which makes no shared right factors: take "
                f"{' or '.join(SHARING_KINDS)} without at_keep, or leave shared_experts out"
            )

    def identity(self) -> dict[str, Any]:
        """Return the settings that change the result of this kind."""
        uses = {
            "svd": (),
            "asvd": ("damping", "alpha"),
            "fwsvd": ("damping", "fisher_side") if self.fisher_side == "inputs" else ("output_damping",),
            "whitened": ("damping",),
            "two_sided": ("damping", "output_damping", "labels"),
        }
        # Settings at their first value are left out, so that factors from before they existed are still found.
        weights = ("token_weights",) if self.weighs_tokens else ()
        again = () if self.at_keep is None else ("at_keep", "at_weight")
        return {"kind": self.kind, **{name: getattr(self, name) for name in (*uses[self.kind], *weights, *again)}}

    def in_dense_model(self) -> Decomposition:
        """Return the decomposition of the first time, by what is measured in the dense model alone."""
        return replace(self, at_keep=None, at_weight=Decomposition.at_weight)

    def point(self, modules: str) -> dict[str, Any]:
        """Return what distinguishes the compressed model of ``at_keep`` from others of the same base and text.

        Args:
            modules: Digest of the names of all linear layers that were compressed.
        """
        return {"compressed": {**self.in_dense_model().identity(), "keep": self.at_keep, "modules": modules}}
