"""The plan of least error by dynamic programming over the few choices that it can differ in.

A component's row and column that have a width each cost two kinds of steps, and what is left of the
budget by a plan of cheapest choices can nearly always be filled by a mixture of both. Which mixture
loses least is a question of hundreds of components with errors that differ little: branch and bound
takes minutes for it, a table of the least loss at every cost a fraction of a second.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MOST_ENTRIES = 2**26  # of a table with a byte for each component and cost
GROWTH = 2.0  # of the excess, from table to table
GRID = 128


@dataclass(frozen=True)
class Deviations:
    """What choices other than each component's cheapest at a price lose, and cost more or less."""

    start: Tensor  # [rank] int64: the cheapest choices
    loss: Tensor  # [rank, choices] fp64, >= 0: of errors + price · cost; 0 at the start
    change: Tensor  # [rank, choices] int64
    slack: int  # of the budget that the start leaves
    price: float


def best_plan(errors: Tensor, costs: Tensor, budget: int, price: float, within: float,
              known: float) -> tuple[Tensor | None, bool]:
    """The plan of least summed error, if that is below the known one.

    With E + price · cost for the errors the cheapest choices bound every plan from below; a plan is
    above that bound by what its other choices lose, and by the price of what it leaves of the
    budget. Tables hold the plans up to some excess over the bound, which grows until there is one.

    Args:
        errors: `[rank, choices]` fp64.
        costs: `[choices]` int64.
        budget: of the summed costs.
        price: for a unit of cost, > 0, at which the cheapest choices keep to the budget.
        within: the excess to begin with, > 0.
        known: summed error of a plan.

    Returns:
        (plan `[rank]` int64, or None where none is better than the known one; whether that is
        certain: a table that would be too large is cut).
    """
    found = deviations(errors, costs, budget, price)
    bound = (errors.gather(1, found.start[:, None]).sum() - price * found.slack).item()
    limit, best = within, None
    while True:
        limit = min(limit, known - bound)
        plan, is_whole = plan_within(found, limit)
        if is_whole and (plan is not None or limit >= known - bound):
            return plan if best is None or plan is not None else best, True
        if not is_whole and plan is not None:  # then a smaller table may do to make sure of it
            error = errors.gather(1, plan[:, None]).sum().item()
            if error >= known:
                return best, False
            best, known = plan, error
        elif limit >= known - bound:
            return best, False
        else:
            limit *= GROWTH


def deviations(errors: Tensor, costs: Tensor, budget: int, price: float) -> Deviations:
    """From the cheapest choices at a price."""
    priced = errors + price * costs.double()
    start = priced.argmin(dim=1)
    return Deviations(start, priced - priced.gather(1, start[:, None]),
                      costs[None, :] - costs[start][:, None], budget - int(costs[start].sum()),
                      price)


def plan_within(found: Deviations, limit: float) -> tuple[Tensor | None, bool]:
    """The plan of least excess, if that is within the limit; whether no table was cut."""
    is_open = found.loss <= limit
    is_open.scatter_(1, found.start[:, None], False)
    components = torch.nonzero(is_open.any(dim=1))[:, 0]
    down, up = _window(found.change[is_open], found.loss[is_open], found, limit)
    most = MOST_ENTRIES // (2 * max(len(components), 1))
    is_whole = max(up, down) <= most
    up, down = min(up, most), min(down, most)
    least = torch.full((up + down + 1,), torch.inf, dtype=torch.float64)
    least[down] = 0.0  # entry down + c: plans that cost c more than the start
    tables = []
    for i in components.tolist():
        least, taken = _with_component(least, found, i, is_open[i], limit)
        tables.append(taken)
    cost = torch.arange(-down, up + 1)
    excess = torch.where(cost <= found.slack, least + found.price * (found.slack - cost), torch.inf)
    at = int(excess.argmin())
    if not excess[at] <= limit:
        return None, is_whole
    plan = found.start.clone()
    for i, taken in zip(reversed(components.tolist()), reversed(tables), strict=True):
        plan[i] = k = int(taken[at])
        at -= int(found.change[i, k])
    return plan, is_whole


def _with_component(least: Tensor, found: Deviations, i: int, is_open: Tensor, limit: float
                    ) -> tuple[Tensor, Tensor]:
    """(the table with component i's other choices, its choice at each cost)."""
    result = least.clone()
    taken = torch.full(least.shape, int(found.start[i]), dtype=torch.uint8)
    for k in torch.nonzero(is_open)[:, 0].tolist():
        shift = int(found.change[i, k])
        if abs(shift) >= len(least):
            continue
        source = least[max(-shift, 0):len(least) - max(shift, 0)] + found.loss[i, k]
        here = slice(max(shift, 0), max(shift, 0) + len(source))
        is_less = (source < result[here]) & (source <= limit)
        taken[here].masked_fill_(is_less, k)
        result[here] = torch.where(is_less, source, result[here])
    return result, taken


def _window(change: Tensor, loss: Tensor, found: Deviations, limit: float) -> tuple[int, int]:
    """How far below and above the start's cost the parts of a plan within the limit can come.

    What adds to the cost and what lowers it share the limit on what they lose, and in the end they
    differ by at most the slack, and by no less than leaves the price of the rest within the limit.
    """
    shares = limit * torch.linspace(0, 1, GRID + 1, dtype=torch.float64)
    up, most_up = _reach(change, loss, shares)
    down, most_down = _reach(-change, loss, shares)
    unspent = limit / found.price
    rises = int((up <= most_down.flip(0) + found.slack).sum())
    falls = int((down <= most_up.flip(0) - found.slack + unspent).sum())
    return int(most_down[min(falls, GRID)]), int(most_up[min(rises, GRID)])


def _reach(change: Tensor, loss: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
    """What choices that lose no more than each limit in all can add to the cost, of the fractional
    knapsack (from below, from above)."""
    change, loss = change[change > 0], loss[change > 0]
    order = (loss / change).argsort()
    sums = torch.cat([change.new_zeros(1), change[order].cumsum(dim=0)])
    count = torch.searchsorted(loss[order].cumsum(dim=0), limits, right=True)
    return sums[count], sums[(count + 1).clamp(max=len(change))]
