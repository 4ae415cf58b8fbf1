"""The Triton kernel of a :class:`~lowrank_pl.serving.kernels.Stage`.

This is the only module of the package that imports Triton. With ``TRITON_INTERPRET=1`` in the environment before it is
imported, the kernel runs on a CPU, slowly, to be tested.
"""

from __future__ import annotations

import triton
import triton.language as tl

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

    CAN_OVERLAP = True
except ImportError:  # before Triton 3.3
    CAN_OVERLAP = False

    @triton.jit
    def gdc_wait():  # type: ignore[no-untyped-def]
        """Do nothing: kernels are never launched so that they overlap."""

    @triton.jit
    def gdc_launch_dependents():  # type: ignore[no-untyped-def]
        """Do nothing: kernels are never launched so that they overlap."""


__all__ = ["CAN_OVERLAP", "rows_kernel"]


# A kernel for each number of tokens, or for steps that happen to be multiples of 16, would only be compiled more often.
@triton.jit(do_not_specialize=["tokens", "input_step", "output_step", "kept_step"])  # type: ignore[untyped-decorator]
def rows_kernel(  # type: ignore[no-untyped-def]
    input,
    output,
    kept,
    bias,
    weight_0,
    weight_1,
    weight_2,
    weight_3,
    table,
    reads,
    adds,
    places,
    tokens,
    input_step,
    output_step,
    kept_step,
    HAS_BIAS: tl.constexpr,
    GATHERS: tl.constexpr,
    ADDS: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Compute the rows of one matrix that the table has for this program; see ``Stage.table`` and ``Stage.launch``."""
    entry = table + tl.program_id(0) * 9
    matrix = tl.load(entry)
    first = tl.multiple_of(tl.load(entry + 1), ROWS)
    height = tl.load(entry + 2)
    width = tl.load(entry + 3)
    step = tl.multiple_of(tl.load(entry + 4), 8)
    begin = tl.load(entry + 5)
    stored = tl.load(entry + 6)
    keeps = tl.load(entry + 7)
    base = tl.load(entry + 8)

    weight = weight_0
    if matrix == 1:
        weight = weight_1
    if matrix == 2:
        weight = weight_2
    if matrix == 3:
        weight = weight_3

    rows = first + tl.arange(0, ROWS)
    exists = rows < height
    steps = tl.arange(0, COLUMNS)
    token = tl.arange(0, TOKENS)
    given = token < tokens
    starts = weight + rows.to(tl.int64) * step
    # Rows are padded with zeros, so that whole groups of numbers are read.
    full = tl.multiple_of((width + 7) // 8 * 8, 8)

    if TOKENS == 1:
        partial = tl.zeros([ROWS, COLUMNS], tl.float32)
        # Weights depend on nothing: the first of them are on their way while the kernel before still computes. Each is
        # read once, so it need not stay in the cache.
        block = tl.load(
            starts[:, None] + steps[None, :],
            mask=exists[:, None] & (steps < full)[None, :],
            other=0.0,
            eviction_policy="evict_first",
        )
        if OVERLAPS:
            gdc_wait()
            gdc_launch_dependents()
        for start in range(0, width, COLUMNS):
            columns = start + steps
            inside = columns < width
            if GATHERS:
                found = tl.load(reads + begin + columns, mask=inside & (stored != 0), other=0)
                sources = tl.where(stored != 0, found, begin + columns)
            else:
                sources = begin + columns
            values = tl.load(input + sources, mask=inside, other=0.0)
            columns += COLUMNS
            following = tl.load(
                starts[:, None] + columns[None, :],
                mask=exists[:, None] & (columns < full)[None, :],
                other=0.0,
                eviction_policy="evict_first",
            )
            partial += block.to(tl.float32) * values.to(tl.float32)[None, :]
            block = following
        total = tl.sum(partial, 1)[:, None]
    else:
        total = tl.zeros([ROWS, TOKENS], tl.float32)
        if OVERLAPS:
            gdc_wait()
            gdc_launch_dependents()
        for start in range(0, width, COLUMNS):
            columns = start + steps
            inside = columns < width
            if GATHERS:
                found = tl.load(reads + begin + columns, mask=inside & (stored != 0), other=0)
                sources = tl.where(stored != 0, found, begin + columns)
            else:
                sources = begin + columns
            values = tl.load(
                input + token[None, :] * input_step + sources[:, None], mask=inside[:, None] & given[None, :], other=0.0
            )
            block = tl.load(
                starts[:, None] + columns[None, :], mask=exists[:, None] & (columns < full)[None, :], other=0.0
            )
            total = tl.dot(block, values, total, input_precision="ieee")

    written = exists[:, None] & given[None, :]
    if ADDS:
        added = tl.load(adds + base + rows, mask=exists, other=-1)
        total += tl.load(
            input + token[None, :] * input_step + added[:, None], mask=written & (added >= 0)[:, None], other=0.0
        ).to(tl.float32)
    if keeps >= 0:
        tl.store(kept + token[None, :] * kept_step + (keeps + rows)[:, None], total, mask=written)
    place = tl.load(places + base + rows, mask=exists, other=-1)
    if HAS_BIAS:
        total += tl.load(bias + place, mask=place >= 0, other=0.0).to(tl.float32)[:, None]
    tl.store(output + token[None, :] * output_step + place[:, None], total, mask=written & (place >= 0)[:, None])
