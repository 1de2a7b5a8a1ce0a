"""ops.search_scales against the same search in torch calls, in fp32 and float64: by the error, in
float64, that a scale leaves. Two searches may differ by a tie, and then in all that follows."""

from collections.abc import Iterator

import pytest
import torch
from conftest import skip_without_cuda
from scales_in_torch import search_scales_in_torch
from torch import Tensor

from adamix import ops
from adamix.compression.quantize import nearest_codes

OPERATORS = ("search_scales",)
LONGEST = 58_000  # about what Hopper's shared memory holds; longer lanes are read in every pass
# An entry on a level is off by its own rounding and its scale's, 2^-24 of it each.
ONE_ROUNDING = 2.0**-23


def random_lanes(kind: str, lanes: int, n: int) -> Tensor:
    values = torch.randn(lanes, n)
    if kind == "heavy":
        values /= torch.rand(lanes, n).clamp_min(1e-3)
    elif kind == "spike":
        values[:, n // 2] *= 100.0
    elif kind == "constant":
        values = values[:, :1].repeat(1, n)
    elif kind == "two values":
        values = torch.where(values > 0.3, 3.0, -0.7)
    scale = {"tiny": 1e-15, "denormal squares": 1e-21, "overflowing squares": 1e25}
    return values * scale.get(kind, 1.0)


def every_width(lanes: int) -> Tensor:
    return torch.arange(lanes, dtype=torch.int32) % ops.MAX_BITS + 1


def squared_errors(lanes: Tensor, bits: Tensor, scales: Tensor, weights: Tensor | None) -> Tensor:
    lanes, scales, top = lanes.double(), scales.double(), 2.0 ** bits.double() - 1.0
    levels = 2.0 * nearest_codes(lanes, bits, scales) - top[:, None]
    return ((lanes - scales[:, None] * levels) ** 2 * _ones(lanes, weights)).sum(dim=1)


def _ones(lanes: Tensor, weights: Tensor | None) -> Tensor:
    return torch.ones(lanes.shape[1]).double() if weights is None else weights.double()


def searched(device: str, lanes: Tensor, bits: Tensor, weights: Tensor | None = None) -> Tensor:
    given = None if weights is None else weights.to(device)
    scales = ops.search_scales(lanes.to(device), bits.to(device), given)
    assert scales.dtype == torch.float32 and scales.shape == bits.shape
    assert scales.isfinite().all() and (scales > 0).all()
    return scales.cpu()


def check(device: str, lanes: Tensor, bits: Tensor, weights: Tensor | None = None) -> None:
    """That of the reference in float64 to 1e-4, and no worse than in fp32: at widths where the
    noise of fp32 sums does not lead that one anywhere, for better or for worse."""
    error = squared_errors(lanes, bits, searched(device, lanes, bits, weights), weights)
    in_fp64 = search_scales_in_torch(lanes.double(), bits, weights)
    exact = squared_errors(lanes, bits, in_fp64, weights)
    slack = ONE_ROUNDING**2 * (lanes.double() ** 2 * _ones(lanes, weights)).sum(dim=1)
    assert ((error - exact).abs() <= 1e-4 * exact + slack).all()
    in_fp32 = squared_errors(lanes, bits, search_scales_in_torch(lanes, bits, weights), weights)
    assert (error <= 1.0001 * in_fp32 + slack)[bits <= 5].all()


# --- numbers -----------------------------------------------------------------------------------

KINDS = ["normal", "heavy", "spike", "constant", "two values", "tiny", "denormal squares",
         "overflowing squares"]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("n", [1, 2, 31, 255, 257, 3584])
@pytest.mark.parametrize("kind", KINDS)
def test_the_error_is_the_references(device, kind, n, weighted):
    weights = torch.rand(n) + 0.01 if weighted else None
    check(device, random_lanes(kind, 24, n), every_width(24), weights)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("n", [18944, LONGEST + 3001])
def test_the_error_of_a_long_lane_is_the_references(device, n, weighted):
    weights = torch.rand(n) + 0.01 if weighted else None
    check(device, random_lanes("normal", 8, n), every_width(8), weights)


@pytest.mark.parametrize("bits", [1, 2])
def test_two_percent_would_be_seen(bits):
    lanes, widths = random_lanes("normal", 4, 3584), torch.full((4,), bits, dtype=torch.int32)
    scales = ops.search_scales(lanes, widths)
    for off in (0.98, 1.02):
        worse = squared_errors(lanes, widths, off * scales, None)
        assert (worse > 1.0001 * squared_errors(lanes, widths, scales, None)).all()


def test_a_lane_of_zeros_gets_a_scale_that_vanishes(device):
    bits = every_width(8)
    scales = searched(device, torch.zeros(8, 33), bits)
    assert scales.equal(search_scales_in_torch(torch.zeros(8, 33), bits)) and scales.max() < 1e-20
    without = searched(device, torch.ones(8, 33), bits, torch.zeros(33))  # nothing has a cost
    assert without.equal(1.0 / (2.0 ** bits.float() - 1.0))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3.4e38, 1e-44])
def test_any_lane_gets_a_positive_scale_and_others_feel_nothing(device, value):
    lanes = random_lanes("normal", 24, 300)
    alone = searched(device, lanes, every_width(24))
    lanes[::3, 7] = value
    lanes[1] = value
    scales = searched(device, lanes, every_width(24))
    others = [i for i in range(2, 24) if i % 3]
    assert scales[others].equal(alone[others])


def test_a_scale_has_its_lanes_unit(device):
    lanes = random_lanes("normal", 24, 700)
    scales = searched(device, lanes, every_width(24))
    for power in (-60, -1, 30, 100):
        assert searched(device, 2.0**power * lanes, every_width(24)).equal(2.0**power * scales)


def test_signs_do_not_matter(device):
    lanes, bits = random_lanes("heavy", 24, 700), every_width(24)
    assert searched(device, lanes.abs(), bits).equal(searched(device, lanes, bits))


# --- lanes and memory --------------------------------------------------------------------------


@pytest.mark.parametrize("n", [31, 1000, LONGEST + 3001])
def test_a_scale_depends_on_no_other_lane(device, n):
    lanes, bits = random_lanes("heavy", 16, n), every_width(16)
    together = searched(device, lanes, bits)
    assert together.equal(searched(device, lanes, bits))
    order = torch.randperm(16)
    assert searched(device, lanes[order], bits[order]).equal(together[order])
    assert searched(device, lanes[3:4], bits[3:4]).equal(together[3:4])


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_threads_change_nothing(threads):
    lanes, bits = random_lanes("normal", 50, 3000), every_width(50)
    scales = ops.search_scales(lanes, bits)
    for count in (2, 3):
        torch.set_num_threads(count)
        assert ops.search_scales(lanes, bits).equal(scales)


def test_views_are_read_where_they_lie(device):
    lanes, bits, weights = random_lanes("normal", 24, 301), every_width(24), torch.rand(301)
    expected = searched(device, lanes, bits, weights)
    wide = torch.full((26, 309), torch.nan)
    wide[1:-1, 3:304] = lanes
    doubled = torch.stack([bits, bits], dim=1)[:, 0], torch.stack([weights, weights], dim=1)[:, 1]
    for view in (wide[1:-1, 3:304], lanes.T.contiguous().T):
        moved = wide.to(device)[1:-1, 3:304] if view.stride(1) == 1 else view.T.to(device).T
        before = moved.clone()
        scales = ops.search_scales(moved, *(tensor.to(device) for tensor in doubled))
        assert scales.cpu().equal(expected) and moved.equal(before)


def test_no_lanes_and_no_entries(device):
    assert searched(device, torch.empty(0, 5), every_width(0)).shape == (0,)
    assert searched(device, torch.empty(3, 0), every_width(3), torch.empty(0)).max() < 1e-20


# --- CUDA --------------------------------------------------------------------------------------


@pytest.fixture
def cuda() -> str:
    skip_without_cuda(*OPERATORS)
    return "cuda"


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("n", [1, 31, 32, 33, 256, 257, 3584, 18944, LONGEST + 3001])
def test_the_scales_are_the_cpus(cuda, n, weighted):
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("this CPU has no FMA: it rounds a product before it adds")
    weights = torch.rand(n) + 0.01 if weighted else None
    for kind in ("normal", "heavy"):
        lanes, bits = random_lanes(kind, 40, n), every_width(40)
        assert searched(cuda, lanes, bits, weights).equal(searched("cpu", lanes, bits, weights))


def test_widths_that_there_are_not_count_as_the_nearest(cuda):
    lanes = random_lanes("normal", 1, 300).repeat(6, 1)
    wrong = torch.tensor([0, -(2**31), 9, 2**31 - 1, 1, 8], dtype=torch.int32)
    scales = searched(cuda, lanes, wrong)
    assert scales[:2].equal(scales[4].expand(2)) and scales[2:4].equal(scales[5].expand(2))


def test_a_graph_replays_it_on_new_lanes_and_another_stream_will_do(cuda):
    bits = every_width(24)
    place, on_device = random_lanes("normal", 24, 3000).to(cuda), bits.to(cuda)
    ops.search_scales(place, on_device)  # kernels are loaded before they are recorded
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # on a stream of its own
        scales = ops.search_scales(place, on_device)
    for kind in ("normal", "heavy"):
        lanes = random_lanes(kind, 24, 3000)
        place.copy_(lanes)
        graph.replay()
        assert scales.cpu().equal(searched(cuda, lanes, bits))


# --- refusals ----------------------------------------------------------------------------------

REFUSALS = [
    ({"lanes": Tensor.double}, "lanes must be float32, got float64"),
    ({"lanes": lambda t: t[0]}, r"lanes must have 2 dimensions, \[lanes, n\], got \[7\]"),
    ({"bits": Tensor.long}, "bits must be int32, got int64"),
    ({"bits": lambda t: t[None]}, r"bits must have 1 dimensions, \[lanes\], got \[1, 5\]"),
    ({"bits": lambda t: t[:4]}, r"bits must be 5 \(one a lane\) in dimension 0, got shape \[4\]"),
    ({"weights": Tensor.half}, "weights must be float32, got float16"),
    ({"weights": lambda t: t[None]}, r"weights must have 1 dimensions, \[n\], got \[1, 7\]"),
    ({"weights": lambda t: t[:6]}, r"weights must be 7 \(entries of a lane\) in dimension 0"),
]


def arguments(device: str) -> dict[str, Tensor]:
    return {"lanes": torch.ones(5, 7, device=device), "bits": every_width(5).to(device),
            "weights": torch.ones(7, device=device)}


@pytest.mark.parametrize(("changes", "words"), REFUSALS)
def test_a_mistake_gets_a_sentence(device, changes, words):
    args = arguments(device)
    for name, change in changes.items():
        args[name] = change(args[name])
    with pytest.raises(RuntimeError, match=f"^search_scales: {words}"):
        ops.search_scales(**args)


@pytest.mark.parametrize("width", [0, 9, -1])
def test_the_cpu_refuses_widths_that_there_are_not(width):
    args = arguments("cpu")
    args["bits"][3] = width
    with pytest.raises(RuntimeError, match=rf"^search_scales: bits must be 1\.\.8, got {width}$"):
        ops.search_scales(**args)
