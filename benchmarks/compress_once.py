"""One compression in a process of its own, so that its peaks are its own: bench_compress.py's.

    python benchmarks/compress_once.py '{"base": .., "finetuned": .., "out": .., "config": {..}}'

Prints what it took as one JSON object. Optional: "calibration", "threads", "device". Of several
processes that torchrun started the first one prints, and its peaks are those of the largest.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from adamix import Config, compress
from adamix.environment import is_launched, rank_here


def main() -> None:
    options = json.loads(sys.argv[1])
    config = Config.preset(options["config"].pop("preset"), **options["config"])
    given = {name: options[name] for name in ("calibration", "threads") if name in options}
    device = options.get("device", "cpu")
    start = time.perf_counter()
    done = compress(options["base"], options["finetuned"], options["out"], config, device=device,
                    restart=True, **given)
    seconds = time.perf_counter() - start
    gpu = {} if device == "cpu" else _largest({
        "device_bytes": torch.cuda.max_memory_allocated(device),
        "reserved_bytes": torch.cuda.max_memory_reserved(device)})
    if rank_here():
        return
    print(json.dumps(gpu | {
        "seconds": done.seconds, "compress": seconds, "peak_bytes": done.peak_bytes,
        "bytes": done.bytes, "ratio": done.ratio, "mean_error": done.relative_error,
        "matrices": len(done.rows), "processes": done.processes,
        "sha256": _hash_of(done.out)}))


def _hash_of(folder: Path) -> str:
    """SHA-256 of the delta's tensors, of all shards in the order of their names."""
    found = hashlib.sha256()
    for file in sorted(folder.glob("delta*.safetensors")):
        with file.open("rb") as data:
            while block := data.read(2**24):
                found.update(block)
    return found.hexdigest()


def _largest(found: dict[str, int]) -> dict[str, int]:
    """Each figure of the process where it is largest."""
    if not is_launched():
        return found
    everywhere: list[dict[str, int]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everywhere, found)  # `compress` leaves the processes connected
    return {name: max(one[name] for one in everywhere) for name in found}


if __name__ == "__main__":
    main()
