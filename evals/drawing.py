"""What all figures share: colours, markers, sizes, how numbers stand on an axis, and a figure as an element of the page."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The light theme of page.css, by the names of its variables; the page swaps each colour for its variable.
THEME = {
    "ink": "#20262b",
    "muted": "#626a70",
    "rule": "#d9d6cd",
    "accent": "#17617a",
    "s0": "#17617b",
    "s1": "#b3541e",
    "s2": "#4d7c3a",
    "s3": "#7a4d9b",
    "s4": "#a8843a",
    "s5": "#b23a5e",
    "s6": "#3d5fa8",
    "s7": "#5c6670",
}
SERIES = [THEME[f"s{index}"] for index in range(8)]
MARKERS = "osD^vPX*"
DASHES = ["-", (0, (6, 2)), (0, (2, 1.5)), (0, (6, 2, 1, 2))]
HATCHES = {"branch": "....", "dense": "////", "soup": "xxxx", "merge": "\\\\\\\\", "ensemble": "||||"}
STYLE = {
    "font.size": 9,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": THEME["muted"],
    "axes.labelcolor": THEME["muted"],
    "xtick.color": THEME["muted"],
    "ytick.color": THEME["muted"],
    "text.color": THEME["ink"],
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "hatch.linewidth": 0.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "upcycle",
}


def new_figure(rows: int, columns: int, width: float, height: float) -> tuple[Figure, Any]:
    """A figure of rows × columns axes, each `width` by `height` inches, and the axes as a 2-D array."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def write_ticks(axis: Axes, of: str) -> None:
    """Numbers of the horizontal axis: FLOPs as 1.5e15, counts with a metric suffix."""
    from matplotlib.ticker import EngFormatter, FuncFormatter

    powers = FuncFormatter(lambda value, _: f"{value:.2g}".replace("e+", "e"))
    axis.xaxis.set_major_formatter(powers if of == "flops" else EngFormatter(sep=""))


def inlined(draw: Callable[[Axes], None], width: float, height: float, salt: str) -> str:
    """An SVG element of one drawing in the page's own colours and font (CSS variables).

    salt: of the page's drawings this one's own, as their ids must differ.
    """
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context(STYLE | {"svg.hashsalt": f"upcycle {salt}"}):
        figure, axes = new_figure(1, 1, width, height)
        draw(axes[0, 0])
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    svg = buffer.getvalue()[buffer.getvalue().index("<svg") :]
    for variable, color in THEME.items():
        svg = svg.replace(color, f"var(--{variable})")
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # matplotlib names the groups of every figure alike
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return re.sub(r'(<svg [^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg [^>]*?) height="[^"]*"', r"\1", svg))
