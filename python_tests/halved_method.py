"""A method for the tests of by_method, whose processes import it from here."""

from types import SimpleNamespace

from torch import Tensor


def halved(delta: Tensor, gram: Tensor, budget_bits: int) -> SimpleNamespace:
    """Half of ΔW, in all the bits that it may take."""
    assert gram.shape == (delta.shape[1],) * 2 and budget_bits > 0
    return SimpleNamespace(dense=delta / 2, bits=budget_bits)


def none_so_small(delta: Tensor, gram: Tensor, budget_bits: int) -> None:
    return None


def too_large(delta: Tensor, gram: Tensor, budget_bits: int) -> SimpleNamespace:
    return SimpleNamespace(dense=delta, bits=budget_bits + 1)


def failing(delta: Tensor, gram: Tensor, budget_bits: int) -> None:
    raise KeyError("no such thing")
