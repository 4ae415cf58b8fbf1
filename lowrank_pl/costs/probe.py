"""How fast this machine is at what runs are made of, measured in seconds on the shapes of a model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PreTrainedConfig

from lowrank_pl.costs.anatomy import Anatomy
from lowrank_pl.costs.estimate import Speeds
from lowrank_pl.factors.decomposition import thin_svd
from lowrank_pl.utils.environment import describe_machine, timed
from lowrank_pl.utils.files import atomic_write, cache_root

__all__ = ["ASSUMED", "MEMORY", "existing_folder", "probe"]

ASSUMED = {
    # A multiply-add is two operations: 400 of the 989 TFLOP/s that are on paper, at half efficiency, in bf16; half of
    # the 67 in float32 (TF32 is off) and in float64. Decompositions take many steps that are no products: `lowrank
    # bench svd` measures them. NVLink and InfiniBand are taken as one link of 50 GB/s, the slower of both.
    "h100": Speeds(
        "assumed for an H100: 400 TFLOP/s in bf16 at 50 % efficiency, 33 TFLOP/s in float32 and float64, 2 % of that "
        "in decompositions, 50 GB/s between processes, 2 GB/s to and from disk",
        {"forward": 1e14, "float32": 1.65e13, "double": 1.65e13, "svd": 3.3e11},
        disk=2e9,
        link=5e10,
    )
}
"""Speeds by name, for machines that are not at hand."""


MEMORY = {"h100": 80e9}
"""Bytes of their devices."""


_LARGEST = 2**30
"""Bytes of a decoder block that is made for the probe; of a larger one a product of its widest map stands for it."""


_ENOUGH = 2e10
"""Multiply-adds that are many enough to be timed."""


_SIDE = 512
"""Smaller side of the matrices that are decomposed: the time grows with its cube."""


_FILE = 2**25
"""Bytes that are written."""


def probe(model: Anatomy, config: PreTrainedConfig, *, dtype: torch.dtype, device: str, length: int) -> Speeds:
    """Return how fast ``device`` and the disk of the caches are, with a progress bar; takes some seconds.

    Everything is tried twice and the faster time counts. The file that is written is removed again.

    Args:
        model: Its shapes are tried.
        config: Its configuration, of which one decoder block is made from numbers that mean nothing.
        dtype: Type of the weights.
        device: ``cpu`` or ``cuda``.
        length: Tokens of a sequence.
    """
    block = model.blocks[0] * dtype.itemsize <= _LARGEST
    trials: dict[str, Callable[[], float]] = {
        "forward": lambda: (_block if block else _product)(model, config, dtype, device, length),
        "float32": lambda: _gram(model, device, length),
        "double": lambda: _double(device),
        "svd": lambda: _decomposition(model, device),
        "disk": _writing,
    }
    found = {}
    for name, trial in tqdm(trials.items(), desc="probe", unit="trial", leave=False):
        found[name] = max(trial(), trial())
    disk = found.pop("disk")
    made = describe_machine(device)
    what = "one block" if block else "one matrix of a block"
    source = f"measured here ({made['accelerator'] or made['processor']}, {made['threads']} threads) on {what}"
    return Speeds(source, found, disk)  # type: ignore[arg-type]


def _block(model: Anatomy, config: PreTrainedConfig, dtype: torch.dtype, device: str, length: int) -> float:
    """Return multiply-adds a second of one decoder block, forward and backward to its inputs."""
    short = copy.deepcopy(config)
    inner = short.get_text_config()
    inner.num_hidden_layers = 1
    inner.vocab_size = 8
    inner.pad_token_id = None
    if getattr(inner, "layer_types", None):
        inner.layer_types = inner.layer_types[:1]
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(short, dtype=dtype)
    made = made.to_empty(device=device).eval().requires_grad_(False)
    # Memory as it comes may hold numbers that slow arithmetic down.
    for tensor in (*made.parameters(), *made.buffers()):
        tensor.fill_(0.01 if tensor.is_floating_point() else 0)
    count = _tokens(model.blocks[0], length)
    tokens = torch.zeros(1, count, dtype=torch.long, device=device)
    with torch.enable_grad():
        embedded = made.get_input_embeddings()(tokens).detach().requires_grad_()

        def step() -> None:
            made(inputs_embeds=embedded, use_cache=False).logits.float().sum().backward()

        return 2 * count * model.blocks[0] / timed(step, device)[1]


def _product(model: Anatomy, config: PreTrainedConfig, dtype: torch.dtype, device: str, length: int) -> float:
    rows, columns = max((target.shape for target in model.modules), key=lambda shape: shape[0] * shape[1])
    rows = min(rows, max(1, _LARGEST // (columns * dtype.itemsize)))
    weight = torch.full((rows, columns), 0.01, dtype=dtype, device=device)
    inputs = torch.full((_tokens(rows * columns, length), columns), 0.01, dtype=dtype, device=device)
    return len(inputs) * rows * columns / timed(lambda: inputs @ weight.mT, device)[1]


def _tokens(parameters: int, length: int) -> int:
    return max(8, min(length, int(_ENOUGH / parameters)))


def _gram(model: Anatomy, device: str, length: int) -> float:
    width = min(4096, max(target.shape[1] for target in model.modules))
    inputs = torch.ones(length, width, device=device)
    total = torch.zeros(width, width, dtype=torch.float64, device=device)

    def step() -> Tensor:
        return total.add_(inputs.mT @ inputs)

    return length * width * width / timed(step, device)[1]


def _double(device: str) -> float:
    matrix = torch.ones(2 * _SIDE, 2 * _SIDE, dtype=torch.float64, device=device)
    return float(len(matrix)) ** 3 / timed(lambda: matrix @ matrix, device)[1]


def _decomposition(model: Anatomy, device: str) -> float:
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
