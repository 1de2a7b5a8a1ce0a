"""Pairs of other making in bench_accuracy.py: their questions come from files."""

import importlib
import json
import sys
from pathlib import Path

from tiny_models import compressed_pair
from tiny_models import one_thread as one_thread

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
bench, tables, rows, questions = map(importlib.import_module, (
    "bench_accuracy", "accuracy_tables", "rows", "questions"))


def test_a_pair_without_a_record_is_asked_what_a_file_says(tmp_path):
    pair = compressed_pair()
    asked, text = tmp_path / "asked.jsonl", tmp_path / "text.jsonl"
    asked.write_text("".join(json.dumps({"prompt": f"{n} and", "answer": f"{n}, {n}"}) + "\n"
                             for n in range(6)))
    text.write_text('{"text": "One document."}\n{"text": "Another."}\n')
    path = tmp_path / "rows.csv"
    bench.main(list(map(str, (
        "--base", pair.base, "--finetunes", pair.finetuned, "--asked", asked, "--text", text,
        "--prompts", 4, "--methods", "adamix", "--ratios", 4, "--seeds", 0, "--sequences", 4,
        "--length", 32, "--device", "cpu", "--csv", path))))
    found = rows.read_rows([path], rows.AccuracyRow)
    name = pair.base.parent.name
    assert [(row.model, row.family, row.method) for row in found] == [
        (name, "", method) for method in ("base", "fine-tune", "adamix")]
    assert {row.prompts for row in found} == {4} and found[2].kl_text > 0
    assert tables.markdown(found).startswith(f"**{name}** (4 prompts)")
    made = questions.Questions.of(bench.tokenizer_of([pair.base]), asked, 10, text, 64)
    assert len(made.asked) == 6 and len(made.text) == 2
    one = made.asked[3]
    assert made.right(one, " 3, 3 \n") and not made.right(one, "3") and not made.right(one, "3, 3.")
