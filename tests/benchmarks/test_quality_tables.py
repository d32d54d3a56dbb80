"""Table and figure of what each stage is worth."""

import pytest

from benchmarks import quality_figure, quality_tables


def _row(stage: str, perplexity: float, kl: float, spec: str | None = "m2v8g32", base="shipped"):
    bits = 16.0 if spec is None else {"m2v8g32": 2.5, "m1v4g128": 2.125}[spec]
    return {
        "base": base,
        "spec": spec,
        "stage": stage,
        "bits_per_weight": bits + 0.1,
        "nominal_bits_per_weight": bits,
        "perplexity": perplexity,
        "kl": kl,
        "top1": 0.5,
        "seconds": 1.0,
    }


ROWS = [
    _row("pv", 9.5, 0.2),  # rows come in any order
    _row("dense", 8.0, 0.0, spec=None),
    _row("kmeans", 12.0, 0.5),
    _row("search", 10.0, 0.3),
    _row("block", 10.5, 0.25),
    _row("kmeans", 13.0, 0.6, spec="m1v4g128"),
]


def test_a_stage_that_does_not_improve_is_named():
    lines = quality_tables.verdicts(ROWS)
    assert lines == [
        "shipped m2v8g32: + block tuning does not improve on + beam search: "
        "perplexity 10.50000 after 10.00000",
        "2 of 3 stages improve on the last.",
    ]


def test_the_table_stands_in_the_order_of_bits_and_stages():
    lines = quality_tables.report(ROWS).splitlines()
    stages = [line[37:51].strip() for line in lines[1:] if line.startswith("shipped ")][:6]
    assert stages == ["dense", "k-means", "k-means", "+ beam search", "+ block tuning"] + [
        "+ PV-Tuning"
    ]


def test_files_become_one_and_the_last_row_counts():
    first = {"device": "a GPU", "command": "1", "options": {"steps": "1"}, "rows": ROWS}
    later = {"device": "a GPU", "command": "2", "rows": [_row("pv", 9.0, 0.1)]}
    merged = quality_tables.merge([first, later])
    assert len(merged["rows"]) == len(ROWS)
    assert [row["perplexity"] for row in merged["rows"] if row["stage"] == "pv"] == [9.0]
    assert merged["runs"] == [{"command": "1", "options": {"steps": "1"}}, {"command": "2"}]
    last = {"device": "a GPU", "command": "3", "rows": [_row("kl", 9.8, 0.22)]}
    again = quality_tables.merge([merged, last])
    assert [run["command"] for run in again["runs"]] == ["1", "2", "3"]
    with pytest.raises(ValueError, match="several devices"):
        quality_tables.merge([first, later | {"device": "another GPU"}])


def test_the_figure_has_a_line_for_each_stage_of_each_family():
    figure = quality_figure.draw("a GPU", [*ROWS, _row("kmeans", 7.0, 0.4, base="larger")])
    assert len(figure.axes) == 4
    perplexity, kl = figure.axes[:2]
    labels = {line.get_label(): line for line in perplexity.lines}
    assert set(labels) == {
        "k-means, v = 8",
        "k-means, v = 4",
        "+ beam search, v = 8",
        "+ block tuning, v = 8",
        "+ PV-Tuning, v = 8",
        "dense, 16 bits",
    }
    assert list(labels["+ PV-Tuning, v = 8"].get_xdata()) == [2.6]
    assert list(labels["dense, 16 bits"].get_ydata()) == [8.0, 8.0]
    assert [line.get_ydata()[0] for line in kl.lines if line.get_label() == "k-means, v = 4"] == [
        0.6
    ]
