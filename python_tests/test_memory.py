"""--max-memory: the bounds that it is kept by are bounds, it is shared out within them, and a run
that keeps to it writes the same bytes."""

import ctypes
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_pipeline import CONFIG, OPTIONS, assert_same_files
from tiny_models import compressed_pair
from tiny_models import one_thread as one_thread
from typer.testing import CliRunner

from adamix import matrices, memory, pipeline
from adamix.__main__ import app
from adamix.artifacts import WeightPair
from adamix.calibration.blocks import BlockStream, Unsuited
from adamix.calibration.gram import gram_matrices
from adamix.calibration.sums import ALONE
from adamix.compression.error import relative_error
from adamix.compression.hessian import hessian
from adamix.compression.matrix import quantize_matrix
from adamix.config import Config
from adamix.errors import CalibrationError, MemoryLimitError
from adamix.memory import MemoryPlan, Sizes, matrix_bytes, plan_memory, resident_bytes, sizes
from adamix.pipeline import compress

pytestmark = pytest.mark.usefixtures("without_gpu")

GB = 10**9
TEXT = [f"document {i} says {i * i}" for i in range(30)]


def most_held(function):
    """Bytes that a call adds to this process's memory at its peak."""
    ctypes.CDLL(None).malloc_trim(0)  # what tests before have left free would serve it unseen
    before = resident_bytes()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    function()
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1]) - before


@pytest.mark.parametrize("out, n, bits, widths", [
    (1536, 512, 1.0, (8, 4, 2)), (512, 1536, 0.5, (4, 2)), (1024, 1024, 2.0, (4, 3, 2)),
    (16384, 256, 1.0, (8, 7, 6, 5, 4, 3, 2))])
def test_a_matrix_takes_no_more_than_its_bound(apart, out, n, bits, widths):
    config = Config(bits_per_weight=bits, bit_widths=widths)
    bound = matrix_bytes((out, n), config.budget_bits((out, n)), config)
    held = apart.submit(held_by_a_matrix, out, n, config).result()
    assert bound / 4 < held <= bound + memory.ARENA_BYTES
    assert bound < 40 * 8 * max(min(out, n) * max(out, n), n * n)


def held_by_a_matrix(out, n, config):
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(n, n + 64, generator=generator)
    gram = X @ X.T
    base, change = (torch.randn(out, n, generator=generator).bfloat16() for _ in range(2))
    pair = WeightPair("w", base, base + 0.1 * change)

    def work():
        H = hessian(gram, config.damping)
        result = quantize_matrix(pair.delta, H, config)
        relative_error(pair.delta, result.delta.dequantize(), gram)

    return most_held(work)


# --- sharing it out ----------------------------------------------------------------------------

SIZES = Sizes(states=100, resident=1000, block=1000, widest=5, activations=50)  # a Gram matrix: 100
HELD = 400
FIXED = HELD + 3 * memory.ARENA_BYTES
LEAST = FIXED + 1000 + 2000 + 100  # the model's part, the job, a Gram matrix that waits


@pytest.mark.parametrize("limit", [LEAST, LEAST + 99, LEAST + 5000, LEAST + 10**6])
def test_what_runs_at_a_time_is_within_the_bound(limit):
    plan = plan_memory(limit, HELD, SIZES, 2000, 900, 2)
    states = 0 if plan.states_on_disk else SIZES.states
    assert FIXED + SIZES.resident + states + plan.free <= limit
    assert plan.making >= 6 * 100 + 50 and plan.free >= plan.making and plan.free >= 2000 + 100
    # Four sums of each and a chunk's part; the products in the making beside them.
    assert plan.grams >= 5 * 100 and plan.grams + plan.threads * (100 + 50) <= plan.making
    assert 1 <= plan.threads <= 2
    if limit == LEAST + 99:
        assert plan.states_on_disk
    if limit == LEAST + 10**6:
        assert not plan.states_on_disk and plan.threads == 2


def test_a_share_of_the_chunks_takes_fewer_sums():
    alone = plan_memory(LEAST, HELD, SIZES, 2000, 900, 2)
    shared = plan_memory(LEAST, HELD, SIZES, 2000, 900, 2, 1)
    assert (alone.making, shared.making) == (6 * 100 + 50, 3 * 100 + 50)


@pytest.mark.parametrize("threads", [1, 2])
def test_grams_take_no_more_than_their_part_of_the_plan(threads):
    n, chunks, ahead = 3072, 16, threads  # so large that freed memory goes back to the system
    layers = {name: torch.nn.Linear(n, 1, bias=False) for name in "ab"}
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(2, 8, n, generator=generator) for _ in range(chunks)]
    gram, room = 4 * n * n, ALONE.at_once + ahead + 1  # and the product in the making

    def work():
        with ThreadPoolExecutor(threads) as executor:
            gram_matrices(lambda part: [layer(part) for layer in layers.values()], parts, layers,
                          executor=executor, ahead=ahead)

    assert 6 * gram < most_held(work) <= 2 * room * gram + threads * memory.ARENA_BYTES


def test_too_small_a_bound_is_refused_with_what_would_do():
    with pytest.raises(MemoryLimitError, match="one matrix at a time takes") as caught:
        plan_memory(LEAST - 1, HELD, SIZES, 2000, 900, 2)
    assert f"{LEAST / 1e9:.2f} GB" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(MemoryLimitError):  # the output does not fit
        plan_memory(LEAST + 999, HELD, SIZES, 2000, LEAST + 1000 - FIXED, 2)


def test_sizes_are_counted_by_block():
    shapes = {"embed.weight": (100, 8), "layers.0.up.weight": (32, 8), "layers.0.b": (32,),
              "layers.1.up.weight": (32, 8), "layers.1.down.weight": (8, 32), "norm": (8,)}
    found = sizes(shapes, [(8, 32), (32, 8)], 8, (16, 10), whole=False)
    assert (found.states, found.widest) == (4 * 16 * 10 * 8, 32)
    assert found.resident == max(4 * (32 * 8 + 8 * 32), 8 * 800)
    assert found.activations == 4 * 80 * (2 * 40 + 8 * 8)
    whole = sizes(shapes, [(32, 8)], 8, (16, 10), whole=True)
    assert whole.resident == 4 * (800 + 256 + 32 + 256 + 256 + 8) and whole.states == 0


# --- a whole run -------------------------------------------------------------------------------


def limited(monkeypatch, plan):
    """Let a run have this plan, as if its bound had given it."""
    monkeypatch.setattr(matrices, "plan_memory", lambda *arguments: plan)


@pytest.mark.parametrize("variant", ["plain", "tied"])
def test_a_run_that_keeps_to_a_bound_writes_the_same_bytes(tmp_path, variant):
    pair = compressed_pair(variant)
    compress(pair.base, pair.finetuned, tmp_path / "d", CONFIG, threads=2, max_memory=64 * GB)
    assert_same_files(tmp_path / "d", pair.delta)


def test_the_narrowest_plan_writes_the_same_bytes(tmp_path, monkeypatch):
    """One matrix, one chunk and one Gram matrix at a time, hidden states on the disk."""
    pair, at_once, most = compressed_pair(), [], []
    quantize, on_disk = matrices.quantize_matrix, []

    def alone(*arguments, **named):
        at_once.append(1)
        most.append(len(at_once))
        try:
            return quantize(*arguments, **named)
        finally:
            at_once.pop()

    def stream(*arguments):
        on_disk.append(arguments[5])
        return BlockStream(*arguments)

    largest = max(matrix_bytes(shape, 10**9, CONFIG) for shape in ((128, 64), (96, 64), (64, 96)))
    limited(monkeypatch, MemoryPlan(largest + 4 * 96**2, 1, largest, 1, True))
    monkeypatch.setattr(matrices, "quantize_matrix", alone)
    monkeypatch.setattr(matrices, "BlockStream", stream)
    compress(pair.base, pair.finetuned, tmp_path / "d", CONFIG, threads=3, max_memory=64 * GB)
    assert_same_files(tmp_path / "d", pair.delta)
    assert max(most) == 1 and on_disk[0] is not None and not on_disk[0].exists()


def test_a_bound_holds_for_a_model_in_memory_whole_too(tmp_path, monkeypatch):
    def unsuited(*arguments):
        raise Unsuited("its blocks share weights")

    pair, asked, plan = compressed_pair(), [], matrices.plan_memory
    monkeypatch.setattr(matrices, "BlockStream", unsuited)
    monkeypatch.setattr(matrices, "plan_memory",
                        lambda *arguments: (asked.append(arguments[2]), plan(*arguments))[1])
    compress(pair.base, pair.finetuned, tmp_path / "d", CONFIG, threads=2, max_memory=64 * GB)
    assert_same_files(tmp_path / "d", pair.delta)
    assert asked[1].resident > 2 * asked[0].resident - 1 and asked[1].states == 0


def test_a_bound_below_what_is_held_is_refused_before_any_work(tmp_path):
    pair = compressed_pair()
    with pytest.raises(MemoryLimitError, match="reading the largest tensor"):
        compress(pair.base, pair.finetuned, tmp_path / "d", CONFIG, max_memory=1000)
    assert not list(tmp_path.iterdir())


def test_a_model_too_large_to_write_its_own_text_asks_for_a_file(tmp_path, monkeypatch):
    pair = compressed_pair()
    limit = resident_bytes() + 10**7  # the model alone would fit, four threads' arenas do not
    monkeypatch.setattr(pipeline, "check_survey", lambda *arguments: None)
    with pytest.raises(CalibrationError, match="give --calibration FILE"):
        compress(pair.base, pair.finetuned, tmp_path / "d", CONFIG, threads=1, max_memory=limit)
    with pytest.raises(MemoryLimitError, match="one matrix at a time takes"):
        compress(pair.base, pair.finetuned, tmp_path / "d", CONFIG, threads=1, max_memory=limit,
                 calibration=TEXT)


def test_the_option_is_in_gigabytes(tmp_path):
    pair = compressed_pair()
    command = ["compress", str(pair.base), str(pair.finetuned), "-o", str(tmp_path / "d"),
               "--bits", str(OPTIONS["bits_per_weight"]), "--max-memory", "0.001"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1 and "--max-memory of 0.00 GB is too little" in result.stderr
