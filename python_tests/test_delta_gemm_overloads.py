"""Every overload of delta_gemm alike: one matrix, several on one x, tokens sorted into segments."""

import pytest
import torch
from bank import (
    CALLS,
    MIXED,
    OVERLOADS,
    Bank,
    as_segments,
    as_slots,
    make_layers,
    matrices_of,
    routes_for,
)
from conftest import skip_without_cuda
from torch import Tensor

from adamix import ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OUTS = [70, 33, 257]
RANKS = [MIXED, {}, {2: 30}, {5: 3}]
every_overload = pytest.mark.parametrize("overload", OVERLOADS)


def bank_for(overload: str, device: str, n: int = 45) -> Bank:
    return make_layers(OUTS[: matrices_of(overload)], n, RANKS, device)


def new_ys(bank: Bank, tokens: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(tokens, out).to(bank.arena.device, dtype) for out in bank.outs]


def assert_all(
    overload: str, bank: Bank, x: Tensor, slots: list[int], before: list[Tensor], got: list[Tensor]
) -> None:
    for layer, (y, result) in enumerate(zip(before, got, strict=True)):
        bank.assert_delta(result, x, slots, y if adds(overload) else None, layer)


def adds(overload: str) -> bool:
    return overload.startswith("delta_gemm_")


# --- numbers -----------------------------------------------------------------------------------


@every_overload
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 7, 130])
def test_every_overload_adds_the_delta(device, overload, dtype, tokens):
    bank = bank_for(overload, device)
    slots = torch.randint(-1, 5, (tokens,)).tolist()
    x, ys = torch.randn(tokens, 45).to(device, dtype), new_ys(bank, tokens, dtype)
    got = [y.clone() for y in ys]
    CALLS[overload](bank, x, got, routes_for(overload, slots, device))
    assert_all(overload, bank, x, slots, ys, got)
    if adds(overload):
        base = [token for token, slot in enumerate(slots) if slot in (-1, 4)]
        assert all(a[base].equal(b[base]) for a, b in zip(got, ys, strict=True))


@pytest.mark.parametrize("overload", ["delta_gemm.layers", "delta_gemm_.layers"])
@pytest.mark.parametrize("layers", [1, 2, 8])
def test_one_to_eight_matrices(device, overload, layers):
    bank = make_layers([5 + 31 * i for i in range(layers)], 40, RANKS, device)
    slots = [0, 2, -1, 3, 1, 0]
    x, ys = torch.randn(6, 40, device=device), new_ys(bank, 6)
    got = [y.clone() for y in ys]
    CALLS[overload](bank, x, got, routes_for(overload, slots, device), bank.max_rank)
    assert_all(overload, bank, x, slots, ys, got)


@pytest.mark.parametrize("overload", ["delta_gemm_.layers", "delta_gemm_.segments"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_may_be_columns_of_one_tensor(device, overload, dtype):
    """q, k and v come out of one product."""
    bank, slots = bank_for(overload, device), [0, 2, -1, 3, 1, 0]
    x = torch.randn(6, 45).to(device, dtype)
    wide = torch.randn(6, sum(OUTS) + 8).to(device, dtype)
    before = wide.clone()
    CALLS[overload](bank, x, wide[:, 3:-5].split(OUTS, 1), routes_for(overload, slots, device))
    assert_all(
        overload, bank, x, slots, before[:, 3:-5].split(OUTS, 1), wide[:, 3:-5].split(OUTS, 1)
    )
    assert wide[:, :3].equal(before[:, :3]) and wide[:, -5:].equal(before[:, -5:])


@every_overload
def test_x_and_y_may_have_leading_dimensions(device, overload):
    bank, slots = bank_for(overload, device), [0, 2, -1, 3, 1, 0]
    x, ys = torch.randn(2, 3, 45, device=device), new_ys(bank, 6)
    got = [y.clone().view(2, 3, -1) for y in ys]
    CALLS[overload](bank, x, got, routes_for(overload, slots, device))
    flat = [y.flatten(0, 1) for y in got]
    assert_all(overload, bank, x.view(6, 45), slots, ys, flat)


# --- segments ----------------------------------------------------------------------------------


def test_segments_look_as_an_engine_sorts_them():
    indices, counts, starts, slots = as_segments([2, -1, 0, 2, -1, 0, 0], 5, "cpu")
    assert indices.tolist() == [1, 4, 2, 5, 6, 0, 3]
    assert slots.tolist() == [-1, 0, 2, -1, -1] and counts.tolist() == [2, 3, 2, 0, 0]
    assert starts.tolist() == [0, 2, 5, 7, 7, 7]


SEGMENTS = "delta_gemm_.segments"


@pytest.mark.parametrize("overload", [SEGMENTS])
def test_segments_in_any_order_with_gaps(device, overload):
    """Two segments of one slot, tokens in none, and nothing read of what no delta names: indices
    between segments, and those of segments that are empty or the base."""
    bank, x = bank_for(overload, device), torch.randn(8, 45, device=device)
    nothing = 2**31 - 1
    indices = [5, 1, nothing, 3, 0, -7, nothing, -1]
    counts, starts = [1, 2, 3, 2, 0, 1], [3, 0, 5, nothing, -3, 4, 99]
    segments = [indices, counts, starts, [2, 0, -1, 77, 0, 0]]
    slots = [0, 0, -1, 2, -1, 0, -1, -1]
    ys = new_ys(bank, 8)
    got = [y.clone() for y in ys]
    CALLS[overload](bank, x, got, [as_slots(values, device) for values in segments])
    assert_all(overload, bank, x, slots, ys, got)


@pytest.mark.parametrize("overload", [SEGMENTS])
def test_no_segments_change_nothing(device, overload):
    bank, x = bank_for(overload, device), torch.randn(4, 45, device=device)
    ys = new_ys(bank, 4)
    got = [y.clone() for y in ys]
    routes = [as_slots([0, 1, 2, 3], device), *[as_slots([], device)] * 3]
    CALLS[overload](bank, x, got, routes)
    assert all(a.equal(b) for a, b in zip(got, ys, strict=True))


@pytest.mark.parametrize("overload", [SEGMENTS])
@pytest.mark.parametrize("index", [4, -1, 2**31 - 1, -(2**31)])
def test_an_index_outside_is_refused_or_passed_over(device, overload, index):
    bank, x = bank_for(overload, device), torch.randn(4, 45, device=device)
    ys = new_ys(bank, 4)
    got = [y.clone() for y in ys]
    routes = [as_slots(values, device) for values in ([0, index, 2, 3], [0, 3], [0, 0], [2, 0])]
    if device == "cpu":
        with pytest.raises(RuntimeError, match=f"must be 0..3, got {index} in segment 1"):
            CALLS[overload](bank, x, got, routes)
        assert all(a.equal(b) for a, b in zip(got, ys, strict=True))
    else:
        CALLS[overload](bank, x, got, routes)
        assert_all(overload, bank, x, [0, -1, 0, -1], ys, got)


@pytest.mark.parametrize(
    ("segments", "words"),
    [
        (([0, 1], [1, 2], [0, 1], [0, 0]), "segment 1, 2 tokens from 1 on, leads out of the 2 "),
        (([0, 1], [1, 2], [0, -1], [0, 0]), "segment 1, 2 tokens from -1 on, leads out of"),
        (([0, 1], [1, -2], [0, 1], [0, 0]), "segment 1, -2 tokens from 1 on, leads out of"),
        (([0, 0], [1, 1], [0, 1], [2, 0]), "token 0 is there twice, the second time in segment 1"),
    ],
)
def test_segments_that_cannot_be_are_refused(segments, words):
    bank, x = bank_for(SEGMENTS, "cpu"), torch.randn(2, 45)
    with pytest.raises(RuntimeError, match=f"{SEGMENTS}: {words}"):
        CALLS[SEGMENTS](bank, x, new_ys(bank, 2), [as_slots(values, "cpu") for values in segments])


# --- max_rank ----------------------------------------------------------------------------------


@every_overload
@pytest.mark.parametrize("max_rank", [None, 60, 40])
def test_more_components_than_max_rank(device, overload, max_rank):
    """45 inputs and at most 50 outputs: 58 components (60 in the last layer) need a max_rank."""
    bank = make_layers([50, 20, 33][: matrices_of(overload)], 45, [MIXED, {2: 58}], device)
    allowed = max_rank is not None and max_rank >= bank.max_rank
    slots = [0, 1, -1, 0]
    x, ys = torch.randn(4, 45, device=device), new_ys(bank, 4)
    got = [y.clone() for y in ys]
    routes = routes_for(overload, slots, device)
    if device == "cpu" and not allowed:
        words = f"row 1 has .* components, more than max_rank, {50 if max_rank is None else 40} "
        with pytest.raises(RuntimeError, match=words):
            CALLS[overload](bank, x, got, routes, max_rank)
        assert all(a.equal(b) for a, b in zip(got, ys, strict=True))
    else:
        CALLS[overload](bank, x, got, routes, max_rank)
        assert_all(overload, bank, x, slots if allowed else [0, -1, -1, 0], ys, got)


@every_overload
def test_a_max_rank_that_is_enough_changes_no_bit(device, overload):
    bank, slots = bank_for(overload, device), [0, 2, -1, 3, 1, 0]
    x, ys = torch.randn(6, 45, device=device), new_ys(bank, 6)
    routes = routes_for(overload, slots, device)
    results = []
    for max_rank in (None, bank.max_rank, 1000):
        results.append([y.clone() for y in ys])
        CALLS[overload](bank, x, results[-1], routes, max_rank)
    assert all(a.equal(b) for other in results for a, b in zip(results[0], other, strict=True))


# --- streams and graphs ------------------------------------------------------------------------


@every_overload
def test_work_goes_to_torchs_current_stream(overload):
    skip_without_cuda(overload)
    bank, slots = bank_for(overload, "cuda"), [0, 2, -1, 3, 1, 0]
    x, ys, routes = torch.randn(6, 45), new_ys(bank, 6), routes_for(overload, slots, "cuda")
    late, got = torch.zeros(6, 45, device="cuda"), [y.clone() for y in ys]
    source, stream = x.cuda(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # cycles: a launch on another stream reads zeros
        late.copy_(source)
        CALLS[overload](bank, late, got, routes)
    stream.synchronize()
    assert_all(overload, bank, x, slots, ys, got)


@every_overload
@pytest.mark.parametrize("tokens", [6, 150])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_graph_follows_reroutes_and_deltas_swapped_in_place(overload, tokens, dtype):
    skip_without_cuda(overload)
    first = bank_for(overload, "cuda")
    other = make_layers(first.outs, 45, [{}, {8: 2, 1: 33}, {3: 2}, MIXED], "cuda")
    words = max(first.arena.numel(), other.arena.numel())
    live = Bank(torch.zeros(words, dtype=torch.int32, device="cuda"),
                [torch.zeros_like(table) for table in first.tables], first.layers)  # fmt: skip
    x, ys = torch.randn(tokens, 45).cuda().to(dtype), new_ys(first, tokens, dtype)
    got, routes = [y.clone() for y in ys], routes_for(overload, [-1] * tokens, "cuda")

    def load(bank: Bank, slots: list[int]) -> None:
        live.arena[: bank.arena.numel()].copy_(bank.arena)
        for mine, its in zip(live.tables, bank.tables, strict=True):
            mine.copy_(its)
        for mine, its in zip(routes, routes_for(overload, slots, "cuda"), strict=True):
            mine.copy_(its)
        for mine, its in zip(got, ys, strict=True):
            mine.copy_(its)

    graph, max_rank = torch.cuda.CUDAGraph(), other.max_rank
    CALLS[overload](live, x, got, routes, max_rank)  # whatever happens once, happens here
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        CALLS[overload](live, x, got, routes, max_rank)
    for bank in (first, other, first):
        for slots in ([0] * tokens, [t % 6 - 1 for t in range(tokens)], [-1] * tokens):
            load(bank, slots)
            graph.replay()
            assert_all(overload, bank, x, slots, ys, got)


# --- torch.compile -----------------------------------------------------------------------------


@every_overload
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("fused", [False, True], ids=["outputs", "columns"])
def test_a_layer_compiles_whole(device, overload, backend, fused):
    """Its outputs are tensors of their own, or columns of one product."""
    bank, slots = bank_for(overload, device), [0, 2, -1, 3, 1, 0]
    weight, outs = torch.randn(45, sum(bank.outs), device=device), bank.outs

    def layer(x: Tensor, routes: list[Tensor]) -> list[Tensor]:
        base = (x @ weight).split(outs, -1)
        ys = list(base) if fused else [y.clone() for y in base]
        CALLS[overload](bank, x, ys, routes)
        return [y * 2 for y in ys]

    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for shape in ((2, 3, 45), (1, 6, 45)):
        x, routes = torch.randn(shape, device=device), routes_for(overload, slots, device)
        for got, expected in zip(compiled(x, routes), layer(x, routes), strict=True):
            assert got.equal(expected)


def test_functions_take_any_sequence():
    bank, slots = bank_for(SEGMENTS, "cpu"), as_slots([0, 2], "cpu")
    x, ys = torch.randn(2, 45), new_ys(bank, 2)
    tables, outs = tuple(bank.tables), tuple(bank.outs)
    deltas = ops.delta_gemm_layers(x, bank.arena, tables, slots, outs)
    assert isinstance(deltas, list)
    got = tuple(y.zero_() for y in ys)
    ops.delta_gemm_layers_(got, x, bank.arena, tables, slots)
    assert all(a.equal(b) for a, b in zip(got, deltas, strict=True))
