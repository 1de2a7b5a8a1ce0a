"""allocate: against every plan for small cases, against the LP bound for large ones."""

import signal
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from reference import least_plan_error, least_plan_error_by_tables, plan_error_bounds

from adamix.compression.allocate import GAP, allocate
from adamix.errors import SolverError

CBC = pytest.param("cbc", marks=pytest.mark.skipif(find_spec("cbcbox") is None,
                                                   reason="no cbcbox, which is python-mip's CBC"))
SOLVERS = ["highs", CBC]
# The solver may stop within GAP of the optimum; sums of up to 1000 fp64 errors add nothing to it.
WITHIN_GAP = 1 + 2 * GAP
WIDTHS = (8, 7, 6, 5, 4, 3, 2)


def layer_errors(rng, rank, widths=WIDTHS):
    """Errors as layers have them: energies fall over 5 decades, a width loses 4^-b of them."""
    energy = np.sort(10.0 ** rng.uniform(-6, -1, rank))[::-1]
    loss = np.array([4.0 ** (0.7 - b) for b in widths] + [1.0])
    return torch.from_numpy(energy[:, None] * loss * rng.uniform(0.8, 1.2, (rank, len(loss))))


def layer_costs(out, n, widths=WIDTHS):
    """One lane in each factor, in whole blocks of 32 codes, and one fp32 scale."""
    return [32 * b * (-(-out // 32) + -(-n // 32)) + 32 for b in widths] + [0]


def cost_of(plan, costs):
    return sum(costs[k] for k in plan.tolist())


def error_of(plan, errors):
    return errors.double()[torch.arange(len(plan)), plan].sum().item()


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("max_choices", [None, 1, 2, 3])
@pytest.mark.parametrize("seed", range(12))
def test_a_small_plan_is_the_best_of_all_plans(seed, max_choices, solver):
    rng = np.random.default_rng(seed)
    rank, choices = int(rng.integers(1, 6)), int(rng.integers(2, 6))
    errors = torch.from_numpy(10.0 ** rng.uniform(-9, -5, (rank, choices)))
    costs = [*rng.integers(1, 400, choices - 1).tolist(), 0]
    budget = int(rng.uniform(0, 1) * rank * max(costs))
    plan = allocate(errors, costs, budget, max_choices=max_choices, solver=solver)
    assert plan.shape == (rank,) and plan.dtype == torch.int64
    assert cost_of(plan, costs) <= budget
    assert max_choices is None or len(set(plan.tolist())) <= max_choices
    least = least_plan_error(errors, costs, budget, max_choices)
    assert least * (1 - 1e-12) <= error_of(plan, errors) <= least * WITHIN_GAP


@pytest.mark.parametrize("seed", range(12))
def test_a_small_plan_spends_exactly_the_best_plans_bits_and_not_one_bit_more(seed):
    """Budgets at the very sum of a plan's costs, and one bit below it."""
    rng = np.random.default_rng(100 + seed)
    costs = layer_costs(int(rng.integers(1, 200000)), int(rng.integers(1, 9000)), (8, 4, 3, 2))
    errors = layer_errors(rng, 5, (8, 4, 3, 2))
    budget = sum(costs[k] for k in rng.integers(0, 4, 5))
    for bits in (budget, budget - 1):
        plan = allocate(errors, costs, bits)
        assert cost_of(plan, costs) <= bits
        assert error_of(plan, errors) <= least_plan_error(errors, costs, bits) * WITHIN_GAP


@pytest.mark.parametrize("seed", range(12))
def test_a_plan_of_a_small_matrix_where_scales_count_as_much_as_widths_is_the_best(seed):
    """There how many components are kept decides how many steps of width the budget is worth."""
    rng = np.random.default_rng(300 + seed)
    out, n = (int(size) for size in rng.integers(32, 130, 2))
    errors, costs = layer_errors(rng, 40, (8, 4, 3, 2)), layer_costs(out, n, (8, 4, 3, 2))
    budget = int(rng.uniform(0.05, 0.5) * 40 * costs[0])
    plan = allocate(errors, costs, budget)
    assert cost_of(plan, costs) <= budget
    least = least_plan_error_by_tables(errors, costs, budget)
    assert least * (1 - 1e-12) <= error_of(plan, errors) <= least * WITHIN_GAP


@pytest.mark.parametrize(("rank", "out", "n", "share", "solver", "seed"), [
    (300, 576, 1536, 0.1, "highs", 2), (300, 576, 1536, 0.25, "highs", 2),
    (1000, 3584, 18944, 0.1, "highs", 0),
    pytest.param(300, 576, 1536, 0.1, "cbc", 0, marks=CBC.marks)])
def test_a_large_plan_lies_between_the_linear_relaxation_and_its_rounding(
        rank, out, n, share, solver, seed):
    """share: of the bits that all components at 8 bits would take."""
    errors = layer_errors(np.random.default_rng(seed), rank)
    costs = layer_costs(out, n)
    budget = int(share * rank * costs[0]) - 1
    lowest, highest = plan_error_bounds(errors, costs, budget)
    assert highest <= 1.005 * lowest, "the bounds are too far apart to see an error of 1 %"
    plan = allocate(errors, costs, budget, solver=solver)
    assert cost_of(plan, costs) <= budget
    assert lowest * (1 - 1e-12) <= error_of(plan, errors) <= highest * WITHIN_GAP


@pytest.mark.parametrize(("rank", "out", "n", "power", "max_choices"), [
    (1000, 4096, 4096, 1.0, None), (1500, 3584, 18944, 1.0, None), (1500, 3584, 18944, 0.5, None),
    (1490, 11008, 4096, 1.3, None), (1000, 4096, 4096, 1.0, 4)])
def test_many_components_that_nearly_tie_are_no_matter_of_minutes(rank, out, n, power, max_choices):
    """Errors that fall slowly and evenly: hundreds of plans within 0.1 % of each other, which a
    solver enumerates without end unless the budget is rounded to what whole widths can use."""
    noise = np.random.default_rng(0).uniform(0.98, 1.02, (rank, len(WIDTHS) + 1))
    loss = np.array([4.0 ** (0.7 - b) for b in WIDTHS] + [1.0])
    energy = np.arange(1, rank + 1.0) ** -power
    errors, costs = torch.from_numpy(energy[:, None] * loss * noise), layer_costs(out, n)
    budget = out * n
    plan = allocate(errors, costs, budget, max_choices=max_choices)
    assert cost_of(plan, costs) <= budget
    assert max_choices is None or len(set(plan.tolist())) <= max_choices
    lowest, highest = plan_error_bounds(errors, costs, budget)
    allowed = 1.0 if max_choices is None else 1.25  # four widths cost some of the error
    assert lowest * (1 - 1e-12) <= error_of(plan, errors) <= allowed * highest * WITHIN_GAP


def test_a_large_plan_with_few_widths_is_the_best_over_all_sets_of_widths():
    """With f_max = 3 of 5 choices: the LP bounds of every set of 3 bracket the plan."""
    rank, widths = 100, (8, 4, 3, 2)
    errors = layer_errors(np.random.default_rng(1), rank, widths)
    costs = layer_costs(576, 576, widths)
    budget = int(0.2 * rank * costs[0])
    bounds = []
    for left_out in ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)):  # 0 bits is always needed
        used = [k for k in range(5) if k not in left_out]
        bounds.append(plan_error_bounds(errors[:, used], [costs[k] for k in used], budget))
    plan = allocate(errors, costs, budget, max_choices=3)
    assert len(set(plan.tolist())) <= 3
    assert cost_of(plan, costs) <= budget
    lowest, highest = min(low for low, _ in bounds), min(high for _, high in bounds)
    assert highest <= 1.005 * lowest, "the bounds are too far apart to see an error of 1 %"
    assert lowest * (1 - 1e-12) <= error_of(plan, errors) <= highest * WITHIN_GAP


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("seed", [40, 47, 49])
def test_one_bit_below_a_plans_cost_is_too_little_for_it_also_in_a_huge_matrix(seed, solver):
    """An embedding's component takes 2e6 bits: one bit is less than the solvers' tolerance."""
    rng = np.random.default_rng(seed)
    rank = int(rng.integers(3, 60))
    costs = layer_costs(int(rng.integers(100000, 300000)), int(rng.integers(1000, 9000)))
    errors = layer_errors(rng, rank)
    plan = allocate(errors, costs, int(rng.uniform(0.1, 0.9) * rank * costs[0]))
    budget = cost_of(plan, costs) - 1
    assert cost_of(allocate(errors, costs, budget, solver=solver), costs) <= budget


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("unit", [1e-12, 1e-7, 1e12])
def test_the_unit_of_the_errors_does_not_move_the_plan(unit, solver):
    rng = np.random.default_rng(3)
    errors, costs = layer_errors(rng, 60), layer_costs(128, 96)
    budget = 20 * costs[0] - 1
    expected = allocate(errors, costs, budget, solver=solver)
    assert len(set(expected.tolist())) > 3  # a plan that could move
    assert torch.equal(allocate(errors * unit, costs, budget, solver=solver), expected)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("max_choices", [None, 3])
def test_the_same_inputs_give_the_same_plan_also_from_threads(solver, max_choices):
    rng = np.random.default_rng(4)
    costs = layer_costs(128, 96)
    cases = [(layer_errors(rng, rank), costs, rank * costs[3]) for rank in (8, 11, 14, 17)]

    def plan(case):
        return allocate(*case, max_choices=max_choices, solver=solver).tolist()

    one_by_one = [plan(case) for case in cases]
    assert [plan(case) for case in cases] == one_by_one
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(plan, cases * 4)) == one_by_one * 4


def test_with_bits_for_everything_every_component_gets_its_best_choice():
    errors, costs = layer_errors(np.random.default_rng(5), 40), layer_costs(64, 64)
    assert torch.equal(allocate(errors, costs, 40 * costs[0]), errors.argmin(dim=1))


def test_without_a_bit_every_component_is_left_out():
    errors, costs = layer_errors(np.random.default_rng(6), 7), layer_costs(64, 64)
    assert allocate(errors, costs, min(costs[:-1]) - 1).tolist() == [7] * 7


def test_one_component_and_bits_for_its_third_choice():
    errors = torch.tensor([[1.0, 2.0, 3.0, 4.0]]) * 1e-7
    assert allocate(errors, [80, 70, 60, 0], 69).tolist() == [2]


def test_a_width_that_loses_more_than_leaving_out_is_not_bought():
    errors = torch.tensor([[1.0, 3.0, 2.0], [1.0, 3.0, 2.0]])
    assert sorted(allocate(errors, [8, 2, 0], 10).tolist()) == [0, 2]


def test_errors_of_zero_and_no_components_take_the_cheapest_choice():
    assert allocate(torch.zeros(3, 3), [8, 2, 0], 100).tolist() == [2, 2, 2]
    assert allocate(torch.zeros(0, 3), [8, 2, 0], 100).tolist() == []


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_budget_below_the_cheapest_plan_is_an_error_that_names_both(solver):
    with pytest.raises(ValueError, match="12 bits at least, and the budget is 11"):
        allocate(torch.ones(3, 2), [8, 4], 11, solver=solver)


@pytest.mark.parametrize(("solver", "error", "words"), [
    ("highs", FileNotFoundError("HiGHS not found."),
     "the solver highs .*highspy below 1.16.*HiGHS not found"),
    ("cbc", NameError("name 'cbclib' is not defined"), "the solver cbc .*cbc cbcbox.*cbclib")])
def test_a_solver_that_cannot_be_loaded_is_an_error_that_says_what_is_needed(
        solver, error, words, monkeypatch):
    def missing(*args, **keys):
        raise error

    monkeypatch.setattr("mip.Model", missing)
    errors = torch.tensor([[1.0, 2.0, 4.0], [1.0, 2.1, 4.0]])
    with pytest.raises(SolverError, match=words):
        allocate(errors, [8, 5, 0], 13, solver=solver)


@pytest.mark.skipif(find_spec("cbcbox") is None, reason="no cbcbox, which is python-mip's CBC")
def test_control_c_still_works_after_cbc_ran_in_many_threads():
    """CBC's linear solver swaps the process's SIGINT handler; two at a time would lose Python's."""
    errors, costs = layer_errors(np.random.default_rng(2), 6), layer_costs(32, 32)
    with ThreadPoolExecutor(16) as executor:
        list(executor.map(lambda _: allocate(errors, costs, 1100, solver="cbc"), range(300)))
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
        time.sleep(1)


@pytest.mark.parametrize("widths", [(8, 3), (8, 5), (8, 2), (7, 4, 3), (8, 7, 3), (5,), (8, 4, 1)])
def test_widths_with_gaps_between_them_are_as_good_as_any_plan(widths):
    """The narrowest may cost less than the step to the next: 3 bits beside 8."""
    rng = np.random.default_rng(sum(widths))
    for out, n in ((64, 96), (32, 32)):
        costs = layer_costs(out, n, widths)
        for rank in (1, 3, 5):
            errors = layer_errors(rng, rank, widths)
            for share in (0.15, 0.4, 0.7, 0.95):
                budget = int(share * rank * max(costs)) + min(cost for cost in costs if cost)
                plan = allocate(errors, costs, budget)
                assert cost_of(plan, costs) <= budget
                least = least_plan_error(errors, costs, budget)
                assert error_of(plan, errors) <= least * WITHIN_GAP
