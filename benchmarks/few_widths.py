"""The integer program with f_max in bounded time: over each set of widths without it.

`allocate`'s `max_choices` leaves a solver all widths of all components at once, and nothing bounds
its time. Here each set of that many choices is a program of its own, which `allocate` takes apart,
and those whose bound from below is above the best plan so far are not solved. What comes out is as
good.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from adamix.compression.allocate import allocate

HALVINGS = 40  # of the logarithm of a price; any price gives a bound
SLACK = 1e-9  # of a plan's error, by which rounding could put a bound above it

Solve = Callable[..., Tensor]


def allocate_few(errors: Tensor, costs: Sequence[int], budget: int, *,
                 sets: Sequence[Sequence[int]] | None = None, max_choices: int | None = None,
                 solver: str = "highs", solve: Solve = allocate) -> Tensor:
    """As `allocate`, which `solve` calls here or in another process."""
    rank, choices = errors.shape
    if max_choices is None or max_choices >= choices or rank == 0:
        return solve(errors, costs, budget, sets=sets, solver=solver)
    errors = errors.cpu()
    few = dict.fromkeys(chosen for mixed in sets or [range(choices)]
                        for chosen in itertools.combinations(mixed, max_choices))
    sets = [chosen for chosen in few
            if rank * min(costs[k] for k in chosen) <= budget]
    bounds = lower_bounds(errors, costs, budget, sets)
    best, least = None, float("inf")
    for index in bounds.argsort().tolist():
        if bounds[index].item() > least * (1 + SLACK):
            break
        chosen = list(sets[index])
        plan = torch.tensor(chosen)[solve(errors[:, chosen], [costs[k] for k in chosen], budget,
                                          solver=solver)]
        error = errors.gather(1, plan[:, None]).sum().item()
        if best is None or error < least:
            best, least = plan, error
    if best is None:
        raise ValueError(f"no plan of {rank} components keeps to {budget} bits")
    return best


def with_solver(solve: Solve) -> Solve:
    """`allocate_few` over programs that `solve` solves."""
    return partial(allocate_few, solve=solve)


def lower_bounds(errors: Tensor, costs: Sequence[int], budget: int,
                 sets: Sequence[tuple[int, ...]]) -> Tensor:
    """`[sets]`: no plan within the budget has less error, with the choices of each set alone.

    With a price for a bit every component takes its cheapest choice, and the sum less what the
    budget is worth bounds every plan; the price is the least, nearly, at which they keep to it.
    """
    chosen = torch.tensor(sets)
    cost = torch.tensor(costs, dtype=torch.float64)[chosen]  # [sets, choices of a set]
    table = errors.double()[:, chosen].movedim(0, 1)  # [sets, rank, choices of a set]
    most = table.amax().item() / max(min(cost for cost in costs if cost > 0), 1) + 1e-300
    low = torch.full((len(sets),), most * 2.0**-60, dtype=torch.float64)
    high = torch.full_like(low, most * 2.0)
    for _ in range(HALVINGS):
        price = (low * high).sqrt()
        taken = (table + price[:, None, None] * cost[:, None]).argmin(dim=2)
        over = cost.gather(1, taken).sum(dim=1) > budget
        low, high = torch.where(over, price, low), torch.where(over, high, price)
    priced = (table + high[:, None, None] * cost[:, None]).amin(dim=2).sum(dim=1)
    return priced - high * budget
