"""attach: a routed row computes what its merged model would, on any architecture."""

import copy

import pytest
import torch
from routed_models import ARCHITECTURES, VOCABULARY, random_finetune, random_model, random_packed
from tiny_models import one_thread as one_thread
from torch import nn

import adamix
from adamix.artifacts import ModelDelta
from adamix.errors import BankError
from adamix.serving.modules import SITE
from adamix.serving.sites import find_sites

OPERATORS = ("delta_gemm_", "delta_gemm_.layers", "delta_embedding_", "add_rows_")
FP32 = 1e-4  # of the largest logit, DESIGN: what is equal to what
GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def ids_of(rows, tokens=7):
    return torch.randint(3, VOCABULARY, (rows, tokens))


class Family:
    """A base, merged fine-tunes "a" and "b", and the base again with both attached."""

    def __init__(self, architecture="llama", device="cpu", share=1.0, **sizes):
        self.device = device
        base = random_model(architecture)
        (a, merged_a), (b, merged_b) = (random_finetune(base, s, share=share) for s in (1, 2))
        self.models = {None: copy.deepcopy(base), "a": merged_a, "b": merged_b}
        self.deltas = {"a": a, "b": b}
        self.model = base.to(device)
        self.bank = adamix.attach(self.model, self.deltas, verify=None, **sizes)

    @torch.inference_mode()
    def logits(self, ids):
        return self.model(ids.to(self.device)).logits.cpu()

    @torch.inference_mode()
    def merged(self, names, ids):
        """Each row by its own merged model, alone."""
        return torch.cat([self.models[name](row[None]).logits
                          for name, row in zip(names, ids, strict=True)])

    def assert_routed(self, names, ids):
        with self.bank.route(names):
            got = self.logits(ids)
        exact = self.merged(names, ids)
        assert (got - exact).abs().max() <= FP32 * exact.abs().max()
        return got


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_routed_row_computes_what_its_merged_model_does(architecture, device):
    family = Family(architecture, device)
    family.assert_routed(["b", None, "a"], ids_of(3))
    family.assert_routed([None, None], ids_of(2))


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt_neox", "qwen3", "gpt2",
                                          "mixtral"])
def test_one_row_of_many_requests_is_routed_by_token(architecture, device):
    """Attention mixes tokens, so a row of one fine-tune: each layer sees its tokens by token."""
    family, ids = Family(architecture, device), ids_of(1, 9)
    with family.bank.route_tokens(["b"], [9]):
        got = family.logits(ids)
    exact = family.merged(["b"], ids)
    assert (got - exact).abs().max() <= FP32 * exact.abs().max()


def test_tokens_of_one_row_go_to_fine_tunes_of_their_own(device):
    """Where attention adds nothing, a token's logits are its own alone."""
    family, ids = Family(device=device), ids_of(1, 6)
    silent = [name for name in family.deltas["a"].matrices if "o_proj" in name]
    assert len(silent) == 2
    for model in (family.model, *family.models.values()):
        for name in silent:
            model.get_parameter(name).data.zero_()
    for name, delta in family.deltas.items():
        kept = {n: packed for n, packed in delta.matrices.items() if n not in silent}
        family.bank.load(name, ModelDelta(kept, delta.whole, {}, delta.manifest))
    names = ["a", "a", None, "b", "b", "b"]
    with family.bank.route_tokens(["a", None, "b"], [2, 1, 3]):
        got = family.logits(ids)
    exact = torch.cat([family.merged([name], ids)[:, i] for i, name in enumerate(names)])
    assert (got[0] - exact).abs().max() <= FP32 * exact.abs().max()


def test_layers_on_one_input_make_one_call(monkeypatch):
    family, calls = Family(), []
    own = adamix.ops.delta_gemm_layers_
    monkeypatch.setattr(adamix.ops, "delta_gemm_layers_",
                        lambda ys, *args, **keys: (calls.append(len(ys)), own(ys, *args, **keys)))
    family.logits(ids_of(2))
    assert calls == [3, 2] * family.model.config.num_hidden_layers  # q, k, v; gate, up


def test_a_fine_tune_that_changes_little_leaves_the_rest_to_the_base():
    Family(share=0.3).assert_routed(["a", "b", None], ids_of(3))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_rows_of_beams_and_several_sequences_follow_their_prompt(architecture):
    family, ids, names = Family(architecture), ids_of(2), ["b", "a"]
    for more in ({"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}):
        with family.bank.route(names):
            got = family.model.generate(ids, **GREEDY | more).tolist()
        want = [family.models[name].generate(row[None], **GREEDY | more).tolist()
                for name, row in zip(names, ids, strict=True)]
        assert got == sum(want, [])


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_a_batch_of_different_lengths_generates_what_each_model_would(architecture):
    family, names = Family(architecture), ["a", None, "b", "a"]
    rows = [ids_of(1, n)[0] for n in (3, 9, 5, 1)]
    ids = torch.stack([nn.functional.pad(row, (9 - len(row), 0)) for row in rows])
    mask = torch.stack([nn.functional.pad(torch.ones_like(row), (9 - len(row), 0)) for row in rows])
    with family.bank.route(names):
        for cache in ({}, {"cache_implementation": "static", "disable_compile": True}):
            got = family.model.generate(ids, attention_mask=mask, **GREEDY | cache)[:, 9:]
            want = [family.models[name].generate(row[None], **GREEDY)[0, len(row) :].tolist()
                    for name, row in zip(names, rows, strict=True)]
            assert got.tolist() == want


def test_a_compiled_model_follows_the_route():
    """Traced whole, once: the route is data."""
    family, ids = Family(), ids_of(3)
    compiled = torch.compile(family.model, fullgraph=True, backend="aot_eager")
    for names in (["a", "b", None], [None, "a", "a"]):
        with family.bank.route(names), torch.inference_mode():
            got = compiled(ids, use_cache=False).logits
        exact = family.merged(names, ids)
        assert (got - exact).abs().max() <= FP32 * exact.abs().max()


def test_parameters_stay_where_they_are_and_detach_leaves_no_trace():
    family = Family()
    model, base = family.model, family.models[None]
    assert model.state_dict().keys() == base.state_dict().keys()
    assert isinstance(model.lm_head, nn.Linear) and type(model.lm_head) is not nn.Linear
    family.bank.route(["a"])
    family.bank.detach()
    assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()]
    assert not any(SITE in module.__dict__ for module in model.modules())
    assert not model._forward_pre_hooks and not model._forward_hooks
    ids = ids_of(2)
    assert torch.equal(family.logits(ids), base(ids).logits)
    adamix.attach(model, family.deltas, verify=None)  # and it can be attached again


def test_a_tied_head_and_the_embedding_share_their_delta(device):
    family = Family("gemma2", device)
    assert "lm_head.weight" not in family.deltas["a"].matrices
    family.assert_routed(["a", "b"], ids_of(2))


# --- what cannot be routed, in words -----------------------------------------------------------


def refused(change, match, **sizes):
    base = random_model("llama")
    delta, _ = random_finetune(base, 1)
    parts = {"matrices": dict(delta.matrices), "whole": dict(delta.whole), "extra_rows": {}}
    change(parts)
    with pytest.raises(BankError, match=match):
        adamix.attach(base, {"mine": ModelDelta(**parts, manifest=delta.manifest)}, verify=None,
                      **sizes)
    assert not any(SITE in module.__dict__ for module in base.modules())


def test_what_a_row_cannot_have_of_its_own_is_refused_by_name():
    generator, q = torch.Generator(), "model.layers.0.self_attn.q_proj.weight"
    refused(lambda d: d["matrices"].update({"model.x.weight": random_packed((8, 8), generator)}),
            "mine changes model.x.weight, which is no linear layer")
    refused(lambda d: d["matrices"].update({q: random_packed((64, 32), generator)}),
            r"mine has a model.layers.0.self_attn.q_proj.weight of \[64, 32\], the model one of")
    refused(lambda d: d["whole"].update({q: torch.zeros(64, 64)}), "keeps .*q_proj.* whole")
    refused(lambda d: d["whole"].update({"model.y": torch.zeros(64)}), "changes model.y, which the")
    refused(lambda d: d["whole"].update({"model.norm.weight": torch.zeros(32)}),
            r"model.norm.weight of \[32\], the model one of \[64\]")
    refused(lambda d: d["extra_rows"].update({"lm_head.weight": torch.zeros(5, 64)}),
            "mine has 5 rows of lm_head.weight that the base lacks")
    refused(lambda d: None, "components in .*, the bank takes at most 1 there", max_rank=1)
    refused(lambda d: None, "bytes, the bank 4,096: attach with more capacity_bytes",
            capacity_bytes=4096)


def test_positions_are_no_tokens():
    """OPT looks up positions in an embedding: rows have no positions of their own."""
    base = random_model("opt")
    name = "model.decoder.embed_positions.weight"
    packed = random_packed(tuple(base.get_parameter(name).shape), torch.Generator())
    delta, _ = random_finetune(base, 1)
    with pytest.raises(BankError, match=f"changes {name}"):
        adamix.attach(base, {"a": ModelDelta({name: packed}, {}, {}, delta.manifest)}, verify=None)


class ShiftedEmbedding(nn.Embedding):
    """Looks up another row than it is asked for, as OPT's positions do, and notes from where."""

    seen: list[tuple[torch.device, int]] = []

    def forward(self, tokens):
        self.seen.append((self.weight.device, len(self.weight)))
        return super().forward(tokens + 2)


def test_an_embedding_is_looked_into_on_the_cpu_where_a_wrong_row_is_an_exception(device):
    """On a GPU a row out of range ends the process."""
    model = nn.Sequential(ShiftedEmbedding(40, 32), nn.Linear(32, 32)).to(device)
    before = model[0].weight
    ShiftedEmbedding.seen.clear()
    plan = find_sites(model)
    assert [matrix.name for matrix in plan.matrices] == ["1.weight"]
    assert ShiftedEmbedding.seen == [(torch.device("cpu"), 16)]
    assert model[0].weight is before and before.shape == (40, 32) and "weight" not in vars(model[0])


def test_models_that_cannot_be_attached_are_refused():
    model = random_model("llama")
    with pytest.raises(BankError, match="pass base=FOLDER, or verify=None"):
        adamix.attach(model)
    adamix.attach(model, verify=None)
    with pytest.raises(BankError, match="has a bank already"):
        adamix.attach(model, verify=None)
    with pytest.raises(BankError, match="must be loaded, on one device, got"):
        adamix.attach(random_model("llama").to("meta"), verify=None)
    with pytest.raises(BankError, match="LayerNorm has no linear layer"):
        adamix.attach(nn.LayerNorm(4), verify=None)
    for name in ("slots", "capacity_bytes", "max_rank"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            adamix.attach(model, verify=None, **{name: 0})
    with pytest.raises(ValueError, match="verify must be one of"):
        adamix.attach(model, verify="sha")


def test_a_wrong_number_of_rows_is_refused_when_the_model_runs():
    family = Family()
    with family.bank.route(["a", "b"]), pytest.raises(BankError, match="2 rows are routed"):
        family.logits(ids_of(3))


def test_autocast():
    family, ids = Family(), ids_of(2)
    with family.bank.route(["a", None]), torch.autocast("cpu", torch.bfloat16):
        got = family.logits(ids)
    exact = family.merged(["a", None], ids)
    assert (got - exact).abs().max() <= 0.05 * exact.abs().max()
