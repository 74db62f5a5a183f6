"""matplotlib figures as inline SVG that follows the page: its font, and its light or dark colours.

The same input gives the same bytes: ids come from a fixed salt, and no date is written.
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Colours of the light scheme. In the SVG each becomes a CSS variable, which `style.css` sets
#: for both schemes. The hues are Okabe and Ito's, told apart by colour-blind readers.
COLOURS = {
    "ink": "#1b2430",
    "muted": "#5a6675",
    "line": "#d9dee4",
    "blue": "#0072b2",
    "green": "#008a66",
    "vermillion": "#c94f00",
    "purple": "#a8437f",
    "orange": "#b07800",
    "sky": "#2a8cc7",
}
WIDTH = 4.0  # inches of a figure; readable on a phone
_FONT = "DejaVu Sans"  # matplotlib's own, so that the layout is the same on every machine
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": [_FONT],
    "font.size": 9.0,
    "axes.edgecolor": COLOURS["line"],
    "axes.labelcolor": COLOURS["muted"],
    "axes.labelsize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
    "xtick.color": COLOURS["muted"],
    "ytick.color": COLOURS["muted"],
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "text.color": COLOURS["ink"],
    "text.parse_math": False,  # a "$" in a name is a dollar
    "grid.color": COLOURS["line"],
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "path.simplify": True,
}


def draw(
    name: str, description: str, width: float, height: float, paint: Callable[[Figure], None]
) -> Markup:
    """Paint a figure and return it as an ``<svg>`` element that scales with its container.

    Args:
        name: unique on the page; ids inside the SVG derive from it.
        description: what a reader who cannot see the figure is told.
        width, height: in inches; one point of text is one CSS pixel and a third at that size.
    """
    from matplotlib import style
    from matplotlib.figure import Figure

    # "default" first: a matplotlibrc of the user changes nothing.
    with style.context(["default", {**_SETTINGS, "svg.hashsalt": name}]):
        figure = Figure(figsize=(width, height))
        paint(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return Markup(_inline(buffer.getvalue().decode("utf-8"), description))


def fixed_axes(
    figure: Figure, *, left: float, bottom: float, top: float, right: float = 0.12
) -> Axes:
    """Axes that leave margins of fixed size, in inches."""
    width, height = figure.get_size_inches()
    return figure.add_axes(
        (left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height)
    )


def one_line(name: str, characters: int = 50) -> str:
    """A name cut off at a word, for a label."""
    return textwrap.shorten(name, characters, placeholder=" …")


def _inline(document: str, description: str) -> str:
    svg = document[document.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, count=1, flags=re.DOTALL)
    view = re.search(r'viewBox="([^"]+)"', svg)
    assert view, "matplotlib writes a viewBox"
    width = round(float(view[1].split()[2]) * 4 / 3)
    root = (
        f'<svg role="img" aria-label="{escape(description)}" viewBox="{view[1]}" '
        f'style="--natural: {width}px">'
    )
    svg = root + svg[svg.index(">") + 1 :]
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # the same in every figure, and used by none
    svg = svg.replace("xlink:href=", "href=")
    # matplotlib escapes text and writes its own style attributes, so only those are touched here.
    return re.sub(r'style="[^"]*"', lambda match: _themed(match[0]), svg)


def _themed(style: str) -> str:
    for name, colour in COLOURS.items():
        style = style.replace(colour, f"var(--{name}, {colour})")
    return style.replace(f"'{_FONT}'", "var(--font)")
