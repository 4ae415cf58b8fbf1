"""Compiles the Triton kernels for GPUs that need not be here: python -m tests.helpers.compile_kernels."""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lowrank_pl.models.hf_quantized import FIELDS
from lowrank_pl.serving import integer_layers, kernels
from lowrank_pl.serving.triton_rows import rounded_kernel, rows_kernel

GPUS = (80, 90)
"""Compute capabilities: of an A100, and of an H100 or H200."""

BYTES = ("packed", "zeros")
INDICES = ("table", "reads", "adds", "places")
NUMBERS = ("height", "width", "groups", "group", "tokens", "input_step", "output_step", "kept_step", "packed_step",
           "zeros_step")  # fmt: skip


def compiled(kernel: Any, dtype: str, tile: kernels.Tile, constants: dict[str, Any], gpu: int) -> None:
    """Compile ``kernel`` to the machine code of a GPU."""
    types = dict.fromkeys(BYTES, "*u8") | dict.fromkeys(INDICES, "*i32") | dict.fromkeys(NUMBERS, "i32")
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, f"*{dtype}") for name in names}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()})
    made = triton.compile(
        source, target=GPUTarget("cuda", gpu, 32), options={"num_warps": tile.warps, "num_stages": tile.stages}
    )
    assert made.asm["cubin"]


def main() -> None:
    """Compile what an optimised model may launch, in bfloat16."""
    for gpu in GPUS:
        for count, tokens in (("one", 1), ("few", kernels.MAX_TOKENS)):
            for bits in (4, 7, 8):
                first, second, third = (*FIELDS[bits], 0, 0)[:3]
                tile = integer_layers.TILES[count][0]
                constants = {
                    "HAS_ZEROS": bits < 8, "FIRST": first, "SECOND": second, "THIRD": third, "TOKENS": tokens,
                    "ROWS": tile.rows, "UNITS": tile.columns // 8,
                }  # fmt: skip
                compiled(rounded_kernel, "bf16", tile, constants, gpu)
            tile = kernels.TILES[count][0]
            constants = {
                "HAS_BIAS": True, "GATHERS": True, "ADDS": True, "TOKENS": tokens, "ROWS": tile.rows,
                "COLUMNS": tile.columns, "OVERLAPS": gpu >= 90,
            }  # fmt: skip
            compiled(rows_kernel, "bf16", tile, constants, gpu)


if __name__ == "__main__":
    main()
