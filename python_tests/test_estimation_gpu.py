"""estimate of a compression on a GPU: bounds on its memory and the host's, and seconds of turns."""

import json
import struct
import subprocess
import sys
from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from conftest import skip_without_cuda
from tiny_models import compressed_pair
from tiny_models import one_thread as one_thread
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from adamix import devices, estimation
from adamix.artifacts import WeightPair
from adamix.calibration.sampling import chunk_bytes
from adamix.compression import simulate
from adamix.compression.error import output_error
from adamix.compression.hessian import hessian
from adamix.compression.matrix import quantize_matrix
from adamix.config import Config
from adamix.costs import Work
from adamix.devices import CPU, JOBS, Compute, matrix_device_bytes
from adamix.estimation import estimate
from adamix.estimation_gpu import (
    Job,
    calibrating_bytes,
    reading_bytes,
    sampling_device_bytes,
    taking_turns,
)
from adamix.memory import MemoryPlan, Sizes
from adamix.parallel import workers
from adamix.pipeline import compress
from adamix.rates import Limits, measure_gpu
from adamix.storage.pack import pack

CONFIG = Config(bits_per_weight=3.0, bit_widths=(8, 4, 3, 2), calibration_sequences=8,
                calibration_length=32)  # what compressed_pair() does
STEADY = Work(*[1e-9] * 10)
GIB = 2**30


class FakeGpu(Compute):
    """One that is not here."""

    @property
    def label(self):
        return "a GPU"


FAKE = FakeGpu(torch.device("cuda", 0), torch.bfloat16)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of 80 GB whose rates are in the list."""
    rates = [(STEADY, STEADY)]
    monkeypatch.setattr(estimation, "find_compute", lambda *arguments: FAKE)
    monkeypatch.setattr(estimation, "measure_gpu", lambda *arguments: rates[0])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (79 * 10**9, 80 * 10**9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    return rates


# --- the whole ---------------------------------------------------------------------------------


def test_a_gpu_changes_time_and_memory_and_not_the_size(gpu):
    pair = compressed_pair()
    found = estimate(pair.base, pair.finetuned, CONFIG, threads=2)
    assert (found.device, found.threads) == ("a GPU", 2) and 0 < found.gpu_bytes < GIB
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimation, "find_compute", lambda *arguments: CPU)
        patch.setattr(estimation, "measure", lambda *arguments: STEADY)
        on_cpu = estimate(pair.base, pair.finetuned, CONFIG, threads=2)
    assert (on_cpu.device, on_cpu.gpu_bytes, on_cpu.bytes) == ("cpu", 0, found.bytes)
    assert set(on_cpu.seconds) == set(found.seconds) and set(on_cpu.memory) == set(found.memory)


def test_the_device_is_the_one_that_was_asked_for(monkeypatch):
    asked, pair = [], compressed_pair()
    monkeypatch.setattr(estimation, "find_compute",
                        lambda device, dtypes: (asked.append((device, set(dtypes))), CPU)[1])
    monkeypatch.setattr(estimation, "measure", lambda *arguments: STEADY)
    estimate(pair.base, pair.finetuned, CONFIG, device="cuda:3")
    assert asked == [("cuda:3", {torch.bfloat16})]


def test_forward_passes_have_rates_of_their_own(gpu):
    pair = compressed_pair()

    def seconds(**options):
        return estimate(pair.base, pair.finetuned, replace(CONFIG, **options)).seconds

    once, both = seconds(), "calibration and compression"
    gpu[0] = STEADY, Work(*[2e-9] * 10)
    slower = seconds()
    assert slower["read"] == once["read"] and slower[both] > once[both]
    assert slower["calibration tokens"] == pytest.approx(2 * once["calibration tokens"])
    gpu[0] = Work(*[2e-9] * 10), Work(*[2e-9] * 10)
    assert seconds() == pytest.approx({stage: 2 * spent for stage, spent in once.items()})
    assert set(seconds(allocate="model")) > set(once)


def write_headers(folder, config):
    """A checkpoint whose file has a header, and zeros that no disk holds."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    header, end = {}, 0
    for name, parameter in model.named_parameters():
        start, end = end, end + 2 * parameter.numel()
        header[name] = {"dtype": "BF16", "shape": list(parameter.shape),
                        "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    folder.mkdir()
    (folder / "config.json").write_text(config.to_json_string())
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def test_a_7b_model_is_estimated_as_it_was_measured(gpu, tmp_path):
    """A run of Qwen2.5-7B's shapes on an H200 took 72.0 s for calibration and compression, held
    23.78 GB of the GPU, 7.95 GB of the host (32 threads), and wrote 951.78 MB. Its rates, roughly:
    products at 60, 50 and 680 TFLOP/s, the rest such that a layer's matrices take about 2 s."""
    config = AutoConfig.for_model(
        "qwen2", vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
        num_attention_heads=28, num_key_value_heads=4, tie_word_embeddings=False,
        max_position_embeddings=32768, architectures=["Qwen2ForCausalLM"])
    for side in ("base", "finetuned"):
        write_headers(tmp_path / side, config)
    rates = Work(products_fp32=1 / 50e12, products_fp64=1 / 60e12, factors=3e-14, eigen=3e-12,
                 gptq=2.5e-14, scales=2e-11, candidates=6e-5, activations=1e-12, cached=6e-11,
                 surveyed=1 / 1.5e9)
    gpu[0] = rates, replace(rates, products_fp32=1 / 680e12)
    found = estimate(tmp_path / "base", tmp_path / "finetuned", Config(ratio=16), threads=16,
                     calibration=torch.zeros(128, 2048, dtype=torch.long))
    assert found.bytes == pytest.approx(951.78e6, rel=0.001)
    assert 72.0 / 1.5 < found.seconds["calibration and compression"] < 72.0 * 1.5
    assert 23.78e9 <= found.gpu_bytes <= 1.25 * 23.78e9
    assert 7.95e9 <= found.peak_bytes <= 2 * 7.95e9


# --- a GPU's memory ----------------------------------------------------------------------------


def peak_of_a_job(out, n, weighted, ratio, at_a_time):
    """The most bytes that are allocated at a time while a matrix is compressed."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    simulate.AT_A_TIME["cpu"] = at_a_time
    config, X = Config(ratio=ratio), torch.randn(n, 2 * n)
    sizes = (1 + torch.arange(min(out, n) // 2) / 4) ** -0.75
    change = torch.randn(out, len(sizes)) * sizes @ torch.randn(len(sizes), n)
    weights = torch.rand(out, dtype=torch.float64) + 0.5 if weighted else None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        waiting = [X @ X.T]  # as a job has it, to let go of it
        H = hessian(waiting.pop(), config.damping)
        delta = WeightPair("w", torch.zeros(out, n).bfloat16(), change.bfloat16()).delta.double()
        found = quantize_matrix(delta, H, config, row_weights=weights)
        output_error(delta, pack(found.delta).dequantize(), H, weights)
    events = [event for event in profiler.profiler.kineto_results.events()
              if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events))


@pytest.mark.parametrize("at_a_time", [1, 2**26])
@pytest.mark.parametrize("out, n, weighted, ratio", [
    (256, 256, False, 16), (128, 512, False, 4), (512, 128, False, 4), (2000, 64, True, 4),
    (2000, 64, True, 16), (2000, 64, False, 16)])
def test_a_matrix_takes_no_more_than_its_bound(monkeypatch, apart, out, n, weighted, ratio,
                                               at_a_time):
    monkeypatch.setattr(devices, "AT_A_TIME", {"cuda": at_a_time})
    config = Config(ratio=ratio)
    budget = config.budget_bits((out, n))
    bound = matrix_device_bytes((out, n), 2, budget, config, weighted=weighted)
    taken = apart.submit(peak_of_a_job, out, n, weighted, ratio, at_a_time).result()
    assert 0.5 * bound <= taken <= bound


SIZES = Sizes(states=4 * GIB, resident=2 * GIB, block=2 * GIB, widest=1, activations=0)
PLAN = MemoryPlan(free=10 * GIB, grams=2 * GIB, making=4 * GIB, threads=1, states_on_disk=False)
STATES = 3 * GIB  # of 16 bits


def most(*jobs, plan=PLAN):
    return calibrating_bytes(FAKE, plan, SIZES, GIB, jobs) - STATES


def test_jobs_run_side_by_side_as_far_as_is_planned():
    small, large = Job(3 * GIB, 0), Job(8 * GIB, 0)
    assert most() == PLAN.making
    assert most(small) == 3 * GIB + PLAN.making  # while the next block is calibrated
    assert most(small, small, small) == max(3 * 3 * GIB + GIB, 2 * 3 * GIB + PLAN.making)
    assert most(*[Job(GIB, 0)] * 10) == JOBS * GIB + PLAN.making
    assert most(Job(8 * GIB, 1)) == 8 * GIB + GIB  # no room to calibrate beside it
    assert most(Job(12 * GIB, 1)) == 12 * GIB + GIB  # alone, though not planned for
    # With no Gram matrix it comes before there are hidden states.
    assert most(large) == 8 * GIB - STATES and most(large, small) == 3 * GIB + PLAN.making
    tiny = [Job(2**20, 2**10)] * 100
    assert most(*tiny) <= JOBS * 2**20 + PLAN.making + 100 * 2**10 < most(small)


def test_a_sampling_model_is_there_whole_with_a_chunks_cache():
    config = LlamaConfig(vocab_size=100, hidden_size=64, num_hidden_layers=2)
    assert sampling_device_bytes(FAKE, [1000, 50], config, 32) == (
        2 * 2050 + chunk_bytes(config, 32, gpu=True, itemsize=FAKE.dtype.itemsize))


def test_of_tensors_that_are_read_side_by_side_the_largest_count():
    pairs = {"a": 5, "b": 1, "c": 4, "d": 3, "e": 1}  # with each side of each read once more
    assert [reading_bytes(pairs, threads) for threads in (1, 2, 3, 5, 99)] == [5, 9, 12, 17, 28]
    assert reading_bytes({}, 2) == 0


# --- time --------------------------------------------------------------------------------------


def test_a_gpu_works_while_programs_are_solved():
    rates = Work(eigen=1.0, candidates=1.0)
    work = [Work(eigen=2.0, candidates=1.0)] * 8
    assert taking_turns(work, 4.0, rates) == 8 * 2 + 4  # the programs are hidden
    assert taking_turns([Work(eigen=0.5, candidates=6.0)] * 8, 0.0, rates) == 8 * 6 / JOBS
    assert taking_turns([Work(eigen=1.0, candidates=9.0)], 2.0, rates) == 10
    assert taking_turns([], 3.0, rates) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_rate_of_a_device_is_measured(dtype):
    config = LlamaConfig(hidden_size=128, num_attention_heads=4, intermediate_size=256)
    with workers(1) as executor:
        work, forward = measure_gpu(Compute(torch.device("cpu"), dtype), config, (4, 16), 64, 64,
                                    128, executor, 1, Limits(64, 64, 128, 64, 2**16))
    assert all(0 < rate < 1 for name, rate in vars(work).items() if name != "activations")
    assert forward.products_fp32 > 0
    assert replace(forward, products_fp32=work.products_fp32) == work


# --- on a GPU ----------------------------------------------------------------------------------


def run(*arguments):
    done = subprocess.run([sys.executable, "-m", "adamix", *map(str, arguments), "--json"],
                          capture_output=True, check=True)
    return json.loads(done.stdout)


def test_a_compression_on_a_gpu_is_as_estimated(tmp_path):
    skip_without_cuda("gptq", "search_scales", "pack")
    pair = compressed_pair()
    found = estimate(pair.base, pair.finetuned, CONFIG, device="cuda")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    done = compress(pair.base, pair.finetuned, tmp_path / "d", CONFIG, device="cuda")
    assert torch.cuda.max_memory_allocated() - before <= found.gpu_bytes
    assert found.bytes == pytest.approx(done.bytes, rel=0.01)
    assert set(found.seconds) == set(done.seconds)
    assert found.device == torch.cuda.get_device_name()

    options = ["--bits", "3", "--sequences", "8", "--length", "32", "--device", "cuda"]
    host = run("compress", pair.base, pair.finetuned, "-o", tmp_path / "e", *options)["peak_bytes"]
    assert host <= run("estimate", pair.base, pair.finetuned, *options)["peak_bytes"]
