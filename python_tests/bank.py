"""Banks of random deltas, laid out after packed_layout.h's comment, and their float64 meaning."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from tolerance import assert_within_rounding
from torch import Tensor

from adamix import ops

WIDTHS = range(8, 0, -1)  # the order of components
PANEL = 256  # codes
MIXED = {8: 2, 7: 1, 5: 3, 4: 2, 3: 9, 2: 5, 1: 4}
# Up to so many tokens, and for fp32 x, CUDA kernels keep z in fp32 or better.
EXACT_Z_TOKENS = 128
ONE_BIT = [0, 0, 0, 0, 0, 0, 0, 1]  # counts of one lane of one bit
Counts = dict[int, int]  # {bits: rows of V, or columns of U}


@dataclass
class Delta:
    """One matrix: codes uint8 [lanes, in] and [lanes, out] at 8, 7 .. 1 bits, scales."""

    V: list[Tensor]
    U: list[Tensor]
    scales: Tensor

    @property
    def rank(self) -> int:
        return self.scales.numel()

    @property
    def v_counts(self) -> list[int]:
        return [codes.shape[0] for codes in self.V]

    @property
    def u_counts(self) -> list[int]:
        return [codes.shape[0] for codes in self.U]

    def sliced(self, inputs: slice = slice(None), outputs: slice = slice(None)) -> "Delta":
        """A tensor-parallel part: columns of V, rows of U."""
        V, U = [c[:, inputs] for c in self.V], [c[:, outputs] for c in self.U]
        return Delta(V, U, self.scales)

    def dense(self) -> tuple[Tensor, Tensor]:
        """U [out, rank] with the scales folded in, V [rank, in]; float64."""
        return levels(self.U).T * self.scales.double(), levels(self.V)


def levels(codes: list[Tensor]) -> Tensor:
    return torch.cat(
        [2.0 * q.double() - (2**bits - 1) for bits, q in zip(WIDTHS, codes, strict=True)]
    )


def random_delta(out: int, n: int, v_counts: Counts, u_counts: Counts | None = None) -> Delta:
    """Without `u_counts` U's widths differ from V's."""
    u_counts = other_counts(v_counts) if u_counts is None else u_counts
    V, U = (
        [torch.randint(0, 2**b, (counts.get(b, 0), length), dtype=torch.uint8) for b in WIDTHS]
        for counts, length in ((v_counts, n), (u_counts, out))
    )
    return Delta(V, U, 1e-4 * torch.randn(sum(v_counts.values())))


def other_counts(counts: Counts) -> Counts:
    """As many lanes, whose widths fall at other components: those of the lanes a third further on,
    the first of them 3 bits wider, the last 2 bits narrower."""
    widths = [bits for bits in WIDTHS for _ in range(counts.get(bits, 0))]
    rank, third = len(widths), -(-len(widths) // 3)
    shifted = [widths[min(lane + third, rank - 1)] for lane in range(rank)]
    return Counter(min(max(bits + 3 - 6 * lane // rank, 1), 8) for lane, bits in enumerate(shifted))


def factor_words(codes: list[Tensor]) -> Tensor:
    """A factor: panel by panel, in each the lanes at 8, 7 .. 1 bits with their blocks there."""
    parts = [torch.empty(0, dtype=torch.int32)]
    for first in range(0, codes[0].shape[1], PANEL):
        for bits, lanes in zip(WIDTHS, codes, strict=True):
            parts.append(ops.pack(lanes[:, first : first + PANEL], bits=bits).flatten())
    return torch.cat(parts)


@dataclass
class Bank:
    """What the operators get, and the same deltas in words."""

    arena: Tensor
    tables: list[Tensor]
    layers: list[list[Delta]]  # [layer][slot]

    @property
    def table(self) -> Tensor:
        return self.tables[0]

    @property
    def outs(self) -> list[int]:
        return [deltas[0].U[0].shape[1] for deltas in self.layers]

    @property
    def n(self) -> int:
        return self.layers[0][0].V[0].shape[1]

    @property
    def max_rank(self) -> int:
        return max(delta.rank for deltas in self.layers for delta in deltas)

    def delta(self, x: Tensor, slots: list[int], layer: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """The exact result, the same sum of absolute values, and that of z's terms alone:
        |U| diag(scale) |V x|, what z's own rounding is relative to."""
        exact = torch.zeros(len(slots), self.outs[layer], dtype=torch.float64)
        magnitude, of_z = exact.clone(), exact.clone()
        for slot, delta in enumerate(self.layers[layer]):
            tokens = [token for token, its in enumerate(slots) if its == slot]
            U, V = delta.dense()
            own = x[tokens].double()
            exact[tokens] = own @ V.T @ U.T
            magnitude[tokens] = own.abs() @ V.abs().T @ U.abs().T
            of_z[tokens] = (own @ V.T).abs() @ U.abs().T
        return exact, magnitude, of_z

    def assert_delta(
        self, got: Tensor, x: Tensor, slots: list[int], y: Tensor | None = None, layer: int = 0
    ) -> None:
        """got = round(y + delta) within rounding; without y, round(delta)."""
        exact, magnitude, of_z = self.delta(x.cpu(), slots, layer)
        if y is not None:
            exact, magnitude = exact + y.cpu().double(), magnitude + y.cpu().double().abs()
        # The dot product, the scale, the sum over components, y.
        terms = self.n + self.max_rank + 2
        if got.is_cuda and got.dtype != torch.float32 and len(slots) > EXACT_Z_TOKENS:
            # z is the second product's operand, rounded once to bf16: by half an eps, relative.
            # That many fp32 roundings of |U| |z| bound it, added to the others.
            z_rounding = torch.finfo(torch.bfloat16).eps / 2
            magnitude = magnitude + z_rounding / (terms * 2.0**-24) * of_z
        assert_within_rounding(got.cpu(), exact, magnitude, terms)


def build(layers: list[list[Delta]], device: str = "cpu", lead: int = 5) -> Bank:
    """Deltas one after the other; `lead` words before the first, so that none starts at word 0."""
    parts, tables, place = [torch.full((lead,), -1, dtype=torch.int32)], [], lead
    for deltas in layers:
        table = []
        for delta in deltas:
            words = [factor_words(delta.V), factor_words(delta.U), delta.scales.view(torch.int32)]
            table.append([])
            for part in words:
                table[-1].append(place)
                place += part.numel()
            table[-1] += delta.v_counts + delta.u_counts
            parts += words
        tables.append(torch.tensor(table, device=device))
    arena = torch.cat([*parts, torch.full((3,), -1, dtype=torch.int32)])
    return Bank(arena.to(device), tables, layers)


def make_bank(out: int, n: int, ranks: list[Counts], device: str = "cpu") -> Bank:
    """One matrix; a slot for each of `ranks`, V's widths."""
    return build([[random_delta(out, n, counts) for counts in ranks]], device)


def make_layers(outs: Sequence[int], n: int, ranks: list[Counts], device: str = "cpu") -> Bank:
    """Several matrices on one x, each with all of `ranks`; a delta's rank differs by layer."""
    return build(
        [
            [random_delta(out, n, {b: c + i * (c > 0) for b, c in counts.items()})
             for counts in ranks]
            for i, out in enumerate(outs)
        ],
        device,
    )


# --- one call for every overload ---------------------------------------------------------------


def as_slots(slots: list[int], device: str) -> Tensor:
    return torch.tensor(slots, dtype=torch.int32, device=device)


def as_segments(slots: list[int], segments: int, device: str) -> list[Tensor]:
    """What vLLM's LoRAKernelMeta holds: token_indices sorted by slot, the base first; counts and
    starts of each segment (one start more); their slots. Those in no use: count 0, slot -1."""
    own = torch.tensor(slots, dtype=torch.int32)
    present, counts = own.unique(return_counts=True)
    assert len(present) <= segments
    token_counts = torch.zeros(segments, dtype=torch.int32)
    token_counts[: len(counts)] = counts
    token_starts = torch.zeros(segments + 1, dtype=torch.int32)
    token_starts[1:] = token_counts.cumsum(0)
    segment_slots = torch.full((segments,), -1, dtype=torch.int32)
    segment_slots[: len(present)] = present
    indices = own.argsort(stable=True).int()
    return [t.to(device) for t in (indices, token_counts, token_starts, segment_slots)]


def call_delta_gemm(bank, x, ys, routes, max_rank=None):
    out = bank.outs[0]
    own = {"out_features": out, "max_rank": max_rank}
    ys[0].copy_(ops.delta_gemm(x, bank.arena, bank.table, routes[0], **own))


def call_delta_gemm_(bank, x, ys, routes, max_rank=None):
    ops.delta_gemm_(ys[0], x, bank.arena, bank.table, routes[0], max_rank=max_rank)


def call_layers(bank, x, ys, routes, max_rank=None):
    results = ops.delta_gemm_layers(
        x, bank.arena, bank.tables, routes[0], bank.outs, max_rank=max_rank
    )
    for y, result in zip(ys, results, strict=True):
        y.copy_(result)


def call_layers_(bank, x, ys, routes, max_rank=None):
    ops.delta_gemm_layers_(ys, x, bank.arena, bank.tables, routes[0], max_rank=max_rank)


def call_segments_(bank, x, ys, routes, max_rank=None):
    ops.delta_gemm_segments_(ys, x, bank.arena, bank.tables, *routes, max_rank=max_rank)


# Each writes its result into ys, or adds it there.
CALLS: dict[str, Callable] = {
    "delta_gemm": call_delta_gemm,
    "delta_gemm_": call_delta_gemm_,
    "delta_gemm.layers": call_layers,
    "delta_gemm_.layers": call_layers_,
    "delta_gemm_.segments": call_segments_,
}
OVERLOADS = tuple(CALLS)


def routes_for(overload: str, slots: list[int], device: str, segments: int = 8) -> list[Tensor]:
    if overload.endswith(".segments"):
        return as_segments(slots, segments, device)
    return [as_slots(slots, device)]


def matrices_of(overload: str) -> int:
    return 3 if "." in overload else 1
