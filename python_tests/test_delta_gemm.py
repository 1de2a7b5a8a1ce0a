"""ops.delta_gemm and delta_gemm_ against dense float64 products."""

from dataclasses import dataclass

import pytest
import torch
from tolerance import assert_within_rounding
from torch import Tensor

from adamix import ops

OPERATORS = ("pack", "delta_gemm", "delta_gemm_")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MIXED = {8: 2, 7: 1, 5: 3, 4: 2, 3: 9, 2: 5, 1: 4}


@dataclass
class Bank:
    """What the operators get, and the same deltas as dense float64 factors."""

    arena: Tensor
    table: Tensor
    U: list[Tensor]  # [out, rank] per slot, scales folded in
    V: list[Tensor]  # [rank, in]

    def delta(self, x: Tensor, slots: list[int]) -> tuple[Tensor, Tensor]:
        """The exact result, and the same sum of absolute values."""
        exact = torch.zeros(len(slots), self.U[0].shape[0], dtype=torch.float64)
        magnitude = exact.clone()
        for token, slot in enumerate(slots):
            if 0 <= slot < len(self.U):
                exact[token] = self.U[slot] @ (self.V[slot] @ x[token])
                magnitude[token] = self.U[slot].abs() @ (self.V[slot].abs() @ x[token].abs())
        return exact, magnitude

    @property
    def max_rank(self) -> int:
        return max(V.shape[0] for V in self.V)


def make_bank(out: int, n: int, ranks: list[dict[int, int]], device: str = "cpu") -> Bank:
    """One slot an entry of `ranks`: components per width."""
    words = [torch.full((5,), -1, dtype=torch.int32)]  # nothing starts at word 0
    table, Us, Vs = [], [], []
    for counts in ranks:
        row, factors = [], []
        for length in (n, out):
            row.append(sum(part.numel() for part in words))
            levels = [torch.zeros(0, length, dtype=torch.float64)]
            for bits in range(ops.MAX_BITS, 0, -1):
                shape = (counts.get(bits, 0), length)
                codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8)
                words.append(ops.pack(codes, bits=bits).flatten())
                levels.append(2.0 * codes.double() - (2**bits - 1))
            factors.append(torch.cat(levels))
        row.append(sum(part.numel() for part in words))
        scales = 1e-4 * torch.randn(factors[0].shape[0])
        words.append(scales.view(torch.int32))
        table.append(row + [counts.get(bits, 0) for bits in range(ops.MAX_BITS, 0, -1)])
        Vs.append(factors[0])
        Us.append(factors[1].T * scales.double())
    arena = torch.cat([*words, torch.full((3,), -1, dtype=torch.int32)])
    return Bank(arena.to(device), torch.tensor(table).to(device), Us, Vs)


def check(bank: Bank, slots: list[int], dtype: torch.dtype, device: str) -> None:
    """Both operators on random inputs."""
    out, n = bank.U[0].shape[0], bank.V[0].shape[1]
    x = torch.randn(len(slots), n).to(dtype)
    y = (0.05 * torch.randn(len(slots), out)).to(dtype)
    exact, magnitude = bank.delta(x.double(), slots)
    terms = n + bank.max_rank + 2  # the dot product, the scale, the sum over components, y
    routing = (bank.arena, bank.table, torch.tensor(slots, dtype=torch.int32, device=device))

    got = ops.delta_gemm(x.to(device), *routing, out_features=out).cpu()
    assert got.dtype == dtype
    assert_within_rounding(got, exact, magnitude, terms)

    added = y.to(device, copy=True)
    ops.delta_gemm_(added, x.to(device), *routing)
    assert_within_rounding(added.cpu(), exact + y.double(), magnitude + y.double().abs(), terms)
    base = [token for token, slot in enumerate(slots) if not 0 <= slot < len(bank.V)]
    assert added.cpu()[base].equal(y[base]), "a token of the base was touched"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (31, 33), (32, 32), (33, 31), (65, 127), (530, 129)])
def test_mixed_slots(device, shape, dtype):
    bank = make_bank(*shape, [MIXED, {}, {3: 1}, {8: 3, 1: 20}], device)
    check(bank, [3, 0, -1, 2, 1, 0, 3, 4, 0, 2**31 - 1, -(2**31), 2], dtype, device)


@pytest.mark.parametrize("bits", range(1, ops.MAX_BITS + 1))
def test_every_width_alone(device, bits):
    check(make_bank(70, 50, [{bits: 11}], device), [0, 0, -1, 0], torch.float32, device)


@pytest.mark.parametrize("rank", [1, 7, 8, 9, 300])
def test_ranks(device, rank):
    bank = make_bank(100, 90, [{4: rank // 2, 2: rank - rank // 2}], device)
    check(bank, [0] * 5, torch.float32, device)


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 200])
def test_numbers_of_tokens(device, tokens):
    bank = make_bank(40, 45, [MIXED, {2: 30}], device)
    check(bank, [(token * 7 // 3) % 2 for token in range(tokens)], torch.float32, device)
    check(bank, [1] * tokens, torch.bfloat16, device)


@pytest.mark.parametrize("slots", [[-1] * 5, [1] * 5, [2, 3, -7, 99, 2]])
def test_base_and_empty_slots_add_nothing(device, slots):
    bank = make_bank(40, 45, [MIXED, {}], device)
    x = torch.randn(5, 45, device=device)
    routing = (bank.arena, bank.table, torch.tensor(slots, dtype=torch.int32, device=device))
    assert ops.delta_gemm(x, *routing, out_features=40).count_nonzero() == 0
    y = torch.randn(5, 40, device=device)
    before = y.clone()
    ops.delta_gemm_(y, x, *routing)
    assert y.equal(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_sum_is_rounded_once(device, dtype):
    # y = 1 and a delta just above half an ulp: the sum rounds up. Rounded to 16 bits first, the
    # delta would be half an ulp, and the tie would go down to the even 1.
    ulp = torch.finfo(dtype).eps
    scale = torch.tensor([ulp / 2 * (1 + 2**-12)])
    ones = torch.tensor([1, 1], dtype=torch.int32)  # V = U = 1: code 1 at one bit
    arena = torch.cat([ones, scale.view(torch.int32)]).to(device)
    table = torch.tensor([[0, 1, 2] + [0] * 7 + [1]], device=device)
    y = torch.ones(1, 1, dtype=dtype, device=device)
    x = torch.ones(1, 1, dtype=dtype, device=device)
    ops.delta_gemm_(y, x, arena, table, torch.zeros(1, dtype=torch.int32, device=device))
    assert y.item() == 1 + ulp


def test_by_hand(device):
    # V = [1, -1, 1], U = [1, -1], scale 0.5: z = 0.5 * (1 - 2 + 4) = 1.5.
    scale = torch.tensor([0.5]).view(torch.int32)
    arena = torch.cat([torch.tensor([0b101, 0b01], dtype=torch.int32), scale]).to(device)
    table = torch.tensor([[0, 1, 2] + [0] * 7 + [1]], device=device)
    x = torch.tensor([[1.0, 2.0, 4.0]], device=device)
    slots = torch.zeros(1, dtype=torch.int32, device=device)
    assert ops.delta_gemm(x, arena, table, slots, out_features=2).tolist() == [[1.5, -1.5]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_percent_would_be_seen(dtype):
    bank = make_bank(100, 300, [{4: 150, 2: 150}])
    slots = [0] * 6
    x = torch.randn(6, 300).to(dtype)
    exact, magnitude = bank.delta(x.double(), slots)
    got = ops.delta_gemm(
        x, bank.arena, bank.table, torch.tensor(slots, dtype=torch.int32), out_features=100
    )
    assert_within_rounding(got, exact, magnitude, 602)
    for wrong in (exact * 1.02, exact * 0.98, torch.zeros_like(exact), exact.roll(1, 0)):
        with pytest.raises(AssertionError, match="rounding bound"):
            assert_within_rounding(wrong.to(dtype), exact, magnitude, 602)


def test_x_may_have_any_leading_dimensions(device):
    bank = make_bank(40, 45, [MIXED, {3: 4}], device)
    x = torch.randn(2, 3, 45, device=device)
    routing = (
        bank.arena,
        bank.table,
        torch.tensor([0, 1, -1, 1, 0, 0], dtype=torch.int32, device=device),
    )
    flat = ops.delta_gemm(x.view(6, 45), *routing, out_features=40)
    assert ops.delta_gemm(x, *routing, out_features=40).equal(flat.view(2, 3, 40))
    y = torch.zeros(2, 3, 40, device=device)
    ops.delta_gemm_(y, x, *routing)
    assert y.equal(flat.view(2, 3, 40))
    one = ops.delta_gemm(x[0, 0], *routing[:2], routing[2][:1], out_features=40)
    assert one.equal(flat[0])


def test_threads_change_nothing():
    bank = make_bank(1100, 300, [MIXED, {2: 50}])
    x, slots = torch.randn(9, 300), torch.tensor([0, 1, 1, 0, -1, 1, 0, 0, 1], dtype=torch.int32)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(ops.delta_gemm(x, bank.arena, bank.table, slots, out_features=1100))
    finally:
        torch.set_num_threads(threads)
    assert results[0].equal(results[1]) and results[0].equal(results[2])
