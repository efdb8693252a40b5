"""From a profile to the per-stage table, on exports made here: nsys's tables, torch's trace."""

import gzip
import json
import sqlite3

import profile_table as profile
import pytest
import torch
from profile_ranges import stage

import visionpulse as vp
from visionpulse.testing.draw import Draws

PID, TID = 77, 5
THREAD = PID << 24 | TID  # nsys's globalTid; the globalPid is the same with a zero thread
US = 1000  # nanoseconds


def write_nsys(path, ranges, kernels, graph=()):
    """An export as nsys writes it: what the parser reads of it, under the same names."""
    base = sqlite3.connect(path)
    base.executescript(
        """
        CREATE TABLE StringIds (id INTEGER PRIMARY KEY, value TEXT);
        CREATE TABLE NVTX_EVENTS (start INTEGER, end INTEGER, eventType INTEGER, text TEXT,
            textId INTEGER, globalTid INTEGER, domainId INTEGER);
        CREATE TABLE CUPTI_ACTIVITY_KIND_RUNTIME (start INTEGER, end INTEGER, globalTid INTEGER,
            correlationId INTEGER, nameId INTEGER);
        CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL (start INTEGER, end INTEGER, deviceId INTEGER,
            streamId INTEGER, correlationId INTEGER, globalPid INTEGER, demangledName INTEGER,
            shortName INTEGER, gridX INTEGER, registersPerThread INTEGER);
        """
    )
    strings = {}

    def string(value):
        if value not in strings:
            strings[value] = len(strings) + 1
            base.execute("INSERT INTO StringIds VALUES (?, ?)", (strings[value], value))
        return strings[value]

    for i, (name, begin, end) in enumerate(ranges):
        text, text_id = (name, None) if i % 2 else (None, string(name))  # nsys writes both forms
        row = (begin * US, end * US, 59, text, text_id, THREAD, 0)
        base.execute("INSERT INTO NVTX_EVENTS VALUES (?, ?, ?, ?, ?, ?, ?)", row)
    # an instant mark without an end, and a range of somebody else
    base.execute("INSERT INTO NVTX_EVENTS VALUES (1, NULL, 34, 'mark', NULL, ?, 0)", (THREAD,))
    base.execute(
        "INSERT INTO NVTX_EVENTS VALUES (1, 900000, 59, 'other::x', NULL, ?, 0)", (THREAD,)
    )
    for number, (name, launched, begin, end) in enumerate(kernels, 1):
        row = (launched * US, launched * US + 1, THREAD, number, string("cudaLaunchKernel"))
        base.execute("INSERT INTO CUPTI_ACTIVITY_KIND_RUNTIME VALUES (?, ?, ?, ?, ?)", row)
        row = (begin * US, end * US, 0, 7, number, PID << 24, string(name), string(name), 1, 32)
        marks = ", ".join("?" * len(row))
        base.execute(f"INSERT INTO CUPTI_ACTIVITY_KIND_KERNEL VALUES ({marks})", row)
    for name, duration in graph:  # kernels of a graph: no launch of their own
        row = (0, duration * US, 0, 7, 999, PID << 24, string(name), string(name), 1, 32)
        marks = ", ".join("?" * len(row))
        base.execute(f"INSERT INTO CUPTI_ACTIVITY_KIND_KERNEL VALUES ({marks})", row)
    base.commit()
    base.close()
    return path


RANGES = [
    ("visionpulse::step", 0, 100),
    ("visionpulse::anchor", 10, 60),
    ("visionpulse::score", 12, 30),
    ("visionpulse::select", 31, 40),
    ("visionpulse::attend", 70, 90),
]
# (name, launched at, begins, ends): the device runs long after the launch
KERNELS = [
    ("score_scan", 13, 200, 280),
    ("score_finish", 20, 280, 290),
    ("radix", 35, 290, 305),
    ("unnamed", 45, 305, 306),
    ("gather", 71, 306, 346),
    ("copy", 95, 346, 348),
]


def by_name(lines):
    return {line.name: line for line in lines}


def test_kernels_belong_to_the_range_of_their_launch(tmp_path):
    lines = by_name(profile.stages(write_nsys(tmp_path / "a.sqlite", RANGES, KERNELS)))
    device = {name: line.device_us for name, line in lines.items()}
    assert device == {
        "score": 90, "attend": 40, "select": 15, "anchor": 1, "(other)": 2, "step": 0
    }  # fmt: skip
    assert lines["score"].kernels == 2
    assert lines["score"].kernel_names == {"score_scan", "score_finish"}


def test_host_time_is_counted_once(tmp_path):
    lines = by_name(profile.stages(write_nsys(tmp_path / "a.sqlite", RANGES, KERNELS)))
    host = {name: line.host_us for name, line in lines.items()}
    assert host == {
        "step": 30, "anchor": 23, "score": 18, "select": 9, "attend": 20, "(other)": 0
    }  # fmt: skip
    assert sum(host.values()) == 100


def test_the_name_of_a_kernel_in_a_graph_says_its_stage(tmp_path):
    graph = [
        ("vp_attend_bf16_d128_r8", 30), ("_score_kernel", 20), ("vp_select_cluster", 5),
        ("_attend_kernel", 7), ("_select_kernel", 1), ("vp_score_finish", 2), ("select_scatter", 3),
    ]  # fmt: skip
    path = write_nsys(tmp_path / "a.sqlite", [("visionpulse::step", 0, 9)], [], graph)
    device = {line.name: line.device_us for line in profile.stages(path)}
    assert device == {"attend": 37, "score": 22, "select": 6, "(other)": 3, "step": 0}


def test_ranges_of_other_processes_do_not_mix(tmp_path):
    path = write_nsys(tmp_path / "a.sqlite", RANGES, KERNELS)
    base = sqlite3.connect(path)
    base.execute("UPDATE CUPTI_ACTIVITY_KIND_KERNEL SET globalPid = ?", (99 << 24,))
    base.commit()
    base.close()
    assert by_name(profile.stages(path))["select"].kernels == 0


def torch_trace():
    events = [{"ph": "M", "name": "process_name", "args": {}}]
    for name, begin, end in RANGES:
        events.append(
            {"ph": "X", "cat": "user_annotation", "name": name, "tid": 1, "ts": begin,
             "dur": end - begin}
        )  # fmt: skip
    for number, (name, launched, begin, end) in enumerate(KERNELS):
        args = {"correlation": number}
        events.append(
            {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "tid": 1,
             "ts": launched, "dur": 1, "args": args}
        )  # fmt: skip
        events.append(
            {"ph": "X", "cat": "kernel", "name": name, "tid": 7, "ts": begin, "dur": end - begin,
             "args": args}
        )  # fmt: skip
    return {"traceEvents": events}


@pytest.mark.parametrize("packed", [False, True])
def test_both_kinds_of_profile_give_the_same_table(tmp_path, packed):
    nsys = profile.stages(write_nsys(tmp_path / "a.sqlite", RANGES, KERNELS))
    path = tmp_path / ("b.json.gz" if packed else "b.json")
    with (gzip.open if packed else open)(path, "wt") as written:
        json.dump(torch_trace(), written)
    assert profile.table(profile.stages(path)) == profile.table(nsys)
    assert "score" in profile.table(nsys).splitlines()[1]  # the longest first


def test_a_trace_of_torch_on_the_cpu_has_the_stages(tmp_path):
    draws = Draws(0)
    kv = vp.KVCache(draws.normal(1, 2, 64, 16), draws.normal(1, 2, 64, 16))
    visual, q = vp.VisualTokens.from_spans([[(4, 50)]]), draws.normal(1, 4, 16)
    with torch.profiler.profile() as recorded, stage("step"):
        for _ in range(3):
            with stage("anchor"):
                vp.decode(q, kv, visual, backend="reference")
    recorded.export_chrome_trace(str(tmp_path / "c.json"))
    lines = by_name(profile.stages(tmp_path / "c.json"))
    assert lines["anchor"].calls == 3 and lines["step"].calls == 1
    assert lines["anchor"].host_us > 0


def test_what_is_no_profile_is_refused(tmp_path):
    (tmp_path / "x.json").write_text("hello")
    with pytest.raises(ValueError, match="neither an nsys sqlite export nor a torch trace"):
        profile.stages(tmp_path / "x.json")
    base = sqlite3.connect(tmp_path / "y.sqlite")
    base.execute("CREATE TABLE t (a)")
    base.commit()
    base.close()
    with pytest.raises(ValueError, match="nsys profile --trace=cuda,nvtx"):
        profile.stages(tmp_path / "y.sqlite")
