"""Tiny random models of many architectures, and fine-tunes of them made of random numbers."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from adamix.artifacts import Manifest, ModelDelta, PackedDelta
from adamix.panels import pack_factor

VOCABULARY = 96
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96,
         "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
         "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# model_type -> what its config needs beside the sizes
ARCHITECTURES: dict[str, dict[str, object]] = {
    "llama": {},
    "qwen2": {},  # biases of q, k and v
    "qwen3": {},  # norms of q and k by head
    "mistral": {"sliding_window": None},
    "gemma2": {"query_pre_attn_scalar": 16},  # scaled embedding, tied head, weights added to 1
    "gemma3_text": {"query_pre_attn_scalar": 16},  # norms of q and k behind a transposition
    "phi3": {},  # q, k and v in one layer
    "gpt_neox": {},  # LayerNorms with biases, biases everywhere
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64, "do_layer_norm_before": True},
    "starcoder2": {},
    "olmo2": {},
    "cohere": {},  # one norm before attention and MLP, which share its output
    "stablelm": {},
}


def random_model(architecture: str, seed: int = 0) -> PreTrainedModel:
    """In fp32 and eval mode; every parameter random, so that nothing is 0 or 1 by default."""
    config = AutoConfig.for_model(architecture, **(SIZES | ARCHITECTURES[architecture]))
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        parameter.data = 0.1 * values + (1.0 if "norm" in name and "weight" in name else 0.0)
    return model


def random_finetune(model: PreTrainedModel, seed: int, *, share: float = 1.0
                    ) -> tuple[ModelDelta, PreTrainedModel]:
    """A delta of every linear layer, embedding, norm and bias, and the model merged with it.

    `share` of the parameters change, the others are the base's.
    """
    generator = torch.Generator().manual_seed(seed)
    merged = copy.deepcopy(model)
    matrices: dict[str, PackedDelta] = {}
    whole: dict[str, Tensor] = {}
    matrix_names = {f"{n}.weight" for n, m in model.named_modules()
                    if isinstance(m, nn.Linear) or m is model.get_input_embeddings()}
    for name, parameter in merged.named_parameters():
        if torch.rand(1, generator=generator) >= share:
            continue
        if name in matrix_names:
            matrices[name] = random_packed(tuple(parameter.shape), generator)
            parameter.data += matrices[name].dequantize()
        elif parameter.dim() == 1:
            change = 0.05 * torch.randn(parameter.shape, generator=generator)
            parameter.data += change
            whole[name] = parameter.data.clone()
    return ModelDelta(matrices, whole, {}, no_manifest()), merged


def random_packed(shape: tuple[int, int], generator: torch.Generator) -> PackedDelta:
    """A few components of several widths, about as large as the weights above."""
    out, n = shape
    counts = torch.randint(0, 3, (8,), generator=generator).tolist()
    counts[5] += 1  # none is empty
    words, scales = [], []
    for length in (n, out):
        codes = torch.cat([torch.randint(0, 2**bits, (count, length), generator=generator)
                           for bits, count in zip(range(8, 0, -1), counts, strict=True)])
        words.append(pack_factor(codes.to(torch.uint8), counts))
    for bits, count in zip(range(8, 0, -1), counts, strict=True):
        scales.append(0.02 / 4**bits * (0.5 + torch.rand(count, generator=generator)))
    return PackedDelta(torch.cat(words), torch.cat(scales), tuple(counts), shape)


def no_manifest() -> Manifest:
    """For deltas that were never on a disk: attach with `verify=None`."""
    return Manifest(base="", finetuned="", dtype="float32", fingerprint={}, config={},
                    calibration={}, compressed={}, whole={}, extra_rows=[], tied=[], equal={},
                    absent=[])
