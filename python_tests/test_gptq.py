"""ops.gptq against the textbook column loop in float64.

The loop follows the codes that it is given and keeps, beside every weight, a bound of what fp32
arithmetic may have changed in it so far. Every code is then checked on its own: float64's value
must lie in the code's interval, or outside it by no more than the bound. So one admissible
difference never excuses those behind it.
"""

from collections.abc import Iterator

import pytest
import torch
from conftest import skip_without_cuda
from tolerance import FP32_ROUNDOFF
from torch import Tensor

from adamix import ops

OPERATORS = ("gptq",)


def random_factor(n: int) -> Tensor:
    """An upper triangle with a positive diagonal: the Cholesky factor of some H^-1.

    Off the diagonal it is strong nearby and of order 1/n far away: every block of columns feels
    every earlier one, and rounding errors do not grow from column to column. Below the diagonal,
    where nothing may be read, it is NaN.
    """
    distance = (torch.arange(n) - torch.arange(n)[:, None]).clamp(min=0)
    factor = torch.randn(n, n) * (0.06 * 0.9**distance + 0.3 / n)
    factor.diagonal().copy_(1 + torch.rand(n))
    return factor.masked_fill(torch.ones(n, n, dtype=torch.bool).tril(-1), torch.nan)


def random_problem(rows: int, n: int, by_row: bool, bits: int | None = None):
    """weight, hinv, bits, scales: mixed widths unless one is given, some values beyond the grid."""
    lanes = rows if by_row else n
    widths = torch.arange(lanes) % ops.MAX_BITS + 1 if bits is None else torch.full((lanes,), bits)
    scales = 2.5 / 2.0**widths * (0.8 + 0.4 * torch.rand(lanes))
    return torch.randn(rows, n), random_factor(n), widths.int(), scales


def check_codes(
    codes: Tensor, weight: Tensor, hinv: Tensor, bits: Tensor, scales: Tensor, by_row: bool
) -> tuple[int, int]:
    """(codes that rounding does not excuse, decisions that rounding could turn)."""
    u = FP32_ROUNDOFF
    w, factor = weight.double(), hinv.double()
    lane_of = (slice(None), None) if by_row else (None, slice(None))
    top = (2.0 ** bits.double() - 1)[lane_of].expand_as(w)
    step = scales.double()[lane_of].expand_as(w)
    lost = torch.zeros_like(w)  # bound of |fp32's weight - float64's|
    n, wrong, turnable = w.shape[1], 0, 0
    for j in range(n):
        q, s, t = codes[:, j].double(), step[:, j], top[:, j]
        lower = (q - (t + 1) / 2) * 2 * s
        upper = torch.where(q == t, torch.inf, lower + 2 * s)
        lower = torch.where(q == 0, -torch.inf, lower)
        # the division by 2s rounds once; another u for the comparison's own sake
        slack = lost[:, j] + 2 * u * w[:, j].abs()
        wrong += int(((q > t) | (w[:, j] < lower - slack) | (w[:, j] >= upper + slack)).sum())
        nearest = torch.minimum((w[:, j] - lower).abs(), (w[:, j] - upper).abs())
        turnable += int((nearest <= slack).sum())
        value = s * (2 * q - t)
        err = (w[:, j] - value) / factor[j, j]
        # s * level rounds once, so do the subtraction and the division
        err_lost = (lost[:, j] + u * value.abs()) / factor[j, j] + 3 * u * err.abs()
        row = factor[j, j + 1 :]
        pushed = torch.outer(err, row).abs()
        # a sum of at most n + 2 terms in any order, each a product that rounds once
        lost[:, j + 1 :] += torch.outer(err_lost, row.abs()) + (n + 2) * u * pushed
        lost[:, j + 1 :] += u * w[:, j + 1 :].abs()
        w[:, j + 1 :] -= torch.outer(err, row)
    return wrong, turnable


@pytest.mark.parametrize("by_row", [True, False])
@pytest.mark.parametrize("n", [1, 2, 127, 128, 129, 300])
@pytest.mark.parametrize("rows", [1, 33])
def test_every_code_is_the_textbook_loops(device, rows, n, by_row):
    problem = random_problem(rows, n, by_row)
    codes = ops.gptq(*(tensor.to(device) for tensor in problem), by_row=by_row)
    assert codes.dtype == torch.uint8 and codes.shape == (rows, n)
    wrong, turnable = check_codes(codes.cpu(), *problem, by_row)
    assert wrong == 0
    assert turnable <= 1 + rows * n // 100, "the bound is too wide to show anything"


@pytest.mark.parametrize("bits", range(1, ops.MAX_BITS + 1))
def test_every_width(device, bits):
    problem = random_problem(40, 150, by_row=True, bits=bits)
    codes = ops.gptq(*(tensor.to(device) for tensor in problem), by_row=True)
    assert check_codes(codes.cpu(), *problem, True)[0] == 0


@pytest.mark.parametrize("by_row", [True, False])
def test_two_percent_would_be_seen(by_row):
    weight, hinv, bits, scales = random_problem(64, 300, by_row)
    factor, far = hinv.clone(), hinv.clone()
    factor.diagonal().mul_(1.02)
    far[:128, 128:] = 0  # as if nothing were pushed beyond the first block
    for other in (
        (weight, hinv, bits, scales * 1.02),
        (weight, factor, bits, scales),
        (weight, far, bits, scales),
    ):
        codes = ops.gptq(*other, by_row=by_row)
        assert check_codes(codes, weight, hinv, bits, scales, by_row)[0] > 0


def test_by_hand(device):
    # Levels -1.5, -0.5, 0.5, 1.5. The first weight becomes 1.5; its error of -0.5 lifts the second
    # from -0.1, which alone would be code 1, to 0.15: code 2.
    weight = torch.tensor([[1.0, -0.1]], device=device)
    hinv = torch.tensor([[1.0, 0.5], [0.0, 1.0]], device=device)
    lane = {"bits": torch.tensor([2], dtype=torch.int32), "scales": torch.tensor([0.5])}
    codes = ops.gptq(weight, hinv, **{k: v.to(device) for k, v in lane.items()}, by_row=True)
    assert codes.tolist() == [[3, 2]]


def test_the_weighted_error_is_below_that_of_rounding_alone(device):
    inputs = torch.randn(100, 100) @ torch.randn(100, 400)
    hessian = (inputs @ inputs.T).double()
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(100)
    hinv = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True).float()
    weight, bits = torch.randn(50, 100), torch.full((50,), 4, dtype=torch.int32)
    scales = torch.full((50,), 0.2)

    def weighted_error(factor: Tensor) -> float:
        arguments = (weight, factor, bits, scales)
        codes = ops.gptq(*(tensor.to(device) for tensor in arguments), by_row=True).cpu()
        error = (weight - 0.2 * (2.0 * codes - 15)).double()
        return ((error @ hessian) * error).sum().item()

    assert weighted_error(hinv) < 0.5 * weighted_error(torch.eye(100))


def test_the_weight_stays_and_threads_change_nothing():
    problem = random_problem(200, 260, by_row=True)
    before, threads = problem[0].clone(), torch.get_num_threads()
    codes = ops.gptq(*problem, by_row=True)
    assert problem[0].equal(before)
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert ops.gptq(*problem, by_row=True).equal(codes)
    finally:
        torch.set_num_threads(threads)


def test_nan_becomes_code_zero(device):
    weight = torch.tensor([[torch.nan], [torch.inf], [-torch.inf]], device=device)
    bits = torch.full((3,), 3, dtype=torch.int32, device=device)
    codes = ops.gptq(
        weight, torch.eye(1, device=device), bits, torch.ones(3, device=device), by_row=True
    )
    assert codes.tolist() == [[0], [7], [0]]


# --- CUDA: the same operations in the same order as on the CPU ----------------------------------


@pytest.fixture
def cuda() -> str:
    skip_without_cuda(*OPERATORS)
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("this CPU has no FMA: it rounds a product before it adds")
    return "cuda"


@pytest.fixture
def tf32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


def differing(codes: Tensor, expected: Tensor) -> int:
    return int((codes.cpu() != expected).sum())


@pytest.mark.parametrize("by_row", [True, False])
@pytest.mark.parametrize(("rows", "n"), [(5, 127), (129, 257), (1000, 513), (70, 1200)])
def test_the_codes_are_the_cpus(cuda, rows, n, by_row):
    problem = random_problem(rows, n, by_row)
    codes = ops.gptq(*(tensor.to(cuda) for tensor in problem), by_row=by_row)
    assert differing(codes, ops.gptq(*problem, by_row=by_row)) == 0


def test_a_second_call_and_tf32_elsewhere_change_nothing(cuda, tf32):
    problem = random_problem(300, 700, by_row=True)
    on_device = [tensor.to(cuda) for tensor in problem]
    expected = ops.gptq(*problem, by_row=True)
    for _ in range(2):
        assert differing(ops.gptq(*on_device, by_row=True), expected) == 0
    assert on_device[0].cpu().equal(problem[0]), "the weight has changed"


@pytest.mark.parametrize("by_row", [True, False])
def test_views_are_read_where_they_lie(cuda, by_row):
    """Rows of a wider tensor, at any address; a transposed factor; every second lane."""
    weight, hinv, bits, scales = random_problem(150, 300, by_row)
    expected = ops.gptq(weight, hinv, bits, scales, by_row=by_row)
    wide = torch.full((150, 304), torch.nan, device=cuda)
    wide[:, 1:301] = weight
    turned = hinv.T.contiguous().to(cuda).T
    lanes = (torch.stack([lane, lane], dim=1).to(cuda)[:, 0] for lane in (bits, scales))
    codes = ops.gptq(wide[:, 1:301], turned, *lanes, by_row=by_row)
    assert differing(codes, expected) == 0
    factor = torch.full((300, 303), torch.nan, device=cuda)
    factor[:, 2:302] = hinv
    codes = ops.gptq(
        weight.to(cuda), factor[:, 2:302], bits.to(cuda), scales.to(cuda), by_row=by_row
    )
    assert differing(codes, expected) == 0


def test_it_runs_on_torchs_current_stream(cuda):
    """The weight is not there before the stream has slept and copied."""
    problem = random_problem(200, 400, by_row=True)
    on_device = [tensor.to(cuda) for tensor in problem]
    late = torch.zeros_like(on_device[0])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(on_device[0])
        codes = ops.gptq(late, *on_device[1:], by_row=True)
    stream.synchronize()
    assert differing(codes, ops.gptq(*problem, by_row=True)) == 0


def test_a_graph_replays_it_on_a_new_weight(cuda):
    weight, *rest = random_problem(200, 400, by_row=False)
    place, on_device = weight.to(cuda), [tensor.to(cuda) for tensor in rest]
    ops.gptq(place, *on_device, by_row=False)  # kernels are loaded before they are recorded
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        codes = ops.gptq(place, *on_device, by_row=False)
    for changed in (weight, torch.randn(200, 400)):
        place.copy_(changed)
        graph.replay()
        assert differing(codes, ops.gptq(changed, *rest, by_row=False)) == 0
