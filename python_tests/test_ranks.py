"""compress by several processes: the same bytes for any number of them, and errors that end all."""

import json
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_families import random_pair
from test_pipeline import assert_same_files
from test_resume import finished, interrupt_after
from test_tokens import ending
from tiny_models import compressed_pair, make_pair
from tiny_models import one_thread as one_thread

from adamix.calibration.sums import (
    ALONE,
    GROUPS,
    TreeSum,
    chunks_of,
    group_of,
    sums_at_once,
)
from adamix.config import Config
from adamix.pipeline import compress
from adamix.ranks import Loads, Part, Ranks, launched
from adamix.storage.log import read_log

pytestmark = pytest.mark.usefixtures("without_gpu")

HERE = Path(__file__).parent
# Six chunks of sequences, the last one half full: groups without a chunk, and with one.
OPTIONS = dict(bits_per_weight=3.0, bit_widths=(8, 4, 2), calibration_sequences=44,
               calibration_length=12, passes=1)
TEXTS = [f"document {i} says {i * i}" for i in range(90)]
SMALL = ["--bits", "3", "--widths", "8,4,2", "--sequences", "44", "--length", "12", "--passes", "1"]


# --- the tree ----------------------------------------------------------------------------------


class Meeting(Ranks):
    """One of several ranks that are threads; a move ends when it was taken, as gloo's may."""

    def __init__(self, rank, count, barrier, table, lines):
        self.rank, self.count = rank, count
        self._barrier, self._table, self._lines = barrier, table, lines
        self.received = 0

    def gather(self, value):
        self._table[self.rank] = value
        self._barrier.wait(10)
        found = list(self._table)
        self._barrier.wait(10)
        return found

    def move(self, matrix, width, source, target):
        if source == target or self.rank not in (source, target):
            return matrix if self.rank == target else None
        line = self._lines[source, target]
        if self.rank == source:
            line.put(matrix.clone())
            line.join()
            return None
        self.received += 1
        taken = line.get(timeout=10)
        line.task_done()
        return taken


def meet(count, work):
    """work(rank) in each of `count` threads; the results."""
    barrier, table = threading.Barrier(count), [None] * count
    lines = {(a, b): queue.Queue() for a in range(count) for b in range(count)}
    ranks = [Meeting(rank, count, barrier, table, lines) for rank in range(count)]
    results = [None] * count

    def run(rank):
        results[rank.rank] = work(rank)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert all(result is not None for result in results)
    return results, ranks


def nodes_of(parts, groups, chunks):
    total = TreeSum(groups)
    for number in chunks_of(groups, chunks):
        if parts[number] is not None:
            total.add(group_of(number, chunks), parts[number].clone())
    return total.take()


def by_hand(parts):
    """((g0 + g1) + (g2 + g3)) + ((g4 + g5) + (g6 + g7)), None where nothing is."""
    def add(a, b):
        return b if a is None else a if b is None else a + b

    sums = [None] * GROUPS
    for number, part in enumerate(parts):
        group = next(g for g in range(GROUPS) if number in range(
            len(parts) * g // GROUPS, len(parts) * (g + 1) // GROUPS))
        sums[group] = add(sums[group], part)
    while len(sums) > 1:
        sums = [add(a, b) for a, b in zip(sums[::2], sums[1::2], strict=True)]
    return sums[0]


@pytest.mark.parametrize("chunks, absent", [(16, ()), (19, ()), (3, ()), (1, ()), (8, (0, 1, 5)),
                                            (16, (2, 3, 8, 9, 10, 11)), (9, range(9))])
def test_the_sum_has_the_same_bits_for_any_number_of_ranks(chunks, absent):
    generator = torch.Generator().manual_seed(chunks)
    parts = [None if i in absent else torch.randn(5, 5, generator=generator) for i in range(chunks)]
    expected = by_hand(parts)
    plain = sum((part for part in parts if part is not None), torch.zeros(5, 5))
    alone = ALONE.combine({"x": 5}, {"x": nodes} if (nodes := nodes_of(
        parts, range(GROUPS), chunks)) else {}, {"x": 1})[0]
    assert (not alone) if expected is None else torch.equal(alone["x"], expected)
    assert expected is None or torch.allclose(expected, plain, atol=1e-5)
    for count in (1, 2, 3, 4, 5, 6, 7, 8, 11):
        owners = {"x": (chunks * 7) % count, "y": 0}

        def work(rank, owners=owners):
            share = Part(rank, owners)
            nodes = nodes_of(parts, share.groups, chunks)
            mine = sum(parts[i] is not None for i in chunks_of(share.groups, chunks))
            return share.combine({"x": 5, "y": 5}, {"x": nodes} if nodes else {},
                                 {"x": mine} if nodes else {})

        results, ranks = meet(count, work)
        for rank, (totals, counts) in enumerate(results):
            there = expected is not None and rank == owners["x"]
            assert totals.keys() == ({"x"} if there else set())
            assert not there or torch.equal(totals["x"], expected)
            assert counts == ({} if expected is None else {"x": chunks - len(absent)})
        if count in (2, 4, 8) and not absent and chunks >= 8:
            assert sum(rank.received for rank in ranks) == count - 1  # a matrix each, no more


def test_a_groups_sum_may_be_taken_out_and_added_to_in_place():
    parts, chunks = [torch.full((2, 2), 2.0**i) for i in range(11)], 11
    total = TreeSum(range(GROUPS))
    for number, part in enumerate(parts):
        group = group_of(number, chunks)
        one = total.reopen(group)
        assert (one is None) == (group == 0 or group != group_of(number - 1, chunks))
        assert total.reopen(group) is None  # it is out
        total.add(group, part.clone() if one is None else one.add_(part))
    assert torch.equal(total.take()[0, GROUPS], by_hand(parts))


def test_few_sums_are_alive_at_a_time():
    runs = {count: [range(GROUPS * r // count, GROUPS * (r + 1) // count) for r in range(count)]
            for count in (1, 2, 4, 8)}
    assert [max(map(sums_at_once, runs[count])) for count in (1, 2, 4, 8)] == [4, 3, 2, 1]
    assert ALONE.at_once == 4


@pytest.mark.parametrize("chunks", [1, 5, 8, 16, 37])
def test_groups_are_contiguous_and_of_one_size_but_for_a_chunk(chunks):
    groups = [chunks_of(range(g, g + 1), chunks) for g in range(GROUPS)]
    assert [number for group in groups for number in group] == list(range(chunks))
    assert max(map(len, groups)) - min(map(len, groups)) <= 1
    assert all(group_of(number, chunks) == g for g, group in enumerate(groups) for number in group)


def test_loads_are_balanced_over_what_came_before():
    loads = Loads(2)
    assert loads.spread([5.0, 1.0, 1.0]) == [0, 1, 1]
    assert loads.spread([5.0, 2.0]) == [1, 0]  # 5 and 2 before
    assert Loads(3).spread([]) == [] and Loads(1).spread([1.0, 2.0]) == [0, 0]


def test_a_process_of_its_own_needs_no_torch_distributed():
    with launched() as ranks:
        assert (ranks.rank, ranks.gather(3), ranks.mine([1, 2])) == (0, [3], [0, 1])
    assert "adamix.torchrun" not in sys.modules and not torch.distributed.is_initialized()


# --- processes ---------------------------------------------------------------------------------


def torchrun(count, *command):
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), *command]


def at_work(count, folder, calls):
    """What every rank says of every call, [call][rank]."""
    folder.mkdir()
    done = subprocess.run(torchrun(count, HERE / "ranks_at_work.py", folder, json.dumps(calls)),
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [[json.loads((folder / f"{call}.{rank}.json").read_text()) for rank in range(count)]
            for call in range(len(calls))]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """{name: folder with base, finetuned, and what one process makes of them}."""
    root, made = tmp_path_factory.mktemp("ranks"), {}
    for name in ("dense", "experts"):
        made[name] = root / name
        if name == "dense":
            make_pair(made[name])
        else:
            models = random_pair("gpt_oss")
            for model, side in zip(models, ("base", "finetuned"), strict=True):
                for experts in (3, 1):  # that the router takes seldom, or never
                    model.model.layers[0].mlp.router.bias.data[experts] = -1e3 if experts > 1 else 0
                model.save_pretrained(made[name] / side)
        compress(made[name] / "base", made[name] / "finetuned", made[name] / "delta",
                 Config(**OPTIONS), threads=1)
    compress(made["dense"] / "base", made["dense"] / "finetuned", made["dense"] / "shared",
             Config(**OPTIONS, allocate="model"), threads=1)
    return made


def rows_of(folder):
    return [replace(row, seconds=0.0) for row in read_log(folder)]


def call_of(folder, out, more=None, **options):
    return {"base": str(folder / "base"), "finetuned": str(folder / "finetuned"), "out": str(out),
            "config": OPTIONS | (more or {}), **options}


def damaged(folder, pair, name, value):
    """A copy of a pair whose fine-tune has a weight with this value."""
    (folder / "finetuned").mkdir(parents=True)
    (folder / "base").symlink_to(pair / "base")
    for file in (pair / "finetuned").iterdir():
        (folder / "finetuned" / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "finetuned" / "model.safetensors")
    tensors[name][0] = value
    save_file(tensors, folder / "finetuned" / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_two_processes_write_the_bytes_of_one(tmp_path, pairs, monkeypatch):
    dense, experts = pairs["dense"], pairs["experts"]
    broken = damaged(tmp_path / "nan", dense, "model.layers.1.mlp.up_proj.weight", float("nan"))
    loud = damaged(tmp_path / "loud", dense, "model.layers.1.input_layernorm.weight", 3e38)
    interrupt_after(3, compressed_pair(), tmp_path / "resumed", monkeypatch)
    kept, plain = len(finished(tmp_path / "resumed")), compressed_pair()
    calls = [
        call_of(dense, tmp_path / "dense"),
        call_of(dense, tmp_path / "nan-out") | {"finetuned": str(broken / "finetuned")},
        call_of(experts, tmp_path / "experts", threads=2, max_memory=8 * 10**9),
        call_of(dense, tmp_path / "loud-out", calibration=TEXTS) | {
            "finetuned": str(loud / "finetuned")},
        call_of(dense, tmp_path / "shared", {"allocate": "model"}),
        call_of(dense, tmp_path / "broken", broken=1),
        call_of(dense, tmp_path / "unsuited", unsuited=1),
        call_of(dense, tmp_path / "interrupted", interrupted=1, threads=1),
        {"base": str(plain.base), "finetuned": str(plain.finetuned), "threads": 1,
         "out": str(tmp_path / "resumed"), "config": {**OPTIONS, "bit_widths": (8, 4, 3, 2),
         "calibration_sequences": 8, "calibration_length": 32, "passes": 4}}]
    found = at_work(2, tmp_path / "said", calls)
    for out, expected in (("dense", dense / "delta"), ("experts", experts / "delta"),
                          ("shared", dense / "shared"), ("unsuited", dense / "delta"),
                          ("resumed", plain.delta)):
        assert_same_files(tmp_path / out, expected)
        assert rows_of(tmp_path / out) == rows_of(expected)
    assert "layer" in {row.gram for row in read_log(tmp_path / "experts")}
    for ranks, kind, words in (
            (found[1], "NonFiniteError", "up_proj.weight of the fine-tune holds NaN"),
            (found[3], "NonFiniteError", "activations that enter model.layers.1"),
            (found[7], "KeyboardInterrupt", "")):
        assert ranks[0] == ranks[1] and ranks[0]["kind"] == kind and words in ranks[0]["error"]
    assert found[5][0] == {"kind": "RankError",
                           "error": "process 1 failed: TypeError: no such thing"}
    assert found[5][1] == {"kind": "TypeError", "error": "no such thing"}
    assert found[0][0] == found[0][1] and found[0][0]["processes"] == 2
    assert found[8][1]["resumed"] == kept > 0
    assert not (tmp_path / ".nan-out.partial").exists()
    # What the two had finished when one was interrupted is taken up by a single one.
    kept = len(finished(tmp_path / "interrupted"))
    assert kept >= 1 and not (tmp_path / "interrupted").exists()
    summary = compress(dense / "base", dense / "finetuned", tmp_path / "interrupted",
                       Config(**OPTIONS), threads=1)
    assert summary.resumed == kept
    assert_same_files(tmp_path / "interrupted", dense / "delta")


def test_three_processes_write_the_bytes_of_one(tmp_path, pairs):
    dense, short, both = pairs["dense"], tmp_path / "short", {"sample_from": "both"}
    short.mkdir()
    (short / "base").symlink_to(dense / "base")
    ending(dense / "finetuned", short / "finetuned")
    for out, pair, options, texts in (("one", dense, {}, TEXTS), ("one-both", dense, both, None),
                                      ("one-auto", short, {}, None)):
        done = compress(pair / "base", pair / "finetuned", tmp_path / out,
                        Config(**OPTIONS | options), calibration=texts, threads=1)
    assert done.sample_from == "both"
    found = at_work(3, tmp_path / "said", [
        call_of(pairs["experts"], tmp_path / "experts"),
        call_of(dense, tmp_path / "texts", calibration=TEXTS),
        call_of(dense, tmp_path / "both", both), call_of(short, tmp_path / "auto")])
    assert_same_files(tmp_path / "experts", pairs["experts"] / "delta")
    assert_same_files(tmp_path / "texts", tmp_path / "one")
    assert_same_files(tmp_path / "both", tmp_path / "one-both")
    assert_same_files(tmp_path / "auto", tmp_path / "one-auto")
    assert all(ranks[0] == ranks[1] == ranks[2] for ranks in found)


def started(rank, port, *command):
    """One of two processes, by torchrun's variables alone."""
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2,
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return subprocess.Popen([sys.executable, "-m", "adamix", "compress", *command], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env=os.environ | {key: str(value) for key, value in variables.items()})


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_a_process_is_killed_and_one_alone_goes_on(tmp_path, pairs):
    dense, out = pairs["dense"], tmp_path / "d"
    port = free_port()
    processes = [started(rank, port, dense / "base", dense / "finetuned", "-o", out, "--threads",
                         "1", *SMALL) for rank in (0, 1)]
    try:
        end = time.monotonic() + 60
        while len(finished(out)) < 2 and processes[0].poll() is None and time.monotonic() < end:
            time.sleep(0.001)
        processes[1].kill()
        said = processes[0].communicate(timeout=60)[1]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    if processes[0].returncode:  # else it was done by then
        assert processes[0].returncode == 1 and said.count("adamix: error:") == 1, said
        assert "another process of this compression has ended" in said and "Traceback" not in said
        kept = len(finished(out))
        assert kept >= 2
        summary = compress(dense / "base", dense / "finetuned", out, Config(**OPTIONS), threads=1)
        assert summary.resumed == kept
    assert_same_files(out, dense / "delta")


def test_the_command_says_one_sentence(tmp_path, pairs):
    """Of a fault that every process has, and of one that only the other one has."""
    dense, port = pairs["dense"], free_port()
    (tmp_path / "d").mkdir()
    processes = [started(rank, port, dense / "base", dense / side, "-o", tmp_path / "d", *SMALL)
                 for rank, side in ((0, "finetuned"), (1, "nowhere"))]
    said = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [1, 1]
    assert [out for out, _ in said] == ["", ""] and "Traceback" not in said[0][1] + said[1][1]
    assert said[0][1].count("adamix: error:") == 1 and "adamix" not in said[1][1]
    assert "exists" in said[0][1] or "nowhere" in said[0][1]  # whichever was first
