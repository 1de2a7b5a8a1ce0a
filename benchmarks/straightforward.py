"""The method as one would write it down in PyTorch: what the speed of adamix is measured against.

One matrix after the other: a full SVD; GPTQ as published, a Python loop over the columns in blocks
of 128, once for every width; the integer program; Target Correction and a loop over U's columns;
the same again in the second pass. It has the same choices as adamix (`Config`) and the same integer
program and search for scales (`allocate`, `search_scales`), computes in fp32 but for the
correction's solves, shares a Hessian among matrices of one input, and runs on any device.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from rivals.gptq_loop import BLOCK, gptq_loop
from torch import Tensor

from adamix.compression.allocate import allocate
from adamix.compression.correct import LEAST_KEPT, MOST_GAIN
from adamix.compression.matrix import component_bits
from adamix.compression.pairs import columns, sets_of_pairs, union
from adamix.compression.quantize import nearest_codes, search_scales
from adamix.config import Config

HESSIAN, SVD, WIDTHS, ILP, REST = "Hessian", "SVD", "GPTQ at every width", "ILP", "quantization"
RIDGE = 1e-6  # of the mean diagonal


@dataclass
class Clock:
    """Seconds by stage, each begun and ended with an idle device.

    Attributes:
        seconds: of the whole work: a stage of which a share was done counts by that share.
        measured: what was really done.
        widths: how many were tried, of all matrices together.
        widths_of: how many there were to try.
    """

    device: torch.device
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    measured: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    widths: int = 0
    widths_of: int = 0

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = self.now()
        yield
        self.add(stage, self.now() - start)

    def add(self, stage: str, measured: float, share: float = 1.0) -> None:
        self.measured[stage] += measured
        self.seconds[stage] += measured / share

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


@dataclass(frozen=True)
class Hessian:
    """H with a mean diagonal of 1, and what its users need."""

    matrix: Tensor
    order: Tensor  # inputs by falling diagonal
    inverse_upper: Tensor  # the upper Cholesky factor of H[order, order]⁻¹


@dataclass(frozen=True)
class Approximation:
    """Δ̂ = U V, dequantized."""

    U: Tensor  # [out, rank]
    V: Tensor  # [rank, in]
    v_bits: list[int]  # of each component
    u_bits: list[int]


def compress_group(gram: Tensor, deltas: Mapping[str, Tensor], config: Config, clock: Clock,
                   seconds: float | None = None) -> dict[str, Approximation]:
    """The matrices of one input, one after the other.

    Args:
        gram: X Xᵀ `[in, in]`.
        deltas: ΔW `[out, in]` by name.
        config: which steps are on, and the bits a weight.
        clock: takes the times.
        seconds: a matrix's GPTQ at every width ends after the first width, from the narrowest on,
            that is done later than this. The others are then left out of the integer program.
    """
    with clock(HESSIAN):
        H = hessian(gram, config.damping)
    return {name: compress_matrix(delta, H, config, clock, seconds)
            for name, delta in deltas.items()}


def hessian(gram: Tensor, damping: float) -> Hessian:
    matrix = gram.float() / gram.diagonal().mean()
    matrix.diagonal().add_(damping)
    order = torch.argsort(matrix.diagonal(), descending=True)
    lower = torch.linalg.cholesky(matrix[order][:, order])
    inverse_upper = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
    return Hessian(matrix, order, inverse_upper)


def compress_matrix(delta: Tensor, H: Hessian, config: Config, clock: Clock,
                    seconds: float | None = None) -> Approximation:
    """ΔW -> Δ̂ within the budget (paper Algorithm 1, with the same choices as adamix)."""
    delta, budget = delta.float(), config.budget_bits(delta.shape)
    least = component_bits(tuple(delta.shape), min(config.bit_widths))
    with clock(SVD):
        U, s, V = decompose(delta, H, budget // least, config)
    v_errors, u_errors, rows = simulate(U, s, V, H, config, clock, seconds)
    with clock(ILP):
        sets = sets_of_pairs(replace(config, bit_widths=tuple(rows)))
        pairs = union(sets)
        table = torch.stack([*(v_errors[v] + u_errors[u] for v, u in pairs), s**2 * energy(V, H)],
                            dim=1).cpu().double()
        costs = [*(component_bits(tuple(delta.shape), v, u) for v, u in pairs), 0]
        choice = allocate(table, costs, budget, sets=columns(sets), max_choices=config.max_widths,
                          solver=config.solver).tolist()
    kept = [i for i, k in enumerate(choice) if k < len(pairs)]
    v_bits, u_bits = ([pairs[choice[i]][side] for i in kept] for side in (0, 1))
    with clock(REST):
        V_hat = torch.stack([rows[b][i] for i, b in zip(kept, v_bits, strict=True)])
        U_hat = quantize_u(delta, s[kept, None] * V_hat, U[:, kept], u_bits, H, config)
        A = s[kept, None] * V_hat
        for _ in range(config.passes - 1):
            target = solve(U_hat.T @ U_hat, U_hat.T @ delta)
            s_new = torch.linalg.vector_norm(target, dim=1, keepdim=True)
            A = s_new * rows_at_widths(target / s_new, v_bits, H)
            U_hat = quantize_u(delta, A, U[:, kept], u_bits, H, config)
        if config.unbiased:
            left = (U[:, kept] * U_hat).sum(dim=0) * (V[kept] * A).sum(dim=1) / s[kept]
            A = A * torch.where(left > LEAST_KEPT, 1 / left, 1.0).clamp(max=MOST_GAIN)[:, None]
    return Approximation(U_hat, A, v_bits, u_bits)


def decompose(delta: Tensor, H: Hessian, rank: int, config: Config
              ) -> tuple[Tensor, Tensor, Tensor]:
    """(U, s, V) of ΔW, or of ΔW L with V's rows brought back from it; V's rows of length 1."""
    whitened = delta
    if config.decomposition == "output-aware":
        damped = H.matrix.clone()
        damped.diagonal().add_(config.svd_damping * H.matrix.diagonal().mean())
        whitened = delta @ torch.linalg.cholesky(damped)
    U = torch.linalg.svd(whitened, full_matrices=False).U[:, :rank]
    scaled = U.T @ delta
    s = torch.linalg.vector_norm(scaled, dim=1)
    return U, s, scaled / s.clamp_min(1e-30)[:, None]


def simulate(U: Tensor, s: Tensor, V: Tensor, H: Hessian, config: Config, clock: Clock,
             seconds: float | None = None
             ) -> tuple[dict[int, Tensor], dict[int, Tensor], dict[int, Tensor]]:
    """{width: error of every component by V, by U}, {width: V̂}, width by width."""
    v_errors, u_errors, rows = {}, {}, {}
    start = clock.now()
    for width in reversed(config.bit_widths):
        rows[width] = quantize_rows(V, width, H)
        v_errors[width] = s**2 * energy(V - rows[width], H)
        u_errors[width] = torch.zeros_like(s)
        if config.objective == "v+u":
            u_errors[width] = s**2 * energy(V, H) * lost_share(U, width)
        taken = clock.now() - start
        if seconds is not None and taken > seconds:
            break
    clock.add(WIDTHS, taken, len(rows) / len(config.bit_widths))
    clock.widths += len(rows)
    clock.widths_of += len(config.bit_widths)
    return v_errors, u_errors, rows


def energy(rows: Tensor, H: Hessian) -> Tensor:
    """v H vᵀ of each row."""
    return ((rows @ H.matrix) * rows).sum(dim=1)


def lost_share(U: Tensor, width: int) -> Tensor:
    """What rounding to the nearest code loses of each column's energy."""
    columns = U.T.contiguous()
    bits = torch.full_like(columns[:, 0], width, dtype=torch.int32)
    scales = search_scales(columns, bits)
    levels = 2 * nearest_codes(columns, bits, scales) - (2**width - 1)
    return (columns - scales[:, None] * levels).square().sum(1) / columns.square().sum(1)


def quantize_rows(V: Tensor, width: int, H: Hessian) -> Tensor:
    """V̂ at one width by GPTQ, dequantized."""
    scales = search_scales(V, torch.full_like(V[:, 0], width, dtype=torch.int32))
    codes = gptq_loop(V[:, H.order], H.inverse_upper, width, scales)
    V_hat = torch.empty_like(V)
    V_hat[:, H.order] = scales[:, None] * (2.0 * codes - (2**width - 1))
    return V_hat


def rows_at_widths(V: Tensor, bits: list[int], H: Hessian) -> Tensor:
    """V̂ where each row has a width of its own: a loop for each width."""
    V_hat = torch.empty_like(V)
    for width in sorted(set(bits)):
        here = [i for i, b in enumerate(bits) if b == width]
        V_hat[here] = quantize_rows(V[here], width, H)
    return V_hat


def quantize_u(delta: Tensor, A: Tensor, U: Tensor, bits: list[int], H: Hessian, config: Config
               ) -> Tensor:
    """Û by GPTQ over the columns of Ũ (paper eq. 6 to 9), dequantized."""
    AH = A @ H.matrix
    gram = AH @ A.T
    target = solve(gram, AH @ delta.T).T if config.correction else U
    scales = search_scales(target.T.contiguous(), torch.tensor(bits, dtype=torch.int32,
                                                               device=target.device))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(gram)))
    hinv = torch.linalg.cholesky(inverse, upper=True).float()
    return gptq_columns(target, hinv, bits, scales.tolist())


def gptq_columns(weight: Tensor, hinv: Tensor, bits: list[int], scales: list[float]) -> Tensor:
    """GPTQ where every column has its own width and scale; dequantized `[rows, n]`."""
    weight, columns = weight.clone(), weight.shape[1]
    restored = torch.empty_like(weight)
    for begin in range(0, columns, BLOCK):
        end = min(begin + BLOCK, columns)
        block, factor = weight[:, begin:end], hinv[begin:end, begin:end]
        errors = torch.empty_like(block)
        for j in range(end - begin):
            scale, half = scales[begin + j], 2 ** (bits[begin + j] - 1)
            code = torch.clamp(torch.floor(block[:, j] / (2 * scale)) + half, 0, 2 * half - 1)
            restored[:, begin + j] = scale * (2 * code - (2 * half - 1))
            error = (block[:, j] - restored[:, begin + j]) / factor[j, j]
            block[:, j + 1 :] -= error[:, None] * factor[j, j + 1 :]
            errors[:, j] = error
        weight[:, end:] -= errors @ hinv[begin:end, end:]
    return restored


def solve(gram: Tensor, right: Tensor) -> Tensor:
    """gram⁻¹ right in fp64, as fp32."""
    return torch.linalg.solve(damped(gram), right.double()).float()


def damped(gram: Tensor) -> Tensor:
    gram = gram.double()
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    return gram
