"""Continuous batching with fine-tunes: every request's tokens are those of its merged model."""

import copy
import threading
from importlib import metadata

import pytest
import torch
from tiny_models import compressed_family
from tiny_models import one_thread as one_thread
from transformers import AutoModelForCausalLM, GenerationConfig

import adamix
from adamix.errors import BankError
from adamix.merging import restored_model
from adamix.serving.internals import check_internals

try:
    from adamix.serving import continuous

    check_internals()
except BankError as unknown:
    pytest.skip(str(unknown), allow_module_level=True)

OPERATORS = ("delta_gemm_", "delta_gemm_.layers", "delta_embedding_", "add_rows_")
NAMES = ["a", "b", "c"]
TOKENS = 8
GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
PAGE = 16  # tokens; a prompt of more completes a block, which requests could share


def prompts_of(*lengths):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(4, 100, (length,), generator=generator).tolist() for length in lengths]


class Served:
    """A model with a bank of two slots for three fine-tunes, and their merged models."""

    def __init__(self, device="cpu", slots=2):
        family = compressed_family(len(NAMES))
        self.paths = dict(zip(NAMES, family.deltas, strict=True))
        self.model = self.load(family.base, device)
        self.bank = adamix.attach(self.model, slots=slots, max_rank=64,
                                  capacity_bytes=slots * 200_000)
        self.merged = {None: self.load(family.base, device)}
        for name, path in self.paths.items():
            self.bank.load(name, path)
            self.merged[name] = restored_model(family.base, path).to(device)

    @staticmethod
    def load(base, device):
        return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).to(device).eval()

    def batching(self, num_return_sequences=None, **config):
        known = vars(continuous.ContinuousBatchingConfig())
        sizes = {"num_blocks": 64, "max_batch_tokens": 64,
                 "page_size" if "page_size" in known else "block_size": PAGE}
        if "auto_switch_to_flash" in known:
            sizes["auto_switch_to_flash"] = False  # which has no fp32
        generation = GenerationConfig(max_new_tokens=TOKENS, **GREEDY)
        if num_return_sequences is not None:  # for sampling alone: from one token
            generation.update(do_sample=True, top_k=1, num_return_sequences=num_return_sequences)
        return adamix.continuous_batching(
            self.model, self.bank, generation_config=generation,
            continuous_batching_config=continuous.ContinuousBatchingConfig(**(sizes | config)))

    def answers(self, prompts, names, tokens=TOKENS):
        """What each prompt's merged model generates alone."""
        return [self.answer(prompt, name, tokens)
                for prompt, name in zip(prompts, names, strict=True)]

    def answer(self, prompt, name, tokens=TOKENS):
        model = self.merged[name]
        ids = torch.tensor([prompt], device=model.device)
        return model.generate(ids, max_new_tokens=tokens, **GREEDY)[0, len(prompt):].tolist()


@pytest.fixture(scope="module")
def cached():
    return {}


@pytest.fixture
def served(cached):
    """One of the CPU for all tests, which leave it as it was."""
    if "cpu" not in cached:
        needs_psutil = metadata.version("transformers") < "5.23"
        if needs_psutil:
            pytest.importorskip("psutil", reason="this transformers sizes caches on CPUs by it")
        cached["cpu"] = Served()
    served = cached["cpu"]
    yield served
    assert served.bank.names == NAMES and served.bank._route == ((None,), None)
    assert not any(known.holders for known in served.bank._known.values())


MIX = ["c", "a", None, "b", "a", "c", "b", None]


def mixed_prompts():
    return prompts_of(9, 3, 17, 1, 9, 5, 30, 2)


def assert_mix_is_answered(served, **config):
    prompts = mixed_prompts()
    with served.batching(**config) as batching:
        outputs = batching.generate_batch(prompts, MIX)
    got = [output.generated_tokens for output in outputs.values()]
    assert got == served.answers(prompts, MIX)
    assert [output.prompt_ids for output in outputs.values()] == prompts


def test_each_request_is_answered_as_by_its_merged_model(served):
    assert_mix_is_answered(served)
    answers = served.answers(mixed_prompts(), MIX)
    assert len({tuple(answer) for answer in answers}) > 4  # the mix tells fine-tunes apart


@pytest.mark.parametrize("scheduler", ["fifo", "prefill_first"])
def test_prompts_longer_than_a_batch_and_few_blocks(served, scheduler):
    assert_mix_is_answered(served, max_batch_tokens=12, num_blocks=12, scheduler_type=scheduler)


def test_padding_is_the_bases(served):
    """Batches of one size, as for CUDA graphs: what follows the tokens is left alone."""
    rows = []
    sizes = {"q_padding_interval_size": 64, "kv_padding_interval_size": 1024}
    # Without a graph, which transformers would capture wherever there is a GPU.
    with served.batching(use_cuda_graph=False, **sizes) as batching:
        batching.batch_processor.model_runner.pad_inputs = True
        head = served.model.lm_head.register_forward_pre_hook(
            lambda module, args: rows.append(args[0].shape[1]))
        outputs = batching.generate_batch(mixed_prompts(), MIX)
    head.remove()
    assert [output.generated_tokens for output in outputs.values()] == (
        served.answers(mixed_prompts(), MIX))
    assert set(rows) == {64}  # as many as tokens, and yet not those tokens


def test_cuda_graphs_follow_the_batch(device):
    """Captured once, replayed with other requests: buffers stay, their content is rewritten."""
    if device == "cpu":
        pytest.skip("graphs are of CUDA")
    served = Served(device)
    assert_mix_is_answered(served)
    assert_mix_is_answered(served, use_cuda_graph=True, q_padding_interval_size=16,
                           kv_padding_interval_size=64)


def test_the_head_is_routed_by_the_tokens_that_it_gets(served, monkeypatch):
    """And the mix is one where that matters: by the first tokens' routes, answers are wrong."""
    calls = []
    monkeypatch.setattr(served.bank.routing, "select", calls.append)
    with served.batching() as batching:
        outputs = batching.generate_batch(mixed_prompts(), MIX)
    got = [output.generated_tokens for output in outputs.values()]
    assert any(isinstance(tokens, torch.Tensor) for tokens in calls)
    assert got != served.answers(mixed_prompts(), MIX)


def test_equal_prompts_of_several_fine_tunes_share_nothing(served):
    """Blocks are found by their tokens alone: shared, one fine-tune would read another's keys."""
    (prompt,) = prompts_of(3 * PAGE)
    names = [None, "a", "b", "a", None]
    wanted = served.answers([prompt] * len(names), names)
    with served.batching(allow_block_sharing=True) as batching:
        for batch in (names, [names[1]], [names[0]], [names[2]]):
            outputs = batching.generate_batch([prompt] * len(batch), batch)
            assert [output.generated_tokens for output in outputs.values()] == (
                [wanted[names.index(name)] for name in batch])


def test_requests_and_fine_tunes_arrive_while_others_run(served):
    first, *rest = mixed_prompts()
    with served.batching() as batching:
        running = batching.add_request(first, finetune="a", max_new_tokens=60, streaming=True)
        while batching.get_result(timeout=5).request_id != running:
            pass
        served.bank.load("late", served.paths["c"])
        names = ["late" if name == "c" else name for name in MIX[1:]]
        ids = batching.add_requests(rest, finetunes=names)
        results = {result.request_id: result for result in batching}
    served.bank.unload("late")
    assert results[running].generated_tokens == served.answer(first, "a", 60)
    assert [results[name].generated_tokens for name in ids] == served.answers(rest, MIX[1:])


def test_no_more_fine_tunes_are_in_flight_than_fit(served, monkeypatch):
    batches = []
    route = served.bank.route_tokens

    def noting(names, counts):
        batches.append({name for name in names if name is not None})
        return route(names, counts)

    monkeypatch.setattr(served.bank, "route_tokens", noting)
    prompts, names = 3 * mixed_prompts(), 3 * MIX
    with served.batching() as batching:
        outputs = batching.generate_batch(prompts, names)
    assert [output.generated_tokens for output in outputs.values()] == (
        served.answers(prompts, names))
    assert max(map(len, batches)) == served.bank.slots
    assert set().union(*batches) == set(NAMES)


def test_several_sequences_of_a_request_are_of_its_fine_tune(served):
    prompts, names = mixed_prompts(), MIX
    for config in ({}, {"num_blocks": 12, "max_batch_tokens": 16}):
        with served.batching(num_return_sequences=3, **config) as batching:
            outputs = list(batching.generate_batch(prompts, names).items())
        for i, wanted in enumerate(served.answers(prompts, names)):
            sequences = outputs[3 * i : 3 * i + 3]
            parent = sequences[0][0]
            assert [name for name, _ in sequences] == (
                [parent, f"{parent}__child#0", f"{parent}__child#1"])
            assert [output.generated_tokens for _, output in sequences] == [wanted] * 3


def test_a_fine_tune_in_flight_stays_what_it_is(served):
    first, second = prompts_of(5, 5)
    with served.batching() as batching:
        running = batching.add_request(first, finetune="a", max_new_tokens=100, streaming=True)
        batching.get_result(timeout=5)
        for change in (lambda: served.bank.unload("a"), served.bank.detach,
                       lambda: served.bank.load("a", served.paths["b"])):
            with pytest.raises(BankError, match="1 requests run on a: wait for them, or cancel"):
                change()
        batching.generate_batch([second, second], ["b", "c"])
        assert "a" in served.bank.resident
        batching.cancel_request(running)
        batching.generate_batch([second], ["b"])
        served.bank.unload("b")  # at once after its result
        served.bank.load("b", served.paths["b"])
        assert all(result.request_id == running for result in batching)


def test_requests_are_cancelled_in_line_and_while_they_run(served):
    (prompt,) = prompts_of(5)
    with served.batching() as batching:
        running = [batching.add_request(prompt, finetune=name, max_new_tokens=100, streaming=True)
                   for name in ("a", "b")]
        waiting = batching.add_request(prompt, finetune="c")
        batching.get_result(timeout=5)
        for request in (waiting, *running):
            batching.cancel_request(request)
        assert {result.request_id for result in batching} <= set(running)
        outputs = batching.generate_batch([prompt], ["c"])
        assert next(iter(outputs.values())).generated_tokens == served.answer(prompt, "c")


def test_a_fine_tune_unloaded_before_its_turn_fails_its_request_alone(served):
    (prompt,) = prompts_of(5)
    served.bank.load("gone", served.paths["c"])
    with served.batching(num_return_sequences=2) as batching:
        for name in ("a", "b"):
            batching.add_request(prompt, finetune=name, max_new_tokens=60)
        lost = batching.add_request(prompt, finetune="gone")
        served.bank.unload("gone")
        errors = {result.request_id: result.error for result in batching}
    assert "no fine-tune 'gone' is loaded" in errors.pop(lost)
    assert "no fine-tune 'gone' is loaded" in errors.pop(f"{lost}__child#0")
    assert len(errors) == 4 and not any(errors.values())


def test_what_fits_beside_nothing_that_ends_fails(served):
    (prompt,) = prompts_of(5)
    for name in ("a", "b"):
        served.bank.pin(name)
    with served.batching() as batching:
        with pytest.raises(RuntimeError, match="c .* does not fit beside what is pinned or in use"):
            batching.generate_batch([prompt], ["c"])
        assert batching.generate_batch([prompt], ["a"])
    for name in ("a", "b"):
        served.bank.unpin(name)


def breaking(served):
    """The model fails in its third batch."""
    count = iter(range(100))

    def fail(module, args):
        if next(count) == 2:
            raise ArithmeticError("the third batch")

    return served.model.model.layers[0].register_forward_pre_hook(fail)


def test_an_error_of_the_thread_reaches_the_caller(served):
    (prompt,) = prompts_of(5)
    hook, results = breaking(served), []
    with pytest.raises(RuntimeError, match="stopped: the third batch"), served.batching() as batch:
        ids = batch.add_requests([prompt] * 3, finetunes=NAMES)  # the third waits for room
        results += batch
    assert {result.request_id for result in results} == set(ids)
    assert all("the third batch" in result.error for result in results)
    hook.remove()
    hook = breaking(served)
    with served.batching() as batch:
        with pytest.raises(RuntimeError, match="the third batch"):
            batch.generate_batch([prompt], ["a"])
        batch._generation_thread.join(10)
        for call in (lambda: batch.get_result(timeout=1), batch.check,
                     lambda: batch.add_request(prompt, finetune="a")):
            with pytest.raises(RuntimeError, match="stopped: the third batch") as raised:
                call()
            assert isinstance(raised.value.__cause__, ArithmeticError)
    hook.remove()
    assert_mix_is_answered(served)


def test_nothing_stays_behind(served, monkeypatch):
    kinds = [continuous.ContinuousBatchingManager, continuous.OutputRouter,
             continuous.ContinuousBatchProcessor]
    before = [dict(vars(kind)) for kind in kinds]
    attention = served.model.config._attn_implementation
    threads = threading.active_count()
    hooks = list(served.model._forward_pre_hooks)
    (prompt,) = prompts_of(5)

    def assert_clean():
        assert list(served.model._forward_pre_hooks) == hooks
        assert not served.model.model._forward_hooks
        assert served.model.config._attn_implementation == attention
        assert threading.active_count() == threads
        assert [dict(vars(kind)) for kind in kinds] == before
        with served.bank.route(["b"]):
            ids = served.model.generate(torch.tensor([prompt]), max_new_tokens=TOKENS, **GREEDY)
        assert ids[0, len(prompt):].tolist() == served.answer(prompt, "b")

    with served.bank.route(["a"]):
        with served.batching() as batching:
            batching.generate_batch([prompt], ["c"])
        assert served.bank._route == (("a",), None)
    assert_clean()
    with pytest.raises(KeyError), served.batching() as batching:
        batching.add_request(prompt, finetune="a", max_new_tokens=100)
        raise KeyError("the caller's own")
    assert_clean()
    assert not batching.is_running()
    attention = "eager"  # which transformers replaces
    served.model.set_attn_implementation(attention)
    monkeypatch.setattr(continuous.ContinuousBatching, "warmup", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError), served.batching():
        pass
    assert_clean()
    served.model.set_attn_implementation("sdpa")


def test_what_cannot_be_batched_is_refused(served, monkeypatch):
    (prompt,) = prompts_of(5)
    with pytest.raises(BankError, match="synchronously"), served.batching(use_async_batching=True):
        pass
    with pytest.raises(BankError, match="at most 65536 tokens"), served.batching(
            max_batch_tokens=65537):
        pass
    other = Served.load(compressed_family(len(NAMES)).base, "cpu")
    with pytest.raises(BankError, match="not attached to this model"), (
            adamix.continuous_batching(other, served.bank)):
        pass
    with served.batching() as batching:
        with pytest.raises(BankError, match="no fine-tune 'd' is loaded; loaded are: a, b, c"):
            batching.add_request(prompt, finetune="d")
        with pytest.raises(BankError, match="at least one token"):
            batching.add_request([], finetune="a")
        with pytest.raises(BankError, match="a fine-tune for each input: got 1 for 2"):
            batching.generate_batch([prompt, prompt], ["a"])
        batching.add_request(prompt, "mine", max_new_tokens=100, finetune="a")
        with pytest.raises(BankError, match="'mine' is not answered yet"):
            batching.add_request(prompt, "mine", finetune="b")
        with pytest.raises(BankError, match="no fine-tune 'd'"):
            batching.generate_batch([prompt, prompt], ["a", "d"])
        batching.cancel_request("mine")


def test_an_unknown_transformers_is_refused_by_what_it_lacks(served, monkeypatch):
    from transformers.generation.continuous_batching.model_runner import ModelRunner

    def renamed(self, model, data):
        raise AssertionError

    monkeypatch.setattr(ModelRunner, "compute_batch", renamed)
    with pytest.raises(BankError, match=r"known to work with transformers 5.17 to 5.23; .* "
                                        r"lacks model_runner.ModelRunner.compute_batch\(batch_da"):
        with served.batching():
            pass
    monkeypatch.delattr(ModelRunner, "compute_batch")
    with pytest.raises(BankError, match="lacks model_runner.ModelRunner.compute_batch"):
        with served.batching():
            pass


def test_the_callers_configurations_stay_theirs(served):
    config = continuous.ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=64)
    generation = GenerationConfig(max_new_tokens=2, **GREEDY)
    before = copy.deepcopy((config, generation))
    with adamix.continuous_batching(served.model, served.bank, generation_config=generation,
                                    continuous_batching_config=config) as batching:
        batching.generate_batch(prompts_of(3), ["a"])
    assert (config, generation) == before
