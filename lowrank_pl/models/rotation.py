"""A dense model with the same outputs and other weights: its residual stream is turned by a random orthogonal matrix.

No model family is known by name. Norms, and the linear layers that read or write the residual stream, are found by a
forward pass of two tokens. Every parameter must have a known role, and the result is compared with the model, so that
a model that can't be rotated is refused.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Container
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from lowrank_pl.models.eval_mode import evaluating, input_device
from lowrank_pl.models.hf_layers import LowRankEmbedding
from lowrank_pl.models.identity import Origin
from lowrank_pl.models.targets import Target, dense_weight, find_targets, first_argument

__all__ = ["RotationError", "logit_difference", "rotated", "tolerance"]

_log = logging.getLogger(__name__)


class RotationError(ValueError):
    """A model that can't be rotated."""


@dataclass(frozen=True)
class _Norm:
    """A norm of the residual stream.

    Args:
        name: Its name.
        unit: The weight that means a gain of 1: 0 if the norm multiplies by ``1 + weight``, else 1.
        readers: The linear layers that read its output, in the decoder blocks.
        head: Whether the head reads its output.
    """

    name: str
    unit: float
    readers: tuple[Target, ...]
    head: bool


@dataclass(frozen=True)
class _Stream:
    """Everything that reads the residual stream or writes to it, apart from the embeddings and the head."""

    norms: tuple[_Norm, ...]
    writers: tuple[Target, ...]


def rotated(model: PreTrainedModel, seed: int = 0, *, stream: bool = True) -> PreTrainedModel:
    """Return a model that computes the same logits as ``model`` with other weights.

    The gain of every RMSNorm ``g`` is folded into the linear layers that read it, and the residual stream ``x`` is
    replaced by ``x Q`` with a random orthogonal matrix ``Q``: ``n(x) diag(g) W' = n(x Q) (Q' diag(g) W')`` for a norm
    ``n`` without gain (SliceGPT, arXiv 2401.15024; QuaRot, arXiv 2404.00456). Norms within heads stay as they are.
    Everything is computed in float64 and rounded once, to the type of ``model``.

    A head that is tied to the embeddings is untied, unless the gain of the final norm is the same for all channels.
    The tied head would need a gain ``g*`` with ``Q diag(g*) Q' = diag(g)``. If the entries of ``g`` differ, only
    signed permutations ``Q`` allow this. The model then has as many more parameters as its head.

    Args:
        model: A dense causal language model whose norms are RMSNorms; it stays unchanged and shares no changed tensor
            with the result.
        seed: Seed of the rotation; the caller's random state is unchanged.
        stream: Turn the residual stream. Without it, gains are folded all the same, except for that of the final norm,
            the values of each attention head are turned by a random rotation of their own, and the hidden features of
            MLPs are permuted. A tied head stays tied then, and the embeddings stay as they are.

    Raises:
        RotationError: The model has LayerNorms, norms between a block's output and the residual stream, or parameters
            of an unknown role, or the rotated model has other logits.

    >>> from lowrank_pl.models.tiny import tiny_model
    >>> model = tiny_model("llama")
    >>> turned = rotated(model)
    >>> torch.allclose(turned(torch.arange(8)[None]).logits, model(torch.arange(8)[None]).logits, atol=1e-5)
    True
    >>> torch.allclose(turned.lm_head.weight, model.lm_head.weight, atol=0.1)
    False
    """
    found = _find_stream(model)
    # Parameters are replaced, never written to, so the copy can share the tensors that stay.
    result = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    width = model.get_input_embeddings().weight.shape[1]
    with torch.no_grad():
        if stream:
            _rotate(result, found, _random_rotation(width, seed, input_device(model)))
        else:
            _fold(result, found)
            _turn_inside_blocks(result, seed)
    vocabulary = model.get_input_embeddings().num_embeddings
    tokens = torch.randint(vocabulary, (2, 16), generator=torch.Generator().manual_seed(seed))
    difference = logit_difference(model, result, tokens)
    if not difference <= tolerance(model.dtype):
        raise RotationError(
            f"{type(model).__name__} can't be rotated: its logits change by {difference:.2g} (relative root mean "
            f"square, {tolerance(model.dtype):.2g} allowed in {model.dtype}), so it uses the residual stream in a way "
            "that is not known here; or load it in float32, if it was loaded in half precision"
        )
    return result


def tolerance(dtype: torch.dtype) -> float:
    """Return the relative root-mean-square difference of logits that rounding of weights of ``dtype`` may cause."""
    return float(torch.finfo(dtype).eps ** 0.5)


def logit_difference(one: PreTrainedModel, other: PreTrainedModel, tokens: Tensor) -> float:
    """Return the root-mean-square difference of the logits of two models, relative to those of the first.

    Args:
        one: A causal language model.
        other: Another one with the same vocabulary.
        tokens: Token ids ``[sequences, length]``.
    """
    with evaluating(one), evaluating(other):
        first, second = (
            model(tokens.to(input_device(model)), use_cache=False).logits.double().cpu() for model in (one, other)
        )
    difference: float = ((second - first).norm() / first.norm()).item()
    return difference


def _random_rotation(width: int, seed: int, device: torch.device) -> Tensor:
    """Return a random orthogonal matrix ``[width, width]``, uniform in Haar's measure, in float64."""
    gaussian = torch.randn(width, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    rotation, triangle = torch.linalg.qr(gaussian)
    # Without the signs, the result depends on the convention of the QR decomposition.
    turned: Tensor = (rotation * triangle.diagonal().sign()).to(device)
    return turned


def _rotate(model: PreTrainedModel, stream: _Stream, rotation: Tensor) -> None:
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    final = next(norm for norm in stream.norms if norm.head)
    tied = head.weight is embeddings.weight
    gain = _gain(model, final)
    keep_tie = tied and bool((gain == gain[0]).all())
    old = head.weight
    embeddings.weight = _parameter(embeddings.weight.double() @ rotation, embeddings.weight)
    if keep_tie:
        head.weight = embeddings.weight
    else:
        head.weight = _parameter(old.double() * gain @ rotation, old)
    if tied and not keep_tie:
        _untie(model, old.numel())
    _fold(model, stream, rotation, final=not keep_tie)
    for writer in stream.writers:
        layer = model.get_submodule(writer.name)
        _set_weight(layer, writer, rotation.mT @ dense_weight(layer).double())
        if layer.bias is not None:
            layer.bias = _parameter(layer.get_parameter("bias").double() @ rotation, layer.bias)


def _fold(model: PreTrainedModel, stream: _Stream, rotation: Tensor | None = None, *, final: bool = False) -> None:
    """Fold the gains of norms into the layers that read them, which read the stream after ``rotation``.

    Args:
        model: The model to change.
        stream: Its norms.
        rotation: ``[width, width]``; none by default.
        final: Set the gain of the final norm to 1 too; its head has it already.
    """
    for norm in tqdm(stream.norms, desc="rotate", unit="norm"):
        gain, module = _gain(model, norm), model.get_submodule(norm.name)
        for reader in norm.readers:
            layer = model.get_submodule(reader.name)
            weight = dense_weight(layer).double() * gain
            _set_weight(layer, reader, weight if rotation is None else weight @ rotation)
        if final or not norm.head:
            module.weight = _parameter(torch.full_like(module.get_parameter("weight"), norm.unit), module.weight)


def _turn_inside_blocks(model: PreTrainedModel, seed: int) -> None:
    """Turn the values of each attention head, and permute the hidden features of each MLP.

    Layers are known by the names that most families share; the comparison of logits finds every mistake.

    Raises:
        RotationError: A block has other layers.
    """
    generator = torch.Generator().manual_seed(seed)
    for target in (one for one in find_targets(model).modules if one.kind.endswith(("v_proj", "down_proj"))):
        parent = target.name.rpartition(".")[0]
        try:
            if target.kind.endswith("v_proj"):
                values, output = (model.get_submodule(f"{parent}.{name}") for name in ("v_proj", "o_proj"))
                _turn_values(values, output, model.get_submodule(parent).head_dim, generator)
            else:
                names = ("gate_proj", "up_proj", "down_proj")
                gate, up, down = (model.get_submodule(f"{parent}.{name}") for name in names)
                _permute_hidden(gate, up, down, generator)
        except AttributeError as error:
            raise RotationError(
                f"{type(model).__name__} can't be turned inside its blocks: expected v_proj, o_proj and head_dim in "
                f"attention, and gate_proj, up_proj and down_proj in MLPs ({error}); turn its stream instead"
            ) from None


def _turn_values(values: nn.Module, output: nn.Module, size: Any, generator: torch.Generator) -> None:
    """Turn the values of each key/value head of ``size`` dimensions, and turn them back in the output projection."""
    into, out_of = dense_weight(values).double(), dense_weight(output).double()
    heads, repeats = len(into) // size, out_of.shape[1] // len(into)
    turned = into.new_empty(heads, size, into.shape[1])
    back = out_of.view(len(out_of), heads, repeats, size).clone()
    for head in range(heads):
        turn = _random_rotation(size, int(torch.randint(2**62, (), generator=generator)), into.device)
        turned[head] = turn.mT @ into.view(heads, size, -1)[head]
        back[:, head] = back[:, head] @ turn
        if values.bias is not None:
            rows = slice(head * size, (head + 1) * size)
            bias = values.get_parameter("bias").double()
            bias[rows] = bias[rows] @ turn
            values.bias = _parameter(bias, values.bias)
    values.weight = _parameter(turned.view_as(into), values.weight)
    output.weight = _parameter(back.view_as(out_of), output.weight)


def _permute_hidden(gate: nn.Module, up: nn.Module, down: nn.Module, generator: torch.Generator) -> None:
    """Permute the hidden features of an MLP."""
    order = torch.randperm(dense_weight(down).shape[1], generator=generator).to(dense_weight(down).device)
    for layer in (gate, up):
        layer.weight = _parameter(dense_weight(layer)[order], layer.weight)
        if layer.bias is not None:
            layer.bias = _parameter(layer.get_parameter("bias")[order], layer.bias)
    down.weight = _parameter(dense_weight(down)[:, order], down.weight)


def _gain(model: PreTrainedModel, norm: _Norm) -> Tensor:
    weight: Tensor = model.get_submodule(norm.name).get_parameter("weight").double()
    return weight + (1 - norm.unit)


def _set_weight(layer: nn.Module, target: Target, weight: Tensor) -> None:
    layer.weight = _parameter(weight.T if target.transposed else weight, layer.weight)


def _parameter(values: Tensor, old: Any) -> nn.Parameter:
    return nn.Parameter(values.to(old).contiguous(), requires_grad=old.requires_grad)


def _untie(model: PreTrainedModel, head: int) -> None:
    for config in {id(config): config for config in (model.config, model.config.get_text_config())}.values():
        config.tie_word_embeddings = False
    # transformers 5 keeps the names of tied parameters; none are tied now.
    vars(model).get("all_tied_weights_keys", {}).clear()
    origin = Origin.of(model)
    if origin is not None:
        # What remains of the base is counted with the same head on both sides.
        replace(origin, parameters=origin.parameters + head).write(model)
    _log.warning("the head is untied from the embeddings: %s parameters more", f"{head:,}")


def _find_stream(model: PreTrainedModel) -> _Stream:
    """Return what reads the residual stream and what writes to it.

    Raises:
        RotationError: A parameter has no known role.
    """
    kind, width = type(model).__name__, model.get_input_embeddings().weight.shape[1]
    head = model.get_output_embeddings()
    if isinstance(model.get_input_embeddings(), LowRankEmbedding):
        raise RotationError(f"{kind} can't be rotated: its embeddings are of low rank; rotate the base instead")
    if not isinstance(head, nn.Linear) or head.weight.shape[1] != width:
        raise RotationError(f"{kind} can't be rotated: expected a head that is a linear layer on the residual stream")
    norms = _norm_units(model, width)
    targets = find_targets(model)
    if targets.skipped:
        first = targets.skipped[0]
        raise RotationError(f"{kind} can't be rotated: {first.name} is no linear layer to rotate ({first.reason})")
    layers = {target.name: model.get_submodule(target.name) for target in targets.modules}
    calls = _Calls(model, {**layers, **{name: model.get_submodule(name) for name in norms}, "": head})
    found: list[_Norm] = []
    read: set[str] = set()
    for name, unit in norms.items():
        source = next((layer for layer in layers if calls.feeds(layer, name)), None)
        if source is not None:
            raise RotationError(
                f"{kind} can't be rotated: {name} scales the output of {source} channel by channel before it is added "
                "to the residual stream, and a rotation can't pass these gains"
            )
        readers = tuple(target for target in targets.modules if calls.feeds(name, target.name))
        read.update(reader.name for reader in readers)
        found.append(_Norm(name, unit, readers, calls.feeds(name, "")))
        if not readers and not found[-1].head:
            raise RotationError(f"{kind} can't be rotated: no linear layer reads {name}, so its gain can't be folded")
    if sum(norm.head for norm in found) != 1:
        raise RotationError(f"{kind} can't be rotated: expected a head that reads the final norm")
    writers = tuple(one for one in targets.modules if one.name not in read and one.shape[0] == width)
    _check_all_known(model, width, {*layers, *norms})
    return _Stream(tuple(found), writers)


def _norm_units(model: PreTrainedModel, width: int) -> dict[str, float]:
    """Return the norms of the residual stream by name, each with the weight that means a gain of 1.

    Raises:
        RotationError: A norm is none that a rotation can pass.
    """
    units = {}
    turn = _random_rotation(width, 0, input_device(model))
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if "weight" not in own or any(parameter.shape != (width,) for parameter in own.values()):
            continue
        unit = next((unit for unit in (1.0, 0.0) if _is_rms_norm(module, unit, turn)), None)
        if unit is None:
            raise RotationError(
                f"{type(model).__name__} can't be rotated: its norm {name} ({type(module).__name__}) is no RMSNorm. A "
                "LayerNorm subtracts the mean over channels, which a rotation changes"
            )
        units[name] = unit
    return units


def _is_rms_norm(module: nn.Module, unit: float, turn: Tensor) -> bool:
    """Tell whether ``module`` commutes with the rotation ``turn`` at the weight ``unit``, and is scaled by its gain."""
    weight = module.get_parameter("weight")
    if len(list(module.parameters())) > 1:
        return False
    probe = torch.randn(4, len(weight), dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(turn.device)
    gain = probe[3].abs() + 0.5

    def computed(values: Tensor, given: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(module, {"weight": values}, (given.float(),)).double()
        return result

    plain = computed(torch.full_like(weight, unit, dtype=torch.float32), probe)
    turned = computed(torch.full_like(weight, unit, dtype=torch.float32), probe @ turn)
    scaled = computed((gain - 1 + unit).float(), probe)
    return bool(
        plain.abs().max() > 0
        and torch.allclose(turned, plain @ turn, atol=1e-4)
        and torch.allclose(scaled, plain * gain, atol=1e-4)
    )


def _check_all_known(model: PreTrainedModel, width: int, known: Container[str]) -> None:
    """Raise ``RotationError`` if a parameter outside the ``known`` modules may touch the residual stream."""
    ends = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    for name, module in model.named_modules():
        if name in known or id(module) in ends:
            continue
        for own, parameter in module.named_parameters(recurse=False):
            # Vectors of another size, such as the gains of norms within heads, don't touch the stream.
            if parameter.dim() != 1 or len(parameter) == width:
                raise RotationError(
                    f"{type(model).__name__} can't be rotated: {name}.{own} of shape {list(parameter.shape)} has no "
                    "known role in the residual stream"
                )


class _Calls:
    """Which of ``modules`` read the output of which others, by a forward pass of two tokens.

    Args:
        model: The model.
        modules: Some of its modules, by name.
    """

    def __init__(self, model: PreTrainedModel, modules: dict[str, nn.Module]) -> None:
        # Tensors are kept until the end of the pass, so that no address is used twice.
        self._inputs: dict[str, list[tuple[int, int]]] = {name: [] for name in modules}
        self._outputs: dict[str, list[tuple[int, int]]] = {name: [] for name in modules}
        alive: list[Any] = []

        def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]:
            def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
                given = first_argument(args, kwargs)
                alive.extend((given, output))
                self._inputs[name].append(_key(given))
                self._outputs[name].append(_key(output))

            return keep

        tokens = torch.arange(2, device=input_device(model))[None]
        with evaluating(model), ExitStack() as hooks:
            for name, module in modules.items():
                hooks.callback(module.register_forward_hook(hook(name), with_kwargs=True).remove)
            model(input_ids=tokens, use_cache=False)

    def feeds(self, one: str, other: str) -> bool:
        """Tell whether module ``other`` reads the output of module ``one``, reshaped or not."""
        return not set(self._outputs[one]).isdisjoint(self._inputs[other])


def _key(tensor: Tensor) -> tuple[int, int]:
    """Return what identifies the values of a tensor: its address, and its version, since it may be overwritten."""
    return tensor.data_ptr(), tensor._version
