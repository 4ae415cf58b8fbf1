"""Width pruning of MLPs: find the hidden neurons of a model, and remove some of them.

No model family is known by name. A module is an MLP if removing hidden neurons from its linear layers gives the same
output as ignoring them. The config's setting of the width is the one whose change gives the pruned shapes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lowrank_pl.factors.decomposition import SquareRoot
from lowrank_pl.methods.prune.eliminate import prune_inputs
from lowrank_pl.models.eval_mode import evaluating
from lowrank_pl.models.hf_experts import split_modules
from lowrank_pl.models.identity import Origin, parent_name
from lowrank_pl.models.targets import Target, Targets, dense_weight, replace_module, replaced

__all__ = [
    "HiddenNeurons",
    "find_hidden_neurons",
    "find_mlps",
    "prune_model",
    "pruned_config",
    "resized_layer",
    "rows_of",
]

Weights = Callable[[Target], tuple[Tensor, SquareRoot]]


@dataclass(frozen=True)
class HiddenNeurons:
    """The hidden neurons of an MLP.

    Args:
        reader: The linear layer that reads them: the down-projection.
        writers: The linear layers that compute them. Neuron ``i`` depends on output ``i`` of each; a fused layer has
            such an output in each of its parts.
    """

    reader: Target
    writers: tuple[Target, ...]

    @property
    def width(self) -> int:
        """Number of hidden neurons."""
        return self.reader.shape[1]

    @property
    def parent(self) -> str:
        """Name of the module that contains these linear layers."""
        return parent_name(self.reader)


def find_hidden_neurons(model: PreTrainedModel, targets: Targets) -> list[HiddenNeurons]:
    """Return the hidden neurons of every MLP, in the order of the blocks.

    Args:
        model: A causal language model; it stays unchanged.
        targets: Its target layers.

    Raises:
        ValueError: The model has no MLP, MLPs of several widths, which one setting can't describe, or experts.
    """
    if split_modules(model):
        raise ValueError(
            f"{type(model).__name__} is a mixture of experts, whose MLPs can't be pruned in width: compress its "
            "experts by ranks alone"
        )
    found = find_mlps(model, targets)
    if not found:
        raise ValueError(
            f"no MLP that can be pruned was found in {type(model).__name__}: expected a module with linear layers "
            "whose outputs, neuron by neuron, are the input of another of its linear layers"
        )
    widths = sorted({hidden.width for hidden in found})
    if len(widths) > 1:
        raise ValueError(f"the MLPs of {type(model).__name__} are {widths} wide: expected one width")
    return found


def find_mlps(model: PreTrainedModel, targets: Targets) -> list[HiddenNeurons]:
    """Return the hidden neurons of every MLP, whatever their widths, in the order of the blocks; there may be none.

    Arguments are those of ``find_hidden_neurons``.
    """
    found = []
    for _, inside in groupby(targets.modules, key=lambda target: target.block):
        found += [hidden for hidden in _candidates(list(inside)) if _is_mlp(model, hidden)]
    return found


def pruned_config(model: PreTrainedModel, hidden: Sequence[HiddenNeurons], width: int) -> PretrainedConfig:
    """Return the config of ``model`` with MLPs of ``width``.

    Args:
        model: The unpruned model; it stays unchanged.
        hidden: All of its MLPs.
        width: Hidden neurons that each MLP keeps.

    Raises:
        ValueError: No setting gives these shapes, for example because MLPs of another kind depend on the same setting.
    """
    origin = Origin.of(model)
    if origin is None or not origin.heads_left:
        wanted = _shapes(model)
    else:
        # Attention has fewer heads than any config says: only the MLPs are compared.
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            wanted = _shapes(type(model)(copy.deepcopy(model.config)))
    for target, reads in ((target, target is mlp.reader) for mlp in hidden for target in (mlp.reader, *mlp.writers)):
        rows = target.shape[0] if reads else target.shape[0] // hidden[0].width * width
        columns = width if reads else target.shape[1]
        wanted[f"{target.name}.weight"] = (columns, rows) if target.transposed else (rows, columns)
        if f"{target.name}.bias" in wanted:
            wanted[f"{target.name}.bias"] = (rows,)
    settings = model.config.get_text_config().to_dict()
    own = [key for key, value in settings.items() if value == hidden[0].width]
    # A width of None follows from another setting until it is set.
    for key in [*own, *(key for key, value in settings.items() if value is None)]:
        config = copy.deepcopy(model.config)
        setattr(config.get_text_config(), key, width)
        # A setting of another kind may not accept a number.
        with suppress(Exception), torch.random.fork_rng(devices=[]), torch.device("meta"):
            if _shapes(type(model)(config)) == wanted:
                return config
    raise ValueError(
        f"no setting of {type(model.config).__name__} gives MLPs of width {width} without changing other shapes: "
        "this model can't be pruned in width"
    )


def prune_model(
    model: PreTrainedModel,
    hidden: Sequence[HiddenNeurons],
    widths: Sequence[int],
    weights: Weights,
    *,
    damping: float = 0.1,
) -> float:
    """Prune every MLP of ``model`` in width and return the predicted loss, in nats per token.

    Args:
        model: Changed in place, with its config.
        hidden: All of its MLPs.
        widths: Hidden neurons that each MLP keeps. If these differ, the config keeps the width that it had.
        weights: Returns, for the reader of an MLP, the second moment of the hidden neurons and the square root of the
            weighting of its output errors.
        damping: As in ``prune_inputs``.

    Raises:
        ValueError: A width is not in ``1 ...`` the present one, or no setting of the model gives it.
    """
    for width in widths:
        if not 1 <= width <= hidden[0].width:
            raise ValueError(f"a width of {width} was requested: expected 1 to {hidden[0].width}")
    one = len(set(widths)) == 1
    config = pruned_config(model, hidden, widths[0]) if one else copy.deepcopy(model.config)
    squares = 0.0
    for mlp, width in zip(tqdm(hidden, desc="prune", unit="MLP"), widths, strict=True):
        if width == mlp.width:
            continue
        moment, outputs = weights(mlp.reader)
        weight = dense_weight(model.get_submodule(mlp.reader.name)).detach()
        found = prune_inputs(weight, moment, width, outputs=outputs, damping=damping)
        for name, module in _pruned_layers(model, mlp, found.features, found.weight.to(weight)).items():
            replace_module(model, name, module)
        squares += found.loss
    model.config = config
    return squares / 2


def rows_of(writer: Target, width: int, features: Tensor) -> Tensor:
    """Return the outputs of ``writer`` that compute ``features`` of ``width``, for each part of a fused layer."""
    outputs = torch.arange(writer.shape[0], device=features.device)
    return outputs.view(-1, width)[:, features].flatten()


def _candidates(inside: Sequence[Target]) -> Iterator[HiddenNeurons]:
    """Yield linear layers of one block, in call order, whose inputs may come from other layers of the same module."""
    for number, reader in enumerate(inside):
        earlier = [target for target in inside[:number] if parent_name(target) == parent_name(reader)]
        writers = tuple(target for target in earlier if target.shape[0] % reader.shape[1] == 0)
        if writers:
            yield HiddenNeurons(reader, writers)


def _is_mlp(model: PreTrainedModel, hidden: HiddenNeurons) -> bool:
    """Tell whether removing every other hidden neuron from the module gives the same output as ignoring these."""
    module = model.get_submodule(hidden.parent)
    reader = model.get_submodule(hidden.reader.name)
    kept = torch.arange(0, hidden.width, 2, device=model.device)
    weight = dense_weight(reader).detach()
    unread = torch.zeros_like(weight).index_copy(1, kept, weight[:, kept])
    generator = torch.Generator().manual_seed(0)
    tried = torch.randn(1, 4, hidden.writers[0].shape[1], generator=generator).to(weight)

    def computed(modules: Mapping[str, nn.Module]) -> Any:
        with evaluating(model), replaced(model, modules):
            return module(tried)

    try:
        all_read, whole = computed({}), computed({hidden.reader.name: resized_layer(reader, unread)})
        part = computed(_pruned_layers(model, hidden, kept, weight[:, kept]))
    except (TypeError, RuntimeError, ValueError):
        # The module has several inputs, or needs its width elsewhere, as attention does for its heads.
        return False
    if not all(isinstance(output, Tensor) for output in (all_read, whole, part)):
        return False
    error, change = (part - whole).float().norm(), (all_read - whole).float().norm()
    return bool(change > 0 and error <= torch.finfo(weight.dtype).eps ** 0.5 * change)


def _pruned_layers(
    model: PreTrainedModel, hidden: HiddenNeurons, features: Tensor, weight: Tensor
) -> dict[str, nn.Module]:
    """Return the layers of an MLP with ``features`` only, by name; ``weight`` ``[out, kept]`` is the reader's."""
    modules = {hidden.reader.name: resized_layer(model.get_submodule(hidden.reader.name), weight)}
    for writer in hidden.writers:
        old = model.get_submodule(writer.name)
        rows = rows_of(writer, hidden.width, features)
        modules[writer.name] = resized_layer(old, dense_weight(old).detach()[rows], rows)
    return modules


def resized_layer(module: nn.Module, weight: Tensor, outputs: Tensor | None = None) -> nn.Module:
    """Return a layer like ``module`` with ``weight`` ``[out, in]``, and with the bias of ``outputs`` or of all."""
    rows, columns = weight.shape
    bias: Any = module.bias
    with torch.device("meta"):
        new: Any = (
            Conv1D(rows, columns) if isinstance(module, Conv1D) else nn.Linear(columns, rows, bias=bias is not None)
        )
    values = (weight.T if isinstance(module, Conv1D) else weight).contiguous()
    new.weight = nn.Parameter(values, requires_grad=False)
    if bias is not None:
        new.bias = nn.Parameter((bias if outputs is None else bias[outputs]).detach().clone(), requires_grad=False)
    made: nn.Module = new.train(module.training)
    return made


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
