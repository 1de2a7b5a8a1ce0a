"""Compressions in the processes that torchrun starts, one after the other: test_ranks.py's.

    torchrun --nproc-per-node 2 python_tests/ranks_at_work.py FOLDER '[{"base": .., "out": ..}, ..]'

Of each it writes what `compress` gave or raised into FOLDER, as `call.rank.json`. A call is its
arguments and, of the names of FAULTS, the rank that has that fault.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adamix import matrices, torchrun
from adamix.calibration.blocks import Unsuited
from adamix.config import Config
from adamix.pipeline import compress

RANK = int(os.environ["RANK"])


def fails_after(count: int, error: BaseException) -> object:
    """quantize_matrix, which raises once it was called so often."""
    function, calls = matrices.quantize_matrix, []

    def wrapped(*arguments: object, **named: object) -> object:
        calls.append(1)
        if len(calls) > count:
            raise error
        return function(*arguments, **named)

    return wrapped


def unsuited(*arguments: object) -> None:
    raise Unsuited("its blocks share weights")


FAULTS = {  # {name: (what is replaced, by what)}
    "interrupted": lambda: ("quantize_matrix", fails_after(2, KeyboardInterrupt())),
    "broken": lambda: ("quantize_matrix", fails_after(1, TypeError("no such thing"))),
    "unsuited": lambda: ("BlockStream", unsuited),
}


@contextmanager
def replaced(name: str, value: object) -> Iterator[None]:
    before = getattr(matrices, name)
    setattr(matrices, name, value)
    try:
        yield
    finally:
        setattr(matrices, name, before)


def run(call: dict[str, object]) -> dict[str, object]:
    faulty = [name for name in FAULTS if call.pop(name, None) == RANK]
    config = Config(**call.pop("config"))
    name, value = FAULTS[faulty[0]]() if faulty else ("TITLE", matrices.TITLE)
    try:
        with replaced(name, value):
            done = compress(config=config, **call)
    except (Exception, KeyboardInterrupt) as error:
        return {"error": str(error), "kind": type(error).__name__}
    return {"rows": [row.name for row in done.rows], "resumed": done.resumed,
            "processes": done.processes, "bytes": done.bytes}


def main() -> None:
    torchrun.GRACE = 0.01  # rank 0 prints nothing here
    for number, call in enumerate(json.loads(sys.argv[2])):
        found = run(call)
        (Path(sys.argv[1]) / f"{number}.{RANK}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
