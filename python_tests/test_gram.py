"""X Xᵀ of every distinct input, against activations that a float64 copy of the model computes."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny_models import HIDDEN, MLP, compressed_pair
from tiny_models import one_thread as one_thread
from transformers import AutoModelForCausalLM

from adamix.calibration.gram import CHUNK, accumulate, gram_matrices, passes, shared_inputs
from adamix.errors import NonFiniteError
from adamix.matrices import token_frequency

TOKENS = torch.randint(4, 100, (2 * CHUNK + 3, 12), generator=torch.Generator().manual_seed(0))
LAYER = "model.layers.{}."
GROUPS = [[LAYER + f"self_attn.{x}_proj" for x in "qkv"], [LAYER + "self_attn.o_proj"],
          [LAYER + "mlp.gate_proj", LAYER + "mlp.up_proj"], [LAYER + "mlp.down_proj"]]
EXPECTED_GROUPS = [[name.format(i) for name in group] for i in (0, 1) for group in GROUPS]
EXPECTED_GROUPS.append(["lm_head"])


def load(dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(compressed_pair().finetuned, dtype=dtype).eval()


@pytest.fixture(scope="module")
def model():
    return load()


def linears(model):
    return {name: module for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear)}


def grams(model, tokens=TOKENS, threads=1, names=None, **options):
    modules = linears(model)
    modules = {name: modules[name] for name in names or modules}
    with ThreadPoolExecutor(threads) as executor:
        return accumulate(model, tokens, modules, executor=executor, **options)


def inputs_in_float64():
    """{module: X [tokens, in]} of a float64 copy, all tokens in one pass."""
    exact, seen = load(torch.float64), {}
    for name, module in linears(exact).items():
        module.register_forward_hook(
            lambda module, inputs, output, name=name: seen.update({name: inputs[0].flatten(0, 1)}))
    with torch.inference_mode():
        exact(input_ids=TOKENS)
    return seen


def assert_same_gram(got, exact):
    """To 1e-4 of √(d_i d_j), d the diagonal: entries are sums of products whose factors passed
    2 layers in fp32, each of < 200 terms (< 200 · 2⁻²⁴ = 1.2e-5 relative an operation)."""
    d = exact.diagonal().sqrt()
    assert got.dtype == torch.float32 and got.shape == exact.shape
    assert ((got.double() - exact).abs() / torch.outer(d, d)).max() <= 1e-4


def test_modules_that_read_one_tensor_are_one_group_in_call_order(model):
    found = shared_inputs(model, TOKENS, linears(model))
    assert list(found.items()) == [(group[0], group) for group in EXPECTED_GROUPS]


def test_only_modules_asked_for_are_grouped_and_one_never_called_has_no_group(model):
    modules = {name: module for name, module in linears(model).items()
               if name.endswith(("layers.1.self_attn.k_proj", "layers.1.self_attn.v_proj"))}
    first, second = modules
    modules["idle"] = torch.nn.Linear(HIDDEN, 4)
    assert shared_inputs(model, TOKENS, modules) == {first: [first, second]}


def test_looking_leaves_no_hook_behind(model):
    shared_inputs(model, TOKENS, linears(model))
    grams(model)
    assert not any(module._forward_pre_hooks for module in linears(model).values())


def test_every_gram_matrix_is_that_of_the_float64_models_inputs(model):
    got, inputs = grams(model), inputs_in_float64()
    assert got.keys() == inputs.keys()
    for name, X in inputs.items():
        assert X.shape == (TOKENS.numel(), MLP if "down_proj" in name else HIDDEN)
        assert_same_gram(got[name], X.T @ X)
    for group in EXPECTED_GROUPS:
        assert all(torch.equal(got[name], got[group[0]]) for name in group)


def test_the_first_layers_gram_matrix_by_hand(model):
    """RMSNorm of the tokens' embeddings, nothing else."""
    weights = model.state_dict()
    x = weights["model.embed_tokens.weight"].double()[TOKENS.flatten()]
    x = x / (x.square().mean(-1, keepdim=True) + model.config.rms_norm_eps).sqrt()
    x = x * weights["model.layers.0.input_layernorm.weight"].double()
    name = "model.layers.0.self_attn.q_proj"
    assert_same_gram(grams(model, names=[name])[name], x.T @ x)


def test_threads_change_no_bit_and_progress_counts_sequences(model):
    told = []
    one = grams(model, on_chunk=told.append)
    assert told == [CHUNK, CHUNK, 3]
    for threads in (2, 3):
        other = grams(model, threads=threads)
        assert other.keys() == one.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_sums_in_place_are_those_of_a_chunk_at_a_time(model):
    layers = {group[0]: linears(model)[group[0]] for group in EXPECTED_GROUPS}
    chunks, expected = TOKENS.split(1), None
    for in_place in (False, True):
        with ThreadPoolExecutor(1) as executor:
            seen = {}
            found = gram_matrices(lambda chunk: model(input_ids=chunk), chunks, layers,
                                  executor=executor, ahead=1, in_place=in_place, seen=seen)
        assert seen == dict.fromkeys(layers, TOKENS.numel())
        expected = expected or found
        assert all(torch.equal(found[name], expected[name]) for name in layers)


def test_several_passes_give_the_same_bits_as_one(model):
    widths = {group[0]: linears(model)[group[0]].in_features for group in EXPECTED_GROUPS}
    runs = list(passes(widths, max_bytes=2 * 4 * HIDDEN**2))
    assert len(runs) > 3 and sum(runs, []) == list(widths)
    whole = grams(model, names=list(widths))
    for run in runs:
        part = grams(model, names=run)
        assert list(part) == run and all(torch.equal(part[name], whole[name]) for name in run)


def test_passes_fill_up_to_the_bound_in_order():
    widths = {"a": 10, "b": 10, "c": 20, "d": 30, "e": 1}  # 400, 400, 1600, 3600 and 4 bytes
    assert list(passes(widths, max_bytes=10**6)) == [["a", "b", "c", "d", "e"]]
    assert list(passes(widths, max_bytes=2400)) == [["a", "b", "c"], ["d"], ["e"]]
    assert list(passes(widths, max_bytes=2399)) == [["a", "b"], ["c"], ["d"], ["e"]]
    assert list(passes(widths, max_bytes=1)) == [["a"], ["b"], ["c"], ["d"], ["e"]]
    assert list(passes({})) == []


def test_token_frequency_is_the_count_and_one_percent_of_its_mean():
    found = token_frequency(torch.tensor([[1, 1, 3], [1, 0, 3]]), 6)
    assert found.dtype == torch.float64
    expected = torch.tensor([1.0, 3.0, 0.0, 2.0, 0.0, 0.0], dtype=torch.float64) + 0.01
    assert torch.allclose(found, expected, rtol=0, atol=1e-15)  # 6 tokens over 6 rows: mean 1


@pytest.mark.parametrize("norm, module", [
    ("layers.0.post_attention_layernorm", "model.layers.0.mlp.gate_proj"),
    ("layers.1.input_layernorm", "model.layers.1.self_attn.q_proj"), ("norm", "lm_head")])
@pytest.mark.parametrize("value", [float("nan"), 3e38])  # times 1.2 the latter is Inf
def test_activations_that_are_not_finite_name_the_first_module_they_enter(norm, module, value):
    broken = load()
    broken.model.get_submodule(norm).weight.data.fill_(value)
    with pytest.raises(NonFiniteError, match=f"enter {module} "):
        grams(broken)
