"""What stands before vLLM's LoRA classes of linear layers: the delta in place of A and B.

vLLM's classes keep their forward passes, collectives and rules of when they replace a layer. Their
own A and B, of rank 1, stay empty: vLLM takes shapes from them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from adamix import ops
from adamix.artifacts import PackedDelta
from adamix.engines.sharding import part_of

CLASSES = ("MergedQKVParallelLinearWithLoRA", "MergedColumnParallelLinearWithLoRA",
           "QKVParallelLinearWithLoRA", "ColumnParallelLinearWithLoRA",
           "RowParallelLinearWithLoRA", "ReplicatedLinearWithLoRA")


class Segments(Protocol):
    """What vLLM's GPU wrapper says of a batch's tokens, rewritten in place before each step."""

    token_indices_sorted_by_lora_ids: Tensor  # int32 [tokens]
    num_tokens_per_lora: Tensor  # int32 [slots + 1]
    lora_token_start_loc: Tensor  # int32 [slots + 2]
    active_lora_ids: Tensor  # int32 [slots + 1]: slots, -1 for the base and for what is unused


@dataclass(frozen=True)
class LayerSite:
    """Where a layer's deltas are."""

    arena: Tensor  # int32 [words]
    tables: list[Tensor]  # int64 [slots, TABLE_COLUMNS] each; q, k and v, say
    max_rank: int
    segments: Segments | None  # None on the CPU
    token_slots: Tensor  # int64 [tokens]: what there is instead on the CPU

    def add(self, ys: tuple[Tensor, ...], x: Tensor) -> None:
        """Add every token's delta to `ys`, `[.., tokens, out]` each; `x [.., tokens, in]`."""
        tokens = x.numel() // x.shape[-1]
        if self.segments is None:
            slots = self.token_slots[:tokens].to(torch.int32)
            ops.delta_gemm_layers_(ys, x, self.arena, self.tables, slots, max_rank=self.max_rank)
            return
        ops.delta_gemm_segments_(
            ys, x, self.arena, self.tables,
            self.segments.token_indices_sorted_by_lora_ids[:tokens],
            self.segments.num_tokens_per_lora, self.segments.lora_token_start_loc,
            self.segments.active_lora_ids, max_rank=self.max_rank)


class DeltaLinear(nn.Module):
    """Stands before one of vLLM's classes; without a site it is the base's layer."""

    _site: LayerSite | None

    def create_lora_weights(self, max_loras: int, lora_config: object,
                            model_config: object = None) -> None:
        super().create_lora_weights(max_loras, lora_config, model_config)
        self._site = None

    def install(self, site: LayerSite) -> None:
        """Where the deltas are, once all layers are known."""
        self._site = site

    def part_of(self, packed: PackedDelta, index: int) -> PackedDelta:
        """What this worker has of the delta to the layer's matrix `index`.

        vLLM's own rule says which rows and columns: it is asked to slice their numbers.
        """
        if self.tp_size == 1:
            return packed
        out, n = packed.shape
        rows, columns = torch.arange(out)[:, None], torch.arange(n)[None]
        if len(self.output_slices) == 1:
            return part_of(packed, self.slice_lora_b(rows)[:, 0], self.slice_lora_a(columns)[0])
        several_rows: list[Tensor | None] = [None] * len(self.output_slices)
        several_columns = list(several_rows)
        several_rows[index], several_columns[index] = rows, columns
        return part_of(packed, self.slice_lora_b(several_rows)[index][:, 0],
                       self.slice_lora_a(several_columns)[index][0])

    def _apply_lora_to_output(self, x: Tensor, output: Tensor) -> Tensor:
        if self._site is not None and x.numel():
            self._site.add(output.split(self.output_slices, dim=-1), x)
        return output


def delta_classes(stock: object) -> tuple[type[nn.Module], ...]:
    """The classes above of the module `vllm.lora.layers`, each with DeltaLinear before it."""
    return tuple(type(f"Delta{name}", (DeltaLinear, getattr(stock, name)), {}) for name in CLASSES)
