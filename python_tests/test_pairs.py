"""Pairs of widths: chains, the best plan over them, and what separate widths are worth."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from reference import least_plan_error, least_plan_error_by_tables, plan_error_bounds
from test_allocate import WITHIN_GAP, cost_of, error_of
from test_matrix import LEAST, compress, layer, pairs_of, spent

from adamix.compression import knapsack
from adamix.compression.allocate import NEAR, allocate
from adamix.compression.matrix import component_bits
from adamix.compression.pairs import chains, columns, equal_pairs, sets_of_pairs, union
from adamix.config import Config

LOSS = {bits: 4.0 ** (0.7 - bits) for bits in range(1, 9)}


def pair_errors(rng, rank, widths, power=None):
    """Errors of each component at `union(chains(widths))` and at 0 bits."""
    energy = (np.sort(10.0 ** rng.uniform(-5, -1, rank))[::-1] if power is None
              else np.arange(1, rank + 1.0) ** -power)
    v, u = ({b: LOSS[b] * rng.uniform(0.9, 1.1, rank) for b in widths} for _ in range(2))
    errors = [energy * (0.5 * v[p] + u[q]) for p, q in union(chains(widths))]
    return torch.from_numpy(np.stack([*errors, energy], axis=1))


def pair_costs(shape, widths):
    return [*(component_bits(shape, *pair) for pair in union(chains(widths))), 0]


# --- chains ------------------------------------------------------------------------------------


@pytest.mark.parametrize("widths", [
    (8, 7, 6, 5, 4, 3, 2), (8, 7, 6, 5, 4, 3, 2, 1), (8, 4, 3, 2), (4, 3, 2), (8, 2), (2,), (8, 1),
    (5, 3, 2, 1)])
def test_each_set_is_a_chain_from_the_widest_pair_to_the_narrowest(widths):
    found = chains(widths)
    assert len(set(found)) == len(found)
    for chain in found:
        assert chain[0] == (max(widths),) * 2 and chain[-1] == (min(widths),) * 2
        assert len(chain) == 2 * len(widths) - 1
        for (v, u), (next_v, next_u) in itertools.pairwise(chain):
            assert (v, u) != (next_v, next_u) and next_v <= v and next_u <= u
    assert any(set(equal_pairs(widths)) <= set(chain) for chain in found)


def test_chains_by_hand():
    assert chains((2,)) == [((2, 2),)]
    assert set(chains((8, 2))) == {((8, 8), (8, 2), (2, 2)), ((8, 8), (2, 8), (2, 2))}
    wider_u = ((4, 4), (3, 4), (2, 4), (2, 3), (2, 2))
    assert wider_u in chains((2, 3, 4)) and ((4, 4), (3, 4), (3, 3), (2, 3), (2, 2)) in chains(
        (2, 3, 4))


def test_widths_are_separate_where_the_objective_has_both_factors():
    widths = Config().bit_widths
    assert sets_of_pairs(Config()) == chains(widths)
    for config in (Config(separate_widths=False), Config(objective="v"), Config.preset("paper")):
        assert sets_of_pairs(config) == [equal_pairs(widths)]
    assert columns([equal_pairs(widths)]) is None
    pairs, sets = union(chains((3, 2))), columns(chains((3, 2)))
    assert [[pairs[k] for k in chosen[:-1]] for chosen in sets] == list(map(list, chains((3, 2))))
    assert all(chosen[-1] == len(pairs) for chosen in sets)


# --- the plan ----------------------------------------------------------------------------------


@pytest.mark.parametrize("widths", [(3, 2), (8, 2), (4, 3, 2)])
@pytest.mark.parametrize("seed", range(6))
def test_a_small_plan_is_the_best_of_all_plans_of_all_sets(seed, widths):
    rng = np.random.default_rng(seed)
    shape = tuple(int(size) for size in rng.integers(20, 300, 2))
    errors, costs = pair_errors(rng, int(rng.integers(1, 6)), widths), pair_costs(shape, widths)
    sets, budget = columns(chains(widths)), int(rng.uniform(0.1, 0.9) * len(errors) * max(costs))
    plan = allocate(errors, costs, budget, sets=sets)
    assert cost_of(plan, costs) <= budget and any(set(plan.tolist()) <= set(s) for s in sets)
    least = min(least_plan_error(errors[:, s], [costs[k] for k in s], budget) for s in sets)
    assert least * (1 - 1e-12) <= error_of(plan, errors) <= least * WITHIN_GAP


@pytest.mark.parametrize("seed", range(6))
def test_a_plan_of_many_components_is_the_best_of_all_sets(seed):
    rng = np.random.default_rng(10 + seed)
    widths = (8, 5, 4, 3, 2)
    shape = tuple(int(size) for size in rng.integers(32, 200, 2))
    errors, costs = pair_errors(rng, 30, widths), pair_costs(shape, widths)
    sets, budget = columns(chains(widths)), int(rng.uniform(0.05, 0.5) * 30 * max(costs))
    plan = allocate(errors, costs, budget, sets=sets)
    assert cost_of(plan, costs) <= budget
    least = min(least_plan_error_by_tables(errors[:, s], [costs[k] for k in s], budget)
                for s in sets)
    assert least * (1 - 1e-12) <= error_of(plan, errors) <= least * WITHIN_GAP


@pytest.mark.parametrize(("shape", "rank", "power"), [
    ((3584, 18944), 1505, 0.5), ((3584, 18944), 1505, 1.0), ((3584, 3584), 894, 1.0),
    ((576, 1536), 207, 0.5), ((151936, 896), 222, 0.5)])
def test_many_components_that_nearly_tie_are_no_matter_of_minutes(shape, rank, power, monkeypatch):
    def unused(*arguments):
        raise AssertionError("the tables are to be enough")

    monkeypatch.setattr("adamix.compression.allocate._best_of_cases", unused)
    widths = Config().bit_widths
    errors = pair_errors(np.random.default_rng(0), rank, widths, power)
    costs, sets, budget = pair_costs(shape, widths), columns(chains(widths)), shape[0] * shape[1]
    plan = allocate(errors, costs, budget, sets=sets)
    assert cost_of(plan, costs) <= budget and any(set(plan.tolist()) <= set(s) for s in sets)
    bounds = [plan_error_bounds(errors[:, s], [costs[k] for k in s], budget) for s in sets]
    lowest, highest = (min(bound[side] for bound in bounds) for side in (0, 1))
    assert lowest * (1 - 1e-12) <= error_of(plan, errors) <= highest * WITHIN_GAP


@pytest.mark.parametrize(("bits", "power"), [(2.0, 0.5), (1.0, 1.1)])
def test_of_an_embedding_a_plan_near_its_bound_is_enough(bits, power, monkeypatch):
    monkeypatch.setattr("adamix.compression.allocate._best_of_cases", None)
    widths, shape = Config().bit_widths, (151936, 896)
    costs, sets = pair_costs(shape, widths), columns(chains(widths))
    budget = int(bits * shape[0] * shape[1])
    rank = min(shape[1], budget // min(costs[:-1]))
    errors = pair_errors(np.random.default_rng(0), rank, widths, power)
    plan = allocate(errors, costs, budget, sets=sets)
    assert cost_of(plan, costs) <= budget and any(set(plan.tolist()) <= set(s) for s in sets)
    bounds = [plan_error_bounds(errors[:, s], [costs[k] for k in s], budget) for s in sets]
    assert error_of(plan, errors) <= min(bound[0] for bound in bounds) * (1 + 1.01 * NEAR)


def test_where_tables_would_be_too_large_a_solver_comes_near_the_best_plan(monkeypatch):
    rng = np.random.default_rng(3)
    widths, shape = (4, 3, 2), (96, 160)
    errors, costs = pair_errors(rng, 40, widths), pair_costs(shape, widths)
    sets, budget = columns(chains(widths)), 12 * max(costs)
    expected = error_of(allocate(errors, costs, budget, sets=sets), errors)
    monkeypatch.setattr(knapsack, "MOST_ENTRIES", 1000)
    plan = allocate(errors, costs, budget, sets=sets)
    assert cost_of(plan, costs) <= budget
    assert expected * (1 - 1e-12) <= error_of(plan, errors) <= expected * (1 + 1.01 * NEAR)


def test_the_same_inputs_give_the_same_plan_also_from_threads():
    rng, widths = np.random.default_rng(4), (8, 4, 3, 2)
    costs, sets = pair_costs((128, 96), widths), columns(chains(widths))
    cases = [(pair_errors(rng, rank, widths), costs, rank * costs[3]) for rank in (8, 30, 60)]

    def plan(case):
        return allocate(*case, sets=sets).tolist()

    one_by_one = [plan(case) for case in cases]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(plan, cases * 4)) == one_by_one * 4


@pytest.mark.parametrize("max_choices", [2, 3])
def test_few_choices_are_pairs_of_one_set(max_choices):
    widths, rng = (4, 3, 2), np.random.default_rng(5)
    errors, costs = pair_errors(rng, 20, widths), pair_costs((96, 64), widths)
    sets, budget = columns(chains(widths)), 8 * max(costs)
    plan = allocate(errors, costs, budget, sets=sets, max_choices=max_choices)
    assert len(set(plan.tolist())) <= max_choices and cost_of(plan, costs) <= budget
    assert any(set(plan.tolist()) <= set(s) for s in sets)


@pytest.mark.parametrize("budget", [0, 10**9])
def test_without_a_bit_or_with_bits_for_everything(budget):
    widths = (4, 3, 2)
    errors, costs = pair_errors(np.random.default_rng(6), 9, widths), pair_costs((64, 64), widths)
    plan = allocate(errors, costs, budget, sets=columns(chains(widths)))
    assert torch.equal(plan, errors.argmin(dim=1) if budget else torch.full((9,), len(costs) - 1))


# --- matrices ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(96, 160), (160, 96), (64, 320), (33, 65)])
@pytest.mark.parametrize("bits_per_weight", [0.75, 1.5])
def test_separate_widths_predict_less_error_and_lie_in_the_packed_order(shape, bits_per_weight):
    delta, X = layer(*shape)
    predicted = {}
    for separate in (False, True):
        def solve(errors, *arguments, separate=separate, **options):
            plan = allocate(errors, *arguments, **options)
            predicted[separate] = error_of(plan, errors)
            return plan

        config = Config(bits_per_weight=bits_per_weight, separate_widths=separate)
        result = compress(delta, X, config, solve=solve)
        assert spent(result) <= config.budget_bits(shape)
        assert (result.delta.v_bits.diff() <= 0).all() and (result.delta.u_bits.diff() <= 0).all()
        if not separate:
            assert torch.equal(result.delta.v_bits, result.delta.u_bits)
    assert predicted[True] <= predicted[False] * WITHIN_GAP


def test_the_shorter_lane_gets_the_more_bits():
    for shape, wider in (((64, 320), "u_bits"), ((320, 64), "v_bits")):
        delta, X = layer(*shape)
        result = compress(delta, X, Config(bits_per_weight=1.0)).delta
        other = "v_bits" if wider == "u_bits" else "u_bits"
        assert getattr(result, wider).sum() > getattr(result, other).sum()
        assert len(set(pairs_of(compress(delta, X, Config(bits_per_weight=1.0))))) > 2


def test_widths_are_equal_where_the_configuration_says_so():
    delta, X = layer(96, 128)
    config = Config(bits_per_weight=1.0, separate_widths=False, **LEAST)
    result = compress(delta, X, config)
    assert all(v == u for v, u in pairs_of(result))
    alone = compress(delta, X, Config(bits_per_weight=1.0, objective="v", **LEAST))
    assert all(v == u for v, u in pairs_of(alone))
