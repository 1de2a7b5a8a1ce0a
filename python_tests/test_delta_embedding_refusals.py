"""Bad arguments of delta_embedding and delta_embedding_: one sentence, and y as it was before."""

import pytest
import torch
from bank import MIXED, as_slots, make_bank

from adamix import ops  # noqa: F401  registers the operators

REFUSALS = [
    ({"tokens": lambda t: t.float()}, "tokens must be int32 or int64, got float32"),
    ({"tokens": lambda t: t[None]}, r"tokens must have 1 dimensions, \[tokens\], got \[1, 3\]"),
    ({"arena": lambda t: t.float()}, "arena must be int32, got float32"),
    ({"table": lambda t: t.int()}, "table must be int64, got int32"),
    ({"table": lambda t: t[:, :11]}, r"table must be 19 .* got shape \[2, 11\]"),
    ({"table": lambda t: t + (torch.arange(19) == 18)}, "row 0 has 26 lanes of V and 27 of U"),
    ({"slots": lambda t: t.long()}, "slots must be int32, got int64"),
    ({"slots": lambda t: t[:2]}, r"slots must be 3 \(tokens\) in dimension 0, got shape \[2\]"),
    ({"vocab_size": -1}, r"vocab_size must be 0\.\.2147483647, got -1"),
    ({"vocab_size": 2**31}, r"vocab_size must be 0\.\.2147483647, got 2147483648"),
    ({"max_rank": -1}, "max_rank must not be negative, got -1"),
    ({"max_rank": 3}, "table row 0 has 26 components, more than max_rank, 3 .*vocab_size and hid"),
    ({"vocab_size": 5000}, "table row 0 does not fit: .* vocab_size 5000 and hidden_size 45, lead"),
    ({"arena": lambda t: t[:-1500]}, "table row 0 does not fit: .* the arena of"),
    ({"table": lambda t: t - 2**62}, "table row 0 does not fit"),
    ({"hidden_size": -1}, "hidden_size must not be negative, got -1"),
    ({"hidden_size": 3000}, "table row 0 does not fit: .* vocab_size 40 and hidden_size 3000"),
    ({"dtype": torch.float64}, "dtype must be float16, bfloat16 or float32, got float64"),
    ({"y": lambda t: t.double()}, "y must be float16, bfloat16 or float32, got float64"),
    ({"y": lambda t: t[0]}, r"y must have 2 dimensions, \[tokens, hidden_size\], got \[45\]"),
    ({"y": lambda t: t[:2]}, r"y must be 3 \(tokens\) in dimension 0, got shape \[2, 45\]"),
    ({"y": lambda t: t.T.contiguous().T}, r"y must have adjacent .*got stride 3"),
    ({"y": lambda t: t[:1].expand(3, 45)}, "rows of y must not overlap: .*got 0"),
]


@pytest.mark.parametrize(("changes", "words"), REFUSALS)
def test_a_mistake_gets_a_sentence(changes, words):
    bank = make_bank(40, 45, [MIXED, {}])
    args = {"y": torch.zeros(3, 45), "tokens": torch.tensor([0, 1, 2]), "arena": bank.arena,
            "table": bank.table, "slots": as_slots([0, 1, -1], "cpu")}  # fmt: skip
    args |= {"vocab_size": 40, "hidden_size": 45, "dtype": torch.float32, "max_rank": None}
    for name, change in changes.items():
        args[name] = change(args[name]) if callable(change) else change
    foreign = {"delta_embedding": {"y"}, "delta_embedding_": {"hidden_size", "dtype"}}
    for operator, others in foreign.items():
        if not set(changes) & others:
            own = {name: value for name, value in args.items() if name not in others}
            with pytest.raises(RuntimeError, match=f"^{operator}: .*{words}"):
                getattr(torch.ops.adamix, operator)(**own)
    assert args["y"].count_nonzero() == 0
