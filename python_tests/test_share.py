"""share_out: one budget for all matrices, kept, spent where it pays, and resumed like the rest."""

import itertools

import pytest
import torch
from test_pipeline import CONFIG, assert_same_files
from test_resume import counted, finished, interrupt_after
from tiny_models import compressed_pair
from tiny_models import one_thread as one_thread

from adamix import matrices
from adamix.compression.hessian import hessian, identity
from adamix.compression.matrix import component_bits
from adamix.compression.pairs import equal_pairs
from adamix.compression.share import LOSSES, SPREAD, energies, share_out
from adamix.config import Config
from adamix.errors import MemoryLimitError
from adamix.pipeline import compress
from adamix.storage.file import delta_bytes, read_delta
from adamix.storage.work import work_path

pytestmark = pytest.mark.usefixtures("without_gpu")

WIDTHS = (8, 4, 3, 2)
SHAPE = (64, 96)
STEP = component_bits(SHAPE, 2) - component_bits(SHAPE, 1)
MODEL = Config(bits_per_weight=3.0, bit_widths=WIDTHS, calibration_sequences=8,
               calibration_length=32, allocate="model")


# --- energies ----------------------------------------------------------------------------------


@pytest.mark.parametrize("out, n", [(24, 40), (40, 24)])
def test_energies_are_those_of_the_outputs_components(out, n):
    delta, X = torch.randn(out, n, dtype=torch.float64), torch.randn(n, 200, dtype=torch.float64)
    H = hessian(X @ X.T, 0.01)
    expected = torch.linalg.svdvals(delta @ H.lower).square()
    torch.testing.assert_close(energies(delta, H), expected, rtol=1e-9, atol=1e-9)
    doubled = energies(delta, hessian(100 * X @ X.T, 0.01))  # the inputs' unit does not matter
    torch.testing.assert_close(doubled, expected, rtol=1e-9, atol=1e-9)


def test_only_the_relation_of_row_weights_counts():
    delta, weights = torch.randn(40, 24), torch.rand(40) + 0.1
    found = energies(delta, identity(24), weights)
    torch.testing.assert_close(energies(delta, identity(24), 50 * weights), found)
    scaled = delta.double() * (weights / weights.mean()).double().sqrt()[:, None]
    torch.testing.assert_close(found, torch.linalg.svdvals(scaled).square())


# --- sharing out -------------------------------------------------------------------------------


PAIRS = list(itertools.product(WIDTHS, WIDTHS))


def shares(*spectra, even=40_000, pairs=PAIRS):
    names = [f"m{i}" for i in range(len(spectra))]
    found = share_out(dict(zip(names, spectra, strict=True)), dict.fromkeys(names, SHAPE),
                      dict.fromkeys(names, even), pairs)
    return [found[name] for name in names]


def falling(scale=1.0, power=2.0):
    return scale / torch.arange(1, 65, dtype=torch.float64) ** power


def test_equal_matrices_get_equal_shares_of_all_but_a_step_each():
    first, second = shares(falling(), falling())
    assert first == second and 0.97 * (40_000 - STEP) < first <= 40_000 - STEP


def test_what_loses_more_gets_more_and_the_sum_is_kept():
    low, high = shares(falling(), falling(20.0))
    assert high > 1.15 * low and low + high <= 2 * (40_000 - STEP)
    assert low + high >= 0.97 * 2 * (40_000 - STEP)


@pytest.mark.parametrize("pairs", [PAIRS, equal_pairs(WIDTHS)], ids=["pairs", "equal widths"])
def test_no_plan_within_the_budget_predicts_less_error(pairs):
    """Against all splits of the budget in two, each spent by a price of its own. With energies of
    5 / k a bit of V's row k and one of U's column 3 k would be worth the very same here."""
    spectra, costs = (falling(), falling(5.0, 1.1)), [component_bits(SHAPE, *p) for p in pairs]
    losses = torch.tensor([*(0.5 * LOSSES[v] + LOSSES[u] for v, u in pairs), 1.0],
                          dtype=torch.float64)

    def curve(values):
        """(bits, error) at every price."""
        errors, cost = values[:, None] * losses, torch.tensor([*costs, 0]).double()
        for price in torch.logspace(-9, 0, 20000, dtype=torch.float64):
            chosen = (errors + price * cost).argmin(dim=1)
            yield int(cost[chosen].sum()), errors.gather(1, chosen[:, None]).sum().item()

    curves = [dict(curve(values)) for values in spectra]
    found = shares(*spectra, pairs=pairs)
    ours = sum(min(error for bits, error in curve.items() if bits <= share)
               for curve, share in zip(curves, found, strict=True))
    best = min(first + second for bits, first in curves[0].items()
               for more, second in curves[1].items() if bits + more <= sum(found))
    assert ours <= 1.001 * best


def test_a_share_is_at_least_a_component_and_at_most_the_bound():
    low, high = shares(falling(1e-12), falling(1e6, 0.1))
    assert low == component_bits(SHAPE, min(WIDTHS))
    assert SPREAD == 3 and high <= 3 * 40_000
    assert shares(falling(1e6, 0.1), falling(1e-12), falling(1e-12), falling(1e-12), even=10_000
                  )[0] == 3 * 10_000


# --- a whole run -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    pair, out = compressed_pair(), tmp_path_factory.mktemp("shared") / "d"
    compress(pair.base, pair.finetuned, out, MODEL, threads=1)
    return out


def test_no_more_bytes_are_written_and_they_are_spent_unevenly(shared):
    pair = compressed_pair()
    assert 0.95 * delta_bytes(pair.delta) < delta_bytes(shared)
    ours, theirs = read_delta(shared), read_delta(pair.delta)
    assert ours.nbytes <= theirs.nbytes
    bits = [m.bits_per_weight for m in ours.matrices.values()]
    even = [m.bits_per_weight for m in theirs.matrices.values()]
    assert max(bits) - min(bits) > 3 * (max(even) - min(even))


@pytest.mark.parametrize("threads, max_memory", [(2, None), (3, 64 * 10**9)])
def test_neither_threads_nor_a_bound_on_memory_change_the_bytes(shared, tmp_path, threads,
                                                                max_memory):
    pair = compressed_pair()
    compress(pair.base, pair.finetuned, tmp_path / "d", MODEL, threads=threads,
             max_memory=max_memory)
    assert_same_files(tmp_path / "d", shared)


def test_a_run_that_was_interrupted_while_measuring_goes_on(shared, tmp_path, monkeypatch):
    pair, out, measure, begun = compressed_pair(), tmp_path / "d", matrices.energies, []

    def interrupted(*arguments):
        begun.append(1)
        if len(begun) > 5:
            raise KeyboardInterrupt
        return measure(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(matrices, "energies", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compress(pair.base, pair.finetuned, out, MODEL, threads=1)
    kept = len(list((work_path(out) / "energies").glob("*.safetensors")))
    assert 0 < kept <= 5
    measured = counted(monkeypatch, matrices, "energies")
    compress(pair.base, pair.finetuned, out, MODEL, threads=1)
    assert len(measured) == 16 - kept
    assert_same_files(out, shared)


def test_a_run_that_was_interrupted_while_compressing_measures_nothing_again(
        shared, tmp_path, monkeypatch):
    pair, out = compressed_pair(), tmp_path / "d"
    interrupt_after(5, pair, out, monkeypatch, config=MODEL)
    kept, measured = len(finished(out)), counted(monkeypatch, matrices, "energies")
    summary = compress(pair.base, pair.finetuned, out, MODEL, threads=1)
    assert (summary.resumed, len(measured)) == (kept, 0) and kept > 0
    assert_same_files(out, shared)


def test_memory_for_the_largest_share_is_asked_for_before_any_work(tmp_path, monkeypatch):
    """A matrix may get SPREAD times its even share: the refusal must not come after hours."""
    pair, asked, plan = compressed_pair(), [], matrices.plan_memory

    def planned(*arguments):
        asked.append(arguments[3])
        return plan(*arguments)

    monkeypatch.setattr(matrices, "plan_memory", planned)
    compress(pair.base, pair.finetuned, tmp_path / "d", MODEL, threads=1, max_memory=64 * 10**9)
    compress(pair.base, pair.finetuned, tmp_path / "e", CONFIG, threads=1, max_memory=64 * 10**9)
    measuring, compressing, even = asked
    assert measuring >= compressing and measuring > even

    def refused(*arguments):
        raise MemoryLimitError("too little")

    monkeypatch.setattr(matrices, "plan_memory", refused)
    measured = counted(monkeypatch, matrices, "energies")
    with pytest.raises(MemoryLimitError):
        compress(pair.base, pair.finetuned, tmp_path / "f", MODEL, max_memory=64 * 10**9)
    assert not measured
