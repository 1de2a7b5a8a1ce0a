"""Fake kernels of the operators: shapes and dtypes without data, for tracing; sizes stay symbolic.

What real kernels check is left to them, except for devices that disagree: torch picks the fake
kernel as soon as one tensor is on "meta". Imported by ``ops.py``, which loads the operators.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adamix._C import BLOCK_CODES, lane_words


def _one_device(op: str, **tensors: Tensor | Sequence[Tensor]) -> None:
    """The first tensor says which."""
    named: list[tuple[str, Tensor]] = []
    for name, value in tensors.items():
        if isinstance(value, Tensor):
            named.append((name, value))
        else:
            named += [(f"{name}[{i}]", tensor) for i, tensor in enumerate(value)]
    first, place = named[0][0], named[0][1].device
    for name, tensor in named:
        if tensor.device != place:
            raise RuntimeError(
                f"{op}: {name} must be on the device of {first}, {place}, got {tensor.device}"
            )


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


@torch.library.register_fake("adamix::search_scales")
def _(lanes: Tensor, bits: Tensor, weights: Tensor | None = None) -> Tensor:
    given = {} if weights is None else {"weights": weights}
    _one_device("search_scales", lanes=lanes, bits=bits, **given)
    return lanes.new_empty((lanes.shape[0],))


@torch.library.register_fake("adamix::delta_gemm")
def _(
    x: Tensor,
    arena: Tensor,
    table: Tensor,
    slots: Tensor,
    out_features: int,
    *,
    max_rank: int | None = None,
) -> Tensor:
    _one_device("delta_gemm", x=x, arena=arena, table=table, slots=slots)
    return x.new_empty((x.shape[0], out_features))


@torch.library.register_fake("adamix::delta_gemm.layers")
def _(
    x: Tensor,
    arena: Tensor,
    tables: list[Tensor],
    slots: Tensor,
    out_features: list[int],
    *,
    max_rank: int | None = None,
) -> list[Tensor]:
    _one_device("delta_gemm.layers", x=x, arena=arena, tables=tables, slots=slots)
    return [x.new_empty((x.shape[0], out)) for out in out_features]


@torch.library.register_fake("adamix::delta_gemm_")
def _(
    y: Tensor,
    x: Tensor,
    arena: Tensor,
    table: Tensor,
    slots: Tensor,
    *,
    max_rank: int | None = None,
) -> None:
    _one_device("delta_gemm_", x=x, y=y, arena=arena, table=table, slots=slots)


@torch.library.register_fake("adamix::delta_gemm_.layers")
def _(
    ys: list[Tensor],
    x: Tensor,
    arena: Tensor,
    tables: list[Tensor],
    slots: Tensor,
    *,
    max_rank: int | None = None,
) -> None:
    _one_device("delta_gemm_.layers", x=x, ys=ys, arena=arena, tables=tables, slots=slots)


@torch.library.register_fake("adamix::delta_gemm_.segments")
def _(
    ys: list[Tensor],
    x: Tensor,
    arena: Tensor,
    tables: list[Tensor],
    token_indices: Tensor,
    token_counts: Tensor,
    token_starts: Tensor,
    segment_slots: Tensor,
    *,
    max_rank: int | None = None,
) -> None:
    segments = {"token_indices": token_indices, "token_counts": token_counts}
    segments |= {"token_starts": token_starts, "segment_slots": segment_slots}
    _one_device("delta_gemm_.segments", x=x, ys=ys, arena=arena, tables=tables, **segments)


@torch.library.register_fake("adamix::delta_embedding")
def _(
    tokens: Tensor,
    arena: Tensor,
    table: Tensor,
    slots: Tensor,
    vocab_size: int,
    hidden_size: int,
    *,
    dtype: torch.dtype,
    max_rank: int | None = None,
) -> Tensor:
    _one_device("delta_embedding", tokens=tokens, arena=arena, table=table, slots=slots)
    return tokens.new_empty((tokens.shape[0], hidden_size), dtype=dtype)


@torch.library.register_fake("adamix::delta_embedding_")
def _(
    y: Tensor,
    tokens: Tensor,
    arena: Tensor,
    table: Tensor,
    slots: Tensor,
    vocab_size: int,
    *,
    max_rank: int | None = None,
) -> None:
    _one_device("delta_embedding_", tokens=tokens, y=y, arena=arena, table=table, slots=slots)


@torch.library.register_fake("adamix::add_rows_")
def _(ys: list[Tensor], values: Tensor, slots: Tensor) -> None:
    _one_device("add_rows_", values=values, ys=ys, slots=slots)
