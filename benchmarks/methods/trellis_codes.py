"""This project's method with trellis codes (`trellis.py`) at 2 to 5 bits: what better codes for the
narrow widths would bring. The packed format and the kernels do not have them.

Stored is as much as by this project: blocks of 32 codes in b words, 32 bits of scale a component;
the tables of levels, 256 bytes a width, are constants. Wider components have this project's codes.

GPTQ gives the error of a number to those after it, and Viterbi's search knows a number's code at
the end of its block alone. So every path of the search has the feedback of its own errors inside
the block (per-survivor processing; Raheli, Polydoros and Tzou, 1995); other blocks get that of the
path which is chosen, as in QTIP's BlockLDLQ. Blocks of V come in order of their weight in H.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from adamix.artifacts import Hessian
from adamix.compression import quantize
from adamix.compression.hessian import inverse_upper
from methods import steps
from methods.reconstruction import Reconstruction
from methods.trellis import ROOM, STEPS, Trellis, paths, search, tables

SHARES = (0.9, 0.95, 1.0, 1.05, 1.1)  # of a lane's root mean square, what a scale is looked for in


def compress(delta: Tensor, gram: Tensor, budget_bits: int) -> Reconstruction | None:
    return steps.compress(steps.Codes(quantize_rows, quantize_columns, lost), delta, gram,
                          budget_bits)


def quantize_rows(rows: Tensor, bits: int, H: Hessian) -> Tensor:
    """GPTQ on rows of V `[m, n]` at one width; with a trellis n must be a multiple of 32."""
    if bits not in tables():
        return quantize.quantize_rows(rows, _each(bits, rows), H).dequantize()
    trellis, rows = tables()[bits], rows.float()
    weights = H.matrix.diagonal().view(-1, STEPS).sum(dim=1)
    blocks = torch.argsort(weights, descending=True, stable=True)
    order = (STEPS * blocks[:, None] + torch.arange(STEPS)).flatten()
    upper, scales = inverse_upper(H.matrix, order), find_scales(rows, bits)
    left, result = rows[:, order] / scales[:, None], torch.empty_like(rows)
    for first in range(0, rows.shape[1], STEPS):
        block = slice(first, first + STEPS)
        own = upper[block, block].contiguous()
        rounded = trellis.values(search(trellis, left[:, block], own))
        result[:, order[block]] = rounded * scales[:, None]
        lost = torch.linalg.solve_triangular(own, left[:, block] - rounded, upper=True, left=False)
        left[:, first + STEPS :] -= lost @ upper[block, first + STEPS :]
    return result.double()


def quantize_columns(U: Tensor, bits: Tensor, gram: Tensor) -> Tensor:
    """GPTQ over the columns of Ũ `[out, rank]`; the outputs of a column do not need each other's
    errors, so the search by itself is GPTQ's rounding."""
    left, result, inverse = U.float().clone(), torch.empty_like(U), inverse_upper(gram)
    for i, b in enumerate(bits.tolist()):
        scale = find_scales(U[None, :, i].float(), b)
        rounded = nearest(left[None, :, i], b, scale)[0]
        result[:, i] = rounded
        lost = (left[:, i] - rounded) / inverse[i, i]
        left[:, i + 1 :] -= lost[:, None] * inverse[i, i + 1 :]
    return result


def lost(lanes: Tensor, bits: int) -> Tensor:
    """The share of each lane's energy that rounding loses."""
    lanes = lanes.float()
    rounded = nearest(lanes, bits, find_scales(lanes, bits))
    return ((lanes - rounded).square().sum(dim=1) / lanes.square().sum(dim=1)).double()


def nearest(lanes: Tensor, bits: int, scales: Tensor) -> Tensor:
    """Each lane `[m, n]` rounded at its scale."""
    if bits not in tables():
        codes = quantize.nearest_codes(lanes, _each(bits, lanes), scales)
        return scales[:, None] * (2.0 * codes - (2.0**bits - 1.0))
    trellis = tables()[bits]
    found = trellis.values(search(trellis, _blocks(lanes / scales[:, None])))
    return found.view(len(lanes), -1)[:, : lanes.shape[1]] * scales[:, None]


def find_scales(lanes: Tensor, bits: int) -> Tensor:
    """A scale a lane with the least squared error: by the errors of blocks whose ends need not
    meet, which one search has."""
    if bits not in tables():
        return quantize.search_scales(lanes.contiguous(), _each(bits, lanes))
    trellis = tables()[bits]
    size = lanes.square().mean(dim=1).sqrt().clamp_min(1e-30) / trellis.unit
    best, least = size.clone(), torch.full_like(size, math.inf)
    for share in SHARES:
        scale = share * size
        costs = _open_costs(trellis, _blocks(lanes / scale[:, None])).view(len(lanes), -1)
        error = scale.square() * costs.sum(dim=1)
        best = torch.where(error < least, scale, best)
        least = torch.minimum(error, least)
    return best


def _open_costs(trellis: Trellis, blocks: Tensor) -> Tensor:
    parts = (part.T.contiguous() for part in blocks.split(ROOM // trellis.states // 4))
    return torch.cat([paths(trellis, part, torch.zeros(trellis.states, part.shape[1])
                            ).cost.amin(dim=0) for part in parts])


def _blocks(lanes: Tensor) -> Tensor:
    """`[m, n]` as blocks, the last one of a lane filled up with zeros."""
    return torch.nn.functional.pad(lanes, (0, -lanes.shape[1] % STEPS)).reshape(-1, STEPS)


def _each(bits: int, lanes: Tensor) -> Tensor:
    return torch.full((len(lanes),), bits, dtype=torch.int32)
