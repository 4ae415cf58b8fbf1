"""The layers to compress in any decoder: which they are, which share an input, and what stays dense.

No family is known by name. Blocks are found by their number, linear layers by their class, and shared inputs by a
forward pass of two tokens. What cannot be compressed (fused experts, tied weights, unknown modules) is logged and
counted in :attr:`Targets.skipped`. The embeddings and the head are targets only where they are asked for by name.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lowrank_pl.models.eval_mode import evaluating, input_device
from lowrank_pl.models.hf_experts import all_experts_called, can_drop, is_fused, routers, split_modules
from lowrank_pl.models.hf_quantized import is_quantized
from lowrank_pl.models.names import without_expert
from lowrank_pl.models.settings import EMBEDDINGS

__all__ = [
    "EMBEDDINGS",
    "HEAD",
    "EmbeddingTarget",
    "Skipped",
    "StandIn",
    "Target",
    "Targets",
    "body_of",
    "decoder_blocks",
    "dense_weight",
    "droppable",
    "find_embeddings",
    "find_targets",
    "first_argument",
    "model_parameters",
    "replace_module",
    "replaced",
    "shared_inputs",
    "targeted_parameters",
    "weight_of",
]

logger = logging.getLogger(__name__)

PACKED_WEIGHTS = ("qweight", "weight_packed", "W_q", "quant_state")
OWN_METHOD = "lowrank"
_LOW_RANK = ("LowRankLinear", "PivotedLinear", "LowRankEmbedding")
BY_PATTERN = "excluded by pattern"
ROUTER = "router of a mixture, which is small and chooses the experts"

HEAD = "head"
"""The kind of the head."""

Calls = dict[str, list[tuple[Tensor, int]]]
"""The input of each call of a module by the module's name, with its version: it may be overwritten in place later."""


@dataclass(frozen=True)
class Target:
    """One linear layer to compress.

    Attributes:
        name: Full name of the module.
        block: Index of its decoder block.
        kind: Its name inside the block, such as ``self_attn.q_proj``.
        shape: ``(out, in)``.
        group: Name of the first target with the same input tensor; its own name if no other has it.
        transposed: Whether the weight is stored as ``[in, out]`` (GPT-2's ``Conv1D``).
        experts: Name of the module of experts that it belongs to, which hands it only the tokens that are routed to its
            expert; empty for all other layers.
        stack: Name of the matrix that is decomposed in its place: the same layers of several experts, one below the
            other, which share a right factor; empty where the layer is decomposed by itself.
    """

    name: str
    block: int
    kind: str
    shape: tuple[int, int]
    group: str
    transposed: bool = False
    experts: str = ""
    stack: str = ""

    @property
    def stored_as(self) -> str:
        """The name under which plans and stores of factors have the layer: its own, or that of its stack."""
        return self.stack or self.name

    def of_expert(self, number: int) -> Target:
        """Return the same layer of another expert of its module.

        >>> gate = Target("mlp.experts.7.gate_proj", 0, "experts.7.gate_proj", (8, 4), "mlp.experts.7.gate_proj",
        ...     experts="mlp.experts")
        >>> gate.of_expert(12).name
        'mlp.experts.12.gate_proj'
        """

        def moved(name: str) -> str:
            _, dot, inside = name.removeprefix(f"{self.experts}.").partition(".")
            return f"{self.experts}.{number}{dot}{inside}"

        prefix = self.name.removesuffix(self.kind)
        name = moved(self.name)
        return replace(self, name=name, kind=name.removeprefix(prefix), group=moved(self.group))


@dataclass(frozen=True)
class EmbeddingTarget:
    """The token embeddings, the head, or both where they are tied: one matrix ``[vocabulary, width]`` to compress.

    Attributes:
        name: Full name of the module; of tied ones that of the embeddings.
        shape: ``(vocabulary, width)``.
        embedding: Name of the module that looks its rows up; None for a head of its own.
        head: Name of the module that multiplies by it; None for embeddings of their own.
    """

    name: str
    shape: tuple[int, int]
    embedding: str | None
    head: str | None

    @property
    def places(self) -> tuple[Target, ...]:
        """The modules that use the matrix, as layers that a pass can watch."""
        places = ((self.embedding, EMBEDDINGS), (self.head, HEAD))
        return tuple(Target(name, 0, kind, self.shape, name) for name, kind in places if name is not None)


@dataclass(frozen=True)
class Skipped:
    """One matrix of a decoder block that stays dense.

    Attributes:
        name: Full name of the module, or of the parameter if its module is not a linear layer.
        reason: Why it stays dense.
        parameters: Its number of parameters.
    """

    name: str
    reason: str
    parameters: int


@dataclass(frozen=True)
class Targets:
    """The linear layers of a model that are to be compressed, and the matrices that are not.

    Attributes:
        modules: The layers to compress, in the order in which the forward pass calls them.
        skipped: All other parameters of the decoder blocks with two or more dimensions.
        embeddings: The embeddings and the head to compress; none unless they were asked for.
    """

    modules: tuple[Target, ...]
    skipped: tuple[Skipped, ...]
    embeddings: tuple[EmbeddingTarget, ...] = ()

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """The shape ``(out, in)`` of everything to compress, by name; a stack is one matrix; embeddings come last."""
        shapes: dict[str, tuple[int, int]] = {}
        for target in self.modules:
            name = target.stored_as
            above = shapes[name][0] if name in shapes else 0
            shapes[name] = (above + target.shape[0], target.shape[1])
        return shapes | {target.name: target.shape for target in self.embeddings}

    @property
    def stacks(self) -> dict[str, tuple[str, ...]]:
        """Names of the layers of each stack, by the name of the stack."""
        found: dict[str, tuple[str, ...]] = {}
        for target in self.modules:
            if target.stack:
                found[target.stack] = (*found.get(target.stack, ()), target.name)
        return found

    def stacked(self) -> Targets:
        """Return the targets with the gates of all experts of a block in one stack, and their ups in another.

        Their inputs are those of the block. Down-projections read inputs of their own.

        Raises:
            ValueError: No two targets are gates or ups of experts of one block.
        """
        names = {one.name: without_expert(one.name) for one in self.modules if one.experts and _reads_block(one.name)}
        counts = Counter(names.values())
        if max(counts.values(), default=0) < 2:
            raise ValueError(
                "shared_experts is true, but no two targets are gates or ups of experts of one block: leave it out, or "
                "split the experts of a model of your own (lowrank_pl.split_experts)"
            )
        shared = {name: stack for name, stack in names.items() if counts[stack] > 1}
        return replace(self, modules=tuple(replace(one, stack=shared.get(one.name, "")) for one in self.modules))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of everything to compress; embeddings come last."""
        return tuple(self.shapes)

    def among(self, names: Container[str]) -> list[Target]:
        """Return the layers to compress whose names, or those of their stacks, are in ``names``, in their order."""
        return [target for target in self.modules if target.stored_as in names]


def droppable(model: nn.Module, targets: Targets) -> list[Target]:
    """Return those of ``targets`` that belong to experts that can be dropped, on which others can take over.

    Raises:
        ValueError: There are none.
    """
    of_experts = [target for target in targets.modules if target.experts]
    found = [target for target in of_experts if can_drop(model.get_submodule(target.experts))]
    if not found:
        kinds = sorted({type(model.get_submodule(target.experts)).__name__ for target in of_experts})
        why = f"{', '.join(kinds)} does not see these weights" if kinds else "no experts are targets"
        raise ValueError(
            "drop_experts is true, but no targeted expert is called with the weights of its tokens' other experts, "
            f"which would have to take over: {why}; leave drop_experts out"
        )
    return found


@dataclass(frozen=True)
class _Matrix:
    """A parameter of a block with two or more dimensions; ``module`` is its linear layer if it belongs to one."""

    name: str
    block: int
    kind: str
    owner: nn.Module
    weight: Tensor
    module: nn.Module | None


def find_targets(model: PreTrainedModel, *, include: Sequence[str] = ("*",), exclude: Sequence[str] = ()) -> Targets:
    """Return the linear layers of the decoder blocks to compress, and the matrices that stay dense.

    One forward pass of two tokens finds the order of the layers and the layers that share an input.

    Args:
        model: A causal language model of transformers; it is left unchanged.
        include: Globs; a layer is taken if one matches its full name or its name inside the block. The word
            ``embeddings`` takes the token embeddings and the head, which no glob does; so does the full name of one.
        exclude: Globs of layers to leave dense all the same.

    Raises:
        ValueError: The model is quantised, a pattern matches nothing, no layer is left, or the embeddings are of a kind
            that can't be compressed.

    >>> from lowrank_pl.models.tiny import tiny_model
    >>> found = find_targets(tiny_model("llama"), include=["self_attn.*"])
    >>> [(target.kind, target.group[-6:]) for target in found.modules[:3]]
    [('self_attn.q_proj', 'q_proj'), ('self_attn.k_proj', 'q_proj'), ('self_attn.v_proj', 'q_proj')]
    """
    _refuse_quantised(model)
    matrices = list(_matrices(model))
    embeddings = _asked_embeddings(model, include, exclude)
    ends = _end_names(model) if embeddings else []
    include = [pattern for pattern in include if not embeddings or pattern not in {EMBEDDINGS, *ends}]
    # Those that exclude the embeddings may match nothing else.
    known = {pattern for pattern in exclude if any(fnmatchcase(name, pattern) for name in ends)}
    if not include and embeddings:
        raise ValueError(
            "only embeddings were asked for: name linear layers too, such as --include '*' embeddings, whose "
            "statistics and budget they share"
        )
    if not include:
        raise ValueError("include is empty, so no linear layer was asked for: give globs or names, such as '*'")
    _check_patterns(matrices, [*include, *(pattern for pattern in exclude if pattern not in known)])
    calls = _probe(model, {matrix.name: matrix.module for matrix in matrices if matrix.module is not None})
    shared = _shared_parameters(model)
    chosen_by = tuple(f"{name}." for name in routers(model).values())
    included, excluded = _Patterns(include), _Patterns(exclude)
    reasons = {matrix.name: _reason(matrix, included, excluded, shared, calls) for matrix in matrices}
    reasons |= {name: ROUTER for name in reasons if f"{name}.".startswith(chosen_by)}
    skipped = tuple(
        Skipped(matrix.name, reason, matrix.weight.numel())
        for matrix in matrices
        if (reason := reasons[matrix.name]) is not None
    )
    _report(skipped)
    taken = {matrix.name: matrix for matrix in matrices if reasons[matrix.name] is None}
    if not taken:
        why = "; ".join(dict.fromkeys(entry.reason for entry in skipped)) or "there is no matrix in them"
        raise ValueError(f"no linear layer to compress is left in the decoder blocks of {type(model).__name__}: {why}")
    return Targets(modules=tuple(_targets(model, taken, calls)), skipped=skipped, embeddings=embeddings)


def _reads_block(name: str) -> bool:
    """Tell whether an expert's layer reads the input of the block, by the names in ``hf_experts.Expert``."""
    return name.rpartition(".")[2] in ("gate_proj", "up_proj")


def find_embeddings(model: PreTrainedModel) -> tuple[EmbeddingTarget, ...]:
    """Return the token embeddings and the head of ``model``; tied ones are one.

    Raises:
        ValueError: One of them is of a kind that can't be compressed.

    >>> from lowrank_pl.models.tiny import tiny_model
    >>> [(found.name, found.head) for found in find_embeddings(tiny_model("gpt2"))]
    [('transformer.wte', 'lm_head')]
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    for module in (embedding, head):
        if module is None or id(module) not in names or not (_is_plain_embedding(module) or _is_linear(module)):
            raise ValueError(
                f"the embeddings or the head of {type(model).__name__} are a {type(module).__name__}: only "
                f"nn.Embedding and nn.Linear can be compressed; leave out --include {EMBEDDINGS}"
            )
        _refuse_small_numbers(module)
    looked_up, multiplied = names[id(embedding)], names[id(head)]
    shape = tuple(embedding.weight.shape)
    if head.weight is embedding.weight:
        return (EmbeddingTarget(looked_up, shape, looked_up, multiplied),)
    return (
        EmbeddingTarget(looked_up, shape, looked_up, None),
        EmbeddingTarget(multiplied, tuple(head.weight.shape), None, multiplied),
    )


def _is_plain_embedding(module: nn.Module) -> bool:
    """Tell whether ``module`` looks up rows and at most multiplies them by a number."""
    if not isinstance(module, nn.Embedding) or {name for name, _ in module.named_parameters()} != {"weight"}:
        return False
    return module.max_norm is None and not is_quantized(module)


def _refuse_small_numbers(module: Any) -> None:
    if not module.weight.is_floating_point() or module.weight.element_size() < 2:
        raise ValueError(f"the embeddings have weights of type {module.weight.dtype}: load the unquantised checkpoint")


def _end_names(model: PreTrainedModel) -> list[str]:
    """Return the names of the embeddings and of the head."""
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    return [name for name, module in model.named_modules() if any(module is end for end in ends)]


def _asked_embeddings(
    model: PreTrainedModel, include: Sequence[str], exclude: Sequence[str]
) -> tuple[EmbeddingTarget, ...]:
    """Return the embeddings and the head that ``include`` asks for and ``exclude`` leaves; tied ones by either name."""
    if not {EMBEDDINGS, *_end_names(model)} & set(include):
        return ()
    found = [
        target
        for target in find_embeddings(model)
        if {EMBEDDINGS, target.embedding, target.head} & set(include)
        and not any(fnmatchcase(place.name, pattern) for place in target.places for pattern in exclude)
    ]
    if not found:
        raise ValueError(f"no embeddings are left of those that were asked for: exclude is {list(exclude)}")
    return tuple(found)


def decoder_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Return the name of the list of decoder blocks, and the list.

    Raises:
        ValueError: No list of modules has as many entries as the config has layers.

    >>> from lowrank_pl.models.tiny import tiny_model
    >>> decoder_blocks(tiny_model("gpt2"))[0]
    'transformer.h'
    """
    count = model.config.get_text_config().num_hidden_layers
    # A vision tower may have as many layers, but lies outside get_decoder().
    inside = set(model.get_decoder().modules())
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and module in inside
    ]
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no list of {count} decoder blocks (config.num_hidden_layers): "
            "only decoders with one module per layer can be compressed"
        )
    # Lists inside a block (say, experts) may have the same length: the blocks have the most parameters.
    return max(found, key=lambda entry: sum(parameter.numel() for parameter in entry[1].parameters()))


def body_of(model: PreTrainedModel) -> nn.Module:
    """Return the part of ``model`` before its head.

    Raises:
        ValueError: It has no decoder blocks; see ``decoder_blocks``.

    >>> from lowrank_pl.models.tiny import tiny_model
    >>> type(body_of(tiny_model("llama4"))).__name__
    'Llama4TextModel'
    """
    body: nn.Module = model.base_model
    if body is model:
        # Llama 4's text model names the part as in the model with images, so transformers finds nothing there.
        parent, dot, _ = decoder_blocks(model)[0].partition(".")
        body = model.get_submodule(parent) if dot else model
    return body


def dense_weight(module: nn.Module) -> Tensor:
    """Return the weight of a linear layer as ``[out, in]``, without a copy (GPT-2's ``Conv1D`` is transposed).

    Raises:
        ValueError: The module is not a plain linear layer.

    >>> dense_weight(nn.Linear(3, 2)).shape
    torch.Size([2, 3])
    >>> dense_weight(Conv1D(2, 3)).shape
    torch.Size([2, 3])
    """
    if not _is_linear(module):
        raise ValueError(
            f"{type(module).__name__} is not a plain linear layer: expected nn.Linear or transformers' Conv1D"
        )
    weight = module.get_parameter("weight")
    return weight.T if isinstance(module, Conv1D) else weight


def weight_of(module: nn.Module) -> Tensor:
    """Return the weight of a linear layer as ``[out, in]``, or that of an embedding, without a copy.

    Raises:
        ValueError: The module is neither.
    """
    return module.weight if isinstance(module, nn.Embedding) else dense_weight(module)


def first_argument(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return the first argument of a module's call, positional or by keyword; None if there is none."""
    return args[0] if args else next(iter(kwargs.values()), None)


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put ``new`` in the place of the submodule called ``name``.

    Raises:
        ValueError: The model has no such submodule.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    >>> replace_module(model, "1", nn.Identity())
    >>> model[1]
    Identity()
    """
    parent, _, last = name.rpartition(".")
    try:
        model.get_submodule(name)
    except AttributeError as error:
        raise ValueError(f"{type(model).__name__} has no module {name!r}: {error}") from error
    if not last:
        raise ValueError("the model itself can't be replaced: give the name of one of its submodules")
    setattr(model.get_submodule(parent), last, new)


@contextmanager
def replaced(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Replace submodules of ``model`` by ``modules``, by name, while the block runs."""
    before = {name: model.get_submodule(name) for name in modules}
    try:
        for name, module in modules.items():
            replace_module(model, name, module)
        yield
    finally:
        for name, module in before.items():
            replace_module(model, name, module)


def _is_linear(module: nn.Module) -> bool:
    """Tell whether ``module`` computes ``weight @ x + bias`` and nothing else, judging by its parameters."""
    if {name for name, _ in module.named_parameters(recurse=False)} not in ({"weight"}, {"weight", "bias"}):
        return False
    if isinstance(module, Conv1D):
        return True
    # Subclasses of nn.Linear may store other parameters (adapters, factors, packed weights) or compute otherwise.
    if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
        return module.weight.shape == (module.out_features, module.in_features)
    return False


def _matrices(model: PreTrainedModel) -> Iterator[_Matrix]:
    """Yield every parameter of the decoder blocks with two or more dimensions."""
    prefix, blocks = decoder_blocks(model)
    for index, block in enumerate(blocks):
        for inner, module in block.named_modules():
            linear = module if _is_linear(module) else None
            for parameter_name, parameter in module.named_parameters(recurse=False):
                if parameter.dim() < 2:
                    continue
                kind = inner if linear is not None else f"{inner}.{parameter_name}".lstrip(".")
                yield _Matrix(f"{prefix}.{index}.{kind}".rstrip("."), index, kind, module, parameter, linear)


class _Patterns:
    """Globs and names of matrices. Names are looked up: a plan gives one per layer, too many to match one by one.

    Args:
        patterns: The globs, and names as a whole or in the block.
    """

    def __init__(self, patterns: Sequence[str]) -> None:
        self.patterns = list(patterns)
        self._places = {pattern: place for place, pattern in reversed([*enumerate(patterns)])}
        self._globs = [pattern for pattern in self._places if _is_glob(pattern)]

    def first(self, matrix: _Matrix) -> str | None:
        """Return the first pattern that matches; None if none does."""
        named = [name for name in (matrix.name, matrix.kind) if name in self._places]
        globs = [glob for glob in self._globs if fnmatchcase(matrix.name, glob) or fnmatchcase(matrix.kind, glob)]
        return min([*named, *globs], key=self._places.__getitem__, default=None)


def _is_glob(pattern: str) -> bool:
    return not {*pattern}.isdisjoint("*?[")


def _check_patterns(matrices: Sequence[_Matrix], patterns: Sequence[str]) -> None:
    """Refuse a pattern that matches nothing: it is misspelt, and the plan would differ from the request."""
    names = dict.fromkeys(name for matrix in matrices for name in (matrix.name, matrix.kind))
    for pattern in patterns:
        found = any(fnmatchcase(name, pattern) for name in names) if _is_glob(pattern) else pattern in names
        if not found:
            kinds = ", ".join(list(dict.fromkeys(matrix.kind for matrix in matrices))[:8])
            example = matrices[0].name if matrices else "none"
            raise ValueError(
                f"pattern {pattern!r} matches no matrix of the decoder blocks: expected a glob for a name "
                f"in the block ({kinds}, ...) or a full name ({example})"
            )


def _reason(
    matrix: _Matrix, include: _Patterns, exclude: _Patterns, shared: set[int], called: Container[str]
) -> str | None:
    """Return why ``matrix`` stays dense, or None if it is a target."""
    excluding = exclude.first(matrix)
    if excluding is not None:
        return f"{BY_PATTERN} {excluding!r}"
    if include.first(matrix) is None:
        return f"{BY_PATTERN}: in none of {include.patterns}"
    kind = type(matrix.owner).__name__
    if matrix.module is None:
        if is_fused(matrix.owner):
            return f"fused experts of {kind} (a 3-D parameter): split_experts makes linear layers of them"
        return f"{matrix.weight.dim()}-D parameter of {kind}, which is no known linear layer"
    if not matrix.weight.is_floating_point() or matrix.weight.element_size() < 2:
        return f"weights of type {matrix.weight.dtype}"
    if id(matrix.weight) in shared:
        return "weight tied to another module"
    return None if matrix.name in called else "never called in a forward pass"


def _shared_parameters(model: nn.Module) -> set[int]:
    """Return the ids of parameters that have more than one name."""
    seen: set[int] = set()
    shared: set[int] = set()
    for _, parameter in model.named_parameters(remove_duplicate=False):
        (shared if id(parameter) in seen else seen).add(id(parameter))
    return shared


def _probe(model: PreTrainedModel, modules: Mapping[str, nn.Module]) -> Calls:
    """Return the inputs of all calls of ``modules`` in a pass of two tokens, by name in the order of first calls."""
    calls: Calls = defaultdict(list)

    def remember(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], dict[str, Tensor]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            value = first_argument(args, kwargs)
            calls[name].append((value, value._version))

        return hook

    tokens = torch.arange(2, device=input_device(model))[None]
    with evaluating(model), all_experts_called(), ExitStack() as hooks:
        for name, module in modules.items():
            hooks.callback(module.register_forward_pre_hook(remember(name), with_kwargs=True).remove)
        model(input_ids=tokens, use_cache=False)
    return dict(calls)


def shared_inputs(model: PreTrainedModel, modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Return for each module the first one that has the same input, itself included, in the order of the first calls.

    One forward pass of two tokens finds out. Modules that it doesn't call are left out.

    Args:
        model: A causal language model of transformers.
        modules: Submodules of it, by name.

    >>> from lowrank_pl.models.tiny import tiny_model
    >>> model = tiny_model("llama")
    >>> found = shared_inputs(model, {name: model.get_submodule(f"model.layers.0.{name}") for name in
    ...     ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")})
    >>> found
    {'mlp.gate_proj': 'mlp.gate_proj', 'mlp.up_proj': 'mlp.gate_proj', 'mlp.down_proj': 'mlp.down_proj'}
    """
    return _groups(_probe(model, modules))


def _groups(calls: Calls) -> dict[str, str]:
    groups: dict[tuple[tuple[int, int], ...], str] = {}
    return {
        name: groups.setdefault(tuple((id(value), version) for value, version in given), name)
        for name, given in calls.items()
    }


def _targets(model: nn.Module, taken: dict[str, _Matrix], calls: Calls) -> Iterator[Target]:
    """Yield the targets in the order of the probe's calls; targets with the same inputs form a group."""
    experts = {f"{name}.{layer}": name for name, module in split_modules(model) for layer, _ in module.named_modules()}
    for name, group in _groups({name: given for name, given in calls.items() if name in taken}).items():
        matrix = taken[name]
        assert matrix.module is not None
        rows, columns = dense_weight(matrix.module).shape
        yield Target(
            name=name,
            block=matrix.block,
            kind=matrix.kind,
            shape=(rows, columns),
            group=group,
            transposed=isinstance(matrix.module, Conv1D),
            experts=experts.get(name, ""),
        )


def _report(skipped: Sequence[Skipped]) -> None:
    """Log each reason once, with the number of matrices and parameters that it leaves dense."""
    by_reason: dict[str, list[Skipped]] = defaultdict(list)
    for entry in skipped:
        by_reason[entry.reason].append(entry)
    for reason, entries in by_reason.items():
        expected = reason == ROUTER or reason.startswith(BY_PATTERN)
        level = logging.INFO if expected else logging.WARNING
        text = "left dense: %d matrices, %d parameters (%s, ...): %s"
        logger.log(level, text, len(entries), sum(entry.parameters for entry in entries), entries[0].name, reason)


def _refuse_quantised(model: PreTrainedModel) -> None:
    """Refuse a model whose weights are packed; a model that was dequantised while loading is dense and passes."""
    # They have a name of packed weights too, for PEFT.
    own = next((name for name, module in model.named_modules() if _is_low_rank(module)), None)
    if own is not None:
        raise ValueError(
            f"{type(model).__name__} is already compressed by lowrank_pl (module {own}): give the dense model that it "
            "was made from"
        )
    config = getattr(model.config, "quantization_config", None)
    as_dict = config if isinstance(config, dict) or config is None else config.to_dict()
    method = str((as_dict or {}).get("quant_method", "unknown method")).rpartition(".")[2].lower()
    marked = bool(getattr(model, "is_quantized", False)) and method != OWN_METHOD
    packed = next((name for name, module in model.named_modules() if _is_packed(module)), None)
    if marked or packed is not None:
        where = f"module {packed}" if packed is not None else method
        raise ValueError(
            f"{type(model).__name__} is quantised ({where}) and can't be compressed: load the unquantised checkpoint"
        )


def _is_low_rank(module: nn.Module) -> bool:
    """Tell a low-rank layer that is not rounded, of this package or of a folder's copy of its code."""
    kinds = {kind.__name__ for kind in type(module).__mro__}
    return not is_quantized(module) and not kinds.isdisjoint(_LOW_RANK)


def _is_packed(module: nn.Module) -> bool:
    """Tell whether a quantisation library keeps the weights of ``module`` packed."""
    weight = getattr(module, "weight", None)
    if any(hasattr(module, name) for name in PACKED_WEIGHTS) or type(weight).__module__.startswith("torchao"):
        return True
    subclass = isinstance(module, nn.Linear) and type(module) is not nn.Linear
    return subclass and isinstance(weight, Tensor) and not weight.is_floating_point()


def model_parameters(model: nn.Module) -> int:
    """Return the number of parameters, tied ones counted once; of rounded matrices all numbers, and not the scales."""
    rounded = 0
    for module in filter(is_quantized, model.modules()):
        layer: Any = module
        for name, scales in module.named_parameters(recurse=False):
            if hasattr(module, f"{name}_packed"):
                rounded += len(scales) * layer.columns(name) - scales.numel()
    return sum(parameter.numel() for parameter in model.parameters()) + rounded


def targeted_parameters(targets: Targets) -> int:
    """Return the number of parameters of everything to compress, without biases; tied embeddings count once."""
    return sum(rows * columns for rows, columns in targets.shapes.values())


class StandIn:
    """A layer that takes the place of a dense one while ranks are learned or measured.

    It is no abstract base class: FSDP2 assigns a layer's ``__class__``, which Python allows only
    where the memory layout of both classes is the same.
    """

    weight: Tensor

    def original(self) -> nn.Module:
        """Return the dense layer whose place this one takes."""
        raise NotImplementedError
