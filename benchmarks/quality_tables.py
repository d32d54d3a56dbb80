"""The table of what each stage of the quantizer is worth, and files of results made one.

    python -m benchmarks.quality_tables benchmarks/results/h200/quality.json
    python -m benchmarks.quality_tables a.json b.json --out benchmarks/results/h200/quality.json

Below the table stands every place where a stage does not improve on the last.
"""

import argparse
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from jaxcodec.checkpoints.files import read_json, write_json

Row = dict[str, Any]
# In their order; kl and pv both go on from block.
STAGES = {
    "dense": "dense",
    "kmeans": "k-means",
    "search": "+ beam search",
    "block": "+ block tuning",
    "kl": "+ floats on KL",
    "pv": "+ PV-Tuning",
}


def merge(contents: Sequence[Row]) -> Row:
    """Contents of several files as one: each (base, spec, stage) once, the last one counts.

    `runs` tells of every file what stands at its top: versions, date, commit, command, options; a
    row does not tell of which it is.

    Raises:
      ValueError: files of two devices.
    """
    devices = {content["device"] for content in contents}
    if len(devices) != 1:
        raise ValueError(f"The files are of several devices: {', '.join(sorted(devices))}.")
    rows = {_key(row): row for content in contents for row in content["rows"]}
    ordered = sorted(rows.values(), key=_place)
    runs = [run for content in contents for run in _runs(content)]
    return {"device": devices.pop(), "runs": runs, "rows": ordered}


def pairs(rows: Iterable[Row]) -> list[tuple[Row, Row]]:
    """(a stage, the one before it) of each base and format; the first follows nothing."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["spec"] is not None:
            groups.setdefault((row["base"], row["spec"]), []).append(row)
    return [
        (after, before)
        for group in groups.values()
        for before, after in zip(group, group[1:], strict=False)
    ]


def report(rows: Sequence[Row]) -> str:
    """The table, and where a stage does not improve on the last."""
    rows = sorted(rows, key=_place)
    lines = [
        f"{'base':<9}{'stored as':<11}{'bits':>6}{'nominal':>9}  {'stage':<16}"
        f"{'perplexity':>11}{'KL':>10}{'top-1':>8}{'seconds':>9}"
    ]
    last = None
    for row in rows:
        if last is not None and _key(row)[:2] != last:
            lines.append("")
        last = _key(row)[:2]
        lines.append(
            f"{row['base']:<9}{row['spec'] or 'bf16':<11}{row['bits_per_weight']:>6.3f}"
            f"{row['nominal_bits_per_weight']:>9.3f}  {STAGES[row['stage']]:<16}"
            f"{row['perplexity']:>11.4f}{row['kl']:>10.5f}{row['top1']:>8.2%}{row['seconds']:>9.1f}"
        )
    return "\n".join([*lines, "", *verdicts(rows)])


def verdicts(rows: Sequence[Row]) -> list[str]:
    """A line for every stage that does not lower perplexity and KL, or one that all do."""
    compared = pairs(sorted(rows, key=_place))
    lines = []
    for after, before in compared:
        worse = [
            f"{what} {after[what]:.5f} after {before[what]:.5f}"
            for what in ("perplexity", "kl")
            if not after[what] < before[what]
        ]
        if worse:
            stages = f"{STAGES[after['stage']]} does not improve on {STAGES[before['stage']]}"
            lines.append(f"{after['base']} {after['spec']}: {stages}: {', '.join(worse)}")
    share = f"{len(compared) - len(lines)} of {len(compared)} stages improve on the last."
    return [*lines, share]


def _runs(content: Row) -> list[Row]:
    """What stands at the top of a file of one run, or of those that a file was merged from."""
    if "runs" in content:
        return content["runs"]
    return [{k: v for k, v in content.items() if k not in ("device", "rows")}]


def _key(row: Row) -> tuple[str, str, str]:
    return row["base"], row["spec"] or "", row["stage"]


def _place(row: Row) -> tuple:
    """Where a row stands: the dense one first, then formats by bits, then stages in their order."""
    bits = 0.0 if row["spec"] is None else row["nominal_bits_per_weight"]
    return row["base"], bits, row["spec"] or "", list(STAGES).index(row["stage"])


def main() -> None:
    """Print the table of one file or several; write them as one where --out says so."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=pathlib.Path, nargs="+")
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args()
    content = read_json(options.results[0])
    if len(options.results) > 1:
        content = merge([read_json(path) for path in options.results])
    if options.out is not None:
        write_json(options.out, content)
    print(report(content["rows"]))


if __name__ == "__main__":
    main()
