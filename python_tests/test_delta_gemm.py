"""ops.delta_gemm and delta_gemm_ against dense float64 products."""

import pytest
import torch
from bank import (
    MIXED,
    ONE_BIT,
    PANEL,
    WIDTHS,
    Bank,
    as_slots,
    build,
    factor_words,
    make_bank,
    random_delta,
)
from tolerance import assert_within_rounding
from torch import Tensor

from adamix import ops

OPERATORS = ("delta_gemm", "delta_gemm_")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def fill_free_memory_with_nan(like: Tensor) -> None:
    """On a device the next tensor of this size gets this block."""
    torch.full_like(like, torch.nan)


def check(bank: Bank, slots: list[int], dtype: torch.dtype, max_rank: int | None = None) -> None:
    """Both operators on random inputs."""
    out, device = bank.outs[0], bank.arena.device
    x = torch.randn(len(slots), bank.n).to(dtype)
    y = (0.05 * torch.randn(len(slots), out)).to(dtype)
    routing = (bank.arena, bank.table, as_slots(slots, device))

    fill_free_memory_with_nan(y.to(device))
    got = ops.delta_gemm(x.to(device), *routing, out_features=out, max_rank=max_rank)
    assert got.dtype == dtype
    bank.assert_delta(got, x, slots)

    added = y.to(device, copy=True)
    ops.delta_gemm_(added, x.to(device), *routing, max_rank=max_rank)
    bank.assert_delta(added, x, slots, y)
    base = [token for token, slot in enumerate(slots) if not 0 <= slot < len(bank.layers[0])]
    assert added.cpu()[base].equal(y[base]), "a token of the base was touched"


# --- numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [(1, 1), (31, 33), (32, 32), (33, 31), (65, 127), (255, 256), (256, 255), (257, 513),
     (300, 520), (530, 129), (1024, 640)],
)  # fmt: skip
def test_mixed_slots(device, shape, dtype):
    bank = make_bank(*shape, [MIXED, {}, {3: 1}, {8: 3, 1: 20}], device)
    slots = [3, 0, -1, 2, 1, 0, 3, 4, 0, 2**31 - 1, -(2**31), 2]
    check(bank, slots, dtype, bank.max_rank)


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_width_alone(device, bits):
    bank = build([[random_delta(70, 300, {bits: 11}, {bits: 11})]], device)
    check(bank, [0, 0, -1, 0], torch.float32)
    check(bank, [0] * 150, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_pair_of_widths(device, dtype):
    deltas = [random_delta(70, 300, {v: 11}, {u: 11}) for v in WIDTHS for u in WIDTHS]
    bank = build([deltas], device)
    check(bank, list(range(len(deltas))), dtype)
    check(bank, 3 * list(range(len(deltas))), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts", [
    ({5: 2, 3: 4, 2: 2}, {4: 3, 3: 2, 2: 3}), ({8: 1, 1: 70}, {8: 70, 1: 1}),
    ({8: 70, 1: 1}, {8: 1, 1: 70}), ({2: 33}, {b: 4 + (b == 8) for b in WIDTHS}),
    ({b: 4 + (b == 8) for b in WIDTHS}, {2: 33}), ({4: 32, 3: 32}, {4: 31, 3: 33})])
def test_widths_change_at_other_components_in_v_than_in_u(device, dtype, counts):
    bank = build([[random_delta(150, 290, *counts), random_delta(150, 290, {})]], device)
    check(bank, [0, -1, 0, 1, 0], dtype)
    check(bank, [0] * 150, dtype)


@pytest.mark.parametrize("rank", [1, 7, 8, 9, 31, 32, 33, 300])
def test_ranks(device, rank):
    bank = make_bank(100, 90, [{4: rank // 2, 2: rank - rank // 2}], device)
    for dtype in DTYPES:
        check(bank, [0] * 5, dtype, rank)


@pytest.mark.parametrize("tokens", [1, 2, 3, 16, 17, 63, 64, 65, 128, 129, 130, 200])
def test_numbers_of_tokens(device, tokens):
    bank = make_bank(40, 45, [MIXED, {2: 30}], device)
    for dtype in DTYPES:
        check(bank, [(token * 7 // 3) % 2 for token in range(tokens)], dtype)
        check(bank, [1] * tokens, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_tokens_over_a_few_slots(device, dtype):
    bank = make_bank(33, 40, [MIXED, {}, {2: 30}, {5: 3}], device)
    check(bank, torch.randint(-1, 5, (4000,)).tolist(), dtype)


@pytest.mark.parametrize("slots", [[-1] * 5, [1] * 5, [2, 3, -7, 99, 2], [-1]])
def test_base_and_empty_slots_add_nothing(device, slots):
    bank = make_bank(40, 45, [MIXED, {}], device)
    x = torch.randn(len(slots), 45, device=device)
    routing = (bank.arena, bank.table, as_slots(slots, device))
    fill_free_memory_with_nan(x.new_empty(len(slots), 40))
    assert ops.delta_gemm(x, *routing, out_features=40).count_nonzero() == 0
    y = torch.randn(len(slots), 40, device=device)
    y[0, 0], y[0, 1] = -0.0, torch.nan  # a sum would change one
    before = y.clone()
    ops.delta_gemm_(y, x, *routing)
    assert y.view(torch.int32).equal(before.view(torch.int32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_sum_is_rounded_once(device, dtype):
    # y = 1 and a delta just above half an ulp: the sum rounds up. Rounded to 16 bits first, the
    # delta would be half an ulp, and the tie would go down to the even 1.
    ulp = torch.finfo(dtype).eps
    scale = torch.tensor([ulp / 2 * (1 + 2**-12)])
    ones = torch.tensor([1, 1], dtype=torch.int32)  # V = U = 1: code 1 at one bit
    arena = torch.cat([ones, scale.view(torch.int32)]).to(device)
    table = torch.tensor([[0, 1, 2, *ONE_BIT, *ONE_BIT]], device=device)
    y = torch.ones(1, 1, dtype=dtype, device=device)
    x = torch.ones(1, 1, dtype=dtype, device=device)
    ops.delta_gemm_(y, x, arena, table, as_slots([0], device))
    assert y.item() == 1 + ulp


def test_by_hand(device):
    # V = [1, -1, 1], U = [1, -1], scale 0.5: z = 0.5 * (1 - 2 + 4) = 1.5. Codes 0, 1, 2 are in
    # bytes 0, 2, 1.
    scale = torch.tensor([0.5]).view(torch.int32)
    arena = torch.cat([torch.tensor([0x00_00_01_01, 0x01], dtype=torch.int32), scale]).to(device)
    table = torch.tensor([[0, 1, 2, *ONE_BIT, *ONE_BIT]], device=device)
    x = torch.tensor([[1.0, 2.0, 4.0]], device=device)
    slots = as_slots([0], device)
    assert ops.delta_gemm(x, arena, table, slots, out_features=2).tolist() == [[1.5, -1.5]]


@pytest.mark.parametrize("tokens", [6, 150])
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_percent_would_be_seen(device, dtype, tokens):
    bank = make_bank(100, 300, [{4: 60, 2: 60}], device)
    slots = [0] * tokens
    x = torch.randn(tokens, 300).to(dtype)
    exact, _, _ = bank.delta(x, slots)
    routing = (bank.arena, bank.table, as_slots(slots, device))
    bank.assert_delta(ops.delta_gemm(x.to(device), *routing, out_features=100), x, slots)
    for wrong in (exact * 1.02, exact * 0.98, torch.zeros_like(exact), exact.roll(1, 0)):
        with pytest.raises(AssertionError, match="rounding bound"):
            bank.assert_delta(wrong.to(device, dtype), x, slots)


# --- memory ------------------------------------------------------------------------------------


def test_x_may_have_any_leading_dimensions(device):
    bank = make_bank(40, 45, [MIXED, {3: 4}], device)
    x = torch.randn(2, 3, 45, device=device)
    routing = (bank.arena, bank.table, as_slots([0, 1, -1, 1, 0, 0], device))
    flat = ops.delta_gemm(x.view(6, 45), *routing, out_features=40)
    assert ops.delta_gemm(x, *routing, out_features=40).equal(flat.view(2, 3, 40))
    y = torch.zeros(2, 3, 40, device=device)
    ops.delta_gemm_(y, x, *routing)
    assert y.equal(flat.view(2, 3, 40))
    one = ops.delta_gemm(x[0, 0], *routing[:2], routing[2][:1], out_features=40)
    assert one.equal(flat[0])


@pytest.mark.parametrize("tokens", [3, 150])
@pytest.mark.parametrize("n", [45, 64, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_and_offsets_change_nothing(device, dtype, n, tokens):
    bank = make_bank(70, n, [MIXED, {3: 4}], device)
    routing = (bank.arena, bank.table, as_slots([t % 3 - 1 for t in range(tokens)], device))
    x = torch.randn(tokens, n).to(device, dtype)
    y = torch.randn(tokens, 70).to(device, dtype)
    expected = y.clone()
    ops.delta_gemm_(expected, x, *routing)

    odd = torch.full((tokens * n + 1,), torch.nan, dtype=dtype, device=device)
    wide = torch.full((tokens, n + 9), torch.nan, dtype=dtype, device=device)
    sparse = torch.full((tokens, 2 * n), torch.nan, dtype=dtype, device=device)
    around = torch.full((tokens + 2, 70 + 9), 77.0, dtype=dtype, device=device)
    inside = around[1:-1, 4:-5]
    for place in (odd[1:].view(tokens, n), wide[:, 3 : 3 + n], sparse[:, ::2], wide[:, 1 : 1 + n]):
        place.copy_(x)
        inside.copy_(y)
        ops.delta_gemm_(inside, place, *routing)
        assert inside.equal(expected)
    inside.fill_(77.0)
    assert (around == 77.0).all(), "written beside y"


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_has_the_same_bits_alone_and_among_others(device, dtype):
    bank = make_bank(100, 290, [MIXED, {2: 30}, {}, {8: 1, 6: 3}], device)
    slots = torch.randint(-1, 4, (128,)).tolist()
    x, y = torch.randn(128, 290).to(device, dtype), torch.randn(128, 100).to(device, dtype)
    every = y.clone()
    ops.delta_gemm_(every, x, bank.arena, bank.table, as_slots(slots, device))
    for part in ([0], [5, 0], [127, 3, 3], range(16), range(17), range(40, 105), range(1, 128)):
        part = list(part)
        got = y[part]
        own = as_slots([slots[token] for token in part], device)
        ops.delta_gemm_(got, x[part], bank.arena, bank.table, own)
        assert got.equal(every[part]), f"{len(part)} tokens"


def test_threads_change_nothing():
    bank = make_bank(1100, 300, [MIXED, {2: 50}])
    x, slots = torch.randn(9, 300), as_slots([0, 1, 1, 0, -1, 1, 0, 0, 1], "cpu")
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(ops.delta_gemm(x, bank.arena, bank.table, slots, out_features=1100))
    finally:
        torch.set_num_threads(threads)
    assert results[0].equal(results[1]) and results[0].equal(results[2])


# --- tensor-parallel slices --------------------------------------------------------------------

SLOTS = [0, 1, 1, -1, 0, 2]


def spans(length: int, parts: int) -> list[slice]:
    step = length // parts
    assert step % 32 == 0 and step * parts == length
    return [slice(first, first + step) for first in range(0, length, step)]


@pytest.mark.parametrize("parts", [2, 4, 8])
@pytest.mark.parametrize("length", [768, 2048])
def test_slices_add_up_to_the_whole(device, length, parts):
    counts = [MIXED, {3: 40}, {}]
    x, routing = torch.randn(6, length), as_slots(SLOTS, device)

    deltas = [random_delta(70, length, c) for c in counts]  # V by columns: partial sums
    total = torch.zeros(6, 70, dtype=torch.float64)
    for inputs in spans(length, parts):
        bank = build([[delta.sliced(inputs=inputs) for delta in deltas]], device)
        own = x[:, inputs].to(device)
        part = ops.delta_gemm(own, bank.arena, bank.table, routing, out_features=70)
        bank.assert_delta(part, x[:, inputs], SLOTS)
        total += part.cpu().double()
    exact, magnitude, _ = build([deltas]).delta(x, SLOTS)
    assert_within_rounding(total.float(), exact, magnitude, length + 40 + 2 + parts)

    deltas = [random_delta(length, 70, c) for c in counts]  # U by rows: slices
    x = torch.randn(6, 70)
    columns = []
    for outputs in spans(length, parts):
        bank = build([[delta.sliced(outputs=outputs) for delta in deltas]], device)
        own = (bank.arena, bank.table, routing)
        columns.append(ops.delta_gemm(x.to(device), *own, out_features=length // parts))
    build([deltas]).assert_delta(torch.cat(columns, 1), x, SLOTS)


@pytest.mark.parametrize("n", [1024, 1000])
def test_slices_at_panels_are_views_of_the_same_words(device, n):
    deltas = [random_delta(n, n, counts) for counts in (MIXED, {3: 40}, {})]
    bank = build([deltas], device)
    x, routing = torch.randn(6, n), as_slots(SLOTS, device)
    columns, total = [], torch.zeros(6, n, dtype=torch.float64)
    for first in range(0, n, PANEL):
        part = slice(first, min(first + PANEL, n))
        v_table, u_table = bank.table.clone(), bank.table.clone()
        for row, delta in enumerate(deltas):
            v_words, u_words = (sum(b * c for b, c in zip(WIDTHS, counts, strict=True))
                                for counts in (delta.v_counts, delta.u_counts))
            v_table[row, ops.TABLE_V_OFFSET] += first // 32 * v_words
            u_table[row, ops.TABLE_U_OFFSET] += first // 32 * u_words
            words = factor_words(delta.sliced(inputs=part).V)
            start = v_table[row, ops.TABLE_V_OFFSET]
            assert bank.arena[start : start + words.numel()].cpu().equal(words)
        own = x[:, part].to(device)
        total += ops.delta_gemm(own, bank.arena, v_table, routing, out_features=n).cpu().double()
        size = part.stop - first
        columns.append(
            ops.delta_gemm(x.to(device), bank.arena, u_table, routing, out_features=size)
        )
    bank.assert_delta(torch.cat(columns, 1), x, SLOTS)
    exact, magnitude, _ = bank.delta(x, SLOTS)
    assert_within_rounding(total.float(), exact, magnitude, n + 40 + 2 + 4)
