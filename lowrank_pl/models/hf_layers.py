"""The layers of a compressed model: layers of low rank, stored as two factors or as pivots and coefficients.

This file needs only torch. Every exported folder holds a copy beside hf_format.py, as part of the remote code.

No parameter called ``weight`` has the shape of the dense weight here, so that a loader that does not know these layers
stops at a size mismatch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, TypeVar, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "LowRankEmbedding",
    "LowRankLinear",
    "PivotedLinear",
    "SharedLowRankLinear",
    "Side",
    "blank_embedding",
    "copy_attributes",
    "loaded_by_hook",
    "low_rank_embedding",
]

Side = Literal["out", "in"]
"""Whether pivots are rows of the matrix (outputs) or columns (inputs)."""


class _Matrices(nn.Module):
    """A layer that is stored as matrices with names."""

    def _add_matrix(
        self, name: str, rows: int, columns: int, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        """Register an empty matrix; derived classes store it in other ways."""
        self.register_parameter(name, nn.Parameter(torch.empty(rows, columns, device=device, dtype=dtype)))

    def matrix(self, name: str) -> Tensor:
        """Return the matrix ``weight`` or ``right``; derived classes compute it from what they store."""
        matrix: Tensor = getattr(self, name)
        return matrix


class _TwoMatrices(_Matrices, nn.Linear):
    """A linear layer that is stored as two matrices."""

    right: nn.Parameter

    def product(self, input: Tensor, name: str, bias: Tensor | None = None) -> Tensor:
        """Return the product of the matrix called ``name`` with ``input``, plus ``bias``."""
        return F.linear(input, self.matrix(name), bias)


class LowRankLinear(_TwoMatrices):
    """A linear layer stored as two factors: ``y = weight @ (right @ x) + bias``.

    It derives from ``nn.Linear`` so that PEFT attaches adapters to it. ``weight`` is the left factor, not the merged
    matrix.

    Args:
        in_features: Size of the input.
        out_features: Size of the output.
        rank: Inner size of the factors.
        bias: Whether there is a bias.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Attributes:
        weight: Left factor, ``[out, rank]``.
        right: Right factor, ``[rank, in]``.
        bias: ``[out]`` or None.

    >>> layer = LowRankLinear(8, 6, 2, bias=False)
    >>> layer
    LowRankLinear(in_features=8, out_features=6, rank=2, bias=False)
    >>> layer.dense().shape
    torch.Size([6, 8])
    """

    _has_right = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        # nn.Linear.__init__ would allocate the dense matrix.
        nn.Module.__init__(self)
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self._add_matrix("weight", out_features, rank, device, dtype)
        if self._has_right:
            self._add_matrix("right", rank, in_features, device, dtype)
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        )
        self.reset_parameters()

    @classmethod
    def from_factors(cls, left: Tensor, right: Tensor, bias: Tensor | None = None) -> LowRankLinear:
        """Return a layer that shares its memory with the given tensors, which are detached and made contiguous.

        Args:
            left: Left factor, ``[out, rank]``.
            right: Right factor, ``[rank, in]``.
            bias: ``[out]`` or None.

        Raises:
            ValueError: The shapes, types or devices do not match.

        >>> LowRankLinear.from_factors(torch.ones(4, 2), torch.ones(2, 3))(torch.ones(3)).tolist()
        [6.0, 6.0, 6.0, 6.0]
        """
        parts = [left, right] if bias is None else [left, right, bias]
        fits = left.ndim == right.ndim == 2 and left.shape[1] == right.shape[0]
        if not fits or (bias is not None and bias.shape != left.shape[:1]):
            shapes = ", ".join(str(list(part.shape)) for part in parts)
            raise ValueError(f"factors of shapes {shapes}: expected [out, rank], [rank, in] and a bias of [out]")
        if len({(part.dtype, part.device) for part in parts}) > 1:
            kinds = ", ".join(f"{part.dtype} on {part.device}" for part in parts)
            raise ValueError(f"factors of {kinds}: expected one type and one device")
        layer = cls(right.shape[1], *left.shape, bias=bias is not None, device="meta", dtype=left.dtype)
        layer.weight = nn.Parameter(left.detach().contiguous())
        layer.right = nn.Parameter(right.detach().contiguous())
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().contiguous())
        return layer

    def reset_parameters(self) -> None:
        """Fill the parameters as a chain of two fresh ``nn.Linear`` would."""
        for factor in (self.weight, self.right):
            nn.init.kaiming_uniform_(factor, a=math.sqrt(5))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """Return ``[..., out]`` for an input ``[..., in]``."""
        return self.product(self.product(input, "right"), "weight", self.bias)

    @torch.no_grad()
    def dense(self) -> Tensor:
        """Return the merged matrix ``[out, in]`` in the type of the factors, which are multiplied in a wider type.

        fp32 factors are multiplied in fp64, half-precision factors in fp32, so that only the result is rounded.
        """
        return _product(self.matrix("weight"), self.matrix("right"))

    # Names by which PEFT asks quantised layers for the weight that they stand for. DoRA needs its norms.
    W_q = property(lambda self: self.weight)
    dequantize = dense

    def extra_repr(self) -> str:
        """Return the sizes, for ``print(model)``."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"
        return f"{sizes}, bias={self.bias is not None}"


class SharedLowRankLinear(LowRankLinear):
    """A ``LowRankLinear`` that reads the right factor of another one, its owner, and stores the left one only.

    Arguments are those of ``LowRankLinear``. The layer is complete once it has its owner (:meth:`share`).

    Attributes:
        weight: Left factor, ``[out, rank]``.
        bias: ``[out]`` or None.

    >>> owner = LowRankLinear.from_factors(torch.ones(4, 2), torch.ones(2, 3))
    >>> layer = SharedLowRankLinear.from_owner(torch.full((5, 2), 2.0), owner)
    >>> layer(torch.ones(3)).tolist(), [name for name, _ in layer.named_parameters()]
    ([12.0, 12.0, 12.0, 12.0, 12.0], ['weight'])
    """

    _has_right = False
    source: tuple[LowRankLinear] | None = None

    @classmethod
    def from_owner(cls, left: Tensor, owner: LowRankLinear, bias: Tensor | None = None) -> SharedLowRankLinear:
        """Return a layer that shares its memory with the given tensors, and reads the right factor of ``owner``.

        Args:
            left: Left factor, ``[out, rank]``.
            owner: The layer that stores the right factor.
            bias: ``[out]`` or None.

        Raises:
            ValueError: The rank is not that of the owner, or types or devices differ.
        """
        like = owner.weight
        if left.ndim != 2 or left.shape[1] != owner.rank or (left.dtype, left.device) != (like.dtype, like.device):
            raise ValueError(
                f"a left factor {list(left.shape)}, {left.dtype} on {left.device} was given: expected [out, "
                f"{owner.rank}], {like.dtype} on {like.device}, as its owner has"
            )
        layer = cls(owner.in_features, *left.shape, bias=bias is not None, device="meta", dtype=left.dtype)
        layer.weight = nn.Parameter(left.detach().contiguous())
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().contiguous())
        layer.share(owner)
        return layer

    def share(self, owner: LowRankLinear) -> None:
        """Read the right factor of ``owner`` from now on.

        Raises:
            ValueError: The owner has another rank or another number of inputs, or shares the factor of a third layer.
        """
        sizes = owner.rank, owner.in_features
        if sizes != (self.rank, self.in_features) or isinstance(owner, SharedLowRankLinear):
            raise ValueError(
                f"a layer of rank {self.rank} and {self.in_features} inputs can't share the right factor of a "
                f"{type(owner).__name__} of rank {owner.rank} and {owner.in_features} inputs"
            )
        # In a tuple, so that the owner is not a submodule of this layer as well.
        self.source = (owner,)

    @property
    def owner(self) -> LowRankLinear:
        """The layer that stores the right factor."""
        if self.source is None:
            raise RuntimeError("a SharedLowRankLinear has no owner yet, whose right factor it reads: call share")
        return self.source[0]

    @property
    def right(self) -> nn.Parameter:  # type: ignore[override]
        """Right factor of the owner, ``[rank, in]``."""
        return self.owner.right

    def matrix(self, name: str) -> Tensor:
        """Return the matrix ``weight``, or that of the owner called ``right``."""
        if name != "right":
            return super().matrix(name)
        with loaded_by_hook(self.owner):
            # Moved where the layer is: a device_map may put it elsewhere.
            return self.owner.matrix(name).to(self.weight.device)

    def reset_parameters(self) -> None:
        """Fill the left factor as a fresh ``nn.Linear`` would."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            nn.init.zeros_(self.bias)


@contextmanager
def loaded_by_hook(module: nn.Module) -> Iterator[None]:
    """Load the parameters of ``module`` while the block runs, where accelerate keeps them elsewhere until it runs."""
    hook: Any = getattr(module, "_hf_hook", None)
    if hook is None:
        yield
        return
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)


class PivotedLinear(_TwoMatrices):
    """A linear layer of low rank stored as pivots and coefficients, in ``rank * (in + out - rank)`` numbers.

    A matrix of rank ``k`` has ``k`` rows whose combinations are all other rows, and ``k`` such columns (PIFA, arXiv
    2501.19090). With ``side="out"``, the layer stores these rows as ``right`` and the coefficients of all other rows as
    ``weight``: ``right @ x`` are the outputs at ``pivots``, and ``weight @ right @ x`` are the other outputs. With
    ``side="in"``, it stores columns as ``weight`` and the coefficients of all other columns as ``right``:
    ``weight @ (x[pivots] + right @ x[others])``. Both take as many multiply-adds as numbers. Only the pivots of the
    permutation are stored; the indices for the forward pass follow from them.

    The class derives from ``nn.Linear`` so that PEFT attaches adapters to it. ``weight`` is a part, not the merged
    matrix.

    Args:
        in_features: Size of the input.
        out_features: Size of the output.
        rank: Number of pivots, below both sizes.
        side: Whether pivots are rows (outputs) or columns (inputs).
        bias: Whether there is a bias.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Raises:
        ValueError: The rank or the side is impossible.

    Attributes:
        weight: ``[out - rank, rank]`` coefficients, or ``[out, rank]`` columns.
        right: ``[rank, in]`` rows, or ``[rank, in - rank]`` coefficients.
        pivots: ``[rank]`` ascending indices, int32, a buffer.
        bias: ``[out]`` or None.

    >>> layer = PivotedLinear(8, 6, 2, side="out", bias=False)
    >>> layer
    PivotedLinear(in_features=8, out_features=6, rank=2, side=out, bias=False)
    >>> [list(part.shape) for part in (layer.weight, layer.right, layer.dense())]
    [[4, 2], [2, 8], [6, 8]]
    """

    pivots: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        side: Side,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if side not in get_args(Side):
            raise ValueError(f"the side {side!r} was given: expected one of {', '.join(get_args(Side))}")
        if not 1 <= rank < min(in_features, out_features):
            raise ValueError(
                f"rank {rank} of a layer of shape [{out_features}, {in_features}] can't be stored pivoted: "
                f"expected 1 to {min(in_features, out_features) - 1}"
            )
        nn.Module.__init__(self)
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.side: Side = side
        rows, columns = (out_features - rank, in_features) if side == "out" else (out_features, in_features - rank)
        self._add_matrix("weight", rows, rank, device, dtype)
        self._add_matrix("right", rank, columns, device, dtype)
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        )
        self.register_buffer("pivots", torch.empty(rank, device=device, dtype=torch.int32))
        self._derived: tuple[Any, ...] = (None,)
        self.reset_parameters()

    @classmethod
    def from_parts(
        cls, weight: Tensor, right: Tensor, pivots: Tensor, *, side: Side, bias: Tensor | None = None
    ) -> PivotedLinear:
        """Return a layer that shares its memory with the given tensors, which are detached and made contiguous.

        Args:
            weight: ``[out - rank, rank]`` coefficients, or with ``side="in"`` the ``[out, rank]`` columns.
            right: ``[rank, in]`` rows, or with ``side="in"`` the ``[rank, in - rank]`` coefficients.
            pivots: ``[rank]`` ascending indices of the stored rows or columns, of any integer type.
            side: Whether rows (``"out"``) or columns (``"in"``) are stored.
            bias: ``[out]`` or None.

        Raises:
            ValueError: The shapes, types or devices do not match, or pivots are not ascending indices.

        >>> ones = torch.ones(2, 1), torch.ones(1, 2), torch.tensor([1])
        >>> PivotedLinear.from_parts(*ones, side="out")(torch.ones(2)).tolist()
        [2.0, 2.0, 2.0]
        >>> PivotedLinear.from_parts(*ones, side="in")(torch.ones(3)).tolist()
        [3.0, 3.0]
        """
        parts = [weight, right] if bias is None else [weight, right, bias]
        fits = weight.ndim == right.ndim == 2 and weight.shape[1] == right.shape[0] and pivots.shape == right.shape[:1]
        outputs = weight.shape[0] + (right.shape[0] if side == "out" else 0)
        if not fits or (bias is not None and bias.shape != (outputs,)):
            shapes = ", ".join(str(list(part.shape)) for part in (*parts, pivots))
            wanted = "[out - rank, rank], [rank, in]" if side == "out" else "[out, rank], [rank, in - rank]"
            raise ValueError(f"parts of shapes {shapes}: expected {wanted}, a bias of [out] and pivots of [rank]")
        if len({(part.dtype, part.device) for part in parts}) > 1:
            kinds = ", ".join(f"{part.dtype} on {part.device}" for part in parts)
            raise ValueError(f"parts of {kinds}: expected one type and one device")
        inputs, rank = right.shape[1] + (right.shape[0] if side == "in" else 0), right.shape[0]
        layer = cls(inputs, outputs, rank, side=side, bias=bias is not None, device="meta", dtype=weight.dtype)
        layer.weight = nn.Parameter(weight.detach().contiguous())
        layer.right = nn.Parameter(right.detach().contiguous())
        layer.pivots = pivots.to(device=weight.device, dtype=torch.int32)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().contiguous())
        layer.check_pivots()
        return layer

    def reset_parameters(self) -> None:
        """Fill the parameters as a chain of two fresh ``nn.Linear`` would; the first rows or columns are pivots."""
        for part in (self.weight, self.right):
            nn.init.kaiming_uniform_(part, a=math.sqrt(5))
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        self.pivots = torch.arange(self.rank, device=self.pivots.device, dtype=torch.int32)

    def check_pivots(self) -> None:
        """Raise ``ValueError`` unless the pivots are ascending indices; compute the indices that follow from them."""
        size = self.out_features if self.side == "out" else self.in_features
        pivots = self.pivots
        if pivots[0] < 0 or pivots[-1] >= size or not (pivots.diff() > 0).all():
            raise ValueError(f"the pivots {pivots[:4].tolist()}... are not {self.rank} ascending indices below {size}")
        self._indices()

    def forward(self, input: Tensor) -> Tensor:
        """Return ``[..., out]`` for an input ``[..., in]``."""
        if self.side == "in":
            pivots, others = self._indices()
            kept = _gather(input, pivots) + self.product(_gather(input, others), "right")
            return self.product(kept, "weight", self.bias)
        kept = self.product(input, "right")
        output = _gather(torch.cat([kept, self.product(kept, "weight")], -1), *self._indices())
        return output if self.bias is None else output + self.bias.to(output.dtype)

    def order(self) -> tuple[Tensor, Tensor]:
        """Return the indices of the pivots and of all others, among outputs or inputs."""
        every, is_pivot = self._every()
        return every[is_pivot], every[~is_pivot]

    def _every(self) -> tuple[Tensor, Tensor]:
        """Return all indices of outputs or inputs, and whether each is a pivot."""
        size = self.out_features if self.side == "out" else self.in_features
        every = torch.arange(size, device=self.pivots.device)
        return every, torch.isin(every, self.pivots)

    def _indices(self) -> tuple[Tensor, ...]:
        """Return the indices for the forward pass: pivots and other inputs, or the place of each output.

        They are not buffers, because loaders leave buffers that no file has uninitialised. They are computed again
        whenever ``pivots`` is another tensor, as after loading, moving or broadcasting.
        """
        if self._derived[0] is self.pivots:
            return self._derived[1:]
        # Tensors made in inference mode can't be used in training later.
        with torch.inference_mode(False):
            every, is_pivot = self._every()
            before = is_pivot.cumsum(0)
            # Where each index lies when all pivots come first. ONNX has no stable sort, which would say it more simply.
            place = torch.where(is_pivot, before - 1, self.rank + every - before)
            order = torch.zeros_like(place).scatter(0, place, every)
            indices = (place,) if self.side == "out" else (order[: self.rank], order[self.rank :])
        # The next run of a recorded CUDA graph overwrites what this run computes.
        if not torch.compiler.is_compiling():
            self._derived = (self.pivots, *indices)
        return indices

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PivotedLinear:
        """Convert or move the layer and compute its indices again: a compiled model would do so in every run."""
        known = self._derived[0] is not None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if known and not self.pivots.is_meta:
            self._indices()
        return self

    @torch.no_grad()
    def dense(self) -> Tensor:
        """Return the merged matrix ``[out, in]`` in the type of the parts, which are multiplied in a wider type.

        fp32 parts are multiplied in fp64, half-precision parts in fp32, so that only the result is rounded.
        """
        weight, right = self.matrix("weight"), self.matrix("right")
        others = _product(weight, right)
        if self.side == "out":
            return torch.cat([right, others]).index_select(0, *self._indices())
        return torch.cat([weight, others], 1).index_select(1, torch.cat(self._indices()).argsort())

    W_q = property(lambda self: self.weight)  # as in LowRankLinear
    dequantize = dense

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        """Check loaded pivots, and drop the indices of the old ones: loading changes values in place."""
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)
        self._derived = (None,)
        if f"{prefix}pivots" in state_dict and not self.pivots.is_meta:
            try:
                self.check_pivots()
            except ValueError as error:
                lists[-1].append(f"{prefix.removesuffix('.')}: {error}")

    def extra_repr(self) -> str:
        """Return the sizes, for ``print(model)``."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"
        return f"{sizes}, side={self.side}, bias={self.bias is not None}"


class LowRankEmbedding(_Matrices, nn.Embedding):
    """An embedding of low rank, stored as two factors: the row of a token is ``weight[token] @ right``.

    It is made of the embedding that it replaces by :func:`low_rank_embedding`, so that subclasses keep what they add,
    such as Gemma's factor. There is no pivoted form: with as many rows as a vocabulary has it would save next to
    nothing, ``rank / (rows + columns)`` of the factors.

    Attributes:
        weight: Left factor, ``[embeddings, rank]``.
        right: Right factor, ``[rank, size]``.
        rank: Inner size of the factors.
    """

    _kind: type[nn.Embedding] = nn.Embedding
    right: nn.Parameter
    rank: int

    def rows(self, ids: Tensor) -> Tensor:
        """Return the rows ``[..., rank]`` of the left factor at token ``ids``."""
        return F.embedding(ids, self.weight)

    def forward(self, input: Tensor) -> Tensor:
        """Return the embeddings ``[..., size]`` of token ids."""
        return self.rows(input) @ self.matrix("right")

    def multiply(self, input: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the products ``[..., embeddings]`` of all embeddings with ``input`` ``[..., size]``, plus ``bias``."""
        right, left = (self.matrix(name).to(input.device) for name in ("right", "weight"))
        return F.linear(F.linear(input, right), left, bias)

    @torch.no_grad()
    def dense(self) -> Tensor:
        """Return all embeddings ``[embeddings, size]``, multiplied in a wider type as in ``LowRankLinear``."""
        return _product(self.matrix("weight"), self.matrix("right"))

    def extra_repr(self) -> str:
        """Return the sizes, for ``print(model)``."""
        return f"{self.num_embeddings}, {self.embedding_dim}, rank={self.rank}"

    def __reduce__(self) -> tuple[Any, ...]:
        """Return how to make a copy: pickle does not find classes that were made at run time."""
        return _blank_low_rank, (self._kind,), vars(self)


def low_rank_embedding(
    embedding: nn.Embedding, rank: int, *, stored: type[LowRankEmbedding] = LowRankEmbedding, **attributes: Any
) -> LowRankEmbedding:
    """Return an empty embedding of low rank with the sizes and the type of ``embedding``, of a subclass of its class.

    The embedding itself is not changed.

    Args:
        embedding: The dense embedding.
        rank: Inner size of the factors.
        stored: How the factors are stored.
        **attributes: Set before the factors are made.

    >>> low_rank_embedding(nn.Embedding(8, 4), 2)
    LowRankEmbedding(8, 4, rank=2)
    """
    new = blank_embedding(type(embedding), stored)
    copy_attributes(embedding, new)
    vars(new).update(attributes)
    new.rank = rank
    weight = embedding.weight
    new._add_matrix("weight", embedding.num_embeddings, rank, weight.device, weight.dtype)
    new._add_matrix("right", rank, embedding.embedding_dim, weight.device, weight.dtype)
    return new


AnyEmbedding = TypeVar("AnyEmbedding", bound=nn.Embedding)


def blank_embedding(kind: type[nn.Embedding], stored: type[AnyEmbedding]) -> AnyEmbedding:
    """Return an embedding without any attribute, in place of embeddings of the class ``kind``.

    Args:
        kind: The class of the dense embedding; its forward pass calls that of ``stored``.
        stored: How the numbers are stored.
    """
    made = stored
    if kind is not nn.Embedding:
        prefix = stored.__name__.removesuffix("Embedding")
        made = type(f"{prefix}{kind.__name__}", (kind, stored), {"_kind": kind})
    return made.__new__(made)


def copy_attributes(old: nn.Module, new: nn.Module) -> None:
    """Give the blank module ``new`` the attributes and buffers of ``old``, and none of its parameters."""
    nn.Module.__init__(new)
    known = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"}
    vars(new).update({key: value for key, value in vars(old).items() if key not in known})
    for name, buffer in old.named_buffers(recurse=False):
        new.register_buffer(name, buffer, persistent=name not in old._non_persistent_buffers_set)


def _blank_low_rank(kind: type[nn.Embedding]) -> LowRankEmbedding:
    return blank_embedding(kind, LowRankEmbedding)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Return ``left @ right`` in their type, multiplied in a wider one."""
    wide = torch.float64 if left.dtype == torch.float32 else torch.float32
    wide = torch.promote_types(wide, left.dtype)
    return (left.to(wide) @ right.to(wide)).to(left.dtype)


def _gather(values: Tensor, index: Tensor) -> Tensor:
    """Return the entries ``index`` of the last dimension.

    On a CPU, ``index_select`` starts faster (it saves 1 to 4 us of a decoding step of 300 us). ``gather`` takes half
    the time for many tokens in half precision (0.8 instead of 1.8 ms for 512 x 1536, beside 4 ms of matrix products).
    """
    if values.numel() == values.shape[-1]:
        return values.index_select(-1, index)
    return values.gather(-1, index.expand(*values.shape[:-1], -1))
