"""Triton kernels of a :class:`~lowrank_pl.serving.kernels.Stage` and of rounded matrices.

This is the only module of the package that imports Triton. With ``TRITON_INTERPRET=1`` in the environment before it is
imported, the kernels run on a CPU, slowly, to be tested.
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


__all__ = ["CAN_OVERLAP", "rounded_kernel", "rows_kernel"]


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


@triton.jit  # type: ignore[untyped-decorator]
def _field(starts, byte, shift, exists, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the fields of ``WIDTH`` bits that begin at bit ``shift`` of the bytes ``byte`` behind ``starts``."""
    found = tl.load(starts[:, None] + byte[None, :], mask=exists, other=0).to(tl.int32)
    return (found >> shift) & ((1 << WIDTH) - 1)


@triton.jit(do_not_specialize=["tokens", "input_step", "packed_step", "zeros_step"])  # type: ignore[untyped-decorator]
def rounded_kernel(  # type: ignore[no-untyped-def]
    input,
    output,
    packed,
    scales,
    zeros,
    height,
    width,
    groups,
    group,
    tokens,
    input_step,
    packed_step,
    zeros_step,
    HAS_ZEROS: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    THIRD: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
):
    """Compute ``ROWS`` rows of the product of a rounded matrix; see ``PackedMatrix.launch``.

    A code consists of fields of ``FIRST``, ``SECOND`` and ``THIRD`` bits, the lowest first, and those of a row lie one
    kind behind the other. Eight columns are a unit, whose fields fill whole bytes.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    below = rows < height
    token = tl.arange(0, TOKENS)
    given = token < tokens
    codes = packed + rows.to(tl.int64) * packed_step
    # Where the second and the third fields begin, of codes and of zero points.
    second = (width * FIRST + 7) // 8
    third = second + (width * SECOND + 7) // 8
    zeros_second = (groups * FIRST + 7) // 8
    zeros_third = zeros_second + (groups * SECOND + 7) // 8
    # One token's products are added up in the end, those of several by tensor cores.
    WIDE: tl.constexpr = UNITS if TOKENS == 1 else TOKENS
    total = tl.zeros([ROWS, WIDE], tl.float32)
    for start in range(0, (width + 7) // 8, UNITS):
        units = start + tl.arange(0, UNITS)
        begun = below[:, None] & (units * 8 < width)[None, :]
        # Groups are multiples of eight columns.
        place = units * 8 // group
        scale = tl.load(scales + (rows * groups)[:, None] + place[None, :], mask=begun, other=0.0).to(tl.float32)
        if HAS_ZEROS:
            offsets = zeros + rows.to(tl.int64) * zeros_step
            zero = _field(offsets, place * FIRST // 8, (place * FIRST % 8)[None, :], begun, FIRST)
            if SECOND:
                byte, shift = zeros_second + place * SECOND // 8, (place * SECOND % 8)[None, :]
                zero |= _field(offsets, byte, shift, begun, SECOND) << FIRST
            if THIRD:
                byte, shift = zeros_third + place * THIRD // 8, (place * THIRD % 8)[None, :]
                zero |= _field(offsets, byte, shift, begun, THIRD) << (FIRST + SECOND)
        else:
            zero = 128
        for number in tl.static_range(8):
            columns = units * 8 + number
            inside = columns < width
            exists = below[:, None] & inside[None, :]
            code = _field(codes, units * FIRST + number * FIRST // 8, number * FIRST % 8, exists, FIRST)
            if SECOND:
                byte = second + units * SECOND + number * SECOND // 8
                code |= _field(codes, byte, number * SECOND % 8, exists, SECOND) << FIRST
            if THIRD:
                byte = third + units * THIRD + number * THIRD // 8
                code |= _field(codes, byte, number * THIRD % 8, exists, THIRD) << (FIRST + SECOND)
            weight = (code - zero).to(tl.float32) * scale
            if TOKENS == 1:
                values = tl.load(input + columns, mask=inside, other=0.0)
                total += weight * values.to(tl.float32)[None, :]
            else:
                values = tl.load(
                    input + token[None, :] * input_step + columns[:, None],
                    mask=inside[:, None] & given[None, :],
                    other=0.0,
                )
                total = tl.dot(weight.to(values.dtype), values, total, input_precision="ieee")
    if TOKENS == 1:
        tl.store(output + rows, tl.sum(total, 1), mask=below)
    else:
        places = token[None, :] * height + rows[:, None]
        tl.store(output + places, total, mask=below[:, None] & given[None, :])
