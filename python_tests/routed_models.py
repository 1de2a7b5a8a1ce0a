"""Tiny random models of many architectures, and fine-tunes of them made of random numbers."""

from __future__ import annotations

import copy

import torch
from bank import WIDTHS, other_counts
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

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
    "gpt2": {"n_positions": 64},  # weights stored [in, out]
    "mixtral": {"num_local_experts": 4},  # a checkpoint names experts otherwise than the model
    "qwen2_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48,
                  "shared_expert_intermediate_size": 48},  # a linear layer of one output
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48,
                  "mlp_only_layers": [1]},  # experts in one layer, a dense MLP in the other
    # experts in one tensor, stored [in, out], with biases
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
OTHERS = {"granitemoe": {"num_local_experts": 4}}  # renamed experts in one tensor
TOWER = {"hidden_size": 64, "intermediate_size": 96, "patch_size": 14}
# model_type -> its config: a vision tower before a language model; tokens 90 and up are its own
VISION: dict[str, dict[str, object]] = {
    "llava": {
        "text_config": SIZES | {"model_type": "llama"}, "image_token_index": 95,
        "vision_config": TOWER | {"model_type": "clip_vision_model", "num_hidden_layers": 2,
                                  "num_attention_heads": 4, "image_size": 28}},
    "qwen2_5_vl": {
        "text_config": SIZES | {"rope_parameters": {
            "rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}},
        "vision_config": TOWER | {"depth": 2, "num_heads": 4, "out_hidden_size": 64},
        "image_token_id": 95, "video_token_id": 94, "vision_start_token_id": 93,
        "vision_end_token_id": 92},
}
# model_type -> name of an expert's matrix in a checkpoint, and of the two halves of gate_up_proj
EXPERTS = {"mixtral": ("block_sparse_moe.experts.{}.{}.weight", "w1", "w3", "w2"),
           "qwen2_moe": ("mlp.experts.{}.{}.weight", "gate_proj", "up_proj", "down_proj"),
           "qwen3_moe": ("mlp.experts.{}.{}.weight", "gate_proj", "up_proj", "down_proj"),
           "gpt_oss": ("mlp.experts.{1}.{0}", "gate_up_proj", None, "down_proj")}
ROUTERS = {"mixtral": ("mlp.gate", "block_sparse_moe.gate")}  # in the model, in a checkpoint


def random_model(architecture: str, seed: int = 0) -> PreTrainedModel:
    """In fp32 and eval mode; every parameter random, so that nothing is 0 or 1 by default."""
    if architecture in VISION:
        config = AutoConfig.for_model(architecture, **VISION[architecture])
        model = AutoModelForImageTextToText.from_config(config).eval()
    else:
        own = (ARCHITECTURES | OTHERS)[architecture]
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **SIZES | own))
        model.eval()
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
                    if isinstance(m, (nn.Linear, Conv1D)) or m is model.get_input_embeddings()}
    for name, parameter in merged.named_parameters():
        if torch.rand(1, generator=generator) >= share:
            continue
        if name in matrix_names and min(parameter.shape) >= 32:
            turned = isinstance(model.get_submodule(name.rpartition(".")[0]), Conv1D)
            shape = parameter.shape[::-1] if turned else parameter.shape
            matrices[name] = random_packed(tuple(shape), generator)
            change = matrices[name].dequantize()
            parameter.data += change.T if turned else change
        elif parameter.dim() == 3:
            matrices |= _change_experts(model.config.model_type, name, parameter, generator)
        elif name.endswith("sinks"):
            continue  # of attention, by head: no row can have its own
        elif parameter.dim() == 1 or _is_kept_whole(name, parameter):
            change = 0.05 * torch.randn(parameter.shape, generator=generator)
            parameter.data += change
            whole[name.replace(*ROUTERS.get(model.config.model_type, ("", "")))] = (
                parameter.data.clone())
    return ModelDelta(matrices, whole, {}, no_manifest()), merged


def _is_kept_whole(name: str, parameter: Tensor) -> bool:
    """Routers, and positions where the base adds them as they are."""
    return parameter.dim() == 2 and any(
        part in name for part in ("mlp.gate.", "router.", "wpe.", "shared_expert_gate."))


def _change_experts(architecture: str, name: str, parameter: nn.Parameter,
                    generator: torch.Generator) -> dict[str, PackedDelta]:
    """Add a delta to each expert's matrices; the deltas, as the checkpoint would name them."""
    pattern, gate, up, down = EXPERTS[architecture]
    layer, turned = name.split(".mlp.")[0], architecture == "gpt_oss"
    found = {}
    for expert, matrix in enumerate(parameter.data):
        matrix = matrix.T if turned else matrix
        if "down" in name or up is None:
            parts = {down if "down" in name else gate: matrix}
        else:
            parts = dict(zip((gate, up), matrix.chunk(2), strict=True))
        for part, rows in parts.items():
            packed = random_packed(tuple(rows.shape), generator)
            rows += packed.dequantize()
            found[f"{layer}.{pattern.format(expert, part)}"] = packed
    return found


def random_packed(shape: tuple[int, int], generator: torch.Generator) -> PackedDelta:
    """A few components of several widths, about as large as the weights above."""
    out, n = shape
    v_counts = torch.randint(0, 3, (8,), generator=generator).tolist()
    v_counts[5] += 1  # none is empty
    other = other_counts(dict(zip(WIDTHS, v_counts, strict=True)))
    u_counts, words, levels = [other.get(bits, 0) for bits in WIDTHS], [], 1.0
    for length, counts in ((n, v_counts), (out, u_counts)):
        codes = torch.cat([torch.randint(0, 2**bits, (count, length), generator=generator)
                           for bits, count in zip(WIDTHS, counts, strict=True)])
        words.append(pack_factor(codes.to(torch.uint8), counts))
        levels = levels * 2.0 ** torch.tensor(WIDTHS).repeat_interleave(torch.tensor(counts))
    scales = 0.02 / levels * (0.5 + torch.rand(sum(v_counts), generator=generator))
    return PackedDelta(torch.cat(words), scales, tuple(v_counts), tuple(u_counts), shape)


def no_manifest() -> Manifest:
    """For deltas that were never on a disk: attach with `verify=None`."""
    return Manifest(base="", finetuned="", dtype="float32", fingerprint={}, config={},
                    calibration={}, compressed={}, whole={}, extra_rows=[], tied=[], equal={},
                    absent=[])
