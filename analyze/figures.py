"""The figures of a report, drawn from report.json's numbers alone: each function takes plain lists, gives a Figure.

Blue pushes up, rust pushes down, grey is a null or a baseline. Nothing here touches matplotlib's global state.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

BLUE, RUST, GREY, INK, FAINT = "#2f5d8a", "#b4532a", "#b9b5ab", "#33312c", "#e4e0d6"
LINES = [BLUE, RUST, "#5b8a5a", "#8a6aa8"]
SIZE = (5.2, 2.9)  # inches; drawn at about 1:1 on a page of two columns, and still legible at 380 px
STYLE = {
    "svg.fonttype": "none",  # text stays text: it takes the page's font, can be searched and is smaller
    "svg.hashsalt": "expanse",  # equal numbers give equal files
    "font.size": 10,
    "axes.unicode_minus": True,
}


def _axes(size: tuple[float, float] = SIZE, columns: int = 1, rows: int = 1) -> tuple[Figure, Any]:
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(GREY)
        ax.tick_params(color=GREY, labelcolor=INK, labelsize=9)
    return figure, axes[0, 0] if rows * columns == 1 else axes


def _grid(ax: Axes, axis: str = "y") -> None:
    ax.grid(axis=axis, color=FAINT, linewidth=0.8)
    ax.set_axisbelow(True)


def ladder(names: Sequence[str], r2: Sequence[float | None]) -> Figure:
    """Bars from 0 to 1; what lies below -1 is clipped there, its value printed."""
    figure, ax = _axes((SIZE[0], 0.45 + 0.38 * len(names)))
    for row, value in enumerate(r2):
        if value is None:
            continue
        shown = max(value, -1.0)
        ax.barh(row, shown, height=0.62, color=BLUE if value >= 0 else RUST)
        text = f"{value:.3f}" if value > -10 else f"{value:,.0f}"
        text = text.replace("-", "−") + (" (bar clipped at −1)" if value < -1 else "")
        ax.text(max(shown, 0) + 0.02, row, text, va="center", ha="left", fontsize=9, color=INK)
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    lowest = min([0.0, *(max(v, -1.0) for v in r2 if v is not None)])
    ax.set_xlim(lowest - (0.05 if lowest < 0 else 0), 1.19)
    ax.set_xticks([t for t in (-1, -0.5, 0, 0.25, 0.5, 0.75, 1) if t >= lowest])
    ax.axvline(0, color=INK, linewidth=0.8)
    _grid(ax, "x")
    ax.set_xlabel("R² on held-out tokens")
    return figure


def spectrum(values: Sequence[float], null: Sequence[float], shown: Sequence[int]) -> Figure:
    """Eigenvalues from most positive to most negative; the pairs shown as cards are dots; the null is grey."""
    figure, ax = _axes()
    rank, values = np.arange(1, len(values) + 1), np.asarray(values)
    ax.axhline(0, color=GREY, linewidth=0.8)
    ax.plot(rank, null, color=GREY, linewidth=1.6, label="random weights, same norm")
    ax.plot(rank, values, color=INK, linewidth=1.2, label="this direction")
    for sign, colour in ((1, BLUE), (-1, RUST)):
        picked = [i for i in shown if values[i] * sign > 0]
        ax.plot(rank[picked], values[picked], "o", color=colour, markersize=4.5)
    _grid(ax)
    ax.set_xlabel("eigenpair, largest λ first")
    ax.set_ylabel("λ")
    ax.legend(frameon=False, fontsize=9)
    return figure


def truncation(curves: dict[str, Sequence[float | None]]) -> Figure:
    """Correlation of the k strongest eigenpairs with true activations against k."""
    figure, ax = _axes()
    longest = max((len(curve) for curve in curves.values()), default=1)
    for colour, (name, curve) in zip(LINES, curves.items(), strict=False):
        ax.plot(range(1, len(curve) + 1), _floats(curve), color=colour, linewidth=1.5, label=name)
    ax.set_xscale("log", base=2)
    ticks = [2**i for i in range(0, 20, 1 if longest <= 128 else 2) if 2**i <= longest]
    ax.set_xticks(ticks, [str(t) for t in ticks])
    ax.axhline(0, color=GREY, linewidth=0.8)
    ax.set_ylim(top=1.03)
    _grid(ax)
    ax.set_xlabel("eigenpairs kept, strongest first")
    ax.set_ylabel("correlation")
    ax.legend(frameon=False, fontsize=9)
    return figure


def hosvd(share: Sequence[float], null: Sequence[float]) -> Figure:
    """Cumulative share of ||T||^2 held by the first output directions."""
    figure, ax = _axes()
    rank = np.arange(1, len(share) + 1)
    ax.plot(rank, np.cumsum(null), color=GREY, linewidth=1.6, label="random weights")
    ax.plot(rank, np.cumsum(share), color=BLUE, linewidth=1.6, label="this tensor")
    ax.set_ylim(0, 1.03)
    _grid(ax)
    ax.set_xlabel("output directions kept")
    ax.set_ylabel("share of ‖T‖²")
    ax.legend(frameon=False, fontsize=9, loc="lower right")
    return figure


def component_scatter(cos_parent: Sequence[float], firing: Sequence[float]) -> Figure:
    """Where each component stands: how far from its parent, how often it fires."""
    figure, ax = _axes()
    firing = np.asarray(firing, dtype=float)
    floor = max(firing[firing > 0].min() / 2, 1e-6) if (firing > 0).any() else 1e-6
    dead = firing == 0
    ax.plot(
        np.asarray(cos_parent)[~dead], firing[~dead], "o", color=BLUE, markersize=2.6, alpha=0.45, markeredgewidth=0
    )
    if dead.any():
        ax.plot(np.asarray(cos_parent)[dead], np.full(dead.sum(), floor), "|", color=RUST, markersize=7, alpha=0.6)
        ax.text(0.01, 0.03, "never fired", transform=ax.transAxes, fontsize=9, color=RUST)
    ax.set_yscale("log")
    _grid(ax)
    ax.set_xlabel("cosine to parent")
    ax.set_ylabel("firing rate")
    return figure


def sibling_histogram(cosines: Sequence[float]) -> Figure:
    figure, ax = _axes()
    ax.hist(cosines, bins=np.linspace(np.floor(min(cosines) * 20) / 20, 1.0, 41), color=BLUE)
    _grid(ax)
    ax.set_xlabel("largest cosine to a sibling")
    ax.set_ylabel("components")
    return figure


def history(steps: Sequence[float], series: dict[str, Sequence[float | None]]) -> Figure:
    """Every logged quantity in its own small panel; logarithmic where all of it is positive."""
    columns = min(3, len(series))
    rows = -(-len(series) // columns)
    figure, axes = _axes((3.1 * columns, 1.75 * rows), columns=columns, rows=rows)
    panels = np.atleast_1d(axes).flatten()
    for ax, (name, values) in zip(panels, series.items(), strict=False):
        numbers = np.asarray(_floats(values))
        finite = numbers[np.isfinite(numbers)]
        ax.plot(steps, numbers, color=BLUE, linewidth=1.1)
        if len(finite) and finite.min() > 0 and finite.max() > 3 * finite.min():
            ax.set_yscale("log")
        ax.set_title(name, fontsize=9, loc="left", color=INK)
        _grid(ax)
    for ax in panels[len(series) :]:
        ax.set_visible(False)
    return figure


def _floats(values: Sequence[float | None]) -> list[float]:
    return [float("nan") if value is None else value for value in values]


def save(figure: Figure, folder: Path, name: str) -> str:
    """Write PNG and SVG files; return the SVG as text to be set into a page."""
    with rc_context(STYLE):
        figure.savefig(folder / f"{name}.png", dpi=160)
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None}, transparent=True)
    return inline(name, (folder / f"{name}.svg").read_text(encoding="utf-8"))


def inline(name: str, svg: str) -> str:
    """An SVG file as an element of a page: no prolog, no metadata, no fixed size, and ids that are its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    head, rest = svg.split(">", 1)
    view = re.search(r'viewBox="[^"]*"', head)[0]
    rest = re.sub(r'\bid="', f'id="{name}-', rest)
    rest = re.sub(r'xlink:href="#', f'href="#{name}-', rest)
    rest = rest.replace("url(#", f"url(#{name}-")
    return f'<svg {view} role="img" xmlns="http://www.w3.org/2000/svg">{rest}'
