"""A tiny base and delta folders of it for engine tests: random numbers, in fp32."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from routed_models import no_manifest, random_packed
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from adamix.artifacts import ModelDelta
from adamix.naming import group_by_kind, write_indices
from adamix.source.checkpoints import Checkpoint, fingerprint_of
from adamix.storage.file import write_delta

VOCABULARY = 96


def write_base(folder: Path, *, seed: int = 0, tied: bool = False, kv_heads: int = 2
               ) -> PreTrainedModel:
    """A Llama with heads of 32, which vLLM computes on the CPU; grouped queries."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=192, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=kv_heads, max_position_embeddings=128,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=tied)
    model = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        parameter.data = 1 + 0.1 * values if "norm" in name else 0.08 * values
    model.save_pretrained(folder)
    return model


def write_finetune(base: PreTrainedModel, base_folder: Path, folder: Path, seed: int, *,
                   norms: bool = False) -> None:
    """A delta of every matrix, with `norms` of every norm too."""
    generator = torch.Generator().manual_seed(seed)
    matrices, whole, equal = {}, {}, []
    for name, parameter in base.named_parameters():
        if parameter.dim() == 2:
            matrices[name] = random_packed(tuple(parameter.shape), generator)
        elif norms:
            whole[name] = parameter.data + 0.05 * torch.randn(parameter.shape, generator=generator)
        else:
            equal.append(name)
    manifest = replace(
        no_manifest(), base=str(base_folder), finetuned="random",
        fingerprint=fingerprint_of(Checkpoint(base_folder), full=True),
        compressed={kind: (*matrices[names[0]].shape, write_indices(kind, names)) for kind, names
                    in group_by_kind({n: m.shape for n, m in matrices.items()}).items()},
        whole=_kinds(whole), equal=_kinds(dict.fromkeys(equal)),
        tied=["lm_head.weight"] if base.config.tie_word_embeddings else [])
    folder.mkdir()
    write_delta(ModelDelta(matrices, whole, {}, manifest), folder)
    base.config.save_pretrained(folder)


def _kinds(tensors: dict[str, torch.Tensor | None]) -> dict[str, str]:
    groups = group_by_kind(dict.fromkeys(tensors))
    return {kind: write_indices(kind, names) for kind, names in groups.items()}
