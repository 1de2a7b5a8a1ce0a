"""ops.add_rows_: the bits that one fp32 sum and one rounding give, in the rows that have a slot."""

import pytest
import torch
from bank import as_slots
from conftest import skip_without_cuda
from torch import Tensor

from adamix import ops

OPERATORS = ("add_rows_",)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LEAST, MOST = -(2**31), 2**31 - 1
SLOTS = [2, -1, 0, 1, 3, 0, LEAST, MOST, 2]  # of three
WIDTHS = [[1], [64], [7, 9], [8, 16, 8], [33, 0, 40], [1100, 136, 136], [0, 5], [0],
          [2, 3, 8, 1, 24, 8, 17, 9]]


def expected(ys: list[Tensor], values: Tensor, slots: list[int]) -> list[Tensor]:
    added, widths = [y.clone() for y in ys], [y.shape[-1] for y in ys]
    for token, slot in enumerate(slots):
        if 0 <= slot < len(values):
            for y, own in zip(added, values[slot].split(widths), strict=True):
                y[token] = (y[token].float() + own).to(y.dtype)
    return added


def same_bits(got: list[Tensor], wanted: list[Tensor]) -> bool:
    return all(a.contiguous().view(torch.uint8).equal(b.contiguous().view(torch.uint8))
               for a, b in zip(got, wanted, strict=True))


def check(ys: list[Tensor], values: Tensor, slots: list[int]) -> None:
    wanted = expected(ys, values, slots)
    ops.add_rows_(ys, values, as_slots(slots, values.device))
    assert same_bits(ys, wanted)


def random_ys(tokens: int, widths: list[int], dtype: torch.dtype, device: str) -> list[Tensor]:
    return [torch.randn(tokens, width).to(device, dtype) for width in widths]


# --- numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_every_token_gets_its_row_and_every_output_its_part(device, widths, dtype):
    values = torch.randn(3, sum(widths), device=device)
    check(random_ys(len(SLOTS), widths, dtype, device), values, SLOTS)


@pytest.mark.parametrize("tokens", [0, 1, 2, 8, 129, 1000])
def test_numbers_of_tokens(device, tokens):
    slots = [t * t % 5 - 1 for t in range(tokens)]
    for dtype in DTYPES:
        check(random_ys(tokens, [40, 9], dtype, device), torch.randn(3, 49, device=device), slots)


def test_more_tokens_than_a_grid_has_rows(device):
    if device == "cpu":
        pytest.skip("grids are of CUDA")
    slots = torch.arange(140_000, device=device, dtype=torch.int32) % 3 - 1
    values, y = torch.randn(2, 16, device=device), torch.zeros(140_000, 16, device=device)
    ops.add_rows_([y], values, slots)
    assert y.equal(torch.cat([values, torch.zeros_like(values[:1])])[slots.long()])


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_the_bases_keeps_its_bits(device, dtype):
    slots = [-1, 3, LEAST, MOST]
    (y,) = random_ys(4, [20], dtype, device)
    y[:, 0], y[:, 1] = -0.0, torch.nan  # a sum with 0 would change one
    before = y.clone()
    ops.add_rows_([y], torch.zeros(3, 20, device=device), as_slots(slots, device))
    assert same_bits([y], [before])
    ops.add_rows_([y], torch.zeros(0, 20, device=device), as_slots([0] * 4, device))
    assert same_bits([y], [before])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_sum_is_rounded_once(device, dtype):
    # Rounded to 16 bits first, the value would be half an ulp, and the tie go down to the even 1.
    ulp = torch.finfo(dtype).eps
    y = torch.ones(1, 1, dtype=dtype, device=device)
    values = torch.tensor([[ulp / 2 * (1 + 2**-12)]], device=device)
    ops.add_rows_([y], values, as_slots([0], device))
    assert y.item() == 1 + ulp


# --- memory ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gap", "lead"), [(0, 1), (3, 2), (4, 4), (8, 8)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_anywhere_and_nothing_written_round_them(device, dtype, gap, lead):
    """ys are columns of wide tensors, values of a table that has more."""
    for widths in ([16, 8], [7, 9]):
        own = torch.randn(4, lead + sum(widths) + gap, device=device)
        values = own[:-1, lead : lead + sum(widths)]
        around = [torch.full((len(SLOTS) + 2, lead + width + gap), 77.0).to(device, dtype)
                  for width in widths]
        inside = [wide[1:-1, lead : lead + width]
                  for wide, width in zip(around, widths, strict=True)]
        check(inside, values, SLOTS)
        for y in inside:
            y.fill_(77.0)
        assert all((wide == 77.0).all() for wide in around)


def test_parts_of_one_tensor(device):
    """As an engine has q, k and v."""
    wide, values = torch.randn(3, 40, device=device), torch.randn(2, 40, device=device)
    before = wide.clone()
    ops.add_rows_(wide.split([24, 8, 8], dim=-1), values, as_slots([1, -1, 0], device))
    wanted = expected([before], values, [1, -1, 0])
    assert wide.equal(wanted[0])


def test_outputs_may_have_any_leading_dimensions(device):
    values, slots = torch.randn(2, 14, device=device), [0, 1, -1, 1, 0, 0]
    ys = random_ys(6, [9, 5], torch.bfloat16, device)
    shaped = [y.clone().view(2, 3, -1) for y in ys]
    check(ys, values, slots)
    ops.add_rows_(shaped, values, as_slots(slots, device))
    assert same_bits([y.view(6, -1) for y in shaped], ys)


def test_a_graph_follows_slots_and_values():
    skip_without_cuda(*OPERATORS)
    values, slots = torch.randn(2, 48, device="cuda"), as_slots([-1] * 5, "cuda")
    ys, graph = random_ys(5, [32, 16], torch.bfloat16, "cuda"), torch.cuda.CUDAGraph()
    before = [y.clone() for y in ys]
    ops.add_rows_(ys, values, slots)  # whatever happens once, happens here
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        ops.add_rows_(ys, values, slots)
    for shift in range(3):
        routes = [(t + shift) % 3 - 1 for t in range(5)]
        for y, old in zip(ys, before, strict=True):
            y.copy_(old)
        slots.copy_(torch.tensor(routes))
        values.add_(1.0)
        graph.replay()
        assert same_bits(ys, expected(before, values, routes))


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_layer_compiles_whole(device, dynamic):
    weight, values = torch.randn(24, 10, device=device), torch.randn(2, 24, device=device)

    def layer(x: Tensor, slots: Tensor) -> Tensor:
        ys = [x @ weight[:16].T, x @ weight[16:].T]
        ops.add_rows_(ys, values, slots)
        return torch.cat(ys, dim=-1)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (3, 4):
        args = torch.randn(rows, 2, 10, device=device), as_slots([0, 1, -1] * 2 + [0] * 2, device)
        args = args[0], args[1][: 2 * rows]
        assert compiled(*args).equal(layer(*args))


# --- refusals ----------------------------------------------------------------------------------


def at(place, change):
    return lambda ys: [change(y) if i == place else y for i, y in enumerate(ys)]


REFUSALS = [
    ({"ys": lambda ys: []}, r"ys must be 1\.\.8 tensors, got 0"),
    ({"ys": lambda ys: ys * 5}, r"ys must be 1\.\.8 tensors, got 10"),
    ({"ys": at(0, Tensor.double)}, r"ys\[0\] must be float16, bfloat16 or float32, got float64"),
    ({"ys": at(1, Tensor.half)}, r"ys\[1\] must be float32, got float16"),
    ({"ys": at(1, lambda y: y[0])}, r"ys\[1\] must have 2 dimensions, \[tokens, width\], got"),
    ({"ys": at(0, lambda y: y[:2])}, r"ys\[0\] must be 3 \(tokens of slots\) in dimension 0"),
    ({"ys": at(0, lambda y: y.T.contiguous().T)}, r"ys\[0\] must have adjacent .*got stride 3"),
    ({"ys": at(1, lambda y: y[:1].expand(3, 4))}, r"rows of ys\[1\] must not overlap: .*got 0"),
    ({"ys": lambda ys: ys[:1]}, "the ys must have as many columns as values, 9, got 5"),
    ({"values": lambda v: v[:, :8]}, "the ys must have as many columns as values, 8, got 9"),
    ({"values": Tensor.bfloat16}, "values must be float32, got bfloat16"),
    ({"values": lambda v: v[0]}, r"values must have 2 dimensions, \[capacity, columns\], got"),
    ({"slots": Tensor.long}, "slots must be int32, got int64"),
    ({"slots": lambda s: s[None]}, r"slots must have 1 dimensions, \[tokens\], got \[1, 3\]"),
]


@pytest.mark.parametrize(("changes", "words"), REFUSALS)
def test_a_mistake_gets_a_sentence(device, changes, words):
    args = {"ys": [torch.zeros(3, 5, device=device), torch.zeros(3, 4, device=device)],
            "values": torch.ones(2, 9, device=device), "slots": as_slots([0, 1, -1], device)}
    ys = args["ys"]
    for name, change in changes.items():
        args[name] = change(args[name])
    with pytest.raises(RuntimeError, match=f"^add_rows_: .*{words}"):
        torch.ops.adamix.add_rows_(**args)
    assert not any(y.count_nonzero() for y in ys)
