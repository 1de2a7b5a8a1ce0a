"""Is the delta the same, byte by byte? Compress the example pair again and again and compare.

    python benchmarks/bench_determinism.py
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 1, 2, 3])
    parser.add_argument("--ratio", type=float, default=16.0)
    args = parser.parse_args()
    digests = set()
    with tempfile.TemporaryDirectory() as folder:
        for run, threads in enumerate(args.threads):
            out = Path(folder) / str(run) / "delta"
            subprocess.run([sys.executable, "-m", "adamix", "compress", EXAMPLES / "base",
                            EXAMPLES / "finetuned", "-o", out, "--ratio", str(args.ratio),
                            "--threads", str(threads), "--json"], check=True, capture_output=True)
            digest = hashlib.sha256((out / "delta.safetensors").read_bytes()).hexdigest()
            digests.add(digest)
            print(f"{threads} threads  {digest}", flush=True)
    if len(digests) > 1:
        sys.exit("the deltas differ")
    print("byte-identical")


if __name__ == "__main__":
    main()
