"""Errors, costs, budget -> the width of every component: the paper's 0/1 integer linear program."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from contextlib import nullcontext

import mip
import torch
from torch import Tensor

from adamix.errors import SolverError, reason

# The solvers' tolerances are absolute. Errors of 1e-7, as real layers have them, would pass as
# zero and an empty plan as optimal; with the total brought here both solvers resolve 1e-10 of it.
OBJECTIVE_TOTAL = 1e4
GAP = 1e-6
# CBC's linear solver sets a handler of SIGINT while it runs and puts the one before back: two at a
# time can put back each other's, and Ctrl-C is lost from then on.
CBC_ALONE = threading.Lock()


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
    known = math.inf  # a plan of the greedy kind may use more than max_choices
    if max_choices is None:
        known = scaled.gather(1, _greedy(scaled, costs, budget)[:, None]).sum().item()
    is_open = undominated(scaled, costs, budget, known)
    steps = whole_steps(costs, budget, is_open)
    is_open &= undominated(scaled, *steps, known)
    rows = [(costs, budget), steps]
    return _solve(scaled.tolist(), is_open.tolist(), rows, max_choices, solver)


def undominated(errors: Tensor, costs: Sequence[int], budget: int, known: float) -> Tensor:
    """Which choices a plan no worse than a known one can make: bool `[rank, choices]`.

    Reduced-cost fixing. With a price λ for a unit of budget, every component takes its cheapest
    choice of E + λ cost, and the sum less λ budget bounds every plan from below. A choice dearer
    than its component's cheapest by over the distance from that bound to the known plan is in no
    better one. Exact, and it leaves the solver two or three choices of nine.
    """
    cost = torch.tensor(costs, dtype=torch.float64)
    price = _price(errors, cost, budget)
    priced = errors + price * cost
    best = priced.min(dim=1, keepdim=True).values
    bound = best.sum().item() - price * budget
    return priced - best <= (known - bound) + 1e-9 * (known + OBJECTIVE_TOTAL)


def whole_steps(costs: Sequence[int], budget: int, is_open: Tensor
                ) -> tuple[list[int], int]:
    """The budget row over the step between widths, rounded down: a row that all plans keep.

    A component of b bits costs step · b + 1 units, or 0. Widths are whole, so what the budget has
    beyond a whole number of steps is of no use, once the components that must have a width have
    paid their 1. The linear relaxation does use it: without this row the solver can take minutes
    to prove that nothing else does (1000 components: 122 s without, 0.04 s with).
    """
    paid = [cost for cost in costs if cost > 0]
    step = math.gcd(*(cost - paid[0] for cost in paid)) or paid[0]
    rest = min(cost % step for cost in paid)
    forced = int((~is_open[:, [k for k, cost in enumerate(costs) if cost == 0]]).all(dim=1).sum())
    return [cost // step for cost in costs], (budget - rest * forced) // step


def _price(errors: Tensor, cost: Tensor, budget: int) -> float:
    """The least price (to 100 halvings) at which the cheapest choices keep to the budget."""
    def spent(price: float) -> float:
        return cost[(errors + price * cost).argmin(dim=1)].sum().item()

    low, high = 0.0, 1.0
    while spent(high) > budget:
        low, high = high, 2.0 * high
    for _ in range(100):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if spent(middle) > budget else (low, middle)
    return high


def _greedy(errors: Tensor, costs: Sequence[int], budget: int) -> Tensor:
    """A good plan: the cheapest choices at the budget's price, then what lowers the error most."""
    cost = torch.tensor(costs, dtype=torch.float64)
    plan = (errors + _price(errors, cost, budget) * cost).argmin(dim=1)
    while True:
        gain = errors.gather(1, plan[:, None]) - errors
        extra = cost[None, :] - cost[plan][:, None]
        gain = torch.where(extra <= budget - cost[plan].sum(), gain, -torch.inf)
        component, choice = divmod(int(gain.argmax()), errors.shape[1])
        if not gain[component, choice] > 0:
            return plan
        plan[component] = choice


def _solve(errors: list[list[float]], is_open: list[list[bool]],
           budget_rows: Sequence[tuple[Sequence[int], int]], max_choices: int | None, solver: str
           ) -> Tensor:
    """The integer program over the open choices."""
    rank, choices = len(errors), len(errors[0])
    try:
        model = mip.Model(solver_name=mip.HIGHS if solver == "highs" else mip.CBC)
    except (FileNotFoundError, NotImplementedError) as error:
        raise SolverError(f"python-mip cannot load the solver {solver} (highs needs highspy below "
                          f"1.16): {reason(error)}") from error
    model.verbose, model.threads, model.max_mip_gap, model.seed = 0, 1, GAP, 0
    S = [{k: model.add_var(var_type=mip.BINARY, obj=row[k]) for k in range(choices) if allowed[k]}
         for row, allowed in zip(errors, is_open, strict=True)]
    for row in S:
        model += mip.xsum(row.values()) == 1
    for costs, budget in budget_rows:
        model += mip.xsum(costs[k] * x for row in S for k, x in row.items() if costs[k]) <= budget
    if max_choices is not None:
        used = [model.add_var(var_type=mip.BINARY) for _ in range(choices)]
        model += mip.xsum(used) <= max_choices
        for k in range(choices):
            model += mip.xsum(row[k] for row in S) <= rank * used[k]
    with CBC_ALONE if solver == "cbc" else nullcontext():
        status = model.optimize()
    if status != mip.OptimizationStatus.OPTIMAL:
        raise RuntimeError(f"the allocation's solver ({solver}) stopped with {status.name}")
    return torch.tensor([max(row, key=lambda k: row[k].x) for row in S])
