"""One compression in a process of its own, so that its peaks are its own: bench_compress.py's.

    python benchmarks/compress_once.py '{"base": .., "finetuned": .., "out": .., "config": {..}}'

Prints what it took as one JSON object. Optional: "calibration", "threads", "device".
"""

from __future__ import annotations

import json
import sys
import time

import torch

from adamix import Config, compress


def main() -> None:
    options = json.loads(sys.argv[1])
    config = Config.preset(options["config"].pop("preset"), **options["config"])
    given = {name: options[name] for name in ("calibration", "threads") if name in options}
    device = options.get("device", "cpu")
    start = time.perf_counter()
    done = compress(options["base"], options["finetuned"], options["out"], config, device=device,
                    restart=True, **given)
    seconds = time.perf_counter() - start
    gpu = {} if device == "cpu" else {"device_bytes": torch.cuda.max_memory_allocated(device),
                                      "reserved_bytes": torch.cuda.max_memory_reserved(device)}
    print(json.dumps(gpu | {
        "seconds": done.seconds, "compress": seconds, "peak_bytes": done.peak_bytes,
        "bytes": done.bytes, "ratio": done.ratio, "mean_error": done.relative_error,
        "matrices": len(done.rows)}))


if __name__ == "__main__":
    main()
