"""The figure of rows."""

from benchmarks import figures, plan


def test_figure_draws_lines_points_and_floor(about, measured_rows):
    figure = figures.draw(about, measured_rows)
    panel = figure.axes[0]
    labels = [line.get_label() for line in panel.lines]
    assert "dense bf16" in labels
    assert "HBM floor of 2.125 bits a weight" in labels
    dense = panel.lines[labels.index("dense bf16")]
    assert 40.0 in dense.get_ydata()
    assert [axes.get_title() for axes in figure.axes] == [
        f"K x N = {K} x {N}" for K, N in plan.KERNEL_SHAPES
    ]
