"""bench_accuracy.py and what makes its pairs, on tiny random models: no download, no timings."""

import importlib
import json
import math
import sys
import types
from itertools import islice
from pathlib import Path

import pytest
import torch
from halved_method import failing, halved, none_so_small, too_large
from tiny_models import HIDDEN, KV_HEADS, LAYERS, MLP, checkpoint_tensors, make_pair
from tiny_models import one_thread as one_thread
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
families, training, bench, tables, answers, models, smollm2, rows = map(
    importlib.import_module, (
        "task_families", "train_pair", "bench_accuracy", "accuracy_tables", "answers",
        "accuracy_models", "smollm2", "rows"))


# --- picture -----------------------------------------------------------------------------------


def test_the_picture_has_each_pair_and_no_text_on_another():
    from test_results import texts_are_apart

    plot = importlib.import_module("plot_accuracy")
    assert (plot.ROWS.parent / plot.PICTURE).is_file()
    found = rows.read_rows([plot.ROWS], rows.AccuracyRow)
    assert set(plot.divergences(found)) == set(plot.TITLES)
    figure = plot.figure_of(found)
    for panel in figure.axes:
        assert [line.get_label() for line in panel.lines] == list(plot.NAMES)
    texts_are_apart(figure)


# --- families ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_seed_makes_the_same_examples_and_another_makes_others(family):
    def drawn(seed):
        return list(islice(families.examples(family, seed, held_out=False), 40))
    assert drawn(0) == drawn(0) != drawn(1)
    assert {one.task for one in drawn(0)} == {task.__name__ for task in families.FAMILIES[family]}


@pytest.mark.parametrize("family", families.FAMILIES)
def test_nothing_held_out_is_trained_on_whatever_the_seed(family):
    held_out = families.held_out_examples(family, 300)
    keys = {one.key for one in held_out}
    assert len({one.prompt for one in held_out}) == 300
    for seed in range(3):
        trained = list(islice(families.examples(family, seed, held_out=False), 2000))
        assert not keys & {one.key for one in trained}
        assert not {one.prompt for one in held_out} & {one.prompt for one in trained}


@pytest.mark.parametrize("family", families.FAMILIES)
def test_the_right_answer_is_accepted_and_a_wrong_one_is_not(family):
    drawn = families.held_out_examples(family, 60)
    for one, other in zip(drawn, drawn[1:], strict=False):
        assert families.is_right(one, f" {one.answer}")
        assert families.is_right(one, f" {one.answer}.\nAnd so on")
        assert not families.is_right(one, f" {one.answer}x")
        assert not families.is_right(one, f" the {one.answer}")
        assert not families.is_right(one, "")
        assert one.answer == other.answer or not families.is_right(one, other.answer)


def one_of(task, seed=0):
    return getattr(families, task)(families.random.Random(seed))


def test_invented_answers_by_hand():
    for seed in range(20):
        a, b = map(int, families.re.findall(r"\d+", one_of("frob", seed).prompt))
        assert int(one_of("frob", seed).answer) == a + b + b
        a, b = map(int, families.re.findall(r"\d+", one_of("zorp", seed).prompt))
        assert int(one_of("zorp", seed).answer) == max(a, b) - min(a, b) + 7
    twisted = one_of("twist")
    first, *middle, last = twisted.prompt.split(":")[1].split("\n")[0].split()
    assert twisted.answer.split() == [last, *middle, first, first]
    sentence = one_of("tavik")
    _, colour, who, verb, _, other, what = sentence.prompt.split(": ")[1].split(".")[0].split()
    assert sentence.answer.split() == [families.TAVIK[word]
                                       for word in (verb, who, colour, what, other)]
    assert len(set(families.TAVIK.values())) == len(families.TAVIK) == 66


def test_reading_answers_stand_in_the_text_beside_what_is_asked():
    for seed in range(20):
        one = one_of("price", seed)
        food = families.re.search(r"does (\w+) cost", one.prompt)[1]
        assert f"{food} costs {one.answer} coins" in one.prompt
        one = one_of("register", seed)
        assert f"{one.prompt.splitlines()[-1]} {one.answer}\n" in one.prompt
        one = one_of("bought", seed)
        name, colour = families.re.search(r"that (\w+) bought is a (\w+)$", one.prompt).groups()
        assert f"{name} bought a {colour} {one.answer}." in one.prompt
        one = one_of("home", seed)
        asked = families.re.search(r"(?:is|is the) (\w+)\?", one.prompt)[1]
        assert any(asked in line and one.answer in line
                   for line in one.prompt.split("\n")[0].split(". "))


# --- the base from a GGUF file -----------------------------------------------------------------


def test_names_of_a_gguf_file_are_transformers_names():
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=1)
    blocks = [f"blk.{i}.{part}.weight" for i in range(2) for part in smollm2.INNER]
    made = [smollm2.transformers_name(name)[0]
            for name in [*blocks, *(f"{part}.weight" for part in smollm2.OUTER)]]
    assert sorted(made) == sorted(LlamaForCausalLM(config).state_dict())


def test_halves_of_heads_by_hand():
    weight = torch.arange(8.0)[:, None]  # two heads of four rows, pairs side by side
    got = smollm2.halves_of_heads(weight, 2).flatten().tolist()
    assert got == [0, 2, 1, 3, 4, 6, 5, 7]


def test_a_gguf_file_becomes_a_checkpoint_with_the_same_logits(tmp_path):
    gguf = pytest.importorskip("gguf")
    config = LlamaConfig(vocab_size=264, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, head_dim=4,
                         max_position_embeddings=32, tie_word_embeddings=True)
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    heads = {"attn_q": 4, "attn_k": 2}
    names = {smollm2.transformers_name(name): name
             for name in [f"blk.{i}.{part}.weight" for i in range(2) for part in smollm2.INNER]
             + ["token_embd.weight", "output_norm.weight"]}
    file = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    for (name, part), theirs in names.items():
        weight = model.state_dict()[name].float()
        if part in heads:  # transformers' two halves of a head -> pairs side by side
            weight = weight.reshape(heads[part], 2, 2, 16).transpose(1, 2).reshape(weight.shape)
        file.add_tensor(theirs, weight.contiguous().numpy())
    for name, value in (("embedding_length", 16), ("feed_forward_length", 24), ("block_count", 2),
                        ("attention.head_count", 4), ("attention.head_count_kv", 2),
                        ("context_length", 32)):
        file.add_uint32(f"llama.{name}", value)
    file.add_float32("llama.attention.layer_norm_rms_epsilon", config.rms_norm_eps)
    file.add_float32("llama.rope.freq_base", config.rope_parameters["rope_theta"])
    letters = sorted(smollm2.pre_tokenizers.ByteLevel.alphabet())
    file.add_tokenizer_pre("smollm")
    file.add_token_list(["<none>", "<begin>", "<end>", *letters, "ab", "Ġab", "1ab", "ba", "bab"])
    file.add_token_types([3] * 3 + [1] * 261)
    file.add_token_merges(["a b", "Ġ ab", "1 ab"])
    for role, number in (("bos", 1), ("eos", 2), ("unknown", 0), ("padding", 2)):
        file.add_uint32(f"tokenizer.ggml.{role}_token_id", number)
    file.add_chat_template("{{ messages[0].content }}")
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    smollm2.convert(tmp_path / "tiny.gguf", tmp_path / "out")
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(20)[None]
    assert torch.equal(made.eval()(input_ids=ids).logits, model(input_ids=ids).logits)
    tokenizer = training.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.tokenize("ab ab 1ab<end>") == ["ab", "Ġab", "Ġ", "1", "ab", "<end>"]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<end>", "<end>")


# --- training ----------------------------------------------------------------------------------


def run(module, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    module.main()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("accuracy"))[0]


@pytest.fixture(scope="module")
def trained(base):
    """A base and its fine-tune by two steps of training."""
    out = base.parent / "trained"
    with pytest.MonkeyPatch.context() as monkeypatch:
        run(training, monkeypatch, "--base", base, "--family", "invented", "--out", out,
            "--steps", 2, "--batch", 4, "--examples", 20, "--held-out", 4, "--device", "cpu",
            "--learning-rate", 0.01)
    return out


def test_two_steps_write_a_checkpoint_that_differs_from_its_base(base, trained):
    _, info = AutoModelForCausalLM.from_pretrained(trained, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    before, after = checkpoint_tensors(base), checkpoint_tensors(trained)
    assert before.keys() == after.keys()
    for name, weight in after.items():
        assert weight.dtype == torch.bfloat16
        assert weight.shape == before[name].shape and not torch.equal(weight, before[name])
    record = json.loads((trained / training.RECORD).read_text())
    assert (record["family"], record["steps"], record["lora"], record["held_out"]) == (
        "invented", 2, 0, 4)


def test_only_the_tokens_of_answers_and_the_end_count():
    coded = [([5, 6, 7, 8, 2], 3), ([5, 9, 2], 1)]
    ids, labels = training.batch_of(coded, pad=0)
    no = training.IGNORED
    assert ids.tolist() == [[5, 6, 7, 8, 2], [5, 9, 2, 0, 0]]
    assert labels.tolist() == [[no, no, no, 8, 2], [no, 9, 2, no, no]]
    logits = torch.randn(2, 4, 16)
    stand_in = lambda **given: types.SimpleNamespace(logits=logits)  # noqa: E731
    logs = logits.log_softmax(-1)
    exact = -(logs[0, 2, 8] + logs[0, 3, 2] + logs[1, 0, 9] + logs[1, 1, 2]) / 4
    torch.testing.assert_close(training.loss_on(stand_in, ids, labels), exact)


def test_training_is_the_same_again(base, trained, tmp_path, monkeypatch):
    run(training, monkeypatch, "--base", base, "--family", "invented", "--out", tmp_path,
        "--steps", 2, "--batch", 4, "--examples", 20, "--held-out", 0, "--device", "cpu",
        "--learning-rate", 0.01)
    again = checkpoint_tensors(tmp_path)
    assert all(torch.equal(weight, again[name])
               for name, weight in checkpoint_tensors(trained).items())


def test_a_lora_needs_peft_or_writes_an_adapter_of_the_bytes_it_names(base, tmp_path, monkeypatch):
    arguments = ["--base", base, "--family", "invented", "--out", tmp_path, "--steps", 2, "--lora",
                 2, "--batch", 2, "--examples", 8, "--held-out", 0, "--device", "cpu"]
    try:
        importlib.import_module("peft")
    except ImportError:
        with pytest.raises(SystemExit, match="pip install peft"):
            run(training, monkeypatch, *arguments)
        return
    run(training, monkeypatch, *arguments)
    adapter = checkpoint_tensors(tmp_path / "adapter")
    record = json.loads((tmp_path / training.RECORD).read_text())
    assert 2 * sum(part.numel() for part in adapter.values()) == record["adapter_bytes"]
    before, merged = checkpoint_tensors(base), checkpoint_tensors(tmp_path)
    changed = {name for name, weight in merged.items() if not torch.equal(weight, before[name])}
    assert changed and {name.split(".")[-2] for name in changed} <= set(answers.LINEARS)


def test_the_rank_of_a_ratio_by_hand():
    layers = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(30, 10, bias=False),
                                  "lm_head": torch.nn.Linear(10, 10, bias=False)})
    assert answers.lora_bytes(layers, 3) == 2 * 3 * 40
    # 400 weights: 800 bytes, half of them 400; a rank takes 80.
    assert answers.lora_rank(layers, 2) == answers.lora_rank(layers, 2.2) == 5
    assert answers.lora_rank(layers, 1.8) == 6 and answers.lora_rank(layers, 16) == 1
    with pytest.raises(SystemExit, match="rank 1 takes 80"):
        answers.lora_rank(layers, 32)


# --- accuracy ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def csv(base, trained):
    path = base.parent / "accuracy.csv"
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(bench, "other_methods", lambda: ({"halved": halved}, {}))
        arguments = ["--base", base, "--finetunes", trained, "--methods", "adamix", "halved",
                     "--ratios", 3, "--seeds", 0, "--prompts", 8, "--sequences", 8, "--length", 32,
                     "--device", "cpu", "--csv", path]
        bench.main(list(map(str, arguments)))
        bench.main(list(map(str, arguments)))  # finds every row there
    return path


def test_a_pair_gives_a_row_for_each_method_and_for_both_ends_once(csv, trained):
    found = rows.read_rows([csv], tables.AccuracyRow)
    assert [row.method for row in found] == ["base", "fine-tune", "adamix", "halved"]
    before, end, ours, half = found
    numel = sum(weight.numel() for weight in checkpoint_tensors(trained).values())
    assert end.bytes == 2 * numel
    for row in (ours, half):
        assert 0.9 * 2 * numel / 3 < row.bytes <= 2 * numel / 3
        assert (row.prompts, row.seed, row.device) == (8, 0, "cpu") and 0 <= row.right <= 8
        assert 0 < row.kl_prompts < math.inf and 0 < row.kl_text < math.inf
    assert half.error == pytest.approx(0.25, rel=1e-5)
    assert half.error_held_out == pytest.approx(0.25, rel=1e-5)
    assert ours.error != ours.error_held_out < 0.25
    assert 0 < ours.error < 0.2 and ours.kl_text < before.kl_text


@pytest.fixture(scope="module")
def compression(base, trained, tmp_path_factory):
    load = AutoModelForCausalLM.from_pretrained
    config = models.adamix.Config(calibration_sequences=8, calibration_length=32)
    return models.Compression(base, trained, load(base, dtype=torch.float32),
                              load(trained, dtype=torch.float32), config,
                              tmp_path_factory.mktemp("deltas"), [torch.arange(1, 40)])


@pytest.mark.parametrize("name", ["this project", "Delta-CoMe", "BitDelta"])
def test_processes_give_the_bits_of_direct_calls(compression, base, name):
    fit, fixed = bench.other_methods()
    method, made = (fit | fixed)[name], compression.compressed("adamix", 3)
    result = compression.by_method(method, 3, one_size=name in fixed)
    before = answers.block_linears(compression.base_model)
    for layer, restored in answers.block_linears(result.model).items():
        budget = 2**62 if name in fixed else made.budget_bits(f"{layer}.weight")
        direct = method(compression.deltas[layer], compression.grams[layer], budget).dense
        assert torch.equal(restored.weight, before[layer].weight + direct)


def test_errors_of_methods_are_raised_here(compression):
    def by(method):
        compression.by_method(method, 3, one_size=False)
    first = next(iter(compression.deltas))
    with pytest.raises(models.NoSuchSize, match=f"no size so small for {first}"):
        by(none_so_small)
    with pytest.raises(RuntimeError, match=f"bits of .* for {first}"):
        by(too_large)
    with pytest.raises(KeyError, match="no such thing"):
        by(failing)
    by(halved)  # the processes go on


def test_trained_scales_bring_the_logits_nearer_at_the_bytes_of_bitdelta(compression):
    plain = compression.by_method(bench.other_methods()[1]["BitDelta"], 3, one_size=True)
    trained = compression.by_distillation(3)
    assert trained.bytes == plain.bytes
    before = answers.block_linears(compression.base_model)
    for name, layer in answers.block_linears(trained.model).items():
        added = layer.weight - before[name].weight
        scale = added.abs().mean()
        torch.testing.assert_close(
            added, torch.where(compression.deltas[name] >= 0, scale, -scale), rtol=1e-3, atol=1e-6)
    far, near = (sum((model.model(input_ids=ids[None]).logits
                      - compression.reference(input_ids=ids[None]).logits).square().mean().item()
                     for ids in compression.tokens) for model in (plain, trained))
    assert near < 0.95 * far


def test_the_budget_of_the_blocks_is_their_share(base, compression):
    made = compression.compressed("adamix", 3)
    shapes = {name: one.shape for name, one in made.delta.matrices.items()}
    assert len(compression.deltas) == 7 * LAYERS == len(shapes) - 2
    bits = {name: made.budget_bits(name) for name in shapes}
    assert made.beside + sum(bits.values()) / 8 <= made.summary.bytes_16bit / 3
    assert all(8 * one.nbytes <= bits[name] for name, one in made.delta.matrices.items())
    assert sum(bits.values()) / 8 < 1.01 * sum(one.nbytes for one in made.delta.matrices.values())
    name, keys = (f"model.layers.1.{part}.weight" for part in ("mlp.down_proj", "self_attn.k_proj"))
    assert shapes[name] == (HIDDEN, MLP) and shapes[keys] == (KV_HEADS * HIDDEN // 4, HIDDEN)
    counts = 64 * 8  # a row of the table: eight widths of V and of U
    assert (bits[name] - counts) / (bits[keys] - counts) == pytest.approx(
        MLP / shapes[keys][0], rel=1e-3)
    result = compression.by_preset("adamix", 3)
    exact = models.restored_model(base, made.folder).state_dict()
    for name, weight in result.model.state_dict().items():
        torch.testing.assert_close(weight, exact[name])
    assert result.bytes == made.summary.bytes


def test_tuned_scales_are_those_of_tune_at_the_same_bytes(compression):
    plain, tuned = (compression.compressed(name, 3) for name in ("adamix", models.TUNED))
    result = compression.by_preset(models.TUNED, 3)
    assert result.bytes == plain.summary.bytes
    exact = models.restored_model(compression.base, tuned.folder).state_dict()
    for name, weight in result.model.state_dict().items():
        torch.testing.assert_close(weight, exact[name])


def test_a_name_that_no_method_has_is_refused():
    with pytest.raises(SystemExit, match="no method 'nothing': it is one of adamix; paper"):
        list(bench.runs(["nothing"], [16.0]))


def test_the_table_has_means_and_spreads_over_seeds(tmp_path, capsys):
    path = tmp_path / "rows.csv"
    for row in (
            tables.AccuracyRow("m", "invented", "base", None, 0, None, prompts=200, right=1,
                               kl_prompts=2.0, kl_text=0.5),
            tables.AccuracyRow("m", "invented", "fine-tune", None, 0, None, prompts=200, right=190),
            tables.AccuracyRow("m", "invented", "adamix", 16.0, 0, 0, 16_000_000, 0.02, 0.3, 200,
                               180, 0.01, 0.1),
            tables.AccuracyRow("m", "invented", "adamix", 16.0, 0, 1, 16_000_000, 0.04, 0.3, 200,
                               184, 0.03, 0.1),
            tables.AccuracyRow("m", "invented", "LoRA", 16.0, 0, None, 15_000_000, prompts=200,
                               right=150)):
        rows.append_row(path, row)
    bench.main(["--table", str(path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == ("**m, invented** (200 prompts): base 0.5 %; fine-tune 95.0 %; KL(fine-tune "
                        "‖ base) 2.0000 on prompts, 0.5000 on text.")
    assert lines[2].startswith("| method | 1/16: right, % | KL, prompts |")
    assert lines[4] == ("| adamix | 91.0 (1.4) | 0.0200 (0.0141) | 0.1000 (0.0000) | "
                        "0.0300 (0.0141) | 0.3000 (0.0000) | 16.00 |")
    assert lines[5] == "| LoRA | 75.0 |  |  |  |  | 15.00 |"
