"""Errors, costs, budget -> the width of every component: the paper's 0/1 integer linear program."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import mip
import torch
from torch import Tensor

from adamix.compression.knapsack import best_plan
from adamix.errors import SolverError, reason

# The solvers' tolerances are absolute. Errors of 1e-7, as real layers have them, would pass as
# zero and an empty plan as optimal; with the total brought here both solvers resolve 1e-10 of it.
OBJECTIVE_TOTAL = 1e4
GAP = 1e-6
# How far a plan may be above its bound where the tables that find the best one would be too large,
# as for embeddings of a bit a weight or more. A solver can take minutes to come nearer.
NEAR = 1e-3
FEE_HALVINGS = 30
# CBC's linear solver sets a handler of SIGINT while it runs and puts the one before back: two at a
# time can put back each other's, and Ctrl-C is lost from then on.
CBC_ALONE = threading.Lock()


def allocate(errors: Tensor, costs: Sequence[int], budget: int, *,
             sets: Sequence[Sequence[int]] | None = None, max_choices: int | None = None,
             solver: str = "highs") -> Tensor:
    """Choose one width for each component so that the summed error is least (paper eq. 10).

    Args:
        errors: E `[rank, choices]`, error of component i under choice k; finite, >= 0.
        costs: bits that a component takes under each choice, the same for all components; whole.
        budget: bits in all.
        sets: of choices, of which a plan keeps to one; None: all choices may be mixed. In a very
            large table the plan's error may be 1e-3 of itself above the least.
        max_choices: at most this many different choices in use (f_max), None for no limit. With
            sets they are of the one whose linear relaxation has the least error.
        solver: "highs" or "cbc".

    Returns:
        `[rank]` int64, the choice of each component. The same inputs give the same plan, and the
        errors' unit does not matter.

    Raises:
        ValueError: an error is NaN, Inf or negative, or the cheapest plan exceeds the budget.
        RuntimeError: the solver found no optimal plan.
    """
    errors = errors.cpu()
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
    if sets is not None:
        if max_choices is not None:
            sets = _sets_of_few(scaled, costs, budget, sets, max_choices)
        best = _best_of_sets(scaled, costs, budget, sets, solver)
    elif max_choices is not None:
        best = _few_choices(scaled, costs, budget, max_choices, solver)
    else:
        best = _best_of_cases(scaled, costs, budget, solver)
    if best is None:
        raise RuntimeError(f"the allocation's solver ({solver}) found no plan")
    return best


def _best_of_sets(errors: Tensor, costs: Sequence[int], budget: int, sets: Sequence[Sequence[int]],
                  solver: str) -> Tensor | None:
    """The best plan of all sets. Their linear relaxations are within a hundredth of a percent of
    their best plans, so the set with the least one nearly always rules the others out."""
    best, known = None, math.inf
    for part in _by_bound(errors, costs, budget, sets):
        if part.bound >= (1 - GAP) * known:
            break
        plan = _best_of_set(errors[:, part.chosen], part, budget, known, solver)
        if plan is not None and _error(errors[:, part.chosen], plan) < known:
            best, known = part.chosen[plan], _error(errors[:, part.chosen], plan)
    return best


@dataclass(frozen=True)
class Part:
    """A set of choices, with what bounds its plans from below and the price that gives it."""

    chosen: Tensor
    costs: list[int]
    bound: float
    price: float


def _by_bound(errors: Tensor, costs: Sequence[int], budget: int, sets: Sequence[Sequence[int]]
              ) -> list[Part]:
    """The sets with plans within the budget, that of the least bound first."""
    parts = []
    for chosen in map(list, sets):
        part = [costs[k] for k in chosen]
        if len(errors) * min(part) <= budget:
            case = Case(budget, len(errors), _kept(part))
            bound, price, _ = _dual(errors[:, chosen], part, case)
            parts.append(Part(torch.tensor(chosen), part, bound, price))
    return sorted(parts, key=lambda part: part.bound)


def _sets_of_few(errors: Tensor, costs: Sequence[int], budget: int, sets: Sequence[Sequence[int]],
                 max_choices: int) -> list[Sequence[int]]:
    """So many choices each of the set with the least bound."""
    mixed = _by_bound(errors, costs, budget, sets)[0].chosen.tolist()
    return list(itertools.combinations(mixed, min(max_choices, len(mixed))))


def _best_of_set(errors: Tensor, part: Part, budget: int, known: float, solver: str
                 ) -> Tensor | None:
    """The best plan, or None where none is better than the known one."""
    best = _greedy(errors, part.costs, Case(budget, len(errors), _kept(part.costs)))
    if best is not None and _error(errors, best) < known:
        known = _error(errors, best)
        if part.bound >= (1 - GAP) * known:
            return best
    else:
        best = None
    better, is_certain = best_plan(errors, torch.tensor(part.costs), budget, part.price,
                                   GAP * known, known)
    if better is not None:
        best, known = better, _error(errors, better)
    if not is_certain and part.bound < (1 - NEAR) * known:
        return _best_of_cases(errors, part.costs, budget, solver, gap=NEAR)
    return best


def _few_choices(errors: Tensor, costs: Sequence[int], budget: int, max_choices: int, solver: str
                 ) -> Tensor | None:
    # A plan of the greedy kind may use more choices, so no bound is known.
    is_open = torch.ones(errors.shape, dtype=torch.bool)
    steps, cases = cases_of(costs, budget, is_open)
    rows = [(costs, budget), (steps, cases[0].budget)]
    return _solve(errors, is_open, rows, max_choices, solver)


def _best_of_cases(scaled: Tensor, costs: Sequence[int], budget: int, solver: str,
                   gap: float = GAP) -> Tensor | None:
    whole = Case(budget, len(scaled), _kept(costs))
    plan = _greedy(scaled, costs, whole)
    known = math.inf if plan is None else _error(scaled, plan)
    steps, cases = cases_of(costs, budget, undominated(scaled, costs, whole, known))
    plans = (_greedy(scaled, steps, case) for case in cases)
    known = min([known, *(_error(scaled, plan) for plan in plans if plan is not None)])
    best = None
    for case in sorted(cases, key=lambda case: _dual(scaled, steps, case)[0]):
        is_open = undominated(scaled, steps, case, known)
        if not is_open.any(dim=1).all():
            continue  # none of its plans is as good as the known one
        rows = [(steps, case.budget), ([int(kept) for kept in case.kept], case.components)]
        plan = _solve(scaled, is_open, rows, None, solver, gap)
        if plan is not None and (best is None or _error(scaled, plan) < known):
            best, known = plan, _error(scaled, plan)
    return best


@dataclass(frozen=True)
class Case:
    """Plans of at most so much, and with so many components that are kept."""

    budget: int
    components: int
    kept: Tensor  # of each choice, fp64: 1, or 0 where the component is left out


def _kept(costs: Sequence[int]) -> Tensor:
    return torch.tensor([float(cost > 0) for cost in costs], dtype=torch.float64)


def cases_of(costs: Sequence[int], budget: int, is_open: Tensor) -> tuple[list[int], list[Case]]:
    """The budget in whole steps between widths: those of each choice, and of all that there can be.

    A component of b bits costs step · b + 1 units, or 0 (with gaps between the widths more than 1,
    and none or more steps). Widths are whole, so what the budget has
    beyond whole steps is of no use but to pay the 1 of each kept component. The linear relaxation
    of the budget alone does spend it on a part of a step, and the solver can take minutes to prove
    that no plan can (1000 components: 122 s, with steps 0.04 s). How many steps the budget is worth
    depends on how many components are kept: a case for every such number of steps.
    """
    paid = [cost for cost in costs if cost > 0]
    step = math.gcd(*(cost - paid[0] for cost in paid)) or paid[0]
    rest = paid[0] % step
    kept = _kept(costs)
    least = int((~is_open[:, kept == 0]).all(dim=1).sum())
    most = int(is_open[:, kept > 0].any(dim=1).sum())
    counts = range((budget - rest * least) // step, (budget - rest * most) // step - 1, -1)
    return [cost // step for cost in costs], [
        Case(count, min((budget - step * count) // rest, most) if rest else most, kept)
        for count in counts if count >= 0]


def undominated(errors: Tensor, costs: Sequence[int], case: Case, known: float) -> Tensor:
    """Which choices a plan no worse than a known one can make: bool `[rank, choices]`.

    Reduced-cost fixing. With a price for a unit of budget and a fee for a kept component, every
    component takes its cheapest choice, and the sum less what the case allows bounds every plan
    from below. A choice dearer than its component's cheapest by over the distance from that bound
    to the known plan is in no better one. Exact, and it leaves the solver a few choices in all.
    """
    bound, price, fee = _dual(errors, costs, case)
    priced = _priced(errors, costs, case, price, fee)
    best = priced.min(dim=1, keepdim=True).values
    return priced - best <= (known - bound) + 1e-9 * (known + OBJECTIVE_TOTAL)


def _priced(errors: Tensor, costs: Sequence[int], case: Case, price: float, fee: float) -> Tensor:
    cost = torch.tensor(costs, dtype=torch.float64)
    return (errors + fee * case.kept) + price * cost  # in `_price`'s order: it is a price at a tie


def _dual(errors: Tensor, costs: Sequence[int], case: Case) -> tuple[float, float, float]:
    """(lower bound of all plans of a case, the price and the fee that give it)."""
    def at(fee: float) -> tuple[float, int]:
        """The price, and the components that are kept at both."""
        price = _price(errors + fee * case.kept, costs, case.budget)
        cheapest = _priced(errors, costs, case, price, fee).argmin(dim=1)
        return price, int(case.kept[cheapest].sum())

    fee = 0.0
    price, count = at(fee)
    if count > case.components:
        low, high = 0.0, 1.0
        while at(high)[1] > case.components:
            low, high = high, 2.0 * high
        for _ in range(FEE_HALVINGS):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if at(middle)[1] > case.components else (low, middle)
        fee = high
        price, _ = at(fee)
    cheapest = _priced(errors, costs, case, price, fee).min(dim=1).values.sum().item()
    return cheapest - price * case.budget - fee * case.components, price, fee


def _price(errors: Tensor, costs: Sequence[int], budget: int) -> float:
    """The least price (to 100 halvings) at which the cheapest choices keep to the budget."""
    cost = torch.tensor(costs, dtype=torch.float64)

    def spent(price: float) -> float:
        return cost[(errors + price * cost).argmin(dim=1)].sum().item()

    low, high = 0.0, 1.0
    while spent(high) > budget:
        low, high = high, 2.0 * high
    for _ in range(100):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if spent(middle) > budget else (low, middle)
    return high


def _greedy(errors: Tensor, costs: Sequence[int], case: Case) -> Tensor | None:
    """A good plan: the cheapest choices at the case's price, then what lowers the error most; None
    where that is none of the case's."""
    cost = torch.tensor(costs, dtype=torch.float64)
    _, price, fee = _dual(errors, costs, case)
    plan = _priced(errors, costs, case, price, fee).argmin(dim=1)
    while True:
        gain = errors.gather(1, plan[:, None]) - errors
        extra = cost[None, :] - cost[plan][:, None]
        gain = torch.where(extra <= case.budget - cost[plan].sum(), gain, -torch.inf)
        component, choice = divmod(int(gain.argmax()), errors.shape[1])
        if not gain[component, choice] > 0:
            spent, kept = cost[plan].sum(), int(case.kept[plan].sum())
            return plan if spent <= case.budget and kept <= case.components else None
        plan[component] = choice


def _error(errors: Tensor, plan: Tensor) -> float:
    return errors.gather(1, plan[:, None]).sum().item()


def _solve(errors: Tensor, is_open: Tensor, rows: Sequence[tuple[Sequence[int], int]],
           max_choices: int | None, solver: str, gap: float = GAP) -> Tensor | None:
    """The integer program over the open choices, whose costs keep to each row's bound; None where
    there is no such plan."""
    rank, choices = errors.shape
    try:
        model = mip.Model(solver_name=mip.HIGHS if solver == "highs" else mip.CBC)
    except (FileNotFoundError, NotImplementedError, NameError) as error:
        raise SolverError(f"python-mip cannot load the solver {solver} (highs needs highspy below "
                          f"1.16, cbc cbcbox): {reason(error)}") from error
    model.verbose, model.threads, model.max_mip_gap, model.seed = 0, 1, gap, 0
    S = [{k: model.add_var(var_type=mip.BINARY, obj=row[k]) for k in range(choices) if allowed[k]}
         for row, allowed in zip(errors.tolist(), is_open.tolist(), strict=True)]
    for row in S:
        model += mip.xsum(row.values()) == 1
    for costs, budget in rows:
        model += mip.xsum(costs[k] * x for row in S for k, x in row.items() if costs[k]) <= budget
    if max_choices is not None:
        used = [model.add_var(var_type=mip.BINARY) for _ in range(choices)]
        model += mip.xsum(used) <= max_choices
        for k in range(choices):
            model += mip.xsum(row[k] for row in S if k in row) <= rank * used[k]
    with CBC_ALONE if solver == "cbc" else nullcontext():
        status = model.optimize()
    if status in (mip.OptimizationStatus.INFEASIBLE, mip.OptimizationStatus.INT_INFEASIBLE):
        return None
    if status != mip.OptimizationStatus.OPTIMAL:
        raise RuntimeError(f"the allocation's solver ({solver}) stopped with {status.name}")
    return torch.tensor([max(row, key=lambda k: row[k].x) for row in S])
