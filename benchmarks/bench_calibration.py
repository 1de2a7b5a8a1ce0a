"""What the text that calibrates is worth: the pair of examples/ calibrated by different sources.

    python benchmarks/bench_calibration.py

The fine-tune writes the text itself, or the base, or half of the sequences each (`--sample-from`);
`prose` is what the base was trained on, `tasks` what the fine-tune was, both from the share that is
not held out; the mixture has as many documents of one as of the other. Exact answers,
KL(fine-tune ‖ base + delta) a token on questions and on prose, both held out; means over seeds, and
their standard deviation.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from itertools import islice
from pathlib import Path

import transformers
from accuracy_tables import mean_of
from example_tasks import prose, task_examples
from tables import table

import adamix
from adamix.evaluation import Scores

EXAMPLES = Path(__file__).parents[1] / "examples"
DOCUMENTS = 3000  # more than calibration reads


def texts_of_prose(seed: int, count: int) -> list[str]:
    return list(islice(prose(100 + seed, held_out=False), count))


def texts_of_tasks(seed: int, count: int) -> list[str]:
    return [one.text for one in islice(task_examples(100 + seed, held_out=False), count)]


def mixed(seed: int, count: int) -> list[str]:
    pairs = zip(texts_of_prose(seed, count // 2), texts_of_tasks(seed, count // 2), strict=True)
    return [text for pair in pairs for text in pair]


WRITERS = {"the fine-tune writes": "finetuned", "both write": "both", "the base writes": "base"}
TEXTS = {"tasks": texts_of_tasks, "prose": texts_of_prose, "prose and tasks": mixed}
SOURCES = (*WRITERS, *TEXTS)


def scored(source: str, ratio: float, seed: int, folder: Path) -> Scores:
    """The example's fine-tune, calibrated by a source and compressed."""
    config, calibration = adamix.Config(ratio=ratio, seed=seed), None
    if source in WRITERS:
        config = replace(config, sample_from=WRITERS[source])
    else:
        calibration = folder / "text.jsonl"
        calibration.write_text("".join(json.dumps({"text": text}) + "\n"
                                       for text in TEXTS[source](seed, DOCUMENTS)))
    adamix.compress(EXAMPLES / "base", EXAMPLES / "finetuned", folder / "delta", config,
                    calibration=calibration, device="cpu")
    found = adamix.evaluate(EXAMPLES / "base", EXAMPLES / "finetuned", folder / "delta",
                            prompts=EXAMPLES / "eval.jsonl", text=EXAMPLES / "heldout_text.jsonl")
    assert found.compressed is not None
    return found.compressed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ratios", type=float, nargs="+", default=[16.0, 32.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=SOURCES)
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    head = ["calibrated by"] + [title for ratio in args.ratios for title in (
        f"1/{ratio:g}: right, %", "KL, questions", "KL, prose")]
    lines = []
    for source in args.sources:
        line = [source]
        for ratio in args.ratios:
            found = []
            for seed in args.seeds:
                with tempfile.TemporaryDirectory(prefix="adamix-calibration-") as folder:
                    found.append(scored(source, ratio, seed, Path(folder)))
            line += [mean_of([100 * (one.accuracy or 0.0) for one in found], 1),
                     mean_of([one.kl_prompts for one in found], 4),
                     mean_of([one.kl_text for one in found], 4)]
        lines.append(line)
        print(line, flush=True)
    print(table(head, lines, numbers=True))


if __name__ == "__main__":
    main()
