"""The rest of the paper's tables and figures, on pairs of train_pair.py; bench_accuracy.py has 2 to
5 and 7.

    python benchmarks/bench_paper.py --base BASE --finetunes PAIR .. --rows benchmarks/results
    python benchmarks/bench_paper.py --data PATH/smollm2-arith --rows benchmarks/results
    python benchmarks/bench_paper.py --rows benchmarks/results --table    # Markdown, from the rows
    python benchmarks/bench_paper.py --rows benchmarks/results --plot     # pictures, from the rows

Parts: `widths` (Table 6: accuracy, KL and error by f_max), `errors` (Tables 8 and 10: errors of the
outputs by layers and type), `seconds` (Table 9), `components` (Figure 2), `plan` (Figure 4). Each
has a CSV in the folder of rows; what is there is not measured again.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import paper_tables
import plot_paper
import torch
from accuracy_models import Compression, NoSuchSize, Result
from answers import LINEARS
from bench_accuracy import Bench, Questions, measuring_arguments
from bench_methods import Case
from bench_quality import matrices
from few_widths import Solve, with_solver
from methods import FIXED, METHODS, adamix_published
from paper_measures import (
    by_group,
    components,
    group_of,
    kind_of,
    model_errors,
    ours,
    stage_seconds,
)
from paper_rows import ComponentRow, ErrorRow, PlanRow, StageRow
from paper_tables import FILES, NONE, OURS, PUBLISHED, PUBLISHED_WIDTHS
from rows import AccuracyRow, AnyRow, append_row, read_rows
from torch import Tensor
from train_pair import RECORD

import adamix
from adamix.compression.allocate import allocate
from adamix.config import MODEL_BITS
from adamix.devices import find_compute
from adamix.errors import BudgetError
from adamix.naming import index_of
from adamix.parallel import available_cores, workers
from adamix.plots import default_matrix
from adamix.solving import solvers

PARTS = ("widths", "errors", "seconds", "components", "plan")
COMPARED = ("low rank, 16-bit", "BitDelta", "Delta-CoMe", PUBLISHED, OURS)  # Tables 8 and 10


@dataclass(frozen=True)
class Run:
    """A method by its name in the rows; `compress` None: preset `adamix` by `adamix.compress`."""

    name: str
    compress: Callable[..., object] | None
    one_size: bool = False
    scored: bool = False  # in Table 6
    by_layer: bool = False  # in Tables 8 and 10


def runs(args: argparse.Namespace, solve: Solve) -> Iterator[Run]:
    """Of the parts `widths` and `errors`; `solve` solves integer programs without a limit."""
    widths, errors = "widths" in args.parts, "errors" in args.parts
    few = with_solver(solve)
    published = partial(adamix_published.corrected, solve=few)
    if widths:
        yield from (Run(f"{OURS}, f_max {most or NONE}",
                        partial(ours, max_widths=most, solve=few), scored=True)
                    for most in args.widths)
        yield from (Run(f"{PUBLISHED}, f_max {most or NONE}",
                        partial(published, max_widths=most), scored=True)
                    for most in args.published_widths if most != PUBLISHED_WIDTHS)
    for name in COMPARED:
        scored = widths and (name == "Delta-CoMe"
                             or name == PUBLISHED and PUBLISHED_WIDTHS in args.published_widths)
        if not (scored or errors):
            continue
        own = {OURS: None, PUBLISHED: partial(published, max_widths=PUBLISHED_WIDTHS)}
        compress = own[name] if name in own else (METHODS | FIXED)[name]
        yield Run(name, compress, name in FIXED, scored, errors)


class Paper(Bench):
    """As bench_accuracy.py's, with the other kinds of rows beside those of accuracy."""

    def __init__(self, args: argparse.Namespace) -> None:
        args.csv = args.rows / FILES[AccuracyRow]
        super().__init__(args, "bench_paper.py")
        self.known = {row.key: row for row in read_rows(args.known, AccuracyRow)}
        for kind in (ErrorRow, StageRow, ComponentRow, PlanRow):
            path = args.rows / FILES[kind]
            self.done |= {self._key(row) for row in read_rows([path], kind)} if (
                path.exists()) else set()

    @staticmethod
    def _key(row: AnyRow) -> tuple[object, ...]:
        return row.key if isinstance(row, AccuracyRow) else (type(row).__name__, *row.key)

    def lacks(self, row: AnyRow) -> bool:
        """As `missing`, for any row."""
        return self._key(row) not in self.done and time.monotonic() < self.deadline

    def add(self, rows: Iterable[AnyRow]) -> None:
        """Rows of other kinds than accuracy's, with their origin."""
        for row in rows:
            named = {field.name for field in fields(row)}
            row = replace(row, **{name: value for name, value in self.origin.items()
                                  if name in named and not getattr(row, name)})
            if self._key(row) not in self.done:
                self.done.add(self._key(row))
                append_row(self.args.rows / FILES[type(row)], row)

    def say(self, text: str) -> None:
        print(f"{text}, {time.monotonic() - self.began:.0f} s after the start", flush=True)

    def finetune(self, folder: Path) -> None:
        """All parts on one fine-tune."""
        self.began = time.monotonic()
        pair, _ = self.pair(folder)
        base, reference = self.load(self.args.base), self.load(folder)
        questions = self.questions(reference, pair.family)
        for seed in self.args.seeds:
            start = replace(pair, ratio=self.args.ratio, seed=seed)
            with tempfile.TemporaryDirectory(prefix="adamix-paper-") as made:
                compression = self.compression(folder, base, reference, questions, seed,
                                               Path(made))
                if {"widths", "errors"} & set(self.args.parts):
                    self._methods(start, compression, questions, reference)
                if seed == self.args.seeds[0]:
                    self._matrices(start, compression)

    def _methods(self, start: AccuracyRow, compression: Compression, questions: Questions,
                 reference: torch.nn.Module) -> None:
        for run in runs(self.args, allocate):  # in by_method's processes
            row = replace(start, method=run.name)
            if run.scored and self.lacks(row) and row.key in self.known:
                self.done.add(row.key)
                append_row(self.args.csv, self.known[row.key])
            score = run.scored and self.lacks(row)
            by_layer = run.by_layer and any(map(self.lacks, self._expected(row, reference)))
            if not (score or by_layer):
                continue
            try:
                result = self._restored(run, compression)
            except (NoSuchSize, BudgetError) as error:
                self.write(replace(row, note=str(error)))
                continue
            if by_layer:
                self._errors(row, compression, result)
            if score:
                row = replace(row, bytes=result.bytes, error=result.error,
                              error_held_out=result.error_held_out, seconds=result.seconds)
                self.write(questions.score(row, result.model, reference))
            self.say(f"{start.family} {run.name}: error {result.error:.4f}, compressed in "
                     f"{result.seconds:.1f} s")
            del result
            gc.collect()

    def _restored(self, run: Run, compression: Compression) -> Result:
        if run.compress is None:
            return compression.by_preset(run.name, self.args.ratio)
        return compression.by_method(run.compress, self.args.ratio, one_size=run.one_size)

    def _expected(self, row: AccuracyRow, model: torch.nn.Module) -> list[ErrorRow]:
        layers = model.config.num_hidden_layers
        groups = dict.fromkeys(group_of(layer, layers) for layer in range(layers))
        return [ErrorRow(row.model, row.family, row.method, row.ratio, row.train_seed, row.seed,
                         group, kind) for group in groups for kind in LINEARS]

    def _errors(self, row: AccuracyRow, compression: Compression, result: Result) -> None:
        tokens = compression.tokens[: max(1, self.args.tokens // compression.tokens.shape[1])]
        errors = model_errors(compression.reference, compression.base_model, result.model, tokens)
        layers = compression.reference.config.num_hidden_layers

        def mean(some: list, name: str) -> float:
            return sum(getattr(one, name) for one in some) / len(some)

        names = ("error_all", "error_out", "square_all", "square_out")
        self.add(ErrorRow(row.model, row.family, row.method, row.ratio, row.train_seed, row.seed,
                          group, kind, len(some), **{name: mean(some, name) for name in names},
                          tokens=tokens.numel())
                 for group, kind, some in by_group(errors, layers))

    def _matrices(self, start: AccuracyRow, compression: Compression) -> None:
        """The parts that need no restored model."""
        def cases() -> dict[str, tuple[Tensor, Tensor]]:
            compression.compressed(OURS, self.args.ratio)
            return {name: (delta, compression.grams[name])
                    for name, delta in compression.deltas.items()}

        if "plan" in self.args.parts:
            self._plan(start, compression)
        self.matrices(start.model, start.family, list(compression.deltas), cases)

    def _plan(self, start: AccuracyRow, compression: Compression) -> None:
        names = [f"{name}.weight" for name in compression.deltas]
        rows = [PlanRow(start.model, start.family, OURS, self.args.ratio, name, 0, 0)
                for name in names]
        if not any(map(self.lacks, rows)):
            return
        found = compression.compressed(OURS, self.args.ratio).delta.matrices
        self.add(replace(row, out_features=packed.shape[0], in_features=packed.shape[1],
                         **{f"v_bits_{bits}": count for bits, count in packed.v_widths.items()},
                         **{f"u_bits_{bits}": count for bits, count in packed.u_widths.items()})
                 for row in rows for packed in [found[row.matrix]])
        self.say(f"{start.family} widths of {len(rows)} matrices")

    def data(self, folder: Path) -> None:
        """What needs no pair: f_max by error alone, seconds, components."""
        self.began = time.monotonic()
        cases = list(matrices(folder))
        if "widths" in self.args.parts:
            with self._solver() as solve:
                for run in runs(self.args, solve):
                    row = AccuracyRow(folder.name, "", run.name, self.args.ratio, 0, None)
                    if run.scored and self.lacks(row):
                        self.write(self._of_data(row, run, cases))
        found = {name: (delta, gram) for name, delta, gram, _ in cases}
        self.matrices(folder.name, "", list(found), lambda: found)

    def _of_data(self, row: AccuracyRow, run: Run, cases: list[Case]) -> AccuracyRow:
        begin = time.monotonic()
        with workers() as executor:
            results = list(executor.map(lambda case: run.compress(
                case[1], case[2], int(MODEL_BITS / self.args.ratio * case[1].numel())), cases))
        seconds = time.monotonic() - begin
        errors = [sum(adamix.relative_error(case[1], result.dense, case[inputs])
                      for case, result in zip(cases, results, strict=True)) / len(cases)
                  for inputs in (2, 3)]
        return replace(row, bytes=sum(result.bits for result in results) // 8, error=errors[0],
                       error_held_out=errors[1], seconds=seconds)

    @contextmanager
    def _solver(self) -> Iterator[Solve]:
        """Integer programs of `--data` in processes of their own: its matrices are in threads, and
        what prepares a program holds the interpreter's lock."""
        count = available_cores() if self.args.solvers is None else self.args.solvers
        with solvers(count) if count > 1 else nullcontext() as pool:
            yield pool.allocate if pool else allocate

    def matrices(self, model: str, family: str, names: list[str],
                 cases: Callable[[], dict[str, tuple[Tensor, Tensor]]]) -> None:
        """Seconds and components, of ΔW and Gram matrices {name: both} that `cases` makes."""
        if "seconds" in self.args.parts:
            self._seconds(model, family, names, cases)
        name = default_matrix(names)
        if "components" in self.args.parts and self.lacks(ComponentRow(model, family, name, 1)):
            found = zip(*components(*cases()[name]), strict=True)
            self.add(ComponentRow(model, family, name, rank, value, *terms)
                     for rank, (value, terms) in enumerate(found, 1))
            self.say(f"{family or model} components of {name}")

    def _seconds(self, model: str, family: str, names: list[str],
                 cases: Callable[[], dict[str, tuple[Tensor, Tensor]]]) -> None:
        device = find_compute(None if self.device.type == "cuda" else "cpu", ()).device
        label = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        kinds = [kind for kind in LINEARS if any(kind_of(name) == kind for name in names)]
        rows = {kind: StageRow(model, family, OURS, self.args.ratio, kind, "",
                               device=label) for kind in kinds}
        if not any(map(self.lacks, rows.values())):
            return
        found, config = cases(), adamix.Config(ratio=self.args.ratio)
        chosen = timed_layers(names, self.args.timed_layers)
        stage_seconds(*(part.to(device) for part in found[chosen[0]]), config)  # loads libraries
        for kind, row in rows.items():
            own = [name for name in chosen if kind_of(name) == kind]
            took = [stage_seconds(*(part.to(device) for part in found[name]), config)
                    for name in own]
            shape = "x".join(map(str, found[own[0]][0].shape))
            self.add([replace(row, shape=shape, matrices=len(own), threads=torch.get_num_threads(),
                              **{stage: sum(one[stage] for one in took) / len(took)
                                 for stage in took[0]})])
            said = ", ".join(f"{stage} {seconds:.3f}" for stage, seconds in took[-1].items())
            self.say(f"{family or model} {kind} {shape}: seconds of {said}")


def timed_layers(names: list[str], count: int) -> list[str]:
    """The matrices of so many layers, evenly from the first to the last."""
    layers = sorted({index_of(name)[0] for name in names})
    count = min(count, len(layers))
    chosen = {layers[round(k * (len(layers) - 1) / max(count - 1, 1))] for k in range(count)}
    return [name for name in names if index_of(name)[0] in chosen]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, help="folder of the base")
    parser.add_argument("--finetunes", type=Path, nargs="+", default=[],
                        help=f"folders with a {RECORD}")
    parser.add_argument("--data", type=Path,
                        help="bench_quality.py's data: errors by f_max, seconds and components")
    parser.add_argument("--rows", type=Path, default=paper_tables.ROWS, help="folder of the CSVs")
    parser.add_argument("--known", type=Path, nargs="+", default=[], metavar="CSV",
                        help="bench_accuracy.py's rows, taken instead of measured")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--widths", type=number_or_none, nargs="+", metavar="N",
                        default=[2, 3, 4, 5, 6, None], help=f"f_max; {NONE}: unlimited")
    parser.add_argument("--published-widths", type=number_or_none, nargs="+", metavar="N",
                        default=[PUBLISHED_WIDTHS], help="f_max of AdaMix as published")
    parser.add_argument("--ratio", type=float, default=16.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the calibration")
    measuring_arguments(parser)
    parser.add_argument("--tokens", type=int, default=4096,
                        help="of the calibration's, for errors of outputs; all at a time")
    parser.add_argument("--timed-layers", type=int, default=3)
    parser.add_argument("--solvers", type=int, help="processes, for --data; default: a core each")
    parser.add_argument("--table", action="store_true", help="print the Markdown of the rows")
    parser.add_argument("--plot", action="store_true", help="draw the rows' pictures beside them")
    args = parser.parse_args(arguments)
    if not (args.table or args.plot or args.data) and args.base is None:
        parser.error("--base: the base's folder")
    return args


def number_or_none(text: str) -> int | None:
    return None if text == NONE else int(text)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    if args.table:
        print(paper_tables.markdown(args.rows))
    if args.plot:
        for path in plot_paper.draw(args.rows):
            print(path)
    if args.table or args.plot:
        return
    paper = Paper(args)
    if args.data:
        paper.data(args.data)
    for folder in args.finetunes:
        paper.finetune(folder)


if __name__ == "__main__":
    main()
