"""Self-calibration: documents one after the other, drawn with the model's own probabilities."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from tiny_models import compressed_pair
from tiny_models import one_thread as one_thread
from transformers import AutoModelForCausalLM, LlamaConfig

from adamix.calibration import sampling
from adamix.calibration.sampling import chunk_rows, sample
from adamix.errors import CalibrationError, NonFiniteError

BOS, EOS = 1, 2
SIGMAS = 5  # one false alarm in two million


class Markov:
    """A model whose next token depends on the last one alone: row i of `probabilities`."""

    config = LlamaConfig(hidden_size=4, num_attention_heads=1, num_hidden_layers=1)
    device = torch.device("cpu")

    def __init__(self, probabilities):
        self.logits = torch.tensor(probabilities).clamp(min=1e-30).log()

    def get_input_embeddings(self):
        return SimpleNamespace(weight=self.logits)

    def __call__(self, input_ids, past_key_values, use_cache):
        assert input_ids.shape[1] == 1 and use_cache
        return SimpleNamespace(logits=self.logits[input_ids], past_key_values="cache")


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(compressed_pair().finetuned,
                                                dtype=torch.float32).eval()


def drawn(model, sequences, length, *, start=BOS, end=EOS, seed=0, threads=1, **options):
    with ThreadPoolExecutor(threads) as executor:
        return sample(model, start, end, sequences=sequences, length=length, seed=seed,
                      executor=executor, **options)


def test_the_shape_the_first_token_and_the_report_of_progress(model, monkeypatch):
    monkeypatch.setattr(sampling, "CHUNK", 4)
    told = []
    tokens = drawn(model, 10, 16, on_chunk=told.append)
    assert tokens.dtype == torch.int64 and tokens.shape == (10, 16)
    assert (tokens[:, 0] == BOS).all() and 0 <= tokens.min() and tokens.max() < 128
    assert told == [4, 4, 2]


def test_tokens_depend_on_the_seed_and_not_on_the_threads(model, monkeypatch):
    monkeypatch.setattr(sampling, "CHUNK", 4)
    one = drawn(model, 22, 24, threads=1)
    assert torch.equal(one, drawn(model, 22, 24, threads=3))
    assert not torch.equal(one, drawn(model, 22, 24, seed=1))
    assert torch.equal(one[:8], drawn(model, 8, 24))  # more sequences leave the first as they are
    rows = {tuple(row) for row in one.tolist()}
    assert len(rows) == 22  # each chunk has a random stream of its own


def test_transitions_come_as_often_as_the_model_says():
    P = torch.tensor([[0.7, 0.25, 0.05], [0.1, 0.65, 0.25], [0.25, 0.05, 0.7]])
    tokens = drawn(Markov(P.tolist()), 256, 1024, end=None)
    counts = torch.zeros(3, 3)
    counts.index_put_((tokens[:, :-1].flatten(), tokens[:, 1:].flatten()),
                      torch.ones(256 * 1023), accumulate=True)
    trials = counts.sum(dim=1, keepdim=True)
    bound = SIGMAS * (P * (1 - P) / trials).sqrt()
    assert ((counts / trials - P).abs() <= bound).all(), counts / trials
    # A temperature 2 % off moves the mean of log p by 2 % of log p's variance.
    log_p, entropy = P.log(), -(P * P.log()).sum(dim=1, keepdim=True)
    variance = (P * (log_p + entropy).square()).sum(dim=1, keepdim=True)
    bound = SIGMAS * (trials * variance).sum().sqrt()
    assert (counts * (log_p + entropy)).sum().abs() <= bound < 0.02 * (trials * variance).sum()


def test_a_document_that_ended_is_followed_by_the_start_of_another():
    P = [[0.4, 0.0, 0.3, 0.3]] * 4  # the start is never drawn by chance
    tokens = drawn(Markov(P), 64, 256)
    before, after = tokens[:, :-1].flatten(), tokens[:, 1:].flatten()
    assert ((before == EOS) == (after == BOS)).all() and (before == EOS).sum() > 1000


@pytest.mark.parametrize("end", [None, BOS])
def test_nothing_follows_the_end_where_there_is_none_or_it_is_the_start_itself(end):
    tokens = drawn(Markov([[0.0, 0.5, 0.5]] * 3), 64, 128, end=end)
    share = (tokens[:, 1:] == BOS).double().mean().item()
    assert abs(share - 0.5) < SIGMAS * (0.25 / (64 * 127)) ** 0.5


def test_a_real_models_tokens_are_as_likely_as_its_entropy_says(model):
    """Along a sampled text log p + entropy is a martingale: its mean is 0 but for chance. A cache
    that forgets, or a position off by one, moves it by the divergence of the two distributions."""
    sharp = AutoModelForCausalLM.from_pretrained(compressed_pair().finetuned, dtype=torch.float32)
    sharp.lm_head.weight.data *= 3  # logits of std 2: the context matters
    tokens = drawn(sharp.eval(), 64, 48, end=None)
    with torch.inference_mode():
        log_p = sharp(input_ids=tokens).logits[:, :-1].double().log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    variance = (log_p.exp() * log_p.square()).sum(-1) - entropy.square()
    surprise = log_p.gather(-1, tokens[:, 1:, None])[..., 0] + entropy
    bound = SIGMAS * variance.sum().sqrt() / surprise.numel()
    assert surprise.mean().abs() <= bound < 0.15
    shuffled = log_p.roll(1, dims=1).gather(-1, tokens[:, 1:, None])[..., 0] + entropy
    assert shuffled.mean().abs() > 2 * bound  # what the test would see of a wrong context


def test_a_chunk_is_bounded_by_its_cache():
    small = LlamaConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=2)
    large = LlamaConfig(hidden_size=4096, num_attention_heads=32, num_key_value_heads=8,
                        num_hidden_layers=32, head_dim=128)
    assert chunk_rows(small, 256) == sampling.CHUNK
    a_sequence = 2 * 32 * 8 * 128 * 2048 * 4  # keys and values, fp32: 512 MiB
    assert chunk_rows(large, 2048) == sampling.CACHE_BYTES // a_sequence == 2
    assert chunk_rows(large, 2048, gpu=True) == sampling.GPU_CACHE_BYTES // a_sequence == 20
    assert chunk_rows(large, 10**6) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_refused(value):
    model = Markov([[0.5, 0.5]] * 2)
    model.logits[1, 0] = value
    with pytest.raises(NonFiniteError, match="logits"):
        drawn(model, 4, 8)


@pytest.mark.parametrize("start", [-1, 128, 10**6])
def test_a_start_outside_the_vocabulary_is_refused(model, start):
    with pytest.raises(CalibrationError, match=f"{start}.*128.*--calibration"):
        drawn(model, 4, 8, start=start)
