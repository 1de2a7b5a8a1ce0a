"""Errors, costs, budget -> the width of every component: the paper's 0/1 integer linear program."""

from __future__ import annotations

import math
from collections.abc import Sequence

import mip
import torch
from torch import Tensor

# The solvers' tolerances are absolute. Errors of 1e-7, as real layers have them, would pass as
# zero and an empty plan as optimal; with the total brought here both solvers resolve 1e-10 of it.
OBJECTIVE_TOTAL = 1e4
GAP = 1e-6


def allocate(errors: Tensor, costs: Sequence[int], budget: int, *, max_choices: int | None = None,
             solver: str = "highs") -> Tensor:
    """Choose one width for each component so that the summed error is least (paper eq. 10).

    Args:
        errors: E `[rank, choices]`, error of component i under choice k; finite, >= 0.
        costs: bits that a component takes under each choice, the same for all components; whole.
        budget: bits in all.
        max_choices: at most this many different choices in use (f_max), None for no limit.
        solver: "highs" or "cbc".

    Returns:
        `[rank]` int64, the choice of each component. The same inputs give the same plan, and the
        errors' unit does not matter.

    Raises:
        ValueError: an error is NaN, Inf or negative, or the cheapest plan exceeds the budget.
        RuntimeError: the solver found no optimal plan.
    """
    rank, choices = errors.shape
    if not (torch.isfinite(errors) & (errors >= 0)).all():
        raise ValueError("the errors to allocate by must be finite and not negative")
    if rank * min(costs) > budget:
        raise ValueError(f"{rank} components take {rank * min(costs)} bits at least, and the "
                         f"budget is {budget}")
    # In units of the costs' greatest common divisor all coefficients are small whole numbers, so
    # that no plan over the budget by a single unit passes within the solvers' tolerance.
    unit = math.gcd(*costs) or 1
    costs, budget = [cost // unit for cost in costs], budget // unit
    total = errors.amax(dim=1).sum().item()
    if rank == 0 or total == 0:
        return torch.full((rank,), min(range(choices), key=costs.__getitem__), dtype=torch.long)
    scaled = errors.double() * (OBJECTIVE_TOTAL / total)
    open_choices = torch.ones_like(scaled, dtype=torch.bool)
    if max_choices is None:
        open_choices = undominated(scaled, costs, budget)
    return _solve(scaled.tolist(), open_choices.tolist(), costs, budget, max_choices, solver)


def undominated(errors: Tensor, costs: Sequence[int], budget: int) -> Tensor:
    """Which choices can occur in an optimal plan: bool `[rank, choices]`.

    Reduced-cost fixing. With a price λ for a unit of budget, every component takes its cheapest
    choice of E + λ cost, and the sum less λ budget bounds every plan from below. A choice whose
    price lies above its component's cheapest by more than the distance between that bound and a
    known plan is in no better plan than the known one. Exact, and it leaves the solver two or three
    choices a component of the nine, and mostly a tenth of a second of the seconds that it took.
    """
    cost = torch.tensor(costs, dtype=torch.float64)

    def priced(price: float) -> Tensor:
        return errors + price * cost

    low, high = 0.0, 1.0
    while cost[priced(high).argmin(dim=1)].sum() > budget:
        low, high = high, 2.0 * high
    for _ in range(100):
        middle = 0.5 * (low + high)
        if cost[priced(middle).argmin(dim=1)].sum() > budget:
            low = middle
        else:
            high = middle
    plan = _fill(errors, cost, budget, priced(high).argmin(dim=1))
    best = priced(high).min(dim=1, keepdim=True).values
    bound = best.sum() - high * budget
    known = errors.gather(1, plan[:, None]).sum()
    slack = (known - bound) + 1e-9 * known.abs() + 1e-9
    return (priced(high) - best <= slack).scatter(1, plan[:, None], True)


def _fill(errors: Tensor, cost: Tensor, budget: int, plan: Tensor) -> Tensor:
    """Spend what a plan leaves of the budget, each time where it lowers the error most."""
    plan = plan.clone()
    while True:
        gain = errors.gather(1, plan[:, None]) - errors
        extra = cost[None, :] - cost[plan][:, None]
        gain = torch.where(extra <= budget - cost[plan].sum(), gain, -torch.inf)
        best = int(gain.argmax())
        component, choice = divmod(best, errors.shape[1])
        if not gain[component, choice] > 0:
            return plan
        plan[component] = choice


def _solve(errors: list[list[float]], is_open: list[list[bool]], costs: Sequence[int], budget: int,
           max_choices: int | None, solver: str) -> Tensor:
    """The integer program over the open choices."""
    rank, choices = len(errors), len(costs)
    model = mip.Model(solver_name=mip.HIGHS if solver == "highs" else mip.CBC)
    model.verbose, model.threads, model.max_mip_gap, model.seed = 0, 1, GAP, 0
    S = [{k: model.add_var(var_type=mip.BINARY, obj=row[k]) for k in range(choices) if allowed[k]}
         for row, allowed in zip(errors, is_open, strict=True)]
    for row in S:
        model += mip.xsum(row.values()) == 1
    model += mip.xsum(costs[k] * x for row in S for k, x in row.items() if costs[k]) <= budget
    if max_choices is not None:
        used = [model.add_var(var_type=mip.BINARY) for _ in range(choices)]
        model += mip.xsum(used) <= max_choices
        for k in range(choices):
            model += mip.xsum(row[k] for row in S) <= rank * used[k]
    status = model.optimize()
    if status != mip.OptimizationStatus.OPTIMAL:
        raise RuntimeError(f"the allocation's solver ({solver}) stopped with {status.name}")
    return torch.tensor([max(row, key=lambda k: row[k].x) for row in S])
