"""The operators, typed: the only user of ``torch.ops.adamix`` in the project.

Loads ``libadamix_ops.so`` beside this file (built by ``pip install .``), gives each operator a
Python function and a fake kernel, so that it can be traced and compiled, and passes on the
layout's constants and sizes from ``adamix._C``. The kernels' contracts stand in
``csrc/<operator>/<operator>.h``, the packed layout in ``csrc/layout/packed_layout.h``.

Every function raises RuntimeError, with what was expected and what it got, for a wrong dtype,
shape or value, and NotImplementedError for a device that has no kernel.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

LIBRARY = Path(__file__).with_name("libadamix_ops.so")

try:
    from adamix._C import (
        BLOCK_CODES,
        LAYOUT_VERSION,
        MAX_BITS,
        TABLE_COLUMNS,
        TABLE_FIRST_COUNT,
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

__all__ = [
    "BLOCK_CODES",
    "LAYOUT_VERSION",
    "MAX_BITS",
    "TABLE_COLUMNS",
    "TABLE_FIRST_COUNT",
    "TABLE_SCALE_OFFSET",
    "TABLE_U_OFFSET",
    "TABLE_V_OFFSET",
    "delta_gemm",
    "delta_gemm_",
    "gptq",
    "lane_words",
    "pack",
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
    quantizer of the packed layout.
    """
    return torch.ops.adamix.gptq.default(weight, hinv, bits, scales, by_row)


def delta_gemm(
    x: Tensor, arena: Tensor, table: Tensor, slots: Tensor, *, out_features: int
) -> Tensor:
    """Every token's own delta: ``y[t] = U_level · diag(scale) · V_level · x[t]``.

    ``x`` fp16, bf16 or fp32 ``[..., in]``, flattened to tokens; ``arena`` int32 ``[words]`` and
    ``table`` int64 ``[capacity, TABLE_COLUMNS]``, the bank (packed_layout.h); ``slots`` int32
    ``[tokens]`` says whose delta in the table, values outside ``0..capacity-1`` mean the base.
    Returns ``[..., out_features]`` of x's dtype: fp32 accumulation, one rounding. Raises if a
    slot in use points out of the arena (on the CPU).
    """
    y = torch.ops.adamix.delta_gemm.default(_as_tokens(x), arena, table, slots, out_features)
    return y.view(*x.shape[:-1], out_features)


def delta_gemm_(y: Tensor, x: Tensor, arena: Tensor, table: Tensor, slots: Tensor) -> None:
    """Add every token's delta to ``y`` in place: ``y = round(fp32(y) + delta)``, one rounding.

    ``y [..., out]`` has x's dtype and leading dimensions; each row's elements are adjacent, rows
    do not overlap, and y can be viewed as ``[tokens, out]``. The rest is as for
    :func:`delta_gemm`.
    """
    rows = y.view(math.prod(y.shape[:-1]), y.shape[-1])
    torch.ops.adamix.delta_gemm_.default(rows, _as_tokens(x), arena, table, slots)


def _as_tokens(x: Tensor) -> Tensor:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


# Fake kernels: shapes and dtypes without data, for tracing; sizes stay symbolic. What real kernels
# check is left to them, except for devices that disagree: torch picks the fake kernel as soon as
# one tensor is on "meta".


def _one_device(op: str, **tensors: Tensor) -> None:
    if len({tensor.device for tensor in tensors.values()}) > 1:
        places = ", ".join(f"{name} on {tensor.device}" for name, tensor in tensors.items())
        raise RuntimeError(f"{op}: all tensors must be on one device, got {places}")


@torch.library.register_fake("adamix::pack")
def _(codes: Tensor, bits: int) -> Tensor:
    blocks = (codes.shape[1] + BLOCK_CODES - 1) // BLOCK_CODES
    return codes.new_empty(
        (codes.shape[0], blocks * lane_words(BLOCK_CODES, bits)), dtype=torch.int32
    )


@torch.library.register_fake("adamix::unpack")
def _(words: Tensor, bits: int, count: int) -> Tensor:
    return words.new_empty((words.shape[0], count), dtype=torch.uint8)


@torch.library.register_fake("adamix::gptq")
def _(weight: Tensor, hinv: Tensor, bits: Tensor, scales: Tensor, by_row: bool) -> Tensor:
    _one_device("gptq", weight=weight, hinv=hinv, bits=bits, scales=scales)
    return weight.new_empty(weight.shape, dtype=torch.uint8)


@torch.library.register_fake("adamix::delta_gemm")
def _(x: Tensor, arena: Tensor, table: Tensor, slots: Tensor, out_features: int) -> Tensor:
    _one_device("delta_gemm", x=x, arena=arena, table=table, slots=slots)
    return x.new_empty((x.shape[0], out_features))


@torch.library.register_fake("adamix::delta_gemm_")
def _(y: Tensor, x: Tensor, arena: Tensor, table: Tensor, slots: Tensor) -> None:
    _one_device("delta_gemm_", y=y, x=x, arena=arena, table=table, slots=slots)
