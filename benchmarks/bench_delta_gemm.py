"""Time of torch.ops.adamix.delta_gemm_ on Qwen's and Llama's shapes, beside its rivals.

    python benchmarks/bench_delta_gemm.py --suite table --csv rows.csv
    python benchmarks/bench_delta_gemm.py --shapes 3584x18944 --models 32 --tokens 1

Suites: `table`, the figures of the README; `sweep`, what the pictures show; `all`, every shape
with every number of models and tokens. --shapes, --models, --tokens and --impls choose among them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial

import torch
from banks import Bank, Case, alone, delta_size, make_bank
from harness import Prepared, Session, SkippedError, Work, add_arguments, require_gpu
from rivals import RIVALS
from rows import Row

from adamix import ops

SHAPES = {"3584x18944": (3584, (18944,)), "18944x3584": (18944, (3584,)),  # Qwen2.5-7B
          "3584x3584": (3584, (3584,)), "3584x512": (3584, (512,)),
          "4096x4096": (4096, (4096,)), "4096x11008": (4096, (11008,)),  # Llama-2-7B
          "5120x5120": (5120, (5120,)), "5120x13824": (5120, (13824,))}  # 14B
GROUPED = {"qkv": (3584, (3584, 512, 512)), "gate_up": (3584, (18944, 18944))}
MODELS = (1, 2, 4, 8, 16, 32, 64)
TOKENS = (1, 4, 16, 128, 512)
BASE, ONE_BY_ONE = "base GEMM", "adamix one by one"
LARGEST_ERROR = {torch.bfloat16: 1e-2, torch.float16: 1e-2, torch.float32: 1e-4}
CHECKED_TOKENS = 8  # of one slot, on the CPU

Plan = tuple[str, int, int, tuple[str, ...]]  # shape, models, tokens a model, implementations


# --- adamix itself -----------------------------------------------------------------------------


def adamix_work(case: Case, one_by_one: bool = False) -> Work:
    """delta_gemm_, or its overload for several matrices of one input, in one call."""

    def build(sets: int) -> Prepared:
        bank = make_bank(case, sets)
        order = torch.randperm(case.models, device=case.device, dtype=torch.int32)
        slots = order.repeat_interleave(case.tokens)
        error = check(case, bank, slots)
        calls = []
        for tables in bank.tables:
            x = case.random(case.rows, case.in_features)
            ys = [case.random(case.rows, out) for out in case.outs]
            calls.append(partial(run, ys, x, bank, tables, slots, bank.max_rank, one_by_one))
        path = "a call a matrix" if one_by_one else "one call"
        return Prepared({path: calls}, bank.packed_bytes + case.activation_bytes,
                        bank.flops(case.tokens), error)

    return Work(case.packed_bytes + case.stored_activation_bytes, build)


def run(ys: list[torch.Tensor], x: torch.Tensor, bank: Bank, tables: list[torch.Tensor],
        slots: torch.Tensor, max_rank: int, one_by_one: bool = False) -> None:
    if len(ys) > 1 and not one_by_one:
        ops.delta_gemm_layers_(ys, x, bank.arena, tables, slots, max_rank=max_rank)
        return
    for y, table in zip(ys, tables, strict=True):
        ops.delta_gemm_(y, x, bank.arena, table, slots, max_rank=max_rank)


def check(case: Case, bank: Bank, slots: torch.Tensor) -> float:
    """Relative error of the first set, tokens of one slot, against the CPU operator in fp32.

    Raises:
        SkippedError: it is more than rounding explains.
    """
    x = case.random(case.rows, case.in_features)
    size = delta_size(case.in_features, bank.max_rank)  # a larger y would hide it by its rounding
    ys = [case.random(case.rows, out).mul_(size) for out in case.outs]
    before = [y.clone() for y in ys]
    run(ys, x, bank, bank.tables[0], slots, bank.max_rank)
    index = case.models // 2
    picked = (slots == index).nonzero().flatten()[-CHECKED_TOKENS:]
    errors = []
    for y, old, matrix in zip(ys, before, bank.slots[0], strict=True):
        arena, table = alone(bank, matrix[index])
        delta = ops.delta_gemm(x[picked].float().cpu(), arena, table,
                               torch.zeros(len(picked), dtype=torch.int32),
                               out_features=y.shape[1])
        lost = y[picked].float().cpu() - old[picked].float().cpu() - delta
        errors.append((lost.norm() / delta.norm()).item())
    error = max(errors)
    if not error <= LARGEST_ERROR[case.dtype]:  # a NaN is no small error
        raise SkippedError(f"wrong: error {error:.1e} against the CPU")
    return error


IMPLEMENTATIONS: dict[str, Callable[[Case], Work]] = {
    "adamix": adamix_work, ONE_BY_ONE: partial(adamix_work, one_by_one=True), **RIVALS}


# --- what is measured --------------------------------------------------------------------------


def table_suite() -> Iterator[Plan]:
    every = ("adamix", *RIVALS)
    large = ("3584x18944", "18944x3584")
    for shape in (*large, "4096x4096"):
        yield shape, 32, 1, every
    for shape in large:
        yield from ((shape, models, 1, ("adamix",)) for models in (16, 64))
    yield "3584x3584", 1, 1, ("adamix", BASE)
    yield from ((shape, 1, 1, ("adamix", ONE_BY_ONE, BASE)) for shape in GROUPED)
    for shape in (*large, "3584x3584"):
        yield from ((shape, models, 512, ("adamix", BASE)) for models in (1, 12))


def sweep_suite() -> Iterator[Plan]:
    """Pictures first: the large shapes and one token, then prefill, then the other shapes."""
    rivals = tuple(name for name in RIVALS if name != "PyTorch unpack")  # slow to compile, to run
    shapes = tuple(SHAPES)
    for group in (shapes[:3], shapes[3:]):
        yield from ((shape, models, 1, ("adamix", *rivals)) for shape in group
                    for models in MODELS)
        yield from ((shape, models, tokens, ("adamix", BASE)) for shape in group
                    for tokens in TOKENS[1:] for models in (1, 8, 32))
    yield from ((shape, models, 1, ("adamix", ONE_BY_ONE, BASE)) for shape in GROUPED
                for models in (1, 32))


def all_suite() -> Iterator[Plan]:
    every = ("adamix", *RIVALS)
    yield from ((shape, models, tokens, every) for shape in SHAPES for models in MODELS
                for tokens in TOKENS)
    yield from ((shape, models, 1, (*every[:1], ONE_BY_ONE, *every[1:])) for shape in GROUPED
                for models in (1, 32))


SUITES = {"table": table_suite, "sweep": sweep_suite, "all": all_suite}


def chosen(args: argparse.Namespace) -> list[Plan]:
    """The suite's cases that the filters leave."""
    plans = []
    for shape, models, tokens, impls in SUITES[args.suite]():
        kept = tuple(impl for impl in impls if args.impls is None or impl in args.impls)
        if (kept and models * tokens <= args.max_tokens
                and (args.shapes is None or shape in args.shapes)
                and (args.models is None or models in args.models)
                and (args.tokens is None or tokens in args.tokens)):
            plans.append((shape, models, tokens, kept))
    return plans


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    shapes = [*SHAPES, *GROUPED]
    parser.add_argument("--suite", choices=SUITES, default="table")
    parser.add_argument("--shapes", nargs="+", choices=shapes, metavar="INxOUT",
                        help=f"of {', '.join(shapes)}")
    parser.add_argument("--models", nargs="+", type=int)
    parser.add_argument("--tokens", nargs="+", type=int, help="a model")
    parser.add_argument("--impls", nargs="+", choices=IMPLEMENTATIONS, metavar="NAME",
                        help=f"of {', '.join(IMPLEMENTATIONS)}")
    parser.add_argument("--max-tokens", type=int, default=8192, help="of all models together")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--bits", type=float, default=1.0, help="a weight, everything counted")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    add_arguments(parser)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    plans = chosen(args)
    if args.list:
        for shape, models, tokens, impls in plans:
            print(f"{shape:<12} {models:>3} models x {tokens:>3} tokens: {', '.join(impls)}")
        return
    require_gpu("bench_delta_gemm.py")
    torch.manual_seed(0)
    session = Session(args)
    for shape, models, tokens, impls in plans:
        in_features, outs = (SHAPES | GROUPED)[shape]
        case = Case(in_features, outs, models, tokens, getattr(torch, args.dtype), args.bits)
        for impl in impls:
            row = Row("delta_gemm", case.shape, models, tokens, args.dtype, f"{args.bits:.2f}",
                      impl)
            session.measure(row, IMPLEMENTATIONS[impl](case))
    session.close()


if __name__ == "__main__":
    main()
