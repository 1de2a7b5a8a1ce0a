"""Rows of eight fine-tunes and of the base in one batch, against models merged with the deltas."""

import copy

import pytest
import torch
from routed_models import VOCABULARY, random_finetune, random_model
from tiny_models import one_thread as one_thread

import adamix

OPERATORS = ("delta_gemm_", "delta_gemm_.layers", "delta_embedding_", "add_rows_")
FP32 = 1e-4  # of the largest logit, DESIGN: what is equal to what
COUNT, LENGTH, STEPS = 8, 7, 12
NAMES = [*(f"{i}" for i in range(COUNT)), None, "3", None, "0"]  # two rows of some


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def family(request):
    """(base, {name: delta}, {name: the model merged with it})."""
    base = random_model(request.param)
    found = {f"{i}": random_finetune(base, i + 1) for i in range(COUNT)}
    deltas = {name: delta for name, (delta, _) in found.items()}
    return base, deltas, {None: base, **{name: merged for name, (_, merged) in found.items()}}


def shuffled_rows():
    order = torch.randperm(len(NAMES)).tolist()
    return [NAMES[i] for i in order], torch.randint(3, VOCABULARY, (len(NAMES), LENGTH))


@torch.inference_mode()
def greedy(model, tokens, steps):
    """Tokens that follow each row's, and the logits that they were chosen by."""
    logits = []
    for _ in range(steps):
        logits.append(model(tokens.to(model.device), use_cache=False).logits[:, -1].cpu())
        tokens = torch.cat([tokens, logits[-1].argmax(dim=-1)[:, None]], dim=1)
    return tokens, torch.stack(logits, dim=1)


def test_in_fp32_every_row_goes_on_as_its_merged_model_does(family, device):
    base, deltas, merged = family
    model, (names, ids) = copy.deepcopy(base).to(device), shuffled_rows()
    with adamix.attach(model, deltas, verify=None).route(names):
        got, _ = greedy(model, ids, STEPS)
    alone = 0
    for name, row, begun in zip(names, got, ids, strict=True):
        exact, logits = greedy(merged[name], begun[None], STEPS)
        first, second = logits[0].topk(2, dim=-1).values.unbind(-1)
        near = first - second < FP32 * logits.abs().max()
        until = LENGTH + (int(near.nonzero()[0]) if near.any() else STEPS)
        assert torch.equal(row[:until], exact[0, :until])
        alone += not torch.equal(exact, greedy(base, begun[None], STEPS)[0])
    assert alone > COUNT // 2  # the fine-tunes' answers are not the base's


def rounded(base, delta, exact):
    """The base and the model merged with a delta, both in bf16, and what the merged one would be
    without the rounding of its sums: the base's own rounding is in all three."""
    model, reference = copy.deepcopy(base).bfloat16(), copy.deepcopy(exact)
    merged = copy.deepcopy(model)
    for name, parameter in reference.named_parameters():
        parameter.data = model.get_parameter(name).float()
        if delta is not None and name in delta.matrices:
            parameter.data += delta.matrices[name].dequantize()
        elif delta is not None and name in delta.whole:
            parameter.data = delta.whole[name].bfloat16().float()
        merged.get_parameter(name).data = parameter.data.bfloat16()
    return merged, reference


def test_in_bf16_rows_are_as_near_as_merged_models_would_be(family, device):
    base, deltas, exact = family
    names, ids = shuffled_rows()
    model = copy.deepcopy(base).bfloat16().to(device)
    lost = {"routed": 0.0, "merged": 0.0}
    with torch.inference_mode(), adamix.attach(model, deltas, verify=None).route(names):
        routed = model(ids.to(device)).logits.float().cpu()
        for name, row, got in zip(names, ids, routed, strict=True):
            merged, reference = rounded(base, deltas.get(name), exact[name])
            right = reference(row[None]).logits[0]
            rounded_too = merged.to(device)(row[None].to(device)).logits[0].float().cpu()
            lost["routed"] += (got - right).square().sum().item()
            lost["merged"] += (rounded_too - right).square().sum().item()
    assert 0 < lost["routed"] <= 1.1**2 * lost["merged"]
