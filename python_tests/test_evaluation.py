"""evaluate: perplexity and KL against float64 token by token, answers against a greedy loop."""

import json
import math
import shutil

import pytest
import torch
from tiny_models import compressed_pair, make_pair, tokenizer
from tiny_models import one_thread as one_thread
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from adamix.calibration.texts import join_answer
from adamix.errors import AdamixError, CalibrationError, CheckpointError, DeltaFileError
from adamix.evaluation import (
    Prompt,
    Window,
    answer,
    evaluate,
    score_windows,
    sliding_windows,
)
from adamix.merging import restored_model

TEXT = "The quick brown fox jumps over the lazy dog; 0123456789 (and back again).\n" * 3
RELATIVE = 1e-4  # fp32 logits of two layers are off by 1e-6; an error of 2 % must fail
PROMPTS = [Prompt("1+1=", "2"), Prompt("say it: ", "yes"), Prompt("a", "bc")]


def in_float64(model):
    return model.double().eval()


def load(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


@torch.inference_mode()
def token_by_token(model, reference, ids, length):
    """Mean loss and KL of every token behind <bos>, each after <bos> and what its window shows."""
    bos, body = ids[:1], ids[1:]
    room, step = length - 1, (length - 1) // 2
    loss = divergence = 0.0
    after = {}
    for t in range(len(body)):
        start = max(0, math.ceil((t + 1 - room) / step)) * step
        if start not in after:
            seen = torch.cat([bos, body[start : start + room]])[None]
            after[start] = [m(input_ids=seen).logits[0].tolist() for m in (model, reference)]
        q, p = (probabilities(logits[t - start]) for logits in after[start])
        loss -= math.log(q[body[t]])
        divergence += sum(pi * math.log(pi / qi) for pi, qi in zip(p, q, strict=True))
    return loss / len(body), divergence / len(body)


def probabilities(logits):
    powers = [math.exp(value) for value in logits]
    return [power / sum(powers) for power in powers]


@pytest.mark.parametrize("context", [64, 1024])  # several windows; the model's own 128
def test_perplexity_and_kl_are_those_of_a_float64_computation(context, tmp_path):
    pair = compressed_pair()
    (tmp_path / "text.txt").write_text(TEXT)
    found = evaluate(pair.base, pair.finetuned, pair.delta, text=tmp_path / "text.txt",
                     context=context)
    ids = torch.tensor(tokenizer()(TEXT)["input_ids"])
    assert found.text_tokens == len(ids) - 1 and len(ids) > 128
    reference = in_float64(load(pair.finetuned))
    models = {"base": load(pair.base), "compressed": restored_model(pair.base, pair.delta),
              "finetuned": load(pair.finetuned)}
    for name, model in models.items():
        loss, divergence = token_by_token(in_float64(model), reference, ids, min(context, 128))
        scores = getattr(found, name)
        assert scores.perplexity == pytest.approx(math.exp(loss), rel=RELATIVE)
        if name != "finetuned":
            assert scores.kl_text == pytest.approx(divergence, rel=1e-3)
    assert found.finetuned.kl_text is None
    assert 0 < found.compressed.kl_text < 0.1 * found.base.kl_text


def test_kl_on_prompts_covers_prompt_answer_and_end():
    pair = compressed_pair()
    found = evaluate(pair.base, pair.finetuned, None, prompts=PROMPTS, max_new_tokens=1)
    model, reference = in_float64(load(pair.base)), in_float64(load(pair.finetuned))
    total, tokens = 0.0, 0
    for prompt in PROMPTS:
        document = join_answer(prompt.prompt, prompt.answer)
        ids = torch.tensor([*tokenizer()(document)["input_ids"], 2])
        total += token_by_token(model, reference, ids, 128)[1] * (len(ids) - 1)
        tokens += len(ids) - 1
    assert found.base.kl_prompts == pytest.approx(total / tokens, rel=1e-3)
    assert found.compressed is None and found.base.perplexity is None


@pytest.mark.parametrize("begin", [None, 0])
@pytest.mark.parametrize("tokens", [2, 3, 8, 9, 12, 13, 40])
def test_every_token_but_the_first_counts_once_after_half_a_window(tokens, begin):
    ids, length = torch.arange(tokens), 8
    counted = []
    for window in sliding_windows(ids, length, begin):
        assert len(window.ids) <= length
        assert begin is None or window.ids[0] == begin
        assert window.first >= (1 if not counted else (length - 1) // 2)
        assert window.ids[window.first - 1] == counted[-1] if counted else window.first == 1
        counted += window.ids[window.first :].tolist()
    assert counted == list(range(1, tokens))


def test_a_models_kl_from_itself_is_zero_and_batches_change_nothing(monkeypatch):
    model = load(compressed_pair().base).eval()
    windows = [Window(torch.arange(4, 4 + n), 1) for n in (9, 5, 9, 7, 9)]
    loss, divergence = score_windows(model, windows, model)
    assert divergence == 0
    monkeypatch.setattr("adamix.evaluation.LOGITS_AT_ONCE", 1)
    monkeypatch.setattr("adamix.evaluation.SOFTMAX_AT_ONCE", 1)
    assert score_windows(model, windows)[0] == pytest.approx(loss, rel=1e-6)


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A model that has learnt the answers to PROMPTS by heart."""
    base, _ = make_pair(tmp_path_factory.mktemp("taught"), dtype=torch.float32)
    model: LlamaForCausalLM = load(base)
    rows = [[*tokenizer()(p.prompt + p.answer)["input_ids"], 2] for p in PROMPTS]
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        for row in rows:
            ids = torch.tensor([row])
            model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.save_pretrained(base.parent / "model")
    tokenizer().save_pretrained(base.parent / "model")
    return base.parent / "model"


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_answers_must_agree_exactly_but_for_white_space(taught, batch_size):
    asked = [*PROMPTS[:2], Prompt("a", " bc\n"), Prompt("a", "b"), Prompt("a", "bcd")]
    found = evaluate(None, taught, prompts=asked, batch_size=batch_size)
    assert (found.finetuned.correct, found.prompts) == (3, 5)
    assert found.finetuned.accuracy == pytest.approx(0.6)
    assert evaluate(None, taught, prompts=asked, limit=2).finetuned.accuracy == 1


def test_padded_batches_answer_as_a_greedy_loop_does():
    model, words = load(compressed_pair().finetuned).eval(), tokenizer()
    prompts = ["a", "a longer prompt than the first", "?"]
    expected = []
    for prompt in prompts:
        ids = words(prompt)["input_ids"]
        new = []
        for _ in range(6):
            with torch.inference_mode():
                new.append(int(model(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax()))
            if new[-1] == words.eos_token_id:
                break
        expected.append(words.decode(new, skip_special_tokens=True))
    assert answer(model, words, prompts, max_new_tokens=6) == expected


def test_sampling_follows_the_seed():
    model, words = load(compressed_pair().base).eval(), tokenizer()

    def drawn(seed):
        torch.manual_seed(seed)
        return answer(model, words, ["ab"], max_new_tokens=12, temperature=1.5)

    assert drawn(1) == drawn(1) != drawn(2)


def test_a_base_that_lacks_a_token_is_not_scored_on_it(tmp_path):
    pair = compressed_pair("grown")
    (tmp_path / "text.txt").write_text("one <extra3> two")
    grown = AutoTokenizer.from_pretrained(pair.finetuned)
    grown.add_tokens(["<extra3>"], special_tokens=True)  # so that the text is split there
    assert 131 in grown("one <extra3> two")["input_ids"]
    for file in ("config.json", "model.safetensors"):
        shutil.copy(pair.finetuned / file, tmp_path / file)
    grown.save_pretrained(tmp_path)
    found = evaluate(pair.base, tmp_path, text=tmp_path / "text.txt", prompts=[Prompt("a", "b")],
                     max_new_tokens=2)
    assert found.finetuned.perplexity > 1
    assert found.base.perplexity is None and found.base.kl_text is None
    assert found.base.kl_prompts > 0  # over the shared vocabulary


def test_prompts_are_read_from_json_lines(tmp_path):
    pair, file = compressed_pair(), tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": p.prompt, "answer": p.answer})
                              for p in PROMPTS) + "\n\n")
    found = evaluate(pair.base, prompts=file, max_new_tokens=1)
    assert found.prompts == 3 and found.base.kl_prompts is None
    file.write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "a"}\n')
    with pytest.raises(CalibrationError, match="line 2"):
        evaluate(pair.base, prompts=file)
    file.write_text("\n")
    with pytest.raises(CalibrationError, match="holds no prompts"):
        evaluate(pair.base, prompts=file)


def test_faults_are_named(tmp_path):
    pair = compressed_pair()
    with pytest.raises(AdamixError, match="nothing to evaluate"):
        evaluate(None, pair.finetuned, pair.delta, prompts=PROMPTS)
    with pytest.raises(CalibrationError, match=r"no-such\.txt"):
        evaluate(pair.base, text=tmp_path / "no-such.txt")
    with pytest.raises(CheckpointError, match="is no folder"):
        evaluate(tmp_path / "no-such", prompts=PROMPTS)
    words = tokenizer()
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    with pytest.raises(AdamixError, match="empty prompt"):
        answer(load(pair.base), words, [""], max_new_tokens=1)


def test_a_bad_delta_is_found_before_any_model_is_loaded(tmp_path, monkeypatch):
    pair = compressed_pair()
    monkeypatch.setattr("adamix.evaluation.load_model", lambda folder: pytest.fail("loaded"))
    with pytest.raises(DeltaFileError, match="is no delta"):
        evaluate(pair.base, pair.finetuned, tmp_path, prompts=PROMPTS)
