"""A run's figures as pictures: SVG that takes its ink from the page around it, so that it is right by day and night.

The same figures make the same bytes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Picture
from matplotlib.rcsetup import cycler

from qspin.figures.panel import Figure

INK = "#010203"  # stands for the page's own colour while a picture is drawn
COLOURS = ("#3b82f6", "#f59e0b", "#10b981", "#ef4444", "#8b5cf6", "#64748b")
STYLE = {
    "svg.hashsalt": "qspin",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": cycler(color=COLOURS),
    "legend.frameon": False,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
}


def players(panels: Mapping[str, Mapping[str, Figure]], figures: Mapping[str, tuple[str, float | None]]) -> str:
    """Each figure from player to player, with its interval.

    Args:
        panels: figures by name, by player.
        figures: heading and best value, if there is one, by the figure's name.
    """
    columns = min(3, len(figures))
    rows = -(-len(figures) // columns)
    with mpl.rc_context(STYLE):
        picture = Picture(figsize=(3.2 * columns, 2.3 * rows), layout="constrained")
        axes = list(picture.subplots(rows, columns, squeeze=False).flat)
        for axis, (name, (heading, best)) in zip(axes, figures.items(), strict=False):
            intervals(axis, {"": {player: panel[name] for player, panel in panels.items() if name in panel}})
            axis.set_title(heading, fontsize="medium")
            if best is not None:
                axis.axhline(best, color=INK, linewidth=0.8, linestyle=":")
        for axis in axes[len(figures) :]:
            axis.remove()
        return _svg(picture)


def intervals(axis: Axes, series: Mapping[str, Mapping[str, Figure]]) -> None:
    """Lines from player to player, a little apart so that intervals do not hide each other."""
    found = {player for line in series.values() for player in line}
    iterations = sorted((player for player in found if player.isdigit()), key=int)
    names = [*sorted(found - {*iterations}), *iterations]  # base, sft, 0, 1, …
    for offset, (label, line) in enumerate(series.items()):
        places = [names.index(player) + 0.03 * (offset - (len(series) - 1) / 2) for player in line]
        values = [figure.value for figure in line.values()]
        around = (  # an estimate may lie outside of its percentile interval, by bias or by rounding
            [max(0.0, figure.value - figure.low) for figure in line.values()],
            [max(0.0, figure.high - figure.value) for figure in line.values()],
        )
        axis.errorbar(places, values, around, label=label or None, capsize=2, marker="o", markersize=3, linewidth=1)
    axis.set_xticks(range(len(names)), names)
    axis.margins(x=0.1)


def compared(series: Mapping[str, Mapping[str, Mapping[str, Figure]]], headings: Mapping[str, str]) -> str:
    """Several runs: each figure in a picture of its own, a line a run."""
    with mpl.rc_context(STYLE):
        picture = Picture(figsize=(5 * len(headings), 4), layout="constrained")
        axes = picture.subplots(1, len(headings), squeeze=False)[0]
        for axis, (name, heading) in zip(axes, headings.items(), strict=True):
            runs = {run: {who: panel[name] for who, panel in panels.items()} for run, panels in series.items()}
            intervals(axis, runs)
            axis.set_title(heading, fontsize="medium")
            axis.set_xlabel("player")
        if series:
            axes[0].legend(fontsize="small")
        return _svg(picture)


def lines(series: Mapping[str, Sequence[float]], heading: str, label: str) -> str:
    """Values by step, a line each."""

    def draw(axis: Axes) -> None:
        for name, values in series.items():
            axis.plot(range(len(values)), values, label=name, linewidth=1.2)

    return _single(draw, heading, label)


def distributions(series: Mapping[str, Sequence[int]], heading: str, label: str) -> str:
    """Shares of values in bins that all series have."""
    most = max(max(values) for values in series.values())
    edges = [most * index / 24 for index in range(25)]

    def draw(axis: Axes) -> None:
        for name, values in series.items():
            weights = [1 / len(values)] * len(values)
            axis.hist(values, edges, weights=weights, histtype="step", label=name, linewidth=1.4)

    return _single(draw, heading, label)


def shares(parts: Mapping[str, Mapping[str, float]], kinds: Sequence[str], heading: str, label: str) -> str:
    """A bar for each name, of parts in the order of their kinds, each kind in a colour of its own."""

    def draw(axis: Axes) -> None:
        names = list(parts)
        reached = dict.fromkeys(names, 0.0)
        for kind, colour in _coloured(parts, kinds).items():
            sizes = [parts[name].get(kind, 0.0) for name in names]
            axis.barh(names, sizes, left=list(reached.values()), label=kind, height=0.6, color=colour)
            reached = {name: reached[name] + size for name, size in zip(names, sizes, strict=True)}
        axis.invert_yaxis()

    return _single(draw, heading, label, height=0.8 + 0.35 * len(parts), legend_columns=len(kinds))


def groups(parts: Mapping[str, Mapping[str, float]], kinds: Sequence[str], heading: str, label: str) -> str:
    """As `shares`, of parts that do not add up: a bar each, one under another."""
    coloured = _coloured(parts, kinds)
    high = 0.8 / len(coloured)

    def draw(axis: Axes) -> None:
        for index, (kind, colour) in enumerate(coloured.items()):
            places = [place + (index - (len(coloured) - 1) / 2) * high for place in range(len(parts))]
            sizes = [part.get(kind, 0.0) for part in parts.values()]
            axis.barh(places, sizes, label=kind, height=high, color=colour)
        axis.set_yticks(range(len(parts)), list(parts))
        axis.invert_yaxis()

    return _single(draw, heading, label, height=0.8 + 0.5 * len(parts), legend_columns=len(kinds))


def _single(
    draw: Callable[[Axes], None], heading: str, label: str, *, height: float = 2.6, legend_columns: int = 1
) -> str:
    """A picture of one plot, so many inches high, with a heading, a label below and a legend."""
    with mpl.rc_context(STYLE):
        picture = Picture(figsize=(6, height), layout="constrained")
        axis = picture.subplots()
        draw(axis)
        axis.set_title(heading, fontsize="medium")
        axis.set_xlabel(label)
        axis.legend(fontsize="small", ncols=legend_columns)
        return _svg(picture)


def _coloured(parts: Mapping[str, Mapping[str, float]], kinds: Sequence[str]) -> dict[str, str]:
    """The kinds that there are, each with its colour."""
    there = {kind for part in parts.values() for kind in part}
    return {kind: colour for kind, colour in zip(kinds, COLOURS, strict=False) if kind in there}


def _svg(picture: Picture) -> str:
    file = io.StringIO()
    picture.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    # a part of a page has no XML head of its own, and metadata with other people's addresses says nothing here
    text = re.sub(r"<\?xml.*?(?=<svg)|<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return text.replace(INK, "currentColor")
