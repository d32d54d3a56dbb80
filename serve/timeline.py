"""When things happened to requests, and the same as a Chrome trace, which ui.perfetto.dev opens."""

import collections
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jaxcodec.checkpoints.files import replacement

# Some 60 MB; the oldest are dropped then.
NOTE_LIMIT = 200_000
QUEUED = ("submitted", "preempted")
ENGINE = "engine"  # the process of the counters in a trace; each model is another


class Note(NamedTuple):
    """Something that happened to a response.

    Attributes:
      id: of its request.
      index: which of the request's responses.
      event: "submitted"; "admitted", when it got a row and pages; "prefill", when a chunk was
        launched; "decode", when tokens arrived; "preempted"; and at the end its finish reason.
      time_s: in seconds of the engine's clock.
      details: such as tokens=, reused= and model=.
    """

    id: str
    index: int
    event: str
    time_s: float
    details: dict[str, Any]


class Timeline:
    """What an engine notes of its requests, if it is given one: `Engine(..., timeline=Timeline())`.

    Args:
      limit: most notes that are kept.
    """

    def __init__(self, limit: int = NOTE_LIMIT):
        self.notes: collections.deque[Note] = collections.deque(maxlen=limit)
        self.counters: collections.deque[tuple[float, dict[str, float]]] = collections.deque(
            maxlen=limit
        )

    def note(self, id: str, index: int, event: str, time_s: float, **details: Any) -> None:
        """Keep a `Note`."""
        self.notes.append(Note(id, index, event, time_s, details))

    def counter(self, time_s: float, **numbers: float) -> None:
        """Keep what numbers of the engine are at a time."""
        self.counters.append((time_s, numbers))

    def responses(self) -> list[list[Note]]:
        """The notes of each response, in order of time; an id may be used again."""
        found: list[list[Note]] = []
        current: dict[tuple[str, int], list[Note]] = {}
        for note in self.notes:
            key = note.id, note.index
            if key not in current or note.event == "submitted":
                current[key] = []
                found.append(current[key])
            current[key].append(note)
        return found


def write_chrome_trace(path: str | Path, timeline: Timeline) -> None:
    """Write a timeline as a Chrome trace (JSON): a process for each model, a thread a response.

    Raises:
      OSError: the file cannot be written.
    """
    with replacement(Path(path)) as [temporary], open(temporary, "w", encoding="utf-8") as file:
        json.dump(chrome_trace(timeline), file)


def chrome_trace(timeline: Timeline) -> dict[str, Any]:
    """What `write_chrome_trace` writes, in the JSON object form of the Trace Event Format."""
    responses = [_ascending(notes) for notes in timeline.responses()]
    models = sorted({_model(notes) for notes in responses} - {ENGINE})
    # Processes and threads are numbered as on Linux: from 1 on, and no number twice.
    processes = {name: pid for pid, name in enumerate([ENGINE, *models], start=1)}
    events = [_name("process", pid, pid, name) for name, pid in processes.items()]
    for thread, notes in enumerate(responses, start=len(processes) + 1):
        place = {"pid": processes[_model(notes)], "tid": thread}
        first, last = notes[0], notes[-1]
        label = first.id if first.index == 0 else f"{first.id} [{first.index}]"
        events.append(_name("thread", **place, name=label))
        # Perfetto nests what lies within: the response, and in it what it went through.
        whole = label, first.time_s, last.time_s, {"last": last.event}
        for name, start, end, details in (whole, *_stretches(notes)):
            ts = _microseconds(start)
            time = {"ts": ts, "dur": _microseconds(end) - ts}
            events.append({"ph": "X", "name": name, **place, **time, "args": details})
    place = {"pid": processes[ENGINE], "tid": processes[ENGINE]}
    for time_s, numbers in timeline.counters:
        time = {"ts": _microseconds(time_s)}
        events.append({"ph": "C", "name": ENGINE, **place, **time, "args": numbers})
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _stretches(notes: Iterable[Note]) -> Iterator[tuple[str, float, float, dict[str, Any]]]:
    """(name, start, end, details) of the time between each two notes of a response."""
    for note, following in itertools.pairwise(notes):
        name, details = note.event, note.details
        if name in QUEUED:
            name = "queued"
        elif following.event == "decode" and name != "prefill":
            name, details = "decode", following.details  # its tokens are those at its end
        elif name == "decode":
            details = {}
        yield name, note.time_s, following.time_s, details


def _ascending(notes: list[Note]) -> list[Note]:
    """The same, with no time passing while the clock was set back."""
    times = itertools.accumulate((note.time_s for note in notes), max)
    return [note._replace(time_s=time_s) for note, time_s in zip(notes, times, strict=True)]


def _model(notes: list[Note]) -> str:
    return str(notes[0].details.get("model", "requests"))


def _microseconds(seconds: float) -> int:
    """In which traces count; whole, so that what nests in time nests in numbers."""
    return round(seconds * 1e6)


def _name(kind: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": f"{kind}_name", "pid": pid, "tid": tid, "args": {"name": name}}
