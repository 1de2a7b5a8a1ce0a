"""This project's method with codes of four numbers together in place of one: what better codes for
the narrow widths would bring. The packed format and the kernels do not have them.

Stored is as much as by this project: b bits a number and 32 bits of scale a component; codebooks
are constants. At 2 and 3 bits an index of 4b bits stands for four adjacent numbers of a lane, at 4
and 5 bits one of 2b bits for two, from 6 bits on a number stands alone. Codebooks are centroids of
N(0, 1) (Lloyd's algorithm; Linde, Buzo and Gray, 1980), rounded to bytes:

    python -m methods.vector_codes    # in benchmarks/, trains them anew
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from adamix.artifacts import Hessian
from adamix.compression.hessian import inverse_upper
from methods import steps
from methods.reconstruction import Reconstruction

BOOKS = Path(__file__).with_name("vector_codes.safetensors")
TOGETHER = {2: 4, 3: 4, 4: 2, 5: 2}  # numbers of an index; of other widths one
STEP = 32  # bytes count 1 / STEP of a standard deviation
# Of a lane's root mean square, what its scale is looked for among.
SCALES = (0.7, 0.78, 0.84, 0.89, 0.93, 0.97, 1.0, 1.03, 1.07, 1.12, 1.2)
SAMPLES, ROUNDS, AT_ONCE = 300_000, 20, 2**24
FIELD = 4


def compress(delta: Tensor, gram: Tensor, budget_bits: int) -> Reconstruction | None:
    return steps.compress(steps.Codes(quantize_rows, quantize_columns, lost), delta, gram,
                          budget_bits)


def lost(lanes: Tensor, bits: int) -> Tensor:
    """The share of each lane's energy that rounding loses."""
    lanes = lanes.float()
    rounded = nearest(lanes, bits, find_scales(lanes, bits))
    return ((lanes - rounded).square().sum(dim=1) / lanes.square().sum(dim=1)).double()


# --- rounding ------------------------------------------------------------------------------------


@cache
def book(bits: int) -> Tensor:
    """What the indices of a width stand for, `[2^(bits · numbers), numbers]`, of deviation 1."""
    if bits in TOGETHER:
        return load_file(BOOKS)[f"{bits}"].float() / STEP
    spread = {6: 3.6, 7: 4.0, 8: 4.3}.get(bits, 2.5)  # of uniform levels, in deviations
    return torch.linspace(-spread, spread, 2**bits)[:, None]


def nearest(lanes: Tensor, bits: int, scales: Tensor) -> Tensor:
    """Each lane `[m, n]` rounded at its scale; the last numbers go with zeros if they are few."""
    codes = book(bits)
    padded = torch.nn.functional.pad(lanes / scales[:, None], (0, -lanes.shape[1] % FIELD))
    points = padded.reshape(-1, codes.shape[1])
    owners = _owners(points, codes)
    return codes[owners].view(padded.shape)[:, : lanes.shape[1]] * scales[:, None]


def _owners(points: Tensor, codes: Tensor) -> Tensor:
    """Which code is nearest to each point."""
    half = -codes.square().sum(dim=1) / 2
    return torch.cat([torch.addmm(half, part, codes.T).argmax(dim=1)
                      for part in points.split(max(1, AT_ONCE // len(codes)))])


def find_scales(lanes: Tensor, bits: int) -> Tensor:
    """A scale a lane with the least squared error, of a few."""
    size = lanes.square().mean(dim=1).sqrt().clamp_min(1e-30)
    best, least = size.clone(), torch.full_like(size, math.inf)
    for share in SCALES:
        error = (lanes - nearest(lanes, bits, share * size)).square().sum(dim=1)
        best = torch.where(error < least, share * size, best)
        least = torch.minimum(error, least)
    return best


# --- GPTQ ----------------------------------------------------------------------------------------


def quantize_rows(rows: Tensor, bits: int, H: Hessian) -> Tensor:
    """GPTQ on rows of V `[m, n]` at one width, fields of four inputs at a time, the heaviest first.

    n must be a multiple of four.
    """
    m, n = rows.shape
    rows = rows.float()
    scales = find_scales(rows, bits)
    weights = H.matrix.diagonal().view(-1, FIELD).sum(dim=1)
    fields = torch.argsort(weights, descending=True, stable=True)
    order = (fields[:, None] * FIELD + torch.arange(FIELD)).flatten()
    inverse = inverse_upper(H.matrix, order)
    left, result = rows[:, order].clone(), torch.empty_like(rows)
    for first in range(0, n, FIELD):
        field = slice(first, first + FIELD)
        rounded = nearest(left[:, field].contiguous(), bits, scales)
        result[:, order[field]] = rounded
        lost = torch.linalg.solve_triangular(inverse[field, field], left[:, field] - rounded,
                                             upper=True, left=False)
        left[:, first + FIELD :] -= lost @ inverse[field, first + FIELD :]
    return result.double()


def quantize_columns(U: Tensor, bits: Tensor, gram: Tensor) -> Tensor:
    """GPTQ over the columns of Ũ `[out, rank]`, four outputs of a column together."""
    left, result, inverse = U.float().clone(), torch.empty_like(U), inverse_upper(gram)
    scales = torch.cat([find_scales(left[:, i : i + 1].T.contiguous(), int(b))
                        for i, b in enumerate(bits)])
    for i, b in enumerate(bits.tolist()):
        rounded = nearest(left[None, :, i].contiguous(), b, scales[i : i + 1])[0]
        result[:, i] = rounded
        lost = (left[:, i] - rounded) / inverse[i, i]
        left[:, i + 1 :] -= lost[:, None] * inverse[i, i + 1 :]
    return result


# --- codebooks -----------------------------------------------------------------------------------


def train(bits: int, numbers: int) -> Tensor:
    """Centroids of a Gaussian sample, rounded to bytes, `[2^(bits · numbers), numbers]` int8."""
    generator = torch.Generator().manual_seed(bits)
    sample = torch.randn(SAMPLES, numbers, generator=generator)
    codes = sample[: 2 ** (bits * numbers)].clone()
    for _ in range(ROUNDS):
        owner = _owners(sample, codes)
        count = torch.bincount(owner, minlength=len(codes)).float()
        sums = torch.zeros_like(codes).index_add_(0, owner, sample)
        codes = torch.where(count[:, None] > 0, sums / count.clamp_min(1)[:, None], codes)
    return (STEP * codes).round().clamp(-127, 127).to(torch.int8)


if __name__ == "__main__":
    save_file({f"{bits}": train(bits, numbers) for bits, numbers in TOGETHER.items()}, BOOKS)
