"""A ratio or bits a weight -> the bits of each matrix, with everything in the file counted."""

from __future__ import annotations

from dataclasses import dataclass

from adamix import ops
from adamix.artifacts import Manifest
from adamix.compression.matrix import component_bits
from adamix.config import MODEL_BITS, Config
from adamix.errors import BudgetError
from adamix.naming import group_by_kind
from adamix.source.targets import Survey, Target, Treatment
from adamix.storage.file import header_bytes, manifest_text

COUNTS_BYTES = 4 * 2 * ops.MAX_BITS  # the table row of a matrix


@dataclass(frozen=True)
class Budget:
    """What a delta may take."""

    bytes_16bit: int  # of all tensors that differ
    bits: dict[str, int]  # words and scales of each matrix


def plan_budget(found: Survey, manifest: Manifest, config: Config) -> Budget:
    """Give every compressed matrix the same bits a weight.

    With a ratio: the 16-bit bytes of all tensors that differ, over the ratio, less the config file,
    the header, the tensors kept whole and the counts, is what the matrices share.

    Raises:
        BudgetError: nothing is left for the matrices, or one of them gets less than one component.
    """
    matrices = found.of(Treatment.LINEAR, Treatment.EMBEDDING)
    others = found.of(Treatment.WHOLE)
    grown = [t for t in found.targets if t.extra_rows]
    extra = sum(t.extra_numel * t.dtype.itemsize for t in grown)
    weights = sum(t.numel for t in matrices)
    bytes_16bit = MODEL_BITS // 8 * (sum(t.numel for t in (*matrices, *others))
                                     + sum(t.extra_numel for t in grown))
    if bytes_16bit == 0 and config.ratio is not None:
        raise BudgetError("the models do not differ: there is nothing to compress")
    if config.ratio is None:
        shares = {t.name: config.budget_bits(t.shape) - 8 * COUNTS_BYTES for t in matrices}
    else:
        total = int(bytes_16bit / config.ratio)
        fixed = (sum(t.numel * t.dtype.itemsize for t in others) + extra
                 + COUNTS_BYTES * len(matrices) + len(manifest_text(manifest).encode())
                 + header_bytes(_shapes(matrices, others, grown, total), total))
        left = total - fixed
        if left <= 0:
            raise BudgetError(
                f"ratio {config.ratio:g} allows {total} bytes, and the tensors kept whole with the "
                f"header take {fixed}: choose a smaller ratio")
        shares = {t.name: 8 * left * t.numel // weights for t in matrices}
    for target in matrices:
        least = component_bits(target.shape, min(config.bit_widths))
        if shares[target.name] < least:
            raise BudgetError(
                f"{target.name} [{target.shape[0]}, {target.shape[1]}] would get "
                f"{max(shares[target.name], 0)} bits and one component takes {least}: "
                f"choose a smaller ratio or more bits a weight")
    return Budget(bytes_16bit, shares)


def _shapes(matrices: list[Target], others: list[Target], grown: list[Target], total: int
            ) -> dict[str, tuple[int, ...]]:
    """Names and largest possible shapes of the tensors in the file."""
    shapes: dict[str, tuple[int, ...]] = {}
    for kind, names in group_by_kind({t.name: t.shape for t in matrices}).items():
        shapes |= {f"{kind}.words": (total,), f"{kind}.scales": (total,),
                   f"{kind}.counts": (len(names), 2 * ops.MAX_BITS)}
    by_name = {t.name: t for t in others}
    for kind, names in group_by_kind({t.name: (t.shape, t.dtype) for t in others}).items():
        shapes[f"whole:{kind}"] = (len(names), *by_name[names[0]].shape)
    shapes |= {f"rows:{t.name}": (t.extra_rows, t.shape[1]) for t in grown}
    return shapes
