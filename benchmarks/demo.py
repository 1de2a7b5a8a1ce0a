"""What `make demo` shows: a real fine-tune compressed to 1/16, what it cost, and the pictures."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = Path("examples")
DEMO = Path("demo")


def adamix(*arguments: object) -> None:
    """Run one command as a user would type it, and show it."""
    words = [str(argument) for argument in arguments]
    print(f"\n$ adamix {' '.join(words)}\n", flush=True)
    subprocess.run([sys.executable, "-m", "adamix", *words], cwd=ROOT, check=True)


def main() -> None:
    start = time.perf_counter()
    shutil.rmtree(ROOT / DEMO, ignore_errors=True)
    pair = (EXAMPLES / "base", EXAMPLES / "finetuned")
    adamix("compress", *pair, "-o", DEMO / "delta", "--ratio", "16")
    adamix("evaluate", *pair, DEMO / "delta", "--prompts", EXAMPLES / "eval.jsonl",
           "--text", EXAMPLES / "heldout_text.jsonl")
    adamix("inspect", DEMO / "delta", "--plot", DEMO)
    adamix("generate", EXAMPLES / "base", "--delta", DEMO / "delta", "Add 47 and 85.")
    pictures = sorted(path.relative_to(ROOT) for path in (ROOT / DEMO).glob("*.png"))
    print(f"\nThe delta: {DEMO / 'delta'}. The pictures: {' and '.join(map(str, pictures))}."
          f"\nThat took {time.perf_counter() - start:.0f} s. The same for models of your own:"
          f"\n\n  .venv/bin/adamix compress BASE FINETUNED -o DELTA --ratio 16")


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
