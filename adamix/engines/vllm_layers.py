"""What stands before vLLM's LoRA classes of layers: the delta in place of A and B.

vLLM's classes keep their collectives and their rules of when they replace a layer, those of linear
layers also their forward passes. Their own A and B, of rank 1, stay empty: vLLM takes shapes from
them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from adamix import ops
from adamix.artifacts import PackedDelta
from adamix.engines.sharding import part_of

LINEAR = ("MergedQKVParallelLinearWithLoRA", "MergedColumnParallelLinearWithLoRA",
          "QKVParallelLinearWithLoRA", "ColumnParallelLinearWithLoRA",
          "RowParallelLinearWithLoRA", "ReplicatedLinearWithLoRA")
EMBEDDING, LOGITS = "VocabParallelEmbeddingWithLoRA", "LogitsProcessorWithLoRA"


class Segments(Protocol):
    """What vLLM's GPU wrapper says of a batch's tokens, rewritten in place before each step."""

    token_indices_sorted_by_lora_ids: Tensor  # int32 [tokens]
    num_tokens_per_lora: Tensor  # int32 [slots + 1]
    lora_token_start_loc: Tensor  # int32 [slots + 2]
    active_lora_ids: Tensor  # int32 [slots + 1]: slots, -1 for the base and for what is unused
    no_lora_flag_cpu: Tensor  # bool [1], on the host: whether all tokens are the base's


@torch.library.custom_op(
    "adamix_vllm::add_segments", mutates_args=("ys",),
    schema="(Tensor(a!)[] ys, Tensor x, Tensor arena, Tensor[] tables, Tensor token_indices, "
           "Tensor token_counts, Tensor token_starts, Tensor segment_slots, Tensor no_delta, "
           "int max_rank) -> ()")
def _add_segments(ys: list[Tensor], x: Tensor, arena: Tensor, tables: list[Tensor],
                  token_indices: Tensor, token_counts: Tensor, token_starts: Tensor,
                  segment_slots: Tensor, no_delta: Tensor, max_rank: int) -> None:
    """`ops.delta_gemm_segments_`, or nothing where the flag on the host says so.

    An operator of its own, since compilers do not look into it: the flag is read when a step runs
    or a graph is captured, so the graphs that vLLM keeps for the base alone hold no kernel of ours.
    """
    if not no_delta.item():
        ops.delta_gemm_segments_(ys, x, arena, tables, token_indices, token_counts, token_starts,
                                 segment_slots, max_rank=max_rank)


@_add_segments.register_fake
def _(*_: object) -> None:
    pass


@dataclass(frozen=True)
class LayerSite:
    """Where a layer's deltas are."""

    arena: Tensor  # int32 [words]
    tables: list[Tensor]  # int64 [slots, TABLE_COLUMNS] each; q, k and v, say
    max_rank: int
    segments: Segments | None  # None on the CPU
    token_slots: Tensor  # int64 [tokens]: what there is on the CPU; of an output head, [rows]

    def add(self, ys: tuple[Tensor, ...], x: Tensor) -> None:
        """Add every token's delta to `ys`, `[.., tokens, out]` each; `x [.., tokens, in]`."""
        tokens = math.prod(x.shape[:-1])
        if self.segments is None:
            ops.delta_gemm_layers_(ys, x, self.arena, self.tables, self.slots_of(tokens),
                                   max_rank=self.max_rank)
            return
        meta = self.segments
        _add_segments(list(ys), x, self.arena, self.tables,
                      meta.token_indices_sorted_by_lora_ids[:tokens], meta.num_tokens_per_lora,
                      meta.lora_token_start_loc, meta.active_lora_ids, meta.no_lora_flag_cpu,
                      self.max_rank)

    def slots_of(self, tokens: int) -> Tensor:
        """Each token's slot, int32 `[tokens]`."""
        return self.token_slots[:tokens].to(torch.int32)


@dataclass(frozen=True)
class Sizes:
    """Of one matrix of a layer, as (out, in)."""

    part: tuple[int, int]  # that this worker has
    whole: tuple[int, int]  # or a little more, where workers share heads


class DeltaLayer(nn.Module):
    """Stands before one of vLLM's classes; without a site it is the base's layer."""

    _site: LayerSite | None

    def create_lora_weights(self, max_loras: int, lora_config: object,
                            model_config: object = None) -> None:
        super().create_lora_weights(max_loras, lora_config, model_config)
        self._site = None

    def install(self, site: LayerSite) -> None:
        """Where the deltas are, once all layers are known."""
        self._site = site

    def sizes(self) -> list[Sizes]:
        """Of the layer's matrices, in order."""
        raise NotImplementedError

    def part_of(self, packed: PackedDelta, index: int) -> PackedDelta:
        """What this worker has of the delta to the layer's matrix `index`."""
        return packed


class DeltaLinear(DeltaLayer):
    """A linear layer, or several on one input."""

    def sizes(self) -> list[Sizes]:
        base, several = self.base_layer, len(self.output_slices) > 1
        wholes = base.output_sizes if several else (base.output_size,)
        return [Sizes((out, self.input_size), (whole, base.input_size))
                for out, whole in zip(self.output_slices, wholes, strict=True)]

    def part_of(self, packed: PackedDelta, index: int) -> PackedDelta:
        """vLLM's own rule says which rows and columns: it is asked to slice their numbers."""
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
        if self._site is not None:
            self._site.add(output.split(self.output_slices, dim=-1), x)
        return output


class DeltaEmbedding(DeltaLayer):
    """The embedding; every worker adds whole rows to what the workers have gathered."""

    def sizes(self) -> list[Sizes]:
        shape = self.base_layer.org_vocab_size, self.base_layer.embedding_dim
        return [Sizes(shape, shape)]

    def forward(self, x: Tensor) -> Tensor:
        y, site = self.base_layer.forward(x), self._site
        if site is not None:
            ops.delta_embedding_(y, x, site.arena, site.tables[0], site.slots_of(x.numel()),
                                 vocab_size=self.base_layer.org_vocab_size, max_rank=site.max_rank)
        return y


class DeltaLogits(DeltaLayer):
    """The output head, as vLLM has it: where logits are computed and gathered."""

    def sizes(self) -> list[Sizes]:
        shape = self.base_layer.org_vocab_size, self.hidden_size
        return [Sizes(shape, shape)]

    def _get_logits(self, hidden_states: Tensor, *others: object) -> Tensor | None:
        logits, site = super()._get_logits(hidden_states, *others), self._site
        if logits is not None and site is not None:
            site.add((logits[..., : self.base_layer.org_vocab_size],),
                     hidden_states.to(logits.dtype))
        return logits


def delta_classes(stock: object) -> tuple[type[nn.Module], ...]:
    """Classes of the module `vllm.lora.layers` with ours before them, as vLLM is to ask them."""
    layers = [(name, DeltaLinear) for name in LINEAR] + [(EMBEDDING, DeltaEmbedding)]
    return tuple(_delta_class(stock, name, before) for name, before in layers)


def delta_logits(stock: object) -> type[nn.Module]:
    """The class that vLLM makes of an output head, with ours before it."""
    return _delta_class(stock, LOGITS, DeltaLogits)


def _delta_class(stock: object, name: str, before: type[DeltaLayer]) -> type[nn.Module]:
    return type(f"Delta{name}", (before, getattr(stock, name)), {})
