"""costs: the counts are those of the operations that the code really does."""

from concurrent.futures import Executor, Future

import pytest
import torch
from tiny_models import compressed_pair
from tiny_models import one_thread as one_thread
from torch.utils.flop_counter import FlopCounterMode

from adamix import costs, ops
from adamix.budget import COUNTS_BYTES
from adamix.calibration import sampling
from adamix.calibration.gram import accumulate, shared_inputs
from adamix.calibration.sampling import cache_bytes, sample
from adamix.compression import quantize, simulate
from adamix.compression.error import relative_error
from adamix.compression.hessian import hessian
from adamix.compression.matrix import component_bits, quantize_matrix
from adamix.config import Config
from adamix.costs import (
    Work,
    calibration_work,
    matrix_work,
    planned_bits,
    planned_rank,
    sampling_chunks,
    sampling_work,
)
from adamix.source.models import load_model


def decaying(out, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rank = min(out, n)
    U, V = (torch.linalg.qr(torch.randn(m, rank, generator=generator)).Q for m in (out, n))
    return (U / torch.arange(1, rank + 1)) @ V.T


SHAPES = [(96, 256), (256, 96), (128, 128)]


@pytest.mark.parametrize("out, n", SHAPES)
def test_a_plan_takes_whole_steps_of_its_budget(out, n):
    config = Config(bits_per_weight=1.0)
    budget = config.budget_bits((out, n)) - 8 * COUNTS_BYTES
    X = torch.randn(n, 4 * n)
    H = hessian(X @ X.T, config.damping)
    done = quantize_matrix(decaying(out, n), H, config, budget_bits=budget).delta
    bits = sum(component_bits((out, n), *pair)
               for pair in zip(done.v_bits.tolist(), done.u_bits.tolist(), strict=True))
    step = component_bits((out, n), 2) - component_bits((out, n), 1)
    planned = planned_bits((out, n), budget, config)
    assert abs(planned - bits) <= step and budget - step - 32 * done.rank <= planned <= budget
    assert planned_rank((out, n), budget, config) == pytest.approx(done.rank, rel=0.35)


def test_a_plan_cannot_take_more_than_there_is():
    config = Config(bits_per_weight=20.0, bit_widths=(4, 2))
    assert planned_rank((64, 32), 20 * 64 * 32, config) == 32
    assert planned_bits((64, 32), 20 * 64 * 32, config) == 32 * component_bits((64, 32), 4)


@pytest.mark.parametrize("out, n", SHAPES)
@pytest.mark.parametrize("passes", [1, 3])
def test_products_scales_and_gptq_of_a_matrix_are_counted(monkeypatch, out, n, passes):
    config = Config(bits_per_weight=1.0, passes=passes)
    budget, delta, X = config.budget_bits((out, n)), decaying(out, n), torch.randn(n, 4 * n)
    gram, seen = X @ X.T, {"scales": 0, "gptq": 0}
    H, search, gptq = hessian(gram, config.damping), quantize.search_scales, ops.gptq

    def searched(lanes, *rest):
        seen["scales"] += lanes.numel()
        return search(lanes, *rest)

    def compensated(weight, factor, *rest, **named):
        seen["gptq"] += weight.numel() * factor.shape[0]
        return gptq(weight, factor, *rest, **named)

    monkeypatch.setattr(quantize, "search_scales", searched)
    monkeypatch.setattr(simulate, "search_scales", searched)
    monkeypatch.setattr(quantize.ops, "gptq", compensated)
    with FlopCounterMode(display=False) as products:
        done = quantize_matrix(delta, H, config, budget_bits=budget).delta
        relative_error(delta, done.dequantize(), gram)
    monkeypatch.setattr(costs, "planned_rank", lambda *arguments: done.rank)
    work = matrix_work((out, n), budget, config)
    counted = work.products_fp64 + work.products_fp32
    # The counter knows no triangular solves, two of r² · n each time a factor is solved for.
    solves = 2 * done.rank**2 * (passes * out + (passes - 1) * n)
    assert counted - solves == pytest.approx(products.get_total_flops(), rel=0.02)
    assert (work.scales, work.gptq) == pytest.approx((seen["scales"], seen["gptq"]), rel=0.02)


class AtOnce(Executor):
    """Runs in the calling thread, the only one whose products the counter sees."""

    def submit(self, function, *arguments):
        done = Future()
        done.set_result(function(*arguments))
        return done


def model_of_pair():
    return load_model(compressed_pair().finetuned)


def test_products_of_calibration_are_counted():
    model, tokens = model_of_pair(), torch.zeros(16, 8, dtype=torch.long)
    linears = {name: module for name, module in model.named_modules()
               if isinstance(module, torch.nn.Linear) and "layers" in name}
    leaders = shared_inputs(model, tokens, linears)
    with FlopCounterMode(display=False) as products:
        accumulate(model, tokens, {name: linears[name] for name in leaders}, executor=AtOnce())
    work = calibration_work({name: tuple(m.weight.shape) for name, m in linears.items()},
                            [linears[name].in_features for name in leaders], 2, (16, 8), 1000)
    assert work.activations == 2 * 2 * 1000
    head = 2 * 2 * model.lm_head.weight.numel() * 8  # of the last token of each sequence
    assert work.products_fp32 == pytest.approx(
        products.get_total_flops() - head, rel=0.1)  # and attention, on 8 tokens


def test_products_of_sampling_are_counted():
    model = model_of_pair()
    weights = sum(module.weight.numel() for module in model.modules()
                  if isinstance(module, torch.nn.Linear))
    with FlopCounterMode(display=False) as products:
        sample(model, 1, 2, sequences=4, length=8, seed=0, executor=AtOnce())
    work = sampling_work(weights, model.config, (4, 8))
    assert work.products_fp32 == pytest.approx(products.get_total_flops(), rel=0.1)
    assert work.cached == 7 * 4 * cache_bytes(model.config, 8) / 2


def test_chunks_of_sampling_are_counted(monkeypatch):
    config, chunks = model_of_pair().config, []
    assert sampling_chunks(config, (130, 8)) == 3
    monkeypatch.setattr(sampling, "_sample_chunk", lambda *arguments: (
        chunks.append(1), torch.zeros(arguments[3], 8))[1])
    sample(model_of_pair(), 1, 2, sequences=130, length=8, seed=0, executor=AtOnce())
    assert len(chunks) == 3


def test_work_adds_up():
    one, rates = Work(*range(1, 11)), Work(*[0.5] * 10)
    assert one + Work(eigen=2.0) == Work(1, 2, 3, 6, 5, 6, 7, 8, 9, 10)
    assert (one + one).seconds(rates) == 55.0
