"""Errors, costs, budget -> the width of every component: the paper's 0/1 integer linear program."""

from __future__ import annotations

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
        errors: E `[rank, choices]`, error of component i under choice k; >= 0.
        costs: bits that a component takes under each choice, the same for all components.
        budget: bits in all.
        max_choices: at most this many different choices in use (f_max), None for no limit.
        solver: "highs" or "cbc".

    Returns:
        `[rank]` int64, the choice of each component. The same inputs give the same plan, and the
        errors' unit does not matter.

    Raises:
        RuntimeError: the solver found no optimal plan.
    """
    rank, choices = errors.shape
    total = errors.amax(dim=1).sum().item()
    if rank == 0 or not total > 0:
        return torch.full((rank,), min(range(choices), key=costs.__getitem__), dtype=torch.long)
    scaled = (errors.double() * (OBJECTIVE_TOTAL / total)).tolist()

    model = mip.Model(solver_name=mip.HIGHS if solver == "highs" else mip.CBC)
    model.verbose, model.threads, model.max_mip_gap, model.seed = 0, 1, GAP, 0
    S = [[model.add_var(var_type=mip.BINARY, obj=error) for error in row] for row in scaled]
    for row in S:
        model += mip.xsum(row) == 1
    unit = max(costs)  # in units of the largest cost: the budget row's coefficients are within [0, 1]
    model += mip.xsum(cost / unit * x for row in S for cost, x in zip(costs, row, strict=True)
                      if cost) <= budget / unit
    if max_choices is not None:
        used = [model.add_var(var_type=mip.BINARY) for _ in range(choices)]
        model += mip.xsum(used) <= max_choices
        for k in range(choices):
            model += mip.xsum(row[k] for row in S) <= rank * used[k]
    status = model.optimize()
    if status != mip.OptimizationStatus.OPTIMAL:
        raise RuntimeError(f"the allocation's solver ({solver}) stopped with {status.name}")
    return torch.tensor([max(range(choices), key=lambda k: row[k].x) for row in S])
