"""Integer programs in processes of their own: the same plans, and errors that come through."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from adamix.compression.allocate import allocate
from adamix.errors import SolverError
from adamix.solving import solvers

COSTS = [9, 5, 3, 0]


def program(seed):
    random = torch.Generator().manual_seed(seed)
    falling = torch.rand(12, 4, generator=random, dtype=torch.float64).cumsum(dim=1)
    return falling * torch.linspace(1.0, 0.01, 12, dtype=torch.float64)[:, None]


def test_plans_are_those_of_this_process_whoever_asks():
    with solvers(2) as pool, ThreadPoolExecutor(4) as threads:
        plans = list(threads.map(lambda seed: pool.allocate(program(seed), COSTS, 40,
                                                            max_choices=3), range(6)))
    for seed, plan in enumerate(plans):
        assert torch.equal(plan, allocate(program(seed), COSTS, 40, max_choices=3))


def test_an_error_is_the_callers_and_the_process_goes_on():
    with solvers(1) as pool:
        with pytest.raises(ValueError, match="finite"):
            pool.allocate(torch.full((2, 4), torch.nan), COSTS, 40)
        assert len(pool.allocate(program(0), COSTS, 40)) == 12


def test_a_process_that_ended_is_one_sentence():
    with solvers(1) as pool:
        pool._processes[0].kill()
        pool._processes[0].wait()
        with pytest.raises(SolverError, match="ended with status -9"):
            pool.allocate(program(0), COSTS, 40)
