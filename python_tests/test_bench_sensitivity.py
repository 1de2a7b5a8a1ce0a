"""bench_sensitivity.py's arithmetic on a tiny random pair; no timings are judged."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import make_pair
from tiny_models import one_thread as one_thread
from transformers import AutoModelForCausalLM

from adamix import matrices
from adamix.compression.share import share_out
from adamix.evaluation import Window, score_windows

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
bench, rows = map(importlib.import_module, ("bench_sensitivity", "rows"))
SHARE = 0.03  # of a matrix's norm that it is changed by


@pytest.fixture(scope="module", params=[False, True], ids=["head", "tied"])
def folders(request, tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("pair"), tied=request.param, dtype=torch.float32)


def unit_error(name, E, model, tokens):
    """As `share_out` counts it: of inputs of mean square one; rows of an embedding weigh 1."""
    if "embed" in name:
        weights = torch.bincount(tokens.flatten(), minlength=len(E)).double()
        return (E.double().square().sum(1) * weights / weights.mean()).sum()
    module, seen = model.get_submodule(name.removesuffix(".weight")), []
    hook = module.register_forward_pre_hook(lambda _, given: seen.append(given[0].flatten(0, 1)))
    model(input_ids=tokens)
    hook.remove()
    x = torch.cat(seen).double()
    return (x @ E.double().T).square().sum() / len(x) / x.square().mean()


def test_kl_is_what_the_sensitivities_say(folders):
    def load():
        return AutoModelForCausalLM.from_pretrained(folders[1], dtype=torch.float32).eval()

    model, random = load(), torch.Generator().manual_seed(1)
    tied = model.config.tie_word_embeddings
    tokens = torch.randint(3, 100, (48, 32), generator=random)
    costs = bench.sensitivities(load(), tokens)
    changed = dict(load().named_parameters())
    assert costs.keys() == {name for name, one in changed.items() if one.dim() == 2}
    windows = [Window(ids, 1) for ids in tokens]
    for name in costs:
        if tied and "embed" in name:  # both uses in one: no unit of its own
            continue
        other = load()
        weight = other.get_parameter(name)
        E = SHARE * weight.std() * torch.randn(weight.shape, generator=random)
        with torch.no_grad():
            expected = costs[name] * unit_error(name, E, model, tokens)
            weight += E
            found = score_windows(other, windows, model)[1]
        assert 0.8 * expected < found < 1.25 * expected, (name, found, expected)


def test_a_power_of_1_weighs_errors_by_their_cost_and_0_takes_relative_ones(monkeypatch):
    given = []
    monkeypatch.setattr(bench, "share_out", lambda spectra, *rest: given.append(spectra) or {})
    spectra = {"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([8.0, 2.0]), "c": torch.zeros(2)}
    for power in (1.0, 0.0):
        with bench.shared_by({"a": 2.0, "b": 0.5, "c": 1.0}, power):
            matrices.share_out(spectra, {}, {}, [])
    assert matrices.share_out is share_out
    torch.testing.assert_close(given[0]["a"], torch.tensor([6.0, 2.0]))
    torch.testing.assert_close(given[0]["b"], torch.tensor([4.0, 1.0]))
    torch.testing.assert_close(given[1]["a"], torch.tensor([0.75, 0.25]))
    torch.testing.assert_close(given[1]["b"], torch.tensor([0.8, 0.2]))
    assert not given[0]["c"].any() and not given[1]["c"].any()


def test_rows_at_equal_bytes(folders, tmp_path):
    asked, text = tmp_path / "asked.jsonl", tmp_path / "text.txt"
    asked.write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "cd", "answer": "e"}\n')
    text.write_text("What stands here is read by two models.")
    bench.main(["--base", str(folders[0]), "--finetunes", str(folders[1]), "--asked", str(asked),
                "--text", str(text), "--ratios", "3", "--sequences", "6", "--length", "16",
                "--powers", "1", "--csv", str(tmp_path / "rows.csv")])
    found = rows.read_rows([tmp_path / "rows.csv"], rows.AccuracyRow)
    assert [row.method for row in found] == ["one ratio", "one budget", "sensitive, power 1"]
    assert all(row.kl_prompts > 0 and row.bytes <= found[0].bytes for row in found)
    assert len({row.kl_text for row in found}) == 3
