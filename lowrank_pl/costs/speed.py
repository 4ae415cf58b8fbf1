"""How fast a model decodes and reads prompts: dense, and in each form of storage, beside the limit that its size sets.

Speed depends on shapes, not on values: compressed layers hold random numbers here, and every layer keeps the same
fraction of its parameters, so that neither text nor decomposition is needed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from lowrank_pl.models.eval_mode import evaluating
from lowrank_pl.models.hf_experts import experts_fused, split_modules
from lowrank_pl.models.hf_layers import LowRankLinear, PivotedLinear, Side
from lowrank_pl.models.sequences import check_sequences
from lowrank_pl.models.targets import Targets, dense_weight, find_targets, replaced
from lowrank_pl.plans.budget import check_keep
from lowrank_pl.plans.storage import Form, Storage
from lowrank_pl.serving.optimize import optimized
from lowrank_pl.utils.environment import timed
from lowrank_pl.utils.formatting import percent, table

__all__ = [
    "DENSE",
    "RepeatableLayer",
    "Speed",
    "SpeedCase",
    "SpeedTest",
    "Variant",
    "is_recorded",
    "measure_speed",
    "multiply_adds",
    "random_tokens",
    "read_bytes",
    "repeatable_cache",
    "speed_rows",
    "speed_table",
    "uniform_modules",
]

_log = logging.getLogger(__name__)

SpeedCase = Literal["decode", "prefill"]
"""One new token for every sequence, after tokens that are in the cache; or all tokens of every prompt at once."""

# A turn ends after so many steps or seconds, whichever comes first; its fastest step counts.
_STEPS, _SECONDS = 5, 1.0
_WARM_UP = 0.3


@dataclass(frozen=True)
class SpeedTest:
    """How speed is measured.

    Args:
        case: What a step is: one of decoding, or of reading a prompt, of which the last logits are computed.
        batch_size: Sequences in a step.
        length: Tokens in the cache before a step of decoding; tokens of a prompt.
        repeats: Turns of each variant that count, after one to warm up.
        multiple_of: Every rank is a multiple of this.
        compile: Whether ``torch.compile`` makes the step.
        record: Whether the step is recorded as a CUDA graph, whose replays are timed, as servers decode.
    """

    case: SpeedCase
    batch_size: int = 1
    length: int = 512
    repeats: int = 5
    multiple_of: int = 1
    compile: bool = False
    record: bool = False

    @property
    def tokens(self) -> int:
        """Tokens that a step takes in."""
        return self.batch_size * (1 if self.case == "decode" else self.length)


@dataclass(frozen=True)
class Variant:
    """A form of a model: dense, or every targeted layer in one form of storage at one kept fraction.

    Args:
        storage: ``factored``, ``pivoted``, or ``dense`` for the model as it is.
        keep: Fraction of each targeted layer's parameters to keep.
        optimized: Whether what is fastest computes the layers; see ``optimize_for_inference``.

    Raises:
        ValueError: ``keep`` lies outside (0, 1].
    """

    storage: Form | Literal["dense"]
    keep: float = 1.0
    optimized: bool = False

    def __post_init__(self) -> None:
        check_keep(self.keep)


DENSE = Variant("dense")
"""The model that the other variants are compared with."""


@dataclass(frozen=True)
class Speed:
    """The speed that was measured of one variant, with the bytes and multiply-adds that limit it.

    Attributes:
        seconds: Time of the fastest step.
        bytes: Bytes of the weights that a step reads.
        multiply_adds: Multiply-adds of reading one prompt; 0 in decoding, which is limited by bytes.
    """

    seconds: float
    bytes: int
    multiply_adds: int = 0


def measure_speed(
    model: PreTrainedModel,
    variants: Sequence[Variant],
    test: SpeedTest,
    *,
    tick: Callable[[Variant], object] = lambda _: None,
) -> dict[Variant, Speed]:
    """Return how long a step of each variant takes, and what it reads and computes.

    Variants take turns, so that all meet the same disturbances. Compiled and recorded variants have their turns in a
    row, since each has to be compiled or recorded first. Variants are put into the model one at a time, and at the end
    the model is as it was. The dense form of a mixture has fused experts, which transformers computes together, unless
    it is optimised. A mixture is not recorded.

    Args:
        model: The dense model.
        variants: The forms to measure.
        test: How they are measured.
        tick: Called after every turn with its variant.

    Raises:
        ValueError: The model has too few positions, or no cache of keys and values, or can't be recorded.
    """
    drawn = random_tokens(model, test.length + 1)
    check_sequences(model, drawn if test.case == "decode" else drawn[:, :-1], test.batch_size)
    tokens = drawn.to(model.device).repeat(test.batch_size, 1)
    # Sequences are decoded with tokens of their own, which a mixture routes to other experts.
    tokens[:, -1] = random_tokens(model, test.batch_size)[0].to(model.device)
    targets = find_targets(model)
    record = is_recorded(model, test)
    if test.record and not record:
        _log.warning("a mixture's step is not recorded: which experts it reads differs from step to step")
    found: dict[Variant, Speed] = {}
    with evaluating(model), torch.inference_mode():
        inputs = _step_inputs(model, tokens, test.case)
        in_a_row = test.compile or record
        for number, (variant, turns) in enumerate(_turns(variants, test.repeats, in_a_row=in_a_row)):
            dense = variant.storage == "dense"
            modules = {} if dense else uniform_modules(model, targets, variant, test.multiple_of)
            with ExitStack() as changes:
                changes.enter_context(replaced(model, modules))
                if variant not in found:  # before other products compute it, which are not counted
                    counted = multiply_adds(model, tokens[:1, :-1]) if test.case == "prefill" else 0
                    found[variant] = Speed(float("inf"), read_bytes(model, inputs), counted)
                if variant.optimized:
                    changes.enter_context(optimized(model))
                elif dense:
                    changes.enter_context(experts_fused(model))
                forward: Callable[..., Any] = _compiled(model) if test.compile else model
                if record:
                    forward = _recorded(forward, inputs, model.device)
                for turn in range(turns):
                    seconds = _fastest(forward, inputs, model.device)
                    if turn or number >= len(variants):
                        old = found[variant]
                        found[variant] = Speed(min(seconds, old.seconds), old.bytes, old.multiply_adds)
                    tick(variant)
    return found


def is_recorded(model: PreTrainedModel, test: SpeedTest) -> bool:
    """Return whether ``measure_speed`` records the step of ``model`` as a CUDA graph."""
    return test.record and not split_modules(model)


def random_tokens(model: PreTrainedModel, length: int) -> Tensor:
    """Return ``[1, length]`` token ids of the model's vocabulary, on the CPU; equal arguments give equal ones."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.get_input_embeddings().num_embeddings, (1, length), generator=generator)


def uniform_modules(
    model: PreTrainedModel, targets: Targets, variant: Variant, multiple_of: int = 1
) -> dict[str, nn.Module]:
    """Return a layer of random numbers for every target, each with the largest rank that ``variant`` allows.

    Biases are the model's own. Targets that no such rank makes smaller are left out, as plans leave them dense.

    >>> from lowrank_pl.models.tiny import tiny_model
    >>> model = tiny_model("llama")
    >>> uniform_modules(model, find_targets(model), Variant("factored", 0.5))["model.layers.0.mlp.up_proj"]
    LowRankLinear(in_features=32, out_features=96, rank=12, bias=False)
    """
    made: dict[str, nn.Module] = {}
    # What computes the layers may move tensors, but not those that were made in inference mode.
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False):
        torch.manual_seed(0)
        for target in targets.modules:
            old = model.get_submodule(target.name)
            weight, bias = dense_weight(old), getattr(old, "bias", None)
            assert variant.storage != "dense"
            storage = Storage(variant.storage, weight.element_size())
            even = storage.break_even(target.shape)
            if even < multiple_of:
                continue
            allowed = min(int(storage.rank_at(target.shape, variant.keep)), even)
            rank = max(allowed - allowed % multiple_of, multiple_of)
            new = _random_layer(
                variant.storage, target.shape, rank, bias=bias is not None, device=weight.device, dtype=weight.dtype
            )
            if bias is not None:
                new.bias = bias
            made[target.name] = new
    return made


def _random_layer(
    form: Form, shape: tuple[int, int], rank: int, *, bias: bool, device: torch.device, dtype: torch.dtype
) -> LowRankLinear | PivotedLinear:
    outputs, inputs = shape
    if form == "factored":
        return LowRankLinear(inputs, outputs, rank, bias=bias, device=device, dtype=dtype)
    # The side that `pivot` prefers, and so compression.
    side: Side = "out" if outputs <= inputs else "in"
    layer = PivotedLinear(inputs, outputs, rank, side=side, bias=bias, device=device, dtype=dtype)
    # Scattered, as pivots are in a compressed model.
    layer.pivots = torch.randperm(min(shape))[:rank].sort().values.to(layer.pivots)
    layer.check_pivots()
    return layer


def read_bytes(model: PreTrainedModel, step: Mapping[str, Any] | None = None) -> int:
    """Return the bytes of weights that a step reads: all but embeddings, of which it looks up a few rows.

    A head that shares its weight with the embeddings is read whole. Of a mixture's experts, those that the step's
    tokens are routed to are read.

    Args:
        model: The model.
        step: The arguments of the step; without them, all experts count.
    """
    head = model.get_output_embeddings().weight
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m.weight is not head]
    # The right factor of embeddings of low rank is multiplied by.
    skipped = {
        id(tensor)
        for table in tables
        for name, tensor in (*table.named_parameters(), *table.named_buffers())
        if not name.startswith("right")
    }
    for expert in _idle_experts(model, step) if step else ():
        skipped |= {id(tensor) for tensor in (*expert.parameters(), *expert.buffers())}
    # Pivots and the codes of rounded layers are buffers.
    every = (*model.parameters(), *model.buffers())
    return sum(tensor.nbytes for tensor in every if id(tensor) not in skipped)


def _idle_experts(model: PreTrainedModel, step: Mapping[str, Any]) -> list[nn.Module]:
    """Return the experts that no token of ``step`` is routed to."""
    experts: list[nn.Module] = [expert for _, block in split_modules(model) for expert in block]
    if not experts:
        return []
    called: set[nn.Module] = set()
    hooks = [expert.register_forward_pre_hook(lambda expert, _: called.add(expert)) for expert in experts]
    try:
        model(**step)
    finally:
        for hook in hooks:
            hook.remove()
    return [expert for expert in experts if expert not in called]


def multiply_adds(model: PreTrainedModel, prompt: Tensor) -> int:
    """Return the multiply-adds of the matrix products, attention included, that reading ``prompt`` takes.

    Args:
        model: The model.
        prompt: Token ids ``[1, length]``, of which only the last logits are computed.
    """
    # torch alone counts no attention that runs on a CPU, and fails on fewer heads of keys than of queries.
    kinds = ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
    uncounted = {getattr(torch.ops.aten, f"_scaled_dot_product_{kind}"): _attention_flops for kind in kinds}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=uncounted) as counter:
        model(input_ids=prompt, use_cache=False, logits_to_keep=1)
    counts: dict[Any, int] = counter.get_flop_counts()["Global"]
    attention = sum(count for name, count in counts.items() if "scaled_dot_product" in str(name))
    length = prompt.shape[1]
    # Attention is counted as if every token attended to all others; it attends only to those before.
    return (sum(counts.values()) - attention + attention * (length + 1) // (2 * length)) // 2


def _attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    batch, heads, length, width = query
    return 2 * batch * heads * length * key[2] * (width + value[3])


def speed_rows(measured: Mapping[Variant, Speed], test: SpeedTest) -> list[dict[str, Any]]:
    """Return a row of figures for each variant, with ratios to the dense one, which is among them.

    A ``ratio_to_dense`` of 2 is twice as fast. ``limit`` is the ratio that there would be if time followed the bytes of
    weights that a step of decoding reads, or the multiply-adds of a prompt; ``ratio_to_limit`` is the part reached.

    Args:
        measured: Speeds by variant.
        test: How they were measured.

    >>> found = {DENSE: Speed(3.0, 1000), Variant("pivoted", 0.5): Speed(2.0, 500)}
    >>> row = speed_rows(found, SpeedTest("decode", batch_size=16))[1]
    >>> row["tokens_per_second"], row["ratio_to_dense"], row["limit"], row["ratio_to_limit"]
    (8.0, 1.5, 2.0, 0.75)
    """
    dense = measured[DENSE]
    rows, decoding = [], test.case == "decode"
    for variant, one in measured.items():
        ratio = dense.seconds / one.seconds
        limit = dense.bytes / one.bytes if decoding else dense.multiply_adds / one.multiply_adds
        rows.append({
            "storage": variant.storage,
            "keep": variant.keep,
            "optimized": variant.optimized,
            "seconds": one.seconds,
            "tokens_per_second": test.tokens / one.seconds,
            "ratio_to_dense": ratio,
            "limit": limit,
            "ratio_to_limit": ratio / limit,
            "bytes": one.bytes,
            **({} if decoding else {"multiply_adds": one.multiply_adds}),
        })  # fmt: skip
    return rows


def speed_table(rows: Sequence[Mapping[str, Any]], *, fmt: str = "simple") -> str:
    """Return a table of rows of :func:`speed_rows`, each with a ``dtype`` and a ``batch``, grouped by both."""
    head = ("dtype", "batch", "storage", "keep", "ms", "tokens/s", "times dense", "limit", "of limit")
    body: list[tuple[str, ...]] = []
    group = None
    for row in rows:
        if group not in (None, (row["dtype"], row["batch"])):
            body.append(("",) * len(head))
        first = group != (group := (row["dtype"], row["batch"]))
        body.append((
            row["dtype"] if first else "",
            str(row["batch"]) if first else "",
            f"{row['storage']}, optimized" if row["optimized"] else row["storage"],
            percent(row["keep"]),
            f"{1000 * row['seconds']:,.2f}",
            f"{row['tokens_per_second']:,.1f}",
            f"{row['ratio_to_dense']:.2f}",
            f"{row['limit']:.2f}",
            percent(row["ratio_to_limit"]),
        ))  # fmt: skip
    return table(head, body, fmt, align=("left", "right", "left", *["right"] * 6))


def _turns(variants: Sequence[Variant], repeats: int, *, in_a_row: bool) -> list[tuple[Variant, int]]:
    """Return the variants and how many turns each has, in order; the first turn of each is to warm up."""
    if in_a_row:
        return [(variant, repeats + 1) for variant in variants]
    return [(variant, 1) for _ in range(repeats + 1) for variant in variants]


def _step_inputs(model: PreTrainedModel, tokens: Tensor, case: SpeedCase) -> dict[str, Any]:
    if case == "prefill":
        return {"input_ids": tokens[:, :-1], "use_cache": False, "logits_to_keep": 1}
    cache = repeatable_cache(model, tokens)
    return {"input_ids": tokens[:, -1:], "past_key_values": cache, "use_cache": True, "logits_to_keep": 1}


def _compiled(model: PreTrainedModel) -> Callable[..., Any]:
    # Code that was compiled before is for layers that are gone, and only so much is kept.
    torch.compiler.reset()
    return torch.compile(model, dynamic=False)


def _recorded(forward: Callable[..., Any], inputs: Mapping[str, Any], device: torch.device) -> Callable[..., object]:
    """Return a function that replays a step on these very inputs."""
    if device.type != "cuda":
        raise ValueError(f"the model is on {device}: only a CUDA device can record a step; give device cuda")
    aside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    aside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(aside):  # a library must have been used before it is recorded
        for _ in range(3):
            forward(**inputs)
    torch.cuda.current_stream(device).wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits: Tensor = forward(**inputs).logits

    def replay(**_: Any) -> Tensor:
        graph.replay()
        return logits

    return replay


def _fastest(forward: Callable[..., Any], inputs: Mapping[str, Any], device: torch.device) -> float:
    """Return the seconds of the fastest of some steps one after the other."""
    if device.type == "cuda":
        # A GPU that waited for a compiler has lowered its clock, and a few steps are over before it rises.
        begun = time.perf_counter()
        while time.perf_counter() - begun < _WARM_UP:
            timed(lambda: forward(**inputs), device)
    seconds: list[float] = []
    while len(seconds) < _STEPS and sum(seconds) < _SECONDS:
        seconds.append(timed(lambda: forward(**inputs), device)[1])
    return min(seconds)


def repeatable_cache(model: PreTrainedModel, tokens: Tensor) -> Cache:
    """Return a cache of all of ``tokens`` but the last, on which the step with the last token can be repeated.

    Args:
        model: A decoder in evaluation mode.
        tokens: Token ids ``[batch, length]``, of equal rows: only the first row is read, the others are copies of it.

    Raises:
        ValueError: A layer of the model keeps something other than keys and values.

    >>> from lowrank_pl.models.tiny import tiny_model
    >>> model, tokens = tiny_model("llama"), torch.arange(6)[None]
    >>> with torch.inference_mode():
    ...     cache = repeatable_cache(model, tokens)
    ...     steps = [model(input_ids=tokens[:, -1:], past_key_values=cache).logits for _ in range(2)]
    ...     whole = model(input_ids=tokens).logits[:, -1:]
    >>> torch.equal(*steps), torch.allclose(steps[0], whole, atol=1e-5)
    (True, True)
    """
    read = model(input_ids=tokens[:1, :-1], use_cache=True, logits_to_keep=1).past_key_values
    return Cache(layers=[RepeatableLayer(layer, *tokens.shape) for layer in read.layers])


class RepeatableLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of all tokens but the last, and a place for the last one, which every step fills anew.

    Args:
        read: The layer's cache after one sequence of all tokens but the last.
        batch_size: Copies of that sequence.
        length: Tokens of the sequence, the last one included; a sliding window keeps fewer of them.

    Raises:
        ValueError: ``read`` holds no keys and values.
    """

    def __init__(self, read: Any, batch_size: int, length: int) -> None:
        super().__init__()
        if not isinstance(read, DynamicLayer) or read.keys is None:
            raise ValueError(f"expected keys and values of every layer in the cache, got a {type(read).__name__}")
        self.keys, self.values = (
            torch.cat([part, part[:, :, -1:]], dim=2).repeat(batch_size, 1, 1, 1) for part in (read.keys, read.values)
        )
        self.dtype, self.device = self.keys.dtype, self.keys.device
        self.is_sliding, self.is_initialized = read.is_sliding, True
        self.length = length
        for part in (self.keys, self.values):
            # Without it torch.compile would not record the kernels that write to them.
            torch._dynamo.mark_static_address(part)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Put keys and values of the last token in its place; return the keys and values of all tokens."""
        self.keys[:, :, -1:] = key_states
        self.values[:, :, -1:] = value_states
        return self.keys, self.values

    def get_seq_length(self, *_: Any) -> int:
        """Return how many tokens come before the last one."""
        return self.length - 1

    def get_mask_sizes(self, *_: Any) -> tuple[int, int]:
        """Return how many tokens can be attended to, and how many came before them."""
        return self.keys.shape[-2], self.length - self.keys.shape[-2]
