"""attach: experts and their routers, each token by its row's fine-tune."""

import copy
from importlib import metadata

import pytest
import torch
from routed_models import EXPERTS, random_finetune, random_model
from tiny_models import one_thread as one_thread
from tolerance import assert_within_rounding
from torch import nn
from torch.nn import functional as F
from transformers import GenerationConfig

import adamix
from adamix import ops
from adamix.errors import BankError
from adamix.experts import is_experts
from adamix.serving.experts import RoutedExperts, can_route_experts
from adamix.serving.internals import check_internals
from adamix.serving.modules import SITE
from adamix.serving.whole import can_route_linear_map

MOE = list(EXPERTS)


def experts_of(model):
    return next(module for module in model.modules() if is_experts(module))


def attached(architecture, device, dtype=torch.float32):
    """Experts of a base with fine-tunes "a" and "b", the bank, and each's own, merged in fp64."""
    base = random_model(architecture).to(dtype)
    found = {name: random_finetune(copy.deepcopy(base).float(), seed)
             for name, seed in (("a", 1), ("b", 2))}
    merged = {name: experts_of(model) for name, (_, model) in found.items()}
    merged[None] = experts_of(copy.deepcopy(base).float())
    model = base.to(device)
    bank = adamix.attach(model, {name: delta for name, (delta, _) in found.items()}, verify=None)
    return experts_of(model), bank, {name: module.double() for name, module in merged.items()}


def in_float64(module, x, index, weights):
    """(exact output, sum of the absolute values of its terms) of an experts module, by hand."""
    def times(x, parameter, expert, absolute):
        weight = getattr(module, parameter)[expert]
        weight = weight.T if module.is_transposed else weight
        bias = getattr(module, f"{parameter}_bias")[expert] if module.has_bias else None
        if absolute:
            return x.abs() @ weight.abs().T + (0 if bias is None else bias.abs())
        return F.linear(x, weight, bias)

    first = "gate_up_proj"
    exact, magnitude = torch.zeros_like(x), torch.zeros_like(x)
    for token, choices in enumerate(index.tolist()):
        for place, expert in enumerate(choices):
            if expert < module.down_proj.shape[0]:
                y = module._apply_gate(times(x[token], first, expert, False))
                # an error of gate and up passes the activation with a slope of 2 at most
                size = times(x[token], first, expert, True)
                size = size[..., : y.shape[-1]].amax() * (size.abs().amax() + 1) + y.abs()
                exact[token] += weights[token, place] * times(y, "down_proj", expert, False)
                magnitude[token] += weights[token, place] * times(size, "down_proj", expert, True)
    return exact, magnitude


@pytest.mark.parametrize("architecture", MOE)
@torch.inference_mode()
def test_each_token_goes_through_its_own_fine_tunes_experts(architecture, device):
    module, bank, merged = attached(architecture, device)
    assert isinstance(module, RoutedExperts)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(12, 64, generator=generator)
    index = torch.rand(12, 5, generator=generator).argsort(dim=-1)[:, :2]  # 4 is no expert
    weights = torch.rand(12, 2, generator=generator)
    names = ["a", None, "b", "b"]
    with bank.route(names):
        got = module(x.to(device), index.to(device), weights.to(device)).cpu()
    of_token = [name for name in names for _ in range(3)]
    for token, name in enumerate(of_token):
        rows = slice(token, token + 1)
        exact, magnitude = in_float64(merged[name], x[rows].double(), index[rows],
                                      weights[rows].double())
        assert_within_rounding(got[rows], exact, magnitude, 64)
    with bank.route([None]):
        alone = module(x.to(device), index.to(device), weights.to(device)).cpu()
    assert (alone - got)[:3].abs().max() > 0.01  # what the fine-tune changes is there to be seen


@torch.inference_mode()
def test_experts_take_tokens_of_any_shape_and_none(device):
    module, bank, _ = attached("mixtral", device)
    with bank.route(["a", "b"]):
        for shape in ((0, 64), (2, 64), (2, 3, 64)):
            x = torch.randn(shape, device=device)
            index = torch.zeros(x[..., 0].numel(), 2, dtype=torch.long, device=device)
            assert module(x, index, torch.rand(index.shape, device=device)).shape == shape


@torch.inference_mode()
def test_half_precision_is_as_near_as_merged_experts_would_be(device):
    module, bank, merged = attached("mixtral", device, torch.bfloat16)
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    index = torch.arange(128).view(64, 2) % 4
    weights = torch.full((64, 2), 0.5, dtype=torch.bfloat16)
    with bank.route(["a"] * 64):
        got = module(x.to(device), index.to(device), weights.to(device)).double().cpu()
    exact, _ = in_float64(merged["a"], x.double(), index, weights.double())
    rounded = copy.deepcopy(merged["a"]).bfloat16()(x, index, weights).double()
    assert (got - exact).norm() <= 1.1 * (rounded - exact).norm()


@pytest.mark.parametrize("architecture, ys", [("mixtral", [2, 1]), ("gpt_oss", [1, 1])])
def test_all_experts_make_one_call_a_parameter(monkeypatch, architecture, ys):
    module, bank, _ = attached(architecture, "cpu")
    calls, own = [], ops.delta_gemm_layers_
    monkeypatch.setattr(ops, "delta_gemm_layers_", lambda y, *args, **keys: (
        calls.append(len(y)), own(y, *args, **keys)))
    index = torch.tensor([[0, 1], [2, 3], [3, 0]])
    with bank.route(["a"]), torch.inference_mode():
        module(torch.randn(3, 64), index, torch.rand(3, 2))
    assert calls == ys


def test_detach_leaves_no_trace():
    model = random_model("mixtral")
    before = [type(module) for module in model.modules()]
    adamix.attach(model, verify=None).detach()
    assert [type(module) for module in model.modules()] == before
    assert not any(SITE in vars(module) or "forward" in vars(module) for module in model.modules())


# --- what computes otherwise is left alone, and what changes it refused -------------------------


class OtherRouter(nn.Module):
    """A weight `[out, in]` that is used otherwise than by `F.linear`."""

    def __init__(self, own):
        super().__init__()
        self.weight = own.weight
        self.own = [own]  # no submodule

    def forward(self, x):
        return self.own[0](x * self.weight.norm())


def test_a_layer_that_computes_otherwise_is_refused_by_name():
    model = random_model("mixtral")
    delta, _ = random_finetune(model, 1)
    layer = model.model.layers[0].mlp
    layer.gate = OtherRouter(layer.gate)
    assert not can_route_linear_map(layer.gate)
    with pytest.raises(BankError, match=r"layers.0.block_sparse_moe.gate.weight \[4, 64\] whole"):
        adamix.attach(model, {"mine": delta}, verify=None)


def test_experts_that_compute_otherwise_are_refused_by_name():
    model = random_model("mixtral")
    delta, _ = random_finetune(model, 1)
    module = experts_of(model)
    assert can_route_experts(module)
    own = type(module).forward
    module.__class__ = type("Other", (type(module),), {
        "forward": lambda self, *args: 1.01 * own(self, *args)})
    assert not can_route_experts(module)
    with pytest.raises(BankError, match="changes model.layers.0.block_sparse_moe.experts.0.w1.wei"):
        adamix.attach(model, {"mine": delta}, verify=None)


# --- continuous batching ------------------------------------------------------------------------


def test_requests_of_several_fine_tunes_share_batches_of_experts():
    try:
        from adamix.serving import continuous

        check_internals()
    except BankError as unknown:
        pytest.skip(str(unknown))
    if metadata.version("transformers") < "5.23":
        pytest.importorskip("psutil", reason="this transformers sizes caches on CPUs by it")
    base = random_model("mixtral")
    found = {name: random_finetune(base, seed) for name, seed in (("a", 1), ("b", 2))}
    merged = {None: copy.deepcopy(base)} | {name: model for name, (_, model) in found.items()}
    bank = adamix.attach(base, {name: delta for name, (delta, _) in found.items()}, verify=None)
    known = vars(continuous.ContinuousBatchingConfig())
    sizes = {"num_blocks": 64, "max_batch_tokens": 64,
             "page_size" if "page_size" in known else "block_size": 16}
    if "auto_switch_to_flash" in known:
        sizes["auto_switch_to_flash"] = False
    greedy = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": 5}
    names, prompts = ["a", None, "b", "a"], [[5, 6, 7], [8, 9], [5, 6, 7], [10, 11, 12, 13]]

    def batching(**more):
        return adamix.continuous_batching(
            base, bank, generation_config=GenerationConfig(**greedy),
            continuous_batching_config=continuous.ContinuousBatchingConfig(**sizes | more))

    with pytest.raises(BankError, match="experts cannot be captured"), batching(
            use_cuda_graph=True):
        pass
    with batching() as running:
        got = running.generate_batch(prompts, names)
    want = [merged[name].generate(torch.tensor([prompt]), **greedy)[0, len(prompt) :].tolist()
            for name, prompt in zip(names, prompts, strict=True)]
    assert [result.generated_tokens for result in got.values()] == want
