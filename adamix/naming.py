"""Kinds of layer: names of tensors with their layer numbers taken out, and back again."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping

RUN = re.compile(r"(?P<leading>(\d+\.)*)(?P<first>\d+)(-(?P<last>\d+))?", re.ASCII)


def kind_of(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` -> `model.layers.*.mlp.up_proj.weight`."""
    return ".".join("*" if _is_number(part) else part for part in name.split("."))


def index_of(name: str) -> tuple[int, ...]:
    """The numbers in a name, in order: `model.layers.3.mlp.up_proj.weight` -> `(3,)`."""
    return tuple(int(part) for part in name.split(".") if _is_number(part))


def _is_number(part: str) -> bool:
    """A number as it would be written again: not `01`."""
    return part.isascii() and part.isdigit() and str(int(part)) == part


def name_of(kind: str, index: tuple[int, ...]) -> str:
    """The inverse of `kind_of` and `index_of`."""
    numbers = iter(index)
    return ".".join(str(next(numbers)) if part == "*" else part for part in kind.split("."))


def group_by_kind(traits: Mapping[str, Hashable]) -> dict[str, list[str]]:
    """{kind: its names in the order of their numbers}, kinds in the order of their first name.

    Only names with equal traits (shape, dtype) can be stacked: where a kind's differ, each of its
    names is a kind of its own.
    """
    groups: dict[str, list[str]] = {}
    for name in traits:
        groups.setdefault(kind_of(name), []).append(name)
    stacked: dict[str, list[str]] = {}
    for kind, names in groups.items():
        if len({traits[name] for name in names}) == 1:
            stacked[kind] = sorted(names, key=index_of)
        else:
            stacked.update({name: [name] for name in sorted(names, key=index_of)})
    return stacked


def write_indices(kind: str, names: list[str]) -> str:
    """The numbers of a kind's names as text: `0-27`, or `0.0-7 1.0-7` with two numbers each.

    A kind without "*" has one name and gives the empty text.
    """
    if "*" not in kind.split("."):
        return ""
    runs: list[tuple[tuple[int, ...], int, int]] = []  # (leading numbers, first, last)
    for index in map(index_of, names):
        *leading, last = index
        if runs and runs[-1][0] == tuple(leading) and runs[-1][2] == last - 1:
            runs[-1] = (runs[-1][0], runs[-1][1], last)
        else:
            runs.append((tuple(leading), last, last))
    return " ".join(
        ".".join([*map(str, leading), str(first) if first == last else f"{first}-{last}"])
        for leading, first, last in runs)


def read_indices(kind: str, text: str) -> list[str]:
    """The names that `write_indices` wrote.

    Raises:
        ValueError: text that it could not have written.
    """
    if "*" not in kind.split("."):
        return [kind]
    names = []
    for run in text.split():
        found = RUN.fullmatch(run)
        leading = tuple(map(int, found["leading"].split(".")[:-1])) if found else ()
        first = int(found["first"]) if found else 0
        last = int(found["last"] or first) if found else -1
        if last < first or len(leading) + 1 != kind.split(".").count("*"):
            raise ValueError(f"{run!r} does not number {kind}")
        names += [name_of(kind, (*leading, i)) for i in range(first, last + 1)]
    return names
