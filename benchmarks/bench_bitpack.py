"""Time of torch.ops.adamix.pack and unpack at every width: codes and words over the copy's rate.

    python benchmarks/bench_bitpack.py --csv rows.csv
"""

from __future__ import annotations

import argparse

import torch
from harness import Call, Prepared, Session, Work, add_arguments, random_words, require_gpu
from rows import Row
from torch import Tensor

from adamix import ops

LANES, CODES = 4096, 18944


def in_turn(call: Call, kept: list[object], place: int) -> Call:
    """Keeps the result until this call comes again, so that outputs rotate through memory too."""

    def kept_call() -> None:
        kept[place] = call()

    return kept_call


def bitpack_work(op: str, bits: int, lanes: int, codes: int, device: str = "cuda") -> Work:
    words = lanes * ops.lane_words(codes, bits)
    set_bytes = lanes * codes + 4 * words

    def operand() -> Tensor:
        if op == "unpack":
            return random_words(words, device).view(lanes, -1)
        return torch.randint(0, 2**bits, (lanes, codes), dtype=torch.uint8, device=device)

    def bound(tensor: Tensor) -> Call:
        if op == "unpack":
            return lambda: ops.unpack(tensor, bits=bits, count=codes)
        return lambda: ops.pack(tensor, bits=bits)

    def build(sets: int) -> Prepared:
        kept: list[object] = [None] * sets
        calls = [in_turn(bound(operand()), kept, i) for i in range(sets)]
        return Prepared({"one call": calls}, set_bytes, 0)

    return Work(set_bytes, build)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ops", nargs="+", choices=["pack", "unpack"], default=["pack", "unpack"])
    parser.add_argument("--bits", nargs="+", type=int, default=range(1, ops.MAX_BITS + 1))
    parser.add_argument("--lanes", type=int, default=LANES)
    parser.add_argument("--codes", type=int, default=CODES, help="of a lane")
    add_arguments(parser)
    args = parser.parse_args()
    require_gpu("bench_bitpack.py")
    torch.manual_seed(0)
    session = Session(args)
    for op in args.ops:
        for bits in args.bits:
            row = Row(op, f"{args.lanes}x{args.codes}", None, None, "uint8", str(bits), "adamix")
            session.measure(row, bitpack_work(op, bits, args.lanes, args.codes))
    session.close()


if __name__ == "__main__":
    main()
