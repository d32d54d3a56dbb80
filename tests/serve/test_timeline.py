"""Timelines become traces that follow the Trace Event Format."""

import json
from pathlib import Path

import pytest

from jaxcodec.serve.timeline import Timeline, chrome_trace, write_chrome_trace


@pytest.fixture
def timeline() -> Timeline:
    """One response that is pushed out and comes back, and one that never starts."""
    made = Timeline()
    made.note("a", 0, "submitted", 1.0, model="sums")
    made.note("b", 1, "submitted", 1.5, model="dates")
    made.counter(1.5, running=0, waiting=2)
    made.note("a", 0, "admitted", 2.0, reused=8)
    made.note("a", 0, "prefill", 2.0, tokens=64, start=8)
    made.note("a", 0, "prefill", 2.5, tokens=10, start=72)
    made.note("a", 0, "decode", 3.0, tokens=1)
    made.note("a", 0, "decode", 3.25, tokens=4)
    made.note("a", 0, "preempted", 3.5)
    made.note("a", 0, "admitted", 4.0, reused=72)
    made.note("a", 0, "decode", 4.5, tokens=2)
    made.note("a", 0, "stop", 4.5)
    made.note("b", 1, "cancelled", 5.0)
    made.counter(5.0, running=0, waiting=0)
    return made


def slices(trace: dict, thread: str) -> list[tuple[str, float, float, dict]]:
    [tid] = [
        e["tid"]
        for e in trace["traceEvents"]
        if e["name"] == "thread_name" and e["args"]["name"] == thread
    ]
    return [
        (e["name"], e["ts"] / 1e6, (e["ts"] + e["dur"]) / 1e6, e["args"])
        for e in trace["traceEvents"]
        if e["ph"] == "X" and e["tid"] == tid
    ]


def test_a_response_is_a_thread_of_what_it_went_through(timeline: Timeline) -> None:
    trace = chrome_trace(timeline)
    assert slices(trace, "a") == [
        ("a", 1.0, 4.5, {"last": "stop"}),
        ("queued", 1.0, 2.0, {"model": "sums"}),
        ("admitted", 2.0, 2.0, {"reused": 8}),
        ("prefill", 2.0, 2.5, {"tokens": 64, "start": 8}),
        ("prefill", 2.5, 3.0, {"tokens": 10, "start": 72}),
        ("decode", 3.0, 3.25, {"tokens": 4}),
        ("decode", 3.25, 3.5, {}),
        ("queued", 3.5, 4.0, {}),
        ("decode", 4.0, 4.5, {"tokens": 2}),
        ("decode", 4.5, 4.5, {}),
    ]
    assert [s[0] for s in slices(trace, "b [1]")] == ["b [1]", "queued"]


def test_models_are_processes(timeline: Timeline) -> None:
    events = chrome_trace(timeline)["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert sorted(names.values()) == ["dates", "engine", "sums"]
    assert {names[e["pid"]] for e in events if e["ph"] == "C"} == {"engine"}


def test_the_file_follows_the_trace_event_format(timeline: Timeline, tmp_path: Path) -> None:
    # docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
    write_chrome_trace(tmp_path / "trace.json", timeline)
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert isinstance(trace["traceEvents"], list)
    threads: dict[int, list[tuple[float, float]]] = {}
    processes, named = set(), set()
    for event in trace["traceEvents"]:
        assert {"ph", "name", "pid", "tid"} <= event.keys()
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        assert min(event["pid"], event["tid"]) > 0  # 0 is the kernel's own
        if event["ph"] == "X":
            assert event["dur"] >= 0
            threads.setdefault(event["tid"], []).append((event["ts"], event["dur"]))
        elif event["ph"] == "C":
            assert all(isinstance(value, int | float) for value in event["args"].values())
        else:
            assert event["ph"] == "M"
            assert isinstance(event["args"]["name"], str)
            (processes if event["name"] == "process_name" else named).add(event["tid"])
    assert named == threads.keys()
    assert not named & processes  # readers know threads by their numbers alone
    for spans in threads.values():  # complete events of a thread nest, or follow each other
        (outer_start, outer_length), *inner = spans
        end = outer_start
        for start, length in inner:
            assert start >= end
            end = start + length
        assert end <= outer_start + outer_length


def test_an_id_may_be_used_again() -> None:
    timeline = Timeline()
    for start in (1.0, 5.0):
        timeline.note("a", 0, "submitted", start)
        timeline.note("a", 0, "stop", start + 1)
    assert [[n.time_s for n in notes] for notes in timeline.responses()] == [[1.0, 2.0], [5.0, 6.0]]


def test_no_time_passes_while_the_clock_is_set_back() -> None:
    timeline = Timeline()
    for event, time in (("submitted", 5.0), ("admitted", 6.0), ("decode", 2.0), ("stop", 7.0)):
        timeline.note("a", 0, event, time)
    spans = [e for e in chrome_trace(timeline)["traceEvents"] if e["ph"] == "X"]
    assert [e["dur"] for e in spans] == [2e6, 1e6, 0, 1e6]


def test_the_oldest_notes_are_dropped() -> None:
    timeline = Timeline(limit=3)
    for time in range(5):
        timeline.note("a", 0, "decode", float(time), tokens=1)
    assert [note.time_s for note in timeline.notes] == [2.0, 3.0, 4.0]
    assert len(chrome_trace(timeline)["traceEvents"]) == 6  # names of two processes, a thread
