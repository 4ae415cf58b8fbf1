"""How fast this machine is at the work of a run, measured in seconds on the shapes of a model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM

from lowrank_pl.costs.estimate import Speeds, WorkKind
from lowrank_pl.costs.model_sizes import ModelSizes, config_of
from lowrank_pl.factors.decomposition import thin_svd
from lowrank_pl.models.base import Base, pop_shapes
from lowrank_pl.utils.environment import describe_machine, timed
from lowrank_pl.utils.files import atomic_write, cache_root

__all__ = ["existing_folder", "probe"]

_LARGEST = 2**30
"""Bytes of the largest decoder block that is made; of a larger one, a product of its largest layer is timed."""

_ENOUGH = 2e10
"""Multiply-adds that are many enough to be timed."""

_SIDE = 512
"""Smaller side of the matrices that are decomposed: the time grows with its cube."""

_FILE = 2**25
"""Bytes that are written."""


def probe(base: Base, model: ModelSizes, *, device: str, length: int) -> Speeds:
    """Return how fast ``device`` and the disk of the caches are, with a progress bar; takes some seconds.

    Every trial runs twice and the faster time counts. The file that is written is removed again.

    Args:
        base: One of its decoder blocks is made, of its configuration and numbers without meaning.
        model: Its sizes.
        device: ``cpu`` or ``cuda``.
        length: Tokens of a sequence.
    """
    block = model.blocks[0] * model.itemsize <= _LARGEST
    trials: dict[WorkKind, Callable[[], float]] = {
        "model": lambda: (_block if block else _product)(base, model, device, length),
        "float32": lambda: _gram(model, device, length),
        "float64": lambda: _float64(device),
        "svd": lambda: _decomposition(model, device),
        "disk": _writing,
    }
    rates = {
        kind: max(trial(), trial()) for kind, trial in tqdm(trials.items(), desc="probe", unit="trial", leave=False)
    }
    made = describe_machine(device)
    what = "one block, forward and backward" if block else "one layer of a block"
    where = f"{made['accelerator'] or made['processor']}, threads: {made['threads']}"
    return Speeds(f"measured here ({where}) on {what}", rates)


def _block(base: Base, model: ModelSizes, device: str, length: int) -> float:
    """Return multiply-adds a second of one decoder block, forward and backward to its inputs."""
    short = copy.deepcopy(config_of(base))
    pop_shapes(short)
    inner = short.get_text_config()
    inner.num_hidden_layers = 1
    inner.vocab_size = 8
    inner.pad_token_id = None
    if getattr(inner, "layer_types", None):
        inner.layer_types = inner.layer_types[:1]
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(short, dtype=base.torch_dtype, trust_remote_code=base.trust_remote_code)
    made = made.to_empty(device=device).eval().requires_grad_(False)
    # Memory as it comes may hold numbers that slow arithmetic down.
    for tensor in (*made.parameters(), *made.buffers()):
        tensor.fill_(0.01 if tensor.is_floating_point() else 0)
    used = model.blocks[0] - (model.idle[0] if model.idle else 0)
    count = _tokens(used, length)
    tokens = torch.zeros(1, count, dtype=torch.long, device=device)
    with torch.enable_grad():
        embedded = made.get_input_embeddings()(tokens).detach().requires_grad_()

        def step() -> None:
            made(inputs_embeds=embedded, use_cache=False).logits.float().sum().backward()

        return 2 * count * used / timed(step, device)[1]


def _product(base: Base, model: ModelSizes, device: str, length: int) -> float:
    dtype = base.torch_dtype
    rows, columns = max((target.shape for target in model.modules), key=lambda shape: shape[0] * shape[1])
    rows = min(rows, max(1, _LARGEST // (columns * dtype.itemsize)))
    weight = torch.full((rows, columns), 0.01, dtype=dtype, device=device)
    inputs = torch.full((_tokens(rows * columns, length), columns), 0.01, dtype=dtype, device=device)
    return len(inputs) * rows * columns / timed(lambda: inputs @ weight.mT, device)[1]


def _tokens(parameters: int, length: int) -> int:
    return max(8, min(length, int(_ENOUGH / parameters)))


def _gram(model: ModelSizes, device: str, length: int) -> float:
    width = min(4096, max(target.shape[1] for target in model.modules))
    inputs = torch.ones(length, width, device=device)
    total = torch.zeros(width, width, dtype=torch.float64, device=device)

    def step() -> Tensor:
        return total.add_(inputs.mT @ inputs)

    return length * width * width / timed(step, device)[1]


def _float64(device: str) -> float:
    matrix = torch.ones(2 * _SIDE, 2 * _SIDE, dtype=torch.float64, device=device)
    return float(len(matrix)) ** 3 / timed(lambda: matrix @ matrix, device)[1]


def _decomposition(model: ModelSizes, device: str) -> float:
    rows, columns = max((target.shape for target in model.modules), key=lambda shape: shape[0] * shape[1])
    scale = min(1.0, _SIDE / min(rows, columns))
    generator = torch.Generator().manual_seed(0)
    shape = (max(1, int(rows * scale)), max(1, int(columns * scale)))
    matrix = torch.randn(shape, generator=generator, dtype=torch.float64).to(device)
    return shape[0] * shape[1] * min(shape) / timed(lambda: thin_svd(matrix), device)[1]


def _writing() -> float:
    data = bytes(_FILE)
    # Nothing is to be left behind, not even the folder of the caches.
    path = existing_folder(cache_root()) / ".lowrank-probe"
    try:
        return _FILE / timed(lambda: atomic_write(path, data))[1]
    finally:
        with suppress(FileNotFoundError):
            path.unlink()


def existing_folder(path: Path) -> Path:
    """Return ``path``, or the nearest folder above it that exists."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
