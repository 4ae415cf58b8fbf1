"""Narrower MLPs: where a model's hidden features are, and the same model with fewer of them.

Nothing here knows a family by name: an MLP is what computes the same when its maps lose features as when these count
for nothing, and the setting of its width is the one whose change gives the shapes that are left.
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
from lowrank_pl.methods.prune.eliminate import leave_out
from lowrank_pl.models.eval_mode import evaluating
from lowrank_pl.models.identity import parent_name
from lowrank_pl.models.targets import Target, Targets, dense_weight, replace_module, replaced

__all__ = ["Hidden", "find_hidden", "prune_model", "pruned_config", "rows_of"]

Weights = Callable[[Target], tuple[Tensor, SquareRoot]]


@dataclass(frozen=True)
class Hidden:
    """The hidden features of an MLP.

    Args:
        reader: The map that is fed them.
        writers: The maps whose outputs they are made of, each feature of the output of its own number; or, where one
            map stands for several, of one in each part of its outputs.
    """

    reader: Target
    writers: tuple[Target, ...]

    @property
    def width(self) -> int:
        """How many features there are."""
        return self.reader.shape[1]

    @property
    def parent(self) -> str:
        """Name of the module that all the maps are in."""
        return parent_name(self.reader)


def find_hidden(model: PreTrainedModel, targets: Targets) -> list[Hidden]:
    """Return the hidden features of every MLP, in the order of the blocks.

    Args:
        model: A causal language model; left as it was.
        targets: Its linear maps.

    Raises:
        ValueError: There are none, or MLPs of several widths, which one setting can't tell.
    """
    found = []
    for _, inside in groupby(targets.modules, key=lambda target: target.block):
        found += [hidden for hidden in _candidates(list(inside)) if _is_mlp(model, hidden)]
    if not found:
        raise ValueError(
            f"no MLP that can be narrowed was found in {type(model).__name__}: expected maps of one module whose "
            "outputs another one of its maps is fed, feature by feature"
        )
    widths = sorted({hidden.width for hidden in found})
    if len(widths) > 1:
        raise ValueError(f"the MLPs of {type(model).__name__} are {widths} wide: expected one width")
    return found


def pruned_config(model: PreTrainedModel, hidden: Sequence[Hidden], width: int) -> PretrainedConfig:
    """Return the config of ``model`` with MLPs of ``width``.

    Args:
        model: The model that is to be narrowed; left as it was.
        hidden: All of its MLPs.
        width: Features that each is to keep.

    Raises:
        ValueError: No setting leads to these shapes, as where MLPs of another kind depend on the same one.
    """
    wanted = _shapes(model)
    for target, reads in ((target, target is mlp.reader) for mlp in hidden for target in (mlp.reader, *mlp.writers)):
        rows = target.shape[0] if reads else target.shape[0] // hidden[0].width * width
        columns = width if reads else target.shape[1]
        wanted[f"{target.name}.weight"] = (columns, rows) if target.transposed else (rows, columns)
        if f"{target.name}.bias" in wanted:
            wanted[f"{target.name}.bias"] = (rows,)
    settings = model.config.get_text_config().to_dict()
    own = [key for key, value in settings.items() if value == hidden[0].width]
    # Where the width is no setting of its own, it follows from another one until it is set.
    for key in [*own, *(key for key, value in settings.items() if value is None)]:
        config = copy.deepcopy(model.config)
        setattr(config.get_text_config(), key, width)
        # A setting of another kind may not take a number.
        with suppress(Exception), torch.random.fork_rng(devices=[]), torch.device("meta"):
            if _shapes(type(model)(config)) == wanted:
                return config
    raise ValueError(
        f"no setting of {type(model.config).__name__} makes the MLPs {width} wide and leaves all else as it is: "
        "a model like this can't be narrowed"
    )


def prune_model(
    model: PreTrainedModel,
    hidden: Sequence[Hidden],
    widths: Sequence[int],
    weights: Weights,
    *,
    damping: float = 0.1,
) -> float:
    """Leave out hidden features of every MLP of ``model`` and return the loss that this is predicted to cost, in nats.

    Args:
        model: Is changed, its config as well.
        hidden: All of its MLPs.
        widths: Features that each keeps. Where these differ, its config goes on to say what it said.
        weights: Gives for the map that reads them the second moment of the features, and the root of what the errors of
            its outputs count.
        damping: As in ``leave_out``.

    Raises:
        ValueError: A width is none of ``1 ...`` the present one, or no setting of the model leads to it.
    """
    for width in widths:
        if not 1 <= width <= hidden[0].width:
            raise ValueError(f"a width of {width} was asked for: expected 1 to the {hidden[0].width} that there is")
    one = len(set(widths)) == 1
    config = pruned_config(model, hidden, widths[0]) if one else copy.deepcopy(model.config)
    squares = 0.0
    for mlp, width in zip(tqdm(hidden, desc="prune", unit="MLP"), widths, strict=True):
        if width == mlp.width:
            continue
        moment, outputs = weights(mlp.reader)
        weight = dense_weight(model.get_submodule(mlp.reader.name)).detach()
        found = leave_out(weight, moment, width, outputs=outputs, damping=damping)
        for name, module in _narrowed(model, mlp, found.features, found.weight.to(weight)).items():
            replace_module(model, name, module)
        squares += found.loss
    model.config = config
    return squares / 2


def rows_of(writer: Target, width: int, features: Tensor) -> Tensor:
    """Return the outputs of ``writer`` that ``features`` of ``width`` are made of, part by part."""
    outputs = torch.arange(writer.shape[0], device=features.device)
    return outputs.view(-1, width)[:, features].flatten()


def _candidates(inside: Sequence[Target]) -> Iterator[Hidden]:
    """Yield maps of one block, in the order of their calls, whose inputs others of the same module may have made."""
    for number, reader in enumerate(inside):
        earlier = [target for target in inside[:number] if parent_name(target) == parent_name(reader)]
        writers = tuple(target for target in earlier if target.shape[0] % reader.shape[1] == 0)
        if writers:
            yield Hidden(reader, writers)


def _is_mlp(model: PreTrainedModel, hidden: Hidden) -> bool:
    """Tell whether the module computes the same without every other feature as when these count for nothing."""
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
        all_read, whole = computed({}), computed({hidden.reader.name: _like(reader, unread)})
        part = computed(_narrowed(model, hidden, kept, weight[:, kept]))
    except (TypeError, RuntimeError, ValueError):
        # Not a module of one input, or one that needs its width elsewhere, as attention does for its heads.
        return False
    if not all(isinstance(output, Tensor) for output in (all_read, whole, part)):
        return False
    error, change = (part - whole).float().norm(), (all_read - whole).float().norm()
    return bool(change > 0 and error <= torch.finfo(weight.dtype).eps ** 0.5 * change)


def _narrowed(model: PreTrainedModel, hidden: Hidden, features: Tensor, weight: Tensor) -> dict[str, nn.Module]:
    """Return the maps of an MLP with ``features`` only, ``weight`` ``[out, kept]`` being the reader's."""
    modules = {hidden.reader.name: _like(model.get_submodule(hidden.reader.name), weight)}
    for writer in hidden.writers:
        old = model.get_submodule(writer.name)
        rows = rows_of(writer, hidden.width, features)
        modules[writer.name] = _like(old, dense_weight(old).detach()[rows], rows)
    return modules


def _like(module: nn.Module, weight: Tensor, outputs: Tensor | None = None) -> nn.Module:
    """Return a map of the class of ``module`` with ``weight`` ``[out, in]``, and of its bias the ``outputs`` or all."""
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
