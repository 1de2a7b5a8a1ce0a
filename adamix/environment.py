"""What torchrun tells each process that it starts, by environment variables."""

from __future__ import annotations

import os


def is_launched() -> bool:
    """Whether this process is one of several that torchrun started."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1 and {"RANK", "MASTER_ADDR"} <= os.environ.keys()


def rank_here() -> int:
    """This process's number among them; 0 in a process of its own."""
    return int(os.environ["RANK"]) if is_launched() else 0


def local_rank() -> int:
    """Its number among those on this machine."""
    return int(os.environ.get("LOCAL_RANK", 0)) if is_launched() else 0


def local_count() -> int:
    """How many are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])) if is_launched() else 1
