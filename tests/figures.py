"""What a reader needs of any plot of the project."""

from itertools import combinations
from types import SimpleNamespace

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb


def check_figure(figure):
    """No axes without data; each series of a legend is seen, also in gray; no legend over lines."""
    FigureCanvasAgg(figure)
    figure.draw_without_rendering()
    assert figure.axes
    for axes in figure.axes:
        assert axes.get_xlabel() and axes.get_title("left")
        lines = [line for line in axes.lines if is_seen(line)]
        assert lines or axes.patches, axes.get_title("left")
        if legend := axes.get_legend():
            handles, labels = axes.get_legend_handles_labels()
            series = [getattr(handle, "lines", [handle])[0] for handle in handles]
            unseen = [x for x, line in zip(labels, series, strict=True) if not is_seen(line)]
            assert not unseen, unseen
            assert all(differ(look(a), look(b)) for a, b in combinations(series, 2)), labels
            box = legend.get_window_extent()
            assert not box.overlaps(axes.get_window_extent())
            assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
            assert figure.bbox.y0 <= box.y0


def is_seen(line):
    points = np.isfinite(np.asarray(line.get_xydata(), float)).all(1).sum()
    return points > (line.get_marker() in ("", "None"))


def look(line):
    hollow = line.get_markerfacecolor() in ("none", "white")
    gray = np.dot(to_rgb(line.get_color()), (0.299, 0.587, 0.114))
    return SimpleNamespace(shape=(line.get_marker(), line.get_linestyle(), hollow), gray=gray)


def differ(a, b):
    return a.shape != b.shape or abs(a.gray - b.gray) > 0.1
