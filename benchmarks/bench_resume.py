"""Does an interrupted compression end as if it had never been? Kill it at random moments with
SIGKILL, let the same command go on, and compare all bytes with those of an uninterrupted run.

    python benchmarks/bench_resume.py
"""

from __future__ import annotations

import argparse
import hashlib
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
LOG = "compression_log.csv"


def digest(folder: Path) -> dict[str, str]:
    """{file: SHA-256}; of the log all but the seconds, its last column."""
    found = {}
    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        if file.name == LOG:
            data = b"\n".join(line.rpartition(b",")[0] for line in data.splitlines())
        found[file.name] = hashlib.sha256(data).hexdigest()
    return found


def start(pair: list[Path], out: Path, options: list[str]) -> subprocess.Popen[bytes]:
    """The command of `make demo`."""
    return subprocess.Popen([sys.executable, "-m", "adamix", "compress", *pair, "-o", out,
                             "--ratio", "16", *options, "--json"],
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def kill_once(pair: list[Path], out: Path, options: list[str], after: float) -> tuple[str, float]:
    """Kill a run after so many seconds, go on; (where it was, seconds of the second run)."""
    process = start(pair, out, options)
    time.sleep(after)
    process.kill()
    process.wait()
    work = out.parent / f".{out.name}.partial"
    count = len(list((work / "matrices").glob("*.safetensors")))
    where = ("at its end" if out.exists() else f"with {count} matrices" if count
             else "with its tokens" if (work / "calibration.safetensors").exists() else "before")
    begun = time.monotonic()
    if not out.exists() and start(pair, out, options).wait():
        sys.exit(f"the run that went on from {where} failed")
    if work.exists() and where != "at its end":
        sys.exit(f"{work} is left")
    return where, time.monotonic() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pair", type=Path, nargs=2, metavar=("BASE", "FINETUNED"),
                        default=[EXAMPLES / "base", EXAMPLES / "finetuned"])
    args, options = parser.parse_known_args()
    draw, same = random.Random(args.seed), 0
    with tempfile.TemporaryDirectory() as folder:
        whole, begun = Path(folder) / "0" / "delta", time.monotonic()
        if start(args.pair, whole, options).wait():
            sys.exit("the uninterrupted run failed")
        seconds, expected = time.monotonic() - begun, digest(whole)
        print(f"uninterrupted: {seconds:.1f} s  {expected['delta.safetensors']}", flush=True)
        for kill in range(1, args.kills + 1):
            out, after = Path(folder) / str(kill) / "delta", draw.uniform(0, seconds)
            where, rest = kill_once(args.pair, out, options, after)
            is_same = digest(out) == expected
            same += is_same
            print(f"killed after {after:5.1f} s {where:<18} went on for {rest:5.1f} s  "
                  f"{'same bytes' if is_same else 'OTHER BYTES'}", flush=True)
    print(f"{same} of {args.kills} interrupted runs ended with the bytes of the uninterrupted one")
    sys.exit(same != args.kills)


if __name__ == "__main__":
    main()
