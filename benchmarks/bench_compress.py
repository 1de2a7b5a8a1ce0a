"""Seconds by stage and peak memories of the compression of a whole model, on a GPU or a CPU.

    python benchmarks/bench_compress.py --rival --csv benchmarks/results/compression.csv

A random pair in Qwen2.5-7B's shapes (made_models.py) is written, then compressed with 128 x 2048
random tokens to calibrate by, in a process of its own: the time is that process's, from its start
to its end. `--processes 2` compresses it on two GPUs of this machine, under torchrun: the time is
torchrun's then, and the bytes (`sha256`) must be those of one. `--rival` then compresses one
decoder layer, from its Gram matrices on, with adamix and in plain PyTorch (straightforward.py), the
same steps at the same size.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from made_models import MODELS, config_of, make_pair, model_size
from one_layer import LayerResult, adamix_layer, read_layer, straightforward_layer
from rows import WHOLE, CompressionRow, append_row, check_header, command_of, commit
from safetensors.torch import save_file

import adamix
from adamix.parallel import available_cores

MEMORY = Path("/dev/shm")
ROOM = 2.3  # times a model's size: the pair, the delta twice, its work folder
IMPORTS, OTHER = "imports", "other"
GB = 1e9


class Bench:
    """A run: its options, its pair, and where its rows go."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder = args, folder
        self.config = config_of(args.model, args.layers)
        start = time.perf_counter()
        self.pair = make_pair(folder, self.config, device=args.device)
        size = model_size(self.config) / GB
        print(f"{args.model}, {self.config.num_hidden_layers} layers: two models of {size:.2f} GB "
              f"in {folder}, {time.perf_counter() - start:.1f} s", flush=True)
        if args.device == "cuda":  # the compression's process needs it
            torch.cuda.empty_cache()
        self.row = CompressionRow(
            args.model if args.model in MODELS else Path(args.model).name,
            self.config.num_hidden_layers, "model", "adamix", "", sequences=args.sequences,
            length=args.length, preset=args.preset, target_ratio=args.ratio,
            processes=args.processes, threads=max(1, args.threads // args.processes),
            device=torch.cuda.get_device_name() if args.device == "cuda" else "CPU",
            commit=commit(Path(__file__).parent),
            command=command_of(sys.argv),
            date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"))

    def model(self) -> None:
        """Compress the pair."""
        args, out = self.args, self.folder / "delta"
        shutil.rmtree(out, ignore_errors=True)
        options: dict[str, object] = {
            "base": str(self.pair[0]), "finetuned": str(self.pair[1]), "out": str(out),
            "threads": self.row.threads, "device": args.device,
            "config": {"preset": args.preset, "ratio": args.ratio,
                       "calibration_sequences": args.sequences, "calibration_length": args.length}}
        if not args.self:
            options["calibration"] = str(self._tokens())
        launcher = [] if args.processes == 1 else [
            "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.processes)]
        start = time.perf_counter()
        done = subprocess.run([
            sys.executable, *launcher, Path(__file__).parent / "compress_once.py",
            json.dumps(options)], stdout=subprocess.PIPE)
        seconds = time.perf_counter() - start
        if done.returncode:
            sys.exit(f"the compression ended with exit code {done.returncode}")
        found = json.loads(done.stdout.splitlines()[-1])
        shutil.rmtree(out)
        where = "files in memory" if MEMORY in self.folder.parents else "files on a disk"
        whole = replace(
            self.row, stage=WHOLE, seconds=seconds, host_gb=found["peak_bytes"] / GB,
            device_gb=_gb(found.get("device_bytes")), reserved_gb=_gb(found.get("reserved_bytes")),
            bytes=found["bytes"], ratio=found["ratio"], error=found["mean_error"],
            processes=found["processes"], sha256=found["sha256"],
            note=f"{found['matrices']} matrices, {where}")
        stages = {IMPORTS: seconds - found["compress"], **found["seconds"]}
        if (rest := seconds - sum(stages.values())) > 0:  # stages may run side by side
            stages[OTHER] = rest
        kind = "sampled" if args.self else "given"
        places = f"{args.processes} x " * (args.processes > 1) + self.row.device
        self._show(stages, whole, f"{args.model}, {self.row.layers} layers, calibrated by "
                   f"{args.sequences} x {args.length} {kind} tokens; {places}")

    def layer(self) -> None:
        """One decoder layer in both ways."""
        config = adamix.Config.preset(self.args.preset, ratio=self.args.ratio)
        layer = read_layer(*self.pair, self.args.device)
        ours = adamix_layer(layer, config, self.args.threads)
        self._show({}, self._layer_row("adamix", ours),
                   f"one layer by adamix, from the Gram matrices of {', '.join(layer.groups)} on")
        rival = straightforward_layer(layer, config, self.args.rival_seconds)
        self._show(rival.stages, self._layer_row("straightforward", rival),
                   "the same layer in plain PyTorch", rival.measured_stages)
        print(f"one layer: {rival.seconds:.2f} s in plain PyTorch, {ours.seconds:.3f} s by adamix: "
              f"{rival.seconds / ours.seconds:.1f} times as fast", flush=True)

    def _layer_row(self, impl: str, found: LayerResult) -> CompressionRow:
        return replace(self.row, scope="layer", impl=impl, stage=WHOLE, seconds=found.seconds,
                       processes=1, threads=self.args.threads,
                       measured_s=found.measured, layers=1, sequences=None, length=None,
                       device_gb=_gb(found.device_bytes), error=found.error, note=found.note)

    def _tokens(self) -> Path:
        generator = torch.Generator().manual_seed(0)
        shape, path = (self.args.sequences, self.args.length), self.folder / "tokens.safetensors"
        save_file({"input_ids": torch.randint(self.config.vocab_size, shape, dtype=torch.int32,
                                              generator=generator)}, path)
        return path

    def _show(self, stages: dict[str, float], whole: CompressionRow, title: str,
              measured: dict[str, float] | None = None) -> None:
        """Write and print a row a stage, the whole last."""
        plain = replace(self.row, scope=whole.scope, impl=whole.impl, layers=whole.layers,
                        sequences=whole.sequences, length=whole.length,
                        processes=whole.processes, threads=whole.threads)
        rows = [replace(plain, stage=stage, seconds=seconds, measured_s=(measured or {}).get(stage))
                for stage, seconds in stages.items()]
        print(title)
        for row in [*rows, whole]:
            if self.args.csv is not None:
                append_row(self.args.csv, row)
            share = (row.seconds or 0.0) / (whole.seconds or 1.0)
            print(f"{row.stage:<30} {row.seconds:9.2f} s  {share:6.1%}")
        facts = [f"peak of the host {whole.host_gb:.2f} GB" if whole.host_gb else "",
                 f"of the device {whole.device_gb:.2f} GB" if whole.device_gb else "",
                 f"reserved {whole.reserved_gb:.2f} GB" if whole.reserved_gb else "",
                 f"{whole.bytes / 1e6:.2f} MB, ratio {whole.ratio:.2f}" if whole.bytes else "",
                 f"mean error {whole.error:.4g}" if whole.error is not None else "", whole.note,
                 f"SHA-256 {whole.sha256}" if whole.sha256 else ""]
        print(", ".join(filter(None, facts)), end="\n\n", flush=True)


def _gb(size: int | None) -> float | None:
    return None if size is None else size / GB


@contextmanager
def place(folder: Path | None, size: float) -> Iterator[Path]:
    """The folder given, or one that is removed again: in memory where there is room for so much."""
    if folder is not None:
        yield folder
        return
    roomy = MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > size and _available() > 2 * size
    with tempfile.TemporaryDirectory(dir=MEMORY if roomy else None) as temporary:
        yield Path(temporary)


def _available() -> float:
    """Bytes of memory that are not in use."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024.0 * int(line.split()[1]) for line in lines
                    if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 0.0


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen2.5-7b",
                        help=f"{', '.join(MODELS)}, or a config.json whose shapes to take")
    parser.add_argument("--layers", type=int, help="instead of the model's own number")
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--self", action="store_true", help="self-calibration, not given tokens")
    parser.add_argument("--ratio", type=float, default=16.0)
    parser.add_argument("--preset", choices=("adamix", "paper"), default="adamix")
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--processes", type=int, default=1, metavar="N",
                        help="that compress the model together, on a GPU each; --threads is that "
                             "of all together")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rival", action="store_true", help="one layer in plain PyTorch too")
    parser.add_argument("--rival-seconds", type=float, metavar="S",
                        help="of GPTQ at every width there, about: a matrix is begun with its "
                             "narrowest widths, and what they took is scaled up to all")
    parser.add_argument("--no-model", action="store_true", help="only the layer of --rival")
    parser.add_argument("--folder", type=Path, help="where to keep the pair for the next time")
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()
    if args.csv is not None and args.csv.exists():
        check_header(args.csv, CompressionRow)
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit(f"bench_compress.py measures on an NVIDIA GPU; torch {torch.__version__} sees "
                 f"none on this machine (--device cpu --model tiny tries it out).")
    if args.device == "cuda" and torch.cuda.device_count() < args.processes:
        sys.exit(f"--processes {args.processes} takes as many GPUs; here are "
                 f"{torch.cuda.device_count()}")
    with place(args.folder, ROOM * model_size(config_of(args.model, args.layers))) as folder:
        bench = Bench(args, folder)
        if not args.no_model:
            bench.model()
        if args.rival:
            bench.layer()


if __name__ == "__main__":
    main()
