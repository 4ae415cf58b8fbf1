"""Experts of a mixture as separate linear layers, in the place of the 3-D parameters in which transformers fuses them.

The layout of a fused parameter (order of its axes, interleaved gate and up rows, biases) is read from the attributes
that transformers gives every module of fused experts, and from the names and shapes of its parameters. A model that has
its weights is split only after the separate layers have computed the same as the fused ones.

This file needs only torch and transformers: exported folders hold a copy (see hf_format.py).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

__all__ = [
    "DroppedExpert",
    "Expert",
    "RoutedExperts",
    "SortedExperts",
    "SplitExperts",
    "WeightedInputExperts",
    "all_experts_called",
    "can_drop",
    "drop_experts",
    "dropped_experts",
    "experts_fused",
    "fuse_experts",
    "is_fused",
    "put_module",
    "routers",
    "split_experts",
    "split_modules",
    "taken_over",
]


class Fused:
    """A module of fused experts without its parameters: their layout, and what happens between an expert's two stages.

    Args:
        module: The module of fused experts; it still has its parameters.

    Attributes:
        module: The module, which keeps its activation and its constants.
        gated: Whether experts have a gate.
        transposed: Whether matrices are stored as ``[in, out]``.
        interleaved: Whether the outputs of gate and up alternate; otherwise those of the gate come first.
    """

    def __init__(self, module: nn.Module) -> None:
        fused: Any = module
        self.module = module
        self.gated = bool(getattr(fused, "has_gate", True))
        self.interleaved = not getattr(fused, "is_concatenated", True)
        self.transposed = bool(getattr(fused, "is_transposed", False))
        if not hasattr(fused, "is_transposed") and hasattr(fused, "gate_up_proj"):
            self.transposed = fused.gate_up_proj.shape[2] == 2 * fused.down_proj.shape[1]

    @property
    def first(self) -> str:
        """Name of the parameter of the first stage."""
        return "gate_up_proj" if self.gated else "up_proj"

    def activation(self, gate: Tensor | None, up: Tensor) -> Tensor:
        """Return what lies between the stages, from the outputs of the first one."""
        fused: Any = self.module
        activated: Tensor
        if gate is None:
            activated = fused.act_fn(up)
        elif hasattr(fused, "_apply_gate"):
            activated = fused._apply_gate(self.joined(gate, up))
        else:
            activated = fused.act_fn(gate) * up
        return activated

    def joined(self, gate: Tensor, up: Tensor, dim: Literal[0, -1] = -1) -> Tensor:
        """Return gate and up in one tensor, along ``dim`` in the order in which the fused parameter has its outputs."""
        if not self.interleaved:
            return torch.cat([gate, up], dim=dim)
        return torch.stack([gate, up], dim=1).flatten(0, 1) if dim == 0 else torch.stack([gate, up], dim=-1).flatten(-2)

    def parted(self, both: Tensor) -> tuple[Tensor, Tensor]:
        """Return gate and up of a tensor whose first axis are the outputs of both."""
        half = len(both) // 2
        return (both[::2], both[1::2]) if self.interleaved else (both[:half], both[half:])

    def matrix(self, stored: Tensor) -> Tensor:
        """Return one expert's matrix ``[out, in]``, or the stored form of such a matrix."""
        return stored.mT if self.transposed else stored

    def take(self, name: str) -> list[Tensor | None]:
        """Return the parts of the parameter ``name`` by expert, and remove it; None for each if there is none."""
        stored: Tensor | None = self.module._parameters.pop(name, None)
        return [None] * self.count if stored is None else list(stored.detach())

    @property
    def count(self) -> int:
        """The number of experts."""
        number: int = self.module.num_experts  # type: ignore[assignment]
        return number


class Expert(nn.Module):
    """One expert: ``down_proj(gate(gate_proj(x), up_proj(x)))``, or ``down_proj(act(up_proj(x)))`` without a gate.

    Args:
        fused: The module that it was fused in.
        **layers: ``gate_proj``, unless there is no gate, ``up_proj`` and ``down_proj``.

    Attributes:
        routing_weights: ``[tokens]`` weights that the outputs of the present call are multiplied by; None outside of a
            call, and where the router weights the inputs.
    """

    def __init__(self, fused: Fused, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.fused = fused
        self.routing_weights: Tensor | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the outputs ``[tokens, out]`` for the inputs ``[tokens, in]``."""
        layers: Any = self
        gate = layers.gate_proj(hidden) if self.fused.gated else None
        outputs: Tensor = layers.down_proj(self.fused.activation(gate, layers.up_proj(hidden)))
        return outputs


class DroppedExpert(nn.Module):
    """Stands in the place of an expert that was dropped: it has no parameters and is never called.

    A token whose router chooses it uses the other experts that it chose (:func:`taken_over`).
    """


class SplitExperts(nn.ModuleList):
    """The experts of one mixture as separate modules, called as the module of fused experts was.

    Args:
        fused: The module of fused experts. Its parameters are taken from it.

    Attributes:
        every: Whether experts without tokens are called too, with no rows.
        fused: The module of fused experts, without its parameters.
    """

    every: ClassVar[bool] = False

    def __init__(self, fused: Fused) -> None:
        super().__init__(self._split(fused))
        self.fused = fused

    def _split(self, fused: Fused) -> list[nn.Module]:
        raise NotImplementedError

    def parts(self, name: str, stored: Tensor) -> dict[str, Tensor]:
        """Return the parameters of an expert by name, from its part ``stored`` of the fused parameter ``name``."""
        raise NotImplementedError

    def _parameters_of_fused(self) -> dict[str, list[Tensor]]:
        raise NotImplementedError

    def fuse(self) -> nn.Module:
        """Return the module of fused experts with the present weights of the experts.

        Raises:
            ValueError: A linear layer of an expert has been replaced, or an expert was dropped.
        """
        if self.dropped:
            raise ValueError(
                f"{len(self.dropped)} of {len(self)} experts were dropped: only whole mixtures can be fused"
            )
        for name, layer in self.named_modules():
            if hasattr(layer, "weight") and type(layer) is not nn.Linear:
                raise ValueError(f"{name} is a {type(layer).__name__}: only dense experts can be fused")
        for name, parts in self._parameters_of_fused().items():
            value = torch.stack([part.detach() for part in parts])
            self.fused.module.register_parameter(name, nn.Parameter(value, parts[0].requires_grad))
        return self.fused.module

    @property
    def dropped(self) -> list[int]:
        """The numbers of the experts that were dropped."""
        return [place for place, expert in enumerate(self._modules.values()) if _is_dropped(expert)]

    def _called(self, counts: Sequence[int]) -> Iterator[tuple[int, slice]]:
        """Yield the experts to call, each with its place in rows that are sorted by expert."""
        end = 0
        for place, count in enumerate(counts):
            end += count
            if (count or SplitExperts.every) and not _is_dropped(self[place]):
                yield place, slice(end - count, end)

    def extra_repr(self) -> str:
        """Return the class of the fused experts."""
        return type(self.fused.module).__name__


class RoutedExperts(SplitExperts):
    """Experts that are called with all tokens, and the places and weights that the router gave each of them."""

    def _split(self, fused: Fused) -> list[nn.Module]:
        firsts, biases = fused.take(fused.first), fused.take(f"{fused.first}_bias")
        downs, down_biases = fused.take("down_proj"), fused.take("down_proj_bias")
        experts: list[nn.Module] = []
        for first, bias, down, down_bias in zip(firsts, biases, downs, down_biases, strict=True):
            assert first is not None
            assert down is not None
            layers = {}
            if fused.gated:
                gates = fused.parted(fused.matrix(first))
                gate_biases = (None, None) if bias is None else fused.parted(bias)
                layers = {
                    name: _linear(*parts)
                    for name, *parts in zip(("gate_proj", "up_proj"), gates, gate_biases, strict=True)
                }
            else:
                layers["up_proj"] = _linear(fused.matrix(first), bias)
            experts.append(Expert(fused, **layers, down_proj=_linear(fused.matrix(down), down_bias)))
        return experts

    def parts(self, name: str, stored: Tensor) -> dict[str, Tensor]:
        """Return the parameters of an expert by name, from its part ``stored`` of the fused parameter ``name``."""
        layer = name.removesuffix("_bias")
        kind, value = ("weight", self.fused.matrix(stored)) if layer == name else ("bias", stored)
        if not self.fused.gated or layer == "down_proj":
            return {f"{layer}.{kind}": value}
        gate, up = self.fused.parted(value)
        return {f"gate_proj.{kind}": gate, f"up_proj.{kind}": up}

    def _parameters_of_fused(self) -> dict[str, list[Tensor]]:
        fused, parts = self.fused, dict[str, list[Tensor]]()
        experts: list[Any] = list(self)
        for expert in experts:
            down, up = expert.down_proj, expert.up_proj
            weight, bias = up.weight, up.bias
            if fused.gated:
                gate = expert.gate_proj
                weight = fused.joined(gate.weight, weight, dim=0)
                bias = None if bias is None else fused.joined(gate.bias, bias, dim=0)
            # In the order of the families that have biases.
            values = {fused.first: fused.matrix(weight), f"{fused.first}_bias": bias}
            values |= {"down_proj": fused.matrix(down.weight), "down_proj_bias": down.bias}
            for name, value in values.items():
                if value is not None:
                    parts.setdefault(name, []).append(value)
        return parts

    def forward(self, hidden_states: Tensor, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """Return the sum of the chosen experts' outputs, each times its weight.

        Args:
            hidden_states: ``[tokens, hidden]``.
            *args: ``[tokens, chosen]`` numbers of the chosen experts, then their weights; families give them names of
                their own.
            **kwargs: The same by name.

        Raises:
            ValueError: The router gives no numbers of chosen experts.
        """
        index, weights = (*args, *kwargs.values())
        if index.is_floating_point():
            raise ValueError(
                f"the router of {type(self.fused.module).__name__} chooses no experts (top-k): expected their numbers "
                f"first, and then their weights, not {index.dtype}; such a mixture can't be compressed"
            )
        index, weights = self.routed(index, weights)
        pairs = index.flatten()
        order = torch.argsort(pairs, stable=True)
        # An index of one more than there are experts marks pairs that another process computes: they come last.
        counts = torch.bincount(pairs, minlength=len(self)).tolist()[: len(self)]
        rows, factors = order // index.shape[-1], weights.flatten()[order]
        outputs = hidden_states.new_zeros(len(pairs), hidden_states.shape[-1])
        parts: list[Tensor] = []
        for place, chosen in self._called(counts):
            expert: Any = self[place]
            expert.routing_weights = factors[chosen]
            parts.append(expert(hidden_states[rows[chosen]]) * factors[chosen, None])
            expert.routing_weights = None
        if parts:
            outputs = outputs.index_copy(0, order[: sum(counts)], torch.cat(parts).to(outputs.dtype))
        return outputs.view(*index.shape, -1).sum(dim=-2)

    def routed(self, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the router gave, without the experts that were dropped (:func:`taken_over`)."""
        kept = self.kept(index.device)
        return (index, weights) if kept is None else taken_over(index, weights, kept)

    def kept(self, device: torch.device) -> Tensor | None:
        """Return ``[experts + 1]`` whether each expert is kept, as :func:`taken_over` takes it; None if all are."""
        dropped = self.dropped
        if not dropped:
            return None
        return torch.tensor([place not in dropped for place in range(len(self) + 1)], device=device)


def taken_over(index: Tensor, weights: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Return what a router gave, with the tokens of dropped experts given to the other experts that they chose.

    The weights of these are scaled so that those of a token keep their sum. A token none of whose experts is kept gets
    nothing from the experts.

    Args:
        index: ``[tokens, chosen]`` numbers of the chosen experts.
        weights: ``[tokens, chosen]`` their weights.
        kept: ``[experts + 1]`` whether each expert is kept; the last entry is for those that another process computes.

    Returns:
        The numbers, with that of the last entry for dropped experts, which are not called, and the weights.
    """
    here = kept[index]
    wide = weights.float() if weights.dtype.itemsize < 4 else weights
    left = torch.where(here, wide, 0)
    total, rest = wide.sum(dim=-1, keepdim=True), left.sum(dim=-1, keepdim=True)
    scale = torch.where(rest == 0, 0, total / torch.where(rest == 0, 1, rest))
    return torch.where(here, index, len(kept) - 1), (left * scale).to(weights.dtype)


class WeightedInputExperts(RoutedExperts):
    """Experts of Llama 4: each gets a row for every token, which the router has scaled, by 0 where it isn't chosen."""

    def forward(self, hidden_states: Tensor, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """Return the experts' outputs ``[experts x tokens, hidden]`` for as many rows.

        Args:
            hidden_states: The rows, in the order of the experts.
            *args: Nothing.
            **kwargs: Nothing.
        """
        rows = hidden_states.view(len(self), -1, hidden_states.shape[-1])
        # A row of zeros gives zeros, because there are no biases.
        chosen = rows.any(dim=-1).flatten().nonzero().flatten()
        counts = rows.any(dim=-1).sum(dim=-1).tolist()
        outputs = torch.zeros_like(hidden_states)
        parts = [self[place](hidden_states[chosen[part]]) for place, part in self._called(counts)]
        return outputs.index_copy(0, chosen, torch.cat(parts).to(outputs.dtype)) if parts else outputs


class SortedExperts(SplitExperts):
    """One matrix of each expert (JetMoE): called with rows in the order of the experts, and how many each gets."""

    def _split(self, fused: Fused) -> list[nn.Module]:
        return [_linear(weight, None) for weight in fused.take("weight")]

    def parts(self, name: str, stored: Tensor) -> dict[str, Tensor]:
        """Return the parameters of an expert by name, from its part ``stored`` of the fused parameter ``name``."""
        return {name: stored}

    def _parameters_of_fused(self) -> dict[str, list[Tensor]]:
        layers: list[Any] = list(self)
        return {"weight": [layer.weight for layer in layers]}

    def forward(self, inputs: Tensor, expert_size: Any) -> Tensor:
        """Return the outputs ``[rows, out]``.

        Args:
            inputs: ``[rows, in]``, sorted by expert.
            expert_size: How many rows each expert gets.
        """
        counts = expert_size.tolist() if isinstance(expert_size, Tensor) else list(expert_size)
        return torch.cat([self[place](inputs[part]) for place, part in self._called(counts)])


def _linear(weight: Tensor | None, bias: Tensor | None) -> nn.Linear:
    """Return a linear layer with its own copy of ``weight`` ``[out, in]`` and of ``bias``."""
    assert weight is not None
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    # Copies, so that the memory of the fused parameter is freed, and that no two parameters share theirs.
    for name, part in (("weight", weight), ("bias", bias)):
        if part is not None:
            own = part.clone(memory_format=torch.contiguous_format)
            setattr(layer, name, nn.Parameter(own, requires_grad=False))
    return layer


def is_fused(module: nn.Module) -> bool:
    """Tell whether ``module`` holds experts in fused parameters, one matrix per expert."""
    own = {name: parameter for name, parameter in module.named_parameters(recurse=False) if parameter.dim() == 3}
    return bool(own) and not type(module).__module__.startswith("torch.nn.") and hasattr(module, "num_experts")


def _kind(module: nn.Module) -> type[SplitExperts]:
    """Return the class that takes the place of a module of fused experts.

    Raises:
        ValueError: Its layout is not known.
    """
    fused: Any = module
    names = {name for name, _ in module.named_parameters(recurse=False)}
    call = list(inspect.signature(inspect.unwrap(type(module).forward)).parameters)[1:]
    known = {Fused(module).first, "down_proj"}
    if getattr(fused, "has_bias", False):
        known |= {f"{name}_bias" for name in known}
    if names == known and not getattr(fused, "has_post_expert_norm", False):
        if hasattr(fused, "_apply_gate") and len(call) == 3:
            return RoutedExperts
        if hasattr(fused, "act_fn") and len(call) == 1:
            return WeightedInputExperts
    if names == {"weight"} and call == ["inputs", "expert_size"]:
        return SortedExperts
    raise ValueError(
        f"the layout of {type(module).__name__} is not known: its parameters are {', '.join(sorted(names))} and its "
        f"forward takes {', '.join(call)}; leave its experts dense"
    )


def split_modules(model: nn.Module) -> list[tuple[str, SplitExperts]]:
    """Return the modules of split experts of ``model`` by name, also those of a folder's copy of this file."""
    found: Any = model.named_modules()
    own = SplitExperts.__name__
    return [(name, module) for name, module in found if any(kind.__name__ == own for kind in type(module).__mro__)]


def _is_dropped(expert: nn.Module | None) -> bool:
    # By name, since a folder's copy of this file has a class of its own.
    return type(expert).__name__ == DroppedExpert.__name__


def can_drop(experts: nn.Module) -> bool:
    """Tell whether a module of experts is called with the weights of a token's experts, so that some can take over."""
    # By name, since a folder's copy of this file has classes of its own.
    kinds = [kind.__name__ for kind in type(experts).__mro__]
    return RoutedExperts.__name__ in kinds and WeightedInputExperts.__name__ not in kinds


def dropped_experts(model: nn.Module) -> list[str]:
    """Return the names of the experts of ``model`` that were dropped."""
    return [f"{name}.{number}" for name, experts in split_modules(model) for number in experts.dropped]


def drop_experts(model: nn.Module, names: Iterable[str]) -> None:
    """Drop the experts ``names`` of ``model``, in place: their tokens use the other experts that they chose.

    Raises:
        ValueError: A name is of no expert, or of one that is not called with the weights of its tokens, or no expert of
            a mixture would be left. The model is as it was.
    """
    mixtures = dict(split_modules(model))
    gone: dict[str, set[int]] = {}
    for name in names:
        parent, _, number = name.rpartition(".")
        experts = mixtures.get(parent)
        if experts is None or not number.isdecimal() or int(number) >= len(experts):
            raise ValueError(f"{name} is no expert of a mixture, so it can't be dropped: only whole experts can")
        if not can_drop(experts):
            raise ValueError(
                f"{name} can't be dropped: {type(experts).__name__} does not see the weights of a token's other "
                "experts, which would have to take over; only experts that are called with them can be dropped"
            )
        gone.setdefault(parent, set(experts.dropped)).add(int(number))
    for parent, numbers in gone.items():
        if len(numbers) == len(mixtures[parent]):
            raise ValueError(f"all {len(numbers)} experts of {parent} are dropped: expected at least one to be kept")
    for parent, numbers in gone.items():
        for place in numbers:
            mixtures[parent][place] = DroppedExpert()


def routers(model: nn.Module) -> dict[str, str]:
    """Return the name of the router of each module of split experts, by the name of the experts.

    A router lies beside its experts and holds one matrix, with a row for each of them. Experts without such a module
    beside them are left out.
    """
    found = {}
    for name, experts in split_modules(model):
        parent, _, _ = name.rpartition(".")
        for inner, module in model.get_submodule(parent).named_children():
            matrices = [parameter for parameter in module.parameters() if parameter.dim() > 1]
            if len(matrices) == 1 and len(matrices[0]) == len(experts):
                found[name] = f"{parent}.{inner}"
    return found


@torch.no_grad()
def split_experts(model: nn.Module, *, check: bool = True) -> list[str]:
    """Split all fused experts of ``model`` into linear layers, in place, and return the names of their modules.

    The first module of each class is compared with the fused one on random inputs, unless it is on the meta device.

    Args:
        model: The model.
        check: Whether to compare; tensors without values can't be compared.

    Raises:
        ValueError: The layout of some experts is not known, or separate layers do not compute what the fused ones
            compute. The experts are as they were.
    """
    found = [(name, module, _kind(module)) for name, module in model.named_modules() if is_fused(module)]
    tried: set[type[nn.Module]] = set()
    for name, module, kind in found:
        trial = None
        if check and type(module) not in tried and not next(module.parameters(recurse=False)).is_meta:
            trial = _trial(module, kind)
        tried.add(type(module))
        split = kind(Fused(module)).train(module.training)
        put_module(model, name, split)
        if trial is not None and (error := _error(split, *trial)) is not None:
            fuse_experts(model)
            raise ValueError(
                f"separate experts do not compute what {type(module).__name__} computes (relative error {error:.2g}): "
                "its layout is not known; leave its experts dense"
            )
    return [name for name, _, _ in found]


def fuse_experts(model: nn.Module) -> None:
    """Put fused experts back where ``split_experts`` has split them, with the present weights.

    Raises:
        ValueError: A linear layer of an expert has been replaced.
    """
    for name, module in split_modules(model):
        put_module(model, name, module.fuse())


@contextmanager
def experts_fused(model: nn.Module) -> Iterator[None]:
    """Put fused experts in the place of split ones while the block runs; ``fuse_experts`` says when that fails."""
    split = split_modules(model)
    try:
        fuse_experts(model)
        yield
    finally:
        for name, module in split:
            for key in [key for key, _ in module.fused.module.named_parameters(recurse=False)]:
                del module.fused.module._parameters[key]
            put_module(model, name, module)


def put_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put ``new`` in the place of the module ``name`` of ``model``."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, new)


@contextmanager
def all_experts_called() -> Iterator[None]:
    """Call experts without tokens too, with no rows, while the block runs."""
    before, SplitExperts.every = SplitExperts.every, True
    try:
        yield
    finally:
        SplitExperts.every = before


_TOKENS = 4
"""Tokens on which separate experts are compared with fused ones."""


def _trial(module: nn.Module, kind: type[SplitExperts]) -> tuple[tuple[Any, ...], Tensor]:
    """Return random arguments for a module of fused experts, and what it computes from them."""
    fused, generator = Fused(module), torch.Generator().manual_seed(0)
    stored: Tensor = module.get_parameter("weight" if kind is SortedExperts else fused.first)
    count, width = len(stored), stored.shape[1 if fused.transposed else 2]
    inputs: tuple[Any, ...]
    if kind is RoutedExperts:
        chosen = torch.stack([torch.randperm(count, generator=generator)[:2] for _ in range(_TOKENS)])
        inputs = (chosen.to(stored.device), torch.rand(chosen.shape, generator=generator).to(stored))
    else:
        inputs = ([_TOKENS] * count,) if kind is SortedExperts else ()
    rows = torch.randn(_TOKENS * (1 if kind is RoutedExperts else count), width, generator=generator)
    inputs = (rows.to(stored), *inputs)
    # Without the wrapper that looks for a fast way to compute the same.
    wanted: Tensor = inspect.unwrap(type(module).forward)(module, *inputs)
    return inputs, wanted


def _error(split: SplitExperts, inputs: tuple[Any, ...], wanted: Tensor) -> float | None:
    """Return the relative error of what ``split`` computes; None if it is no more than rounding."""
    wanted = wanted.float()
    error = (split(*inputs).float() - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30)
    return None if error <= min(_ROUNDING * torch.finfo(inputs[0].dtype).eps, _MOST) else error.item()


_ROUNDING = 100
"""The error that is taken as rounding, in units of the type's precision."""

_MOST = 0.1
"""The most that is taken as rounding: in bfloat16, gate and up that are exchanged may differ by less than 100 units."""
