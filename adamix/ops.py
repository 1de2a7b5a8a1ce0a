"""The operators, typed: the only user of ``torch.ops.adamix`` in the project.

Loads ``libadamix_ops.so`` beside this file (built by ``pip install .``), gives each operator a
Python function and, by ``fake_ops.py``, a fake kernel, and passes on the layout's constants and
sizes from ``adamix._C``. The kernels' contracts stand in
``csrc/<operator>/<operator>.h``, the packed layout in ``csrc/layout/packed_layout.h``. CUDA kernels
run on torch's current stream, never synchronise, and so never look at values on the device.

Every function raises RuntimeError, with what was expected and what it got, for a wrong dtype,
shape or value, and NotImplementedError for a device that has no kernel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

LIBRARY = Path(__file__).with_name("libadamix_ops.so")

try:
    from adamix._C import (
        BLOCK_CODES,
        LAYOUT_VERSION,
        MAX_BITS,
        PANEL_CODES,
        TABLE_COLUMNS,
        TABLE_FIRST_U_COUNT,
        TABLE_FIRST_V_COUNT,
        TABLE_SCALE_OFFSET,
        TABLE_U_OFFSET,
        TABLE_V_OFFSET,
        lane_words,
        u_words,
        v_words,
    )
except ImportError as error:
    raise ImportError(
        f"adamix is not built: adamix._C cannot be imported ({error}); run `pip install .`"
    ) from error

if not LIBRARY.exists():
    raise ImportError(f"adamix is not built: {LIBRARY.name} is missing; run `pip install .`")
torch.ops.load_library(LIBRARY)

from adamix import fake_ops as fake_ops  # noqa: E402  needs the operators to be there

__all__ = [
    "BLOCK_CODES",
    "LAYOUT_VERSION",
    "MAX_BITS",
    "PANEL_CODES",
    "TABLE_COLUMNS",
    "TABLE_FIRST_U_COUNT",
    "TABLE_FIRST_V_COUNT",
    "TABLE_SCALE_OFFSET",
    "TABLE_U_OFFSET",
    "TABLE_V_OFFSET",
    "add_rows_",
    "delta_embedding",
    "delta_embedding_",
    "delta_gemm",
    "delta_gemm_",
    "delta_gemm_layers",
    "delta_gemm_layers_",
    "delta_gemm_segments_",
    "gptq",
    "lane_words",
    "pack",
    "search_scales",
    "u_words",
    "unpack",
    "v_words",
]


def pack(codes: Tensor, *, bits: int) -> Tensor:
    """Pack codes uint8 ``[lanes, n]`` into words int32 ``[lanes, lane_words(n, bits)]``.

    Raises if a code does not fit the width (on the CPU, where looking is cheap).
    """
    return torch.ops.adamix.pack.default(codes, bits)


def unpack(words: Tensor, *, bits: int, count: int) -> Tensor:
    """The ``count`` codes of every lane, uint8 ``[lanes, count]``: the inverse of :func:`pack`."""
    return torch.ops.adamix.unpack.default(words, bits, count)


def gptq(weight: Tensor, hinv: Tensor, bits: Tensor, scales: Tensor, *, by_row: bool) -> Tensor:
    """Codes uint8 ``[rows, n]`` of ``weight`` whose error, weighted by a Hessian H, is small.

    ``weight`` fp32 ``[rows, n]``; ``hinv`` fp32 ``[n, n]``, the upper Cholesky factor of H⁻¹
    (nothing is read below its diagonal); ``bits`` int32 (1..8) and ``scales`` fp32, one a row
    where ``by_row`` (a row of V is a lane), else one a column (a column of U is one). ``weight``
    is left as it is. GPTQ (Frantar et al. 2022, algorithm 1), columns left to right, with the
    quantizer of the packed layout. CUDA's codes are the CPU's on a machine with FMA, bit by bit;
    there a width outside 1..8 counts as 1 or 8.
    """
    return torch.ops.adamix.gptq.default(weight, hinv, bits, scales, by_row)


def search_scales(lanes: Tensor, bits: Tensor, weights: Tensor | None = None) -> Tensor:
    """One scale a lane, fp32 ``[lanes]``, with the least (weighted) squared rounding error.

    ``lanes`` fp32 ``[lanes, n]``, left as it is; ``bits`` int32 ``[lanes]``, 1..8; ``weights`` fp32
    ``[n]``, what an entry's squared error costs, None for ones. Of 32 scales in geometric steps,
    from the one whose top level is the mean magnitude to the one that just reaches the largest
    entry, the best; then up to 5 times the least-squares scale of the nearest codes, while that is
    better. Scales are positive and finite, whatever a lane holds: tiny for zeros. A lane's scale
    depends on no other lane. CUDA's scales are the CPU's on a machine with FMA, bit by bit; there
    a width outside 1..8 counts as 1 or 8.
    """
    return torch.ops.adamix.search_scales.default(lanes, bits, weights)


def delta_gemm(
    x: Tensor,
    arena: Tensor,
    table: Tensor,
    slots: Tensor,
    *,
    out_features: int,
    max_rank: int | None = None,
) -> Tensor:
    """Every token's own delta: ``y[t] = U_level · diag(scale) · V_level · x[t]``.

    That is the paper's ΔW = U Σ V (section 2), U and V in whole numbers, Σ and their scales in one.
    ``x`` fp16, bf16 or fp32 ``[..., in]``, flattened to tokens; ``arena`` int32 ``[words]`` and
    ``table`` int64 ``[capacity, TABLE_COLUMNS]``, the bank (packed_layout.h); ``slots`` int32
    ``[tokens]`` says whose delta in the table, values outside ``0..capacity-1`` mean the base.
    Returns ``[..., out_features]`` of x's dtype: fp32 accumulation, one rounding.

    ``max_rank``: the most components that a slot in use has; it bounds the scratch memory on a
    device. None: the larger of in and out. On the CPU a slot in use that has more, or other counts
    of V than of U, or that points out of the arena, raises. CUDA kernels cannot look: there a slot
    of wrong counts is empty, and one that points out of the arena reads what it should not.

    CUDA: at most 65536 inputs, as many components a slot, 524288 outputs. Up to 128 tokens, and for
    fp32 x always, x and z = scale · V_level · x are rounded to 2^-23 of their largest element and
    summed in whole numbers, exactly, so a token's result does not depend on the tokens beside it;
    a NaN or infinity in x makes all of its token's delta NaN. Above 128 tokens of 16 bits (and up
    to 8192 slots) sums are fp32, and z is rounded once to bf16.
    """
    y = torch.ops.adamix.delta_gemm.default(
        _as_tokens(x), arena, table, slots, out_features, max_rank=max_rank
    )
    return y.view(*x.shape[:-1], out_features)


def delta_gemm_(
    y: Tensor,
    x: Tensor,
    arena: Tensor,
    table: Tensor,
    slots: Tensor,
    *,
    max_rank: int | None = None,
) -> None:
    """Add every token's delta to ``y`` in place: ``y = round(fp32(y) + delta)``, one rounding.

    ``y [..., out]`` has x's dtype and leading dimensions; each row's elements are adjacent, rows
    do not overlap, and y can be viewed as ``[tokens, out]``. The rest is as for
    :func:`delta_gemm`.
    """
    torch.ops.adamix.delta_gemm_.default(
        _rows_of(y), _as_tokens(x), arena, table, slots, max_rank=max_rank
    )


def delta_gemm_layers(
    x: Tensor,
    arena: Tensor,
    tables: Sequence[Tensor],
    slots: Tensor,
    out_features: Sequence[int],
    *,
    max_rank: int | None = None,
) -> list[Tensor]:
    """:func:`delta_gemm` of 1..8 matrices on one ``x`` in one launch: q, k, v, or gate and up.

    ``tables`` and ``out_features`` have an entry a matrix; all tables have one capacity, and
    ``slots`` holds for each of them. ``max_rank`` bounds the components in any of them. Returns
    ``[..., out_features[i]]`` for each.
    """
    ys = torch.ops.adamix.delta_gemm.layers(
        _as_tokens(x), arena, list(tables), slots, list(out_features), max_rank=max_rank
    )
    return [y.view(*x.shape[:-1], out) for y, out in zip(ys, out_features, strict=True)]


def delta_gemm_layers_(
    ys: Sequence[Tensor],
    x: Tensor,
    arena: Tensor,
    tables: Sequence[Tensor],
    slots: Tensor,
    *,
    max_rank: int | None = None,
) -> None:
    """:func:`delta_gemm_` of 1..8 matrices on one ``x`` in one launch.

    ``ys``: one a table, each as in :func:`delta_gemm_`; they may be columns of one wide tensor,
    but do not overlap. The rest is as for :func:`delta_gemm_layers`.
    """
    torch.ops.adamix.delta_gemm_.layers(
        [_rows_of(y) for y in ys], _as_tokens(x), arena, list(tables), slots, max_rank=max_rank
    )


def delta_gemm_segments_(
    ys: Sequence[Tensor],
    x: Tensor,
    arena: Tensor,
    tables: Sequence[Tensor],
    token_indices: Tensor,
    token_counts: Tensor,
    token_starts: Tensor,
    segment_slots: Tensor,
    *,
    max_rank: int | None = None,
) -> None:
    """:func:`delta_gemm_layers_` for tokens that are sorted by delta already.

    Segment i is the tokens ``token_indices[token_starts[i] : token_starts[i] + token_counts[i]]``,
    all with the delta in slot ``segment_slots[i]``: ``token_indices`` int32 ``[tokens]``,
    ``token_counts`` and ``segment_slots`` int32 ``[segments]``, ``token_starts`` int32
    ``[segments]`` or longer. Tokens in no segment, or in one whose slot is outside
    ``0..capacity-1``, are the base; of ``token_indices`` nothing is read but what segments with a
    delta name. A segment lies inside ``token_indices``, its tokens in ``0..tokens-1``, and no
    token is in two: anything else raises on the CPU. CUDA kernels pass over tokens outside and
    trust the rest.
    """
    torch.ops.adamix.delta_gemm_.segments(
        [_rows_of(y) for y in ys],
        _as_tokens(x),
        arena,
        list(tables),
        token_indices,
        token_counts,
        token_starts,
        segment_slots,
        max_rank=max_rank,
    )


def delta_embedding(
    tokens: Tensor,
    arena: Tensor,
    table: Tensor,
    slots: Tensor,
    *,
    vocab_size: int,
    hidden_size: int,
    dtype: torch.dtype,
    max_rank: int | None = None,
) -> Tensor:
    """Every token's row of its own delta to an embedding ``[vocab_size, hidden_size]``:
    ``y[t] = sum_k U_level[tokens[t], k] · scale[k] · V_level[k, :]``.

    U ``[vocab_size, rank]`` and V ``[rank, hidden_size]`` are stored as for an output head, so one
    delta serves both where they are tied: :func:`delta_gemm` with ``hidden_size`` inputs and
    ``vocab_size`` outputs is the head. ``tokens`` int64 or int32 ``[...]``; ``arena``, ``table``,
    ``slots`` (one a token) and ``max_rank`` as for :func:`delta_gemm`; ``dtype`` fp16, bf16 or
    fp32. Returns ``[..., hidden_size]``: fp32 accumulation, one rounding.

    A token below 0 or at ``vocab_size`` and beyond gets zeros, as one of the base does: rows of a
    vocabulary that grew are stored whole, beside the delta, and whether a token is one at all is
    the base's embedding to say.

    ``w = U_level · scale`` is rounded to fp32. CUDA kernels then round it to 2^-23 of the largest
    of its token and sum w · V in whole numbers, exactly, for any number of tokens: a token's result
    does not depend on the tokens beside it. CUDA: at most 65536 components a slot and 524288
    columns; tokens go in launches of 128.
    """
    y = torch.ops.adamix.delta_embedding.default(
        tokens.reshape(tokens.numel()),
        arena,
        table,
        slots,
        vocab_size,
        hidden_size,
        dtype=dtype,
        max_rank=max_rank,
    )
    return y.view(*tokens.shape, hidden_size)


def delta_embedding_(
    y: Tensor,
    tokens: Tensor,
    arena: Tensor,
    table: Tensor,
    slots: Tensor,
    *,
    vocab_size: int,
    max_rank: int | None = None,
) -> None:
    """Add every token's row to ``y`` in place: ``y = round(fp32(y) + row)``, one rounding.

    ``y [..., hidden_size]`` fp16, bf16 or fp32 has the leading dimensions of ``tokens`` and lies as
    in :func:`delta_gemm_`; where nothing is added it stays as it is, bit by bit. The rest is as for
    :func:`delta_embedding`.
    """
    torch.ops.adamix.delta_embedding_.default(
        _rows_of(y),
        tokens.reshape(tokens.numel()),
        arena,
        table,
        slots,
        vocab_size,
        max_rank=max_rank,
    )


def add_rows_(ys: Sequence[Tensor], values: Tensor, slots: Tensor) -> None:
    """Add to every token of ``ys`` its own row of ``values`` in place, in one launch:
    ``ys[i][t] += values[slots[t], first_i : first_i + width_i]``, where the ys' widths, in order,
    cut a row of ``values`` into parts side by side.

    What fine-tunes add to the biases of q, k and v. ``ys``: 1..8, fp16, bf16 or fp32, all of one
    type, ``[..., width_i]`` with as many tokens each as ``slots``, lying as in :func:`delta_gemm_`;
    none overlap. ``values`` fp32 ``[capacity, columns]``, the widths' sum being ``columns``;
    ``slots`` int32 ``[tokens]``. Where a slot is outside ``0..capacity-1``, the base, y stays as it
    is, bit by bit. Sums are fp32, rounded once: the same bits on every device.

    Raises for another number of ys, of columns or of tokens, and for ys whose rows have gaps
    between their elements or overlap.
    """
    torch.ops.adamix.add_rows_.default([_rows_of(y) for y in ys], values, slots)


def _as_tokens(x: Tensor) -> Tensor:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _rows_of(y: Tensor) -> Tensor:
    """Never a copy, unlike :func:`_as_tokens`: torch refuses a y whose tokens are no matrix."""
    return y.view(math.prod(y.shape[:-1]), y.shape[-1])
