"""Which slot of the bank every token goes to, in a buffer that stays where it is.

Layers read it on the device, so a captured CUDA graph follows when it is rewritten in place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adamix.errors import BankError

BASE = -1  # a slot that holds nothing; as an index, the last row of a table: the base's
# On the device the base's slot is the one behind all slots: the operators add nothing for it, and
# no other kernel is needed to make an index of it.
MAX_ROWS = 1 << 16
MAX_TABLE_ROWS = 64  # of which all layers' values are gathered at once


class Routing:
    """A slot for each row of a batch, or for each token where a batch is one row of tokens.

    A row's tokens are adjacent when the leading dimensions of an activation are flattened. A batch
    of k times as many rows (beams, several sequences a prompt) has each row k times in turn.

    Args:
        base: what stands for the base on the device: the number of slots. So tables with a row a
            slot have none for it, and in those with one row more, `gather`'s, it is the last.
    """

    def __init__(self, device: torch.device, base: int) -> None:
        self.base = base
        self.slots: Tensor = torch.full((MAX_ROWS,), base, dtype=torch.int32, device=device)
        torch._dynamo.mark_static_address(self.slots)
        self.rows = 1
        self.by_token = False  # whether a row is one token
        self._selected: Tensor | None = None
        self._written = 0  # leading entries that may not be the base's
        # During a forward pass of the model: rows of whole tables, each gathered at most once.
        self._gathered: dict[torch.dtype, Tensor] | None = None

    def write(self, slots: Sequence[int] | Tensor, *, by_token: bool = False) -> None:
        """Route rows, or tokens, in order on the current stream; what follows them is the base's.

        Args:
            slots: of each row or token; BASE or any other below 0 for the base.

        Raises:
            BankError: none, or more than the buffer holds.
        """
        if not 1 <= len(slots) <= MAX_ROWS:
            raise BankError(f"a route has 1..{MAX_ROWS} rows, got {len(slots)}")
        # One copy a batch: it also gives back to the base what the route before has left behind.
        values = torch.full((max(len(slots), self._written),), self.base, dtype=torch.int32,
                            pin_memory=self.slots.is_cuda)
        own = torch.as_tensor(slots, dtype=torch.int32)
        values[: len(slots)] = own.masked_fill(own < 0, self.base)
        self.slots[: len(values)].copy_(values, non_blocking=True)
        self.rows = self._written = len(slots)
        self.by_token, self._selected = by_token, None
        if self._gathered is not None:
            self._gathered = {}

    def select(self, tokens: Tensor | None) -> None:
        """From here on layers get only these of the routed tokens; None: all, as after `write`.

        A model that computes logits of few tokens hands its head no others.

        Args:
            tokens: int `[count]`, their places. Kept, so that a graph follows when it is rewritten.
        """
        self._selected = tokens

    def of(self, count: int) -> Tensor:
        """Slots int32 `[count]` of so many rows or tokens, `base` for the base.

        Raises:
            BankError: they are no multiple of the routed rows, or not those that are selected.
        """
        if self.by_token and self._selected is not None:
            if count != self._selected.numel():
                raise BankError(f"{self._selected.numel()} tokens are selected, got {count}")
            return self.slots.index_select(0, self._selected)
        if self.by_token or count == self.rows:
            return self.slots[:count]
        if count % self.rows != 0:
            raise BankError(f"{self.rows} rows are routed, which {count} rows or tokens are no "
                            f"multiple of: call bank.route with a name for each row of the batch")
        return self.slots[: self.rows].repeat_interleave(count // self.rows)

    def begin_pass(self, *_: object) -> None:
        """A forward pre-hook of the model: until `end_pass`, tables' rows are gathered once."""
        self._gathered = None if torch.compiler.is_compiling() else {}

    def end_pass(self, *_: object) -> None:
        """A forward hook of the model."""
        self._gathered = None

    def gather(self, values: Tensor, like: Tensor, token_dim: int, table: Tensor | None = None,
               begin: int = 0) -> Tensor:
        """Each row's values, shaped to broadcast over an activation.

        Args:
            values: `[slots + 1, n]`, the base's last.
            like: the activation, `[rows, .., n]`; by token `[1, .., n]`.
            token_dim: the dimension of `like` that is its tokens, where a batch is one row.
            table: what `values` are columns of, `[slots + 1, all]`, the only one of its dtype.
            begin: the first of them there.

        Returns:
            `[rows, 1, .., n]`; by token, its tokens in `token_dim`.
        """
        dim = min(token_dim, like.dim() - 2) if self.by_token else 0
        count, columns = like.shape[dim], values.shape[1]
        shape = [1] * like.dim()
        shape[dim], shape[-1] = count, columns
        few = count == self.rows <= MAX_TABLE_ROWS and not self.by_token
        if table is None or self._gathered is None or not few:
            return values.index_select(0, self.of(count)).view(shape)
        if table.dtype not in self._gathered:
            self._gathered[table.dtype] = table.index_select(0, self.of(count))
        return self._gathered[table.dtype][:, begin : begin + columns].view(shape)
