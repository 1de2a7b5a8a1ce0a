"""ops.delta_embedding and delta_embedding_ against rows of the definition in float64."""

import pytest
import torch
from bank import MIXED, ONE_BIT, WIDTHS, Bank, as_slots, build, levels, make_bank, random_delta
from conftest import skip_without_cuda
from reference import embedding_rows
from tolerance import FP32_ROUNDOFF, assert_within_rounding
from torch import Tensor

from adamix import ops
from adamix.artifacts import QuantizedDelta
from adamix.storage.pack import pack

OPERATORS = ("delta_embedding", "delta_embedding_")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LEAST, MOST = -(2**31), 2**31 - 1
# A bank's `out` is the vocabulary, its `n` the hidden size.
RANKS = [MIXED, {}, {3: 1}, {8: 3, 1: 20}]
SLOTS = [3, 0, -1, 2, 1, 0, 3, 4, 0, MOST, LEAST, 2]


def some_tokens(count: int, vocab: int) -> list[int]:
    """The first, the last, any, and some that the vocabulary does not have."""
    edges = [0, vocab - 1, vocab, -1, MOST, LEAST, vocab // 2]
    drawn = torch.randint(0, vocab, (count,)).tolist()
    return [edges[t // 3 % 7] if t % 3 == 2 else token for t, token in enumerate(drawn)]


def adds_nothing(bank: Bank, token: int, slot: int) -> bool:
    used = 0 <= slot < len(bank.layers[0]) and bank.layers[0][slot].rank > 0
    return not used or not 0 <= token < bank.outs[0]


def rows_of(bank: Bank, tokens: list[int], slots: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """The exact rows, the same sums of absolute values, and what those would be if every
    |U · scale| of a token were as large as its largest."""
    sums = [torch.zeros(len(tokens), bank.n, dtype=torch.float64) for _ in range(3)]
    for slot, delta in enumerate(bank.layers[0]):
        own = [t for t, its in enumerate(slots) if its == slot]
        U, V, scales = levels(delta.U).T, levels(delta.V), delta.scales.double()
        weights = (U * scales).abs()
        largest = weights.amax(1, keepdim=True) if len(scales) else weights
        cases = (U, scales, V), (U.abs(), scales.abs(), V.abs())
        cases += ((largest.expand_as(weights), torch.ones_like(scales), V.abs()),)
        for rows, case in zip(sums, cases, strict=True):
            rows[own] = torch.from_numpy(embedding_rows([tokens[t] for t in own], *case))
    return tuple(sums)


def assert_rows(
    bank: Bank, got: Tensor, tokens: list[int], slots: list[int], y: Tensor | None = None
) -> None:
    """got = round(y + rows) within rounding; without y, round(rows)."""
    exact, magnitude, spread = rows_of(bank, tokens, slots)
    if y is not None:
        exact, magnitude = exact + y.cpu().double(), magnitude + y.cpu().double().abs()
    terms = bank.max_rank + 3  # w, its product, the sum over components, y
    if got.is_cuda:  # w is rounded to 2^-23 of the largest, at worst
        magnitude = magnitude + 2.0**-23 / (terms * FP32_ROUNDOFF) * spread
    assert_within_rounding(got.cpu(), exact, magnitude, terms)


def call(bank: Bank, tokens: Tensor, slots: Tensor, dtype: torch.dtype, **changes) -> Tensor:
    sizes = {"vocab_size": bank.outs[0], "hidden_size": bank.n, "dtype": dtype} | changes
    return ops.delta_embedding(tokens, bank.arena, bank.table, slots, **sizes)


def call_(bank: Bank, y: Tensor, tokens: Tensor, slots: Tensor, **changes) -> None:
    own = {"vocab_size": bank.outs[0]} | changes
    ops.delta_embedding_(y, tokens, bank.arena, bank.table, slots, **own)


def check(bank: Bank, tokens: list[int], slots: list[int], dtype: torch.dtype,
          ids: torch.dtype = torch.int64, max_rank: int | None = None) -> None:
    """Both operators."""
    device = bank.arena.device
    y = (0.05 * torch.randn(len(tokens), bank.n)).to(dtype)
    routing = (torch.tensor(tokens, dtype=ids, device=device), as_slots(slots, device))
    got = call(bank, *routing, dtype, max_rank=max_rank)
    assert got.dtype == dtype
    assert_rows(bank, got, tokens, slots)
    added = y.to(device, copy=True)
    call_(bank, added, *routing, max_rank=max_rank)
    assert_rows(bank, added, tokens, slots, y)
    nothing = [t for t, its in enumerate(zip(tokens, slots, strict=True))
               if adds_nothing(bank, *its)]
    assert added.cpu()[nothing].equal(y[nothing]) and got[nothing].count_nonzero() == 0


# --- numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("ids", [torch.int64, torch.int32])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (33, 31), (32, 32), (100, 257), (257, 100), (256, 255),
                                   (520, 300), (1100, 513), (45, 800)])  # fmt: skip
def test_mixed_slots_and_tokens(device, shape, dtype, ids):
    bank = make_bank(*shape, RANKS, device)
    check(bank, some_tokens(12, shape[0]), SLOTS, dtype, ids, bank.max_rank)


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_width_alone(device, bits):
    bank = build([[random_delta(300, 70, {bits: 11}, {bits: 11})]], device)
    check(bank, [0, 299, 5, 255, 256, 31], [0, 0, -1, 0, 0, 0], torch.float32)
    check(bank, some_tokens(150, 300), [0] * 150, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_pair_of_widths(device, dtype):
    deltas = [random_delta(300, 70, {v: 11}, {u: 11}) for v in WIDTHS for u in WIDTHS]
    check(build([deltas], device), some_tokens(192, 300), 3 * list(range(64)), dtype)


@pytest.mark.parametrize("rank", [1, 7, 8, 9, 31, 32, 33, 300])
def test_ranks(device, rank):
    bank = make_bank(90, 100, [{4: rank // 2, 2: rank - rank // 2}], device)
    for dtype in DTYPES:
        check(bank, [89, 0, 17, 17, 64], [0] * 5, dtype, max_rank=rank)


@pytest.mark.parametrize("tokens", [1, 2, 3, 16, 64, 65, 128, 129, 300])
def test_numbers_of_tokens(device, tokens):
    bank = make_bank(40, 45, [MIXED, {2: 30}], device)
    for dtype in DTYPES:
        check(bank, some_tokens(tokens, 40), [t * 7 // 3 % 2 for t in range(tokens)], dtype)
        check(bank, some_tokens(tokens, 40), [1] * tokens, dtype, torch.int32)


def test_every_row_of_a_vocabulary(device):
    bank = make_bank(300, 33, [MIXED], device)
    tokens = list(range(-2, 303))
    check(bank, tokens, [0] * len(tokens), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_adds_nothing_touches_nothing(device, dtype):
    bank = make_bank(40, 45, [MIXED, {}], device)
    tokens, slots = [3, 3, 3, 3, 40, -1, MOST, LEAST], [-1, 1, 2, LEAST, 0, 0, 0, 0]
    y = torch.randn(len(tokens), 45).to(device, dtype)
    y[:, 0], y[:, 1] = -0.0, torch.nan  # a sum would change one
    before, ids = y.clone(), torch.tensor(tokens, device=device)
    call_(bank, y, ids, as_slots(slots, device))
    assert y.view(torch.uint8).equal(before.view(torch.uint8))
    assert call(bank, ids, as_slots(slots, device), dtype).count_nonzero() == 0


def test_a_wide_token_is_not_cut_to_32_bits(device):
    bank = make_bank(40, 45, [MIXED], device)
    tokens = torch.tensor([2**32, 2**32 + 3, -(2**32) + 3, 2**63 - 1, -(2**63)], device=device)
    assert call(bank, tokens, as_slots([0] * 5, device), torch.float32).count_nonzero() == 0


def test_by_hand(device):
    # Two bits, scale 0.5: V = [3, -3], U = [-1, 1]; one bit, scale 2: V = [-1, 1], U = [1, 1].
    # Codes 0 and 1 are in bytes 0 and 2.
    words = torch.tensor([0x03, 0, 0x01_0000, 0x02_0001, 0, 0x01_0001], dtype=torch.int32)
    scales = torch.tensor([0.5, 2.0]).view(torch.int32)
    arena = torch.cat([words, scales]).to(device)
    table = torch.tensor([[0, 3, 6] + 2 * [0, 0, 0, 0, 0, 0, 1, 1]], device=device)
    tokens = torch.tensor([0, 1, 2], device=device)
    sizes = {"vocab_size": 2, "hidden_size": 2, "dtype": torch.float32}
    got = ops.delta_embedding(tokens, arena, table, as_slots([0] * 3, device), **sizes)
    assert got.tolist() == [[-3.5, 3.5], [-0.5, 0.5], [0.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_sum_is_rounded_once(device, dtype):
    # y = 1 and a row just above half an ulp: the sum rounds up. Rounded to 16 bits first, the row
    # would be half an ulp, and the tie would go down to the even 1.
    ulp = torch.finfo(dtype).eps
    scale = torch.tensor([ulp / 2 * (1 + 2**-12)])
    ones = torch.tensor([1, 1], dtype=torch.int32)  # V = U = 1: code 1 at one bit
    arena = torch.cat([ones, scale.view(torch.int32)]).to(device)
    table = torch.tensor([[0, 1, 2, *ONE_BIT, *ONE_BIT]], device=device)
    y = torch.ones(1, 1, dtype=dtype, device=device)
    token = torch.zeros(1, dtype=torch.int64, device=device)
    ops.delta_embedding_(y, token, arena, table, as_slots([0], device), vocab_size=1)
    assert y.item() == 1 + ulp


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_percent_would_be_seen(device, dtype):
    bank = make_bank(300, 100, [{4: 60, 2: 60}], device)
    tokens, slots = [0, 299, 17, 256, 31, 32], [0] * 6
    exact, _, _ = rows_of(bank, tokens, slots)
    got = call(bank, torch.tensor(tokens, device=device), as_slots(slots, device), dtype)
    assert_rows(bank, got, tokens, slots)
    for wrong in (exact * 1.02, exact * 0.98, torch.zeros_like(exact), exact.roll(1, 0)):
        with pytest.raises(AssertionError, match="rounding bound"):
            assert_rows(bank, wrong.to(device, dtype), tokens, slots)


# --- the same delta elsewhere ------------------------------------------------------------------


def test_rows_are_those_of_the_dequantized_delta(device):
    delta = random_delta(300, 100, {4: 7, 3: 20, 1: 4}, {5: 16, 1: 15})
    v_bits = torch.tensor([4] * 7 + [3] * 20 + [1] * 4, dtype=torch.int32)
    u_bits = torch.tensor([5] * 16 + [1] * 15, dtype=torch.int32)
    packed = pack(QuantizedDelta(torch.cat(delta.U), torch.cat(delta.V), u_bits, v_bits,
                                 delta.scales))
    v = ops.v_words(100, packed.v_counts)
    arena = torch.cat([packed.words, packed.scales.view(torch.int32)]).to(device)
    row = [0, v, packed.words.numel(), *packed.v_counts, *packed.u_counts]
    table = torch.tensor([row], device=device)
    tokens = torch.tensor([5, 299, 0, 256, 5], device=device)
    sizes = {"vocab_size": 300, "hidden_size": 100, "dtype": torch.float32}
    got = ops.delta_embedding(tokens, arena, table, as_slots([0] * 5, device), **sizes)
    U, V = delta.dense()
    magnitude = (U.abs() @ V.abs())[tokens.cpu()]
    expected = packed.dequantize()[tokens.cpu()].double()
    # Two sums of 31 components, each rounded; on CUDA w once more, by 2^-23 of the largest.
    spread = U.abs().amax(1, keepdim=True)[tokens.cpu()] * V.abs().sum(0)
    assert_within_rounding(got.cpu(), expected, magnitude + spread, 2 * (31 + 3))


def test_a_tied_output_head_has_the_same_rows(device):
    """delta_gemm of the unit vectors is the delta itself, a column a hidden channel."""
    bank = make_bank(70, 45, [MIXED, {3: 9}], device)
    for slot in (0, 1):
        routing = (bank.arena, bank.table, as_slots([slot] * 45, device))
        head = ops.delta_gemm(torch.eye(45, device=device), *routing, out_features=70).T.cpu()
        tokens = torch.arange(70, device=device)
        rows = call(bank, tokens, as_slots([slot] * 70, device), torch.float32)
        _, magnitude, spread = rows_of(bank, list(range(70)), [slot] * 70)
        # On CUDA either rounds its scaled factor to 2^-23 of the largest component.
        U, V = (levels(factor) for factor in (bank.layers[0][slot].U, bank.layers[0][slot].V))
        scaled = (bank.layers[0][slot].scales.double()[:, None] * V).abs()
        spread = spread + U.abs().sum(0)[:, None] * scaled.amax(0)
        assert_within_rounding(rows.cpu(), head.double(), magnitude + spread, 2 * (45 + 29))


# --- memory ------------------------------------------------------------------------------------


def test_tokens_may_have_any_leading_dimensions(device):
    bank = make_bank(40, 45, [MIXED, {3: 4}], device)
    tokens = torch.tensor([[0, 39, 7], [7, 1, 40]], device=device)
    slots = as_slots([0, 1, -1, 1, 0, 0], device)
    flat = call(bank, tokens.flatten(), slots, torch.bfloat16)
    assert call(bank, tokens, slots, torch.bfloat16).equal(flat.view(2, 3, 45))
    y = torch.zeros(2, 3, 45, dtype=torch.bfloat16, device=device)
    call_(bank, y, tokens, slots)
    assert y.equal(flat.view(2, 3, 45))
    assert call(bank, tokens[0, 0], slots[:1], torch.bfloat16).equal(flat[0])


def test_no_tokens_no_vocabulary_no_columns(device):
    bank = make_bank(40, 45, [MIXED], device)
    none = torch.empty(0, dtype=torch.int64, device=device)
    assert call(bank, none, as_slots([], device), torch.float16).shape == (0, 45)
    call_(bank, torch.empty(0, 45, device=device), none, as_slots([], device))
    ones, slots = none.new_ones(5), as_slots([0] * 5, device)
    assert call(bank, ones, slots, torch.float32, vocab_size=0).count_nonzero() == 0
    assert call(bank, ones, slots, torch.float32, hidden_size=0).shape == (5, 0)
    empty = (bank.arena[:0], bank.table[:0], slots)
    sizes = {"vocab_size": 40, "hidden_size": 45, "dtype": torch.float32}
    assert ops.delta_embedding(ones, *empty, **sizes).count_nonzero() == 0


@pytest.mark.parametrize("tokens", [3, 150])
@pytest.mark.parametrize("hidden", [45, 64, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_and_offsets_change_nothing(device, dtype, hidden, tokens):
    bank = make_bank(70, hidden, [MIXED, {3: 4}], device)
    ids = torch.tensor(some_tokens(tokens, 70), device=device)
    slots = as_slots([t % 3 - 1 for t in range(tokens)], device)
    y = torch.randn(tokens, hidden).to(device, dtype)
    expected = y.clone()
    call_(bank, expected, ids, slots)
    around = torch.full((tokens + 2, hidden + 9), 77.0, dtype=dtype, device=device)
    inside, twice = around[1:-1, 4:-5], torch.stack([ids, ids + 1], 1)
    for place in (ids, twice[:, 0], ids.int()):
        inside.copy_(y)
        call_(bank, inside, place, slots)
        assert inside.equal(expected)
    inside.fill_(77.0)
    assert (around == 77.0).all(), "written beside y"


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_has_the_same_bits_alone_and_among_others(device, dtype):
    bank = make_bank(100, 290, [MIXED, {2: 30}, {}, {8: 1, 6: 3}], device)
    ids = torch.tensor(some_tokens(200, 100), device=device)
    slots = as_slots(torch.randint(-1, 4, (200,)).tolist(), device)
    every = call(bank, ids, slots, dtype)
    for part in ([0], [5, 0], [127, 3, 3], range(16), range(40, 105), range(1, 200)):
        part = list(part)
        assert call(bank, ids[part], slots[part], dtype).equal(every[part]), f"{len(part)} tokens"


def test_threads_change_nothing():
    bank = make_bank(300, 1100, [MIXED, {2: 50}])
    ids, slots = torch.arange(9) * 31, as_slots([0, 1, 1, 0, -1, 1, 0, 0, 1], "cpu")
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(call(bank, ids, slots, torch.float32))
    finally:
        torch.set_num_threads(threads)
    assert results[0].equal(results[1]) and results[0].equal(results[2])


@pytest.mark.parametrize("tokens", [5, 150])
def test_a_graph_stays_valid_while_tokens_and_slots_change(tokens):
    skip_without_cuda(*OPERATORS)
    bank = make_bank(300, 100, [MIXED, {3: 20}], "cuda")
    ids = torch.zeros(tokens, dtype=torch.int64, device="cuda")
    slots = as_slots([-1] * tokens, "cuda")
    y = torch.randn(tokens, 100, device="cuda")
    before, graph = y.clone(), torch.cuda.CUDAGraph()
    call_(bank, y, ids, slots)  # whatever happens once, happens here
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        call_(bank, y, ids, slots)
    for shift in range(3):
        own, routes = some_tokens(tokens, 300), [(t + shift) % 3 - 1 for t in range(tokens)]
        y.copy_(before)
        ids.copy_(torch.tensor(own))
        slots.copy_(torch.tensor(routes))
        graph.replay()
        assert_rows(bank, y, own, routes, before)


# --- torch.compile -----------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, True])
def test_an_embedding_compiles_whole(device, dynamic):
    bank, slots = make_bank(40, 45, [MIXED, {3: 4}], device), as_slots([0, 1, -1, 0], device)
    weight = torch.randn(40, 45, device=device)

    def embed(tokens: Tensor) -> Tensor:
        y = torch.nn.functional.embedding(tokens, weight)
        call_(bank, y, tokens, slots)
        return y + call(bank, tokens, slots, torch.bfloat16)

    tokens = torch.tensor([[0, 39], [7, 7]], device=device)
    compiled = torch.compile(embed, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    assert compiled(tokens).equal(embed(tokens))


# --- what a bank may hold -----------------------------------------------------------------------


def test_slots_that_nobody_uses_may_hold_anything(device):
    bank = make_bank(40, 45, [MIXED, {2: 5}], device)
    bank.table[0, ops.TABLE_V_OFFSET] = -1
    tokens = torch.tensor([3, 39], device=device)
    assert_rows(bank, call(bank, tokens, as_slots([1, 1], device), torch.float32), [3, 39], [1, 1])


def test_more_components_than_max_rank(device):
    """The CPU refuses; a device cannot look and takes the slot for empty."""
    bank = make_bank(40, 45, [{2: 50}, {2: 20}], device)
    tokens, slots = torch.tensor([3, 39], device=device), as_slots([0, 1], device)
    for max_rank in (None, 20):
        if device == "cpu":
            with pytest.raises(RuntimeError, match="row 0 has 50 components, more than max_rank"):
                call(bank, tokens, slots, torch.float32, max_rank=max_rank)
        else:
            got = call(bank, tokens, slots, torch.float32, max_rank=max_rank)
            assert_rows(bank, got, [3, 39], [-1, 1])
    got = call(bank, tokens, slots, torch.float32, max_rank=50)
    assert_rows(bank, got, [3, 39], [0, 1])
