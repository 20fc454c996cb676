"""Figures of matplotlib as inline SVG that takes its colours from the page, and so follows light, dark and print."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from xml.etree import ElementTree

import matplotlib
from matplotlib.figure import Figure

# Colours that stand for variables of the style sheet: what is drawn in one is given the variable instead.
INK, MUTED = "#010101", "#010102"
ROLES = {"old": "#010111", "stale": "#010112", "corrected": "#010113", "fresh": "#010114"}
SERIES = ("#010121", "#010122", "#010123", "#010124", "#010125", "#010126")
VARIABLES = {
    INK: "--ink", MUTED: "--muted", **{colour: f"--{role}" for role, colour in ROLES.items()},
    **{colour: f"--series-{number}" for number, colour in enumerate(SERIES, start=1)},
}  # fmt: skip
MARKERS = ("o", "s", "^", "D", "v", "P")
# Points of a 320 point wide figure: legible on a phone, where that is also about as many pixels.
FONT_SIZE, WIDTH = 9.0, 320 / 72

_COLOUR = re.compile(r"#[0-9a-f]{6}\b")
_REFERENCE = re.compile(r"url\(#([^)]+)\)")
# Of no type of ours: matplotlib spells out every key from 3.11 on, and took strings before.
_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: searchable, read aloud, in the page's own font
    "svg.hashsalt": "hf_corrector",  # the same record gives the same page
    "text.parse_math": False,  # names may hold dollar signs
    "font.size": FONT_SIZE, "axes.labelsize": FONT_SIZE, "legend.fontsize": FONT_SIZE, "xtick.labelsize": FONT_SIZE,
    "ytick.labelsize": FONT_SIZE, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": MUTED,
    "text.color": INK, "axes.labelcolor": INK, "xtick.color": MUTED, "ytick.color": MUTED, "xtick.labelcolor": INK,
    "ytick.labelcolor": INK, "axes.facecolor": "none", "figure.facecolor": "none", "legend.frameon": False,
    "grid.color": MUTED, "grid.alpha": 0.35, "grid.linewidth": 0.5, "lines.linewidth": 1.6, "lines.markersize": 5,
}  # fmt: skip


@contextmanager
def style() -> Iterator[None]:
    """Set how figures of a report look; their text is measured without fonts for every script."""
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # Browsers have fonts for what matplotlib's own lacks; only the layout guesses how wide it is.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def inline(figure: Figure, *, name: str, title: str, description: str) -> str:
    """Return a figure as an ``<svg>`` element for HTML.

    Args:
        figure: The figure, made and drawn on within :func:`style`.
        name: Prefix of all ids in it; unique on the page.
        title: What it shows, for those who do not see it.
        description: What is to be seen in it, in words.
    """
    content = io.BytesIO()
    unsaid: Any = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(content, format="svg", metadata=unsaid)
    root = ElementTree.fromstring(content.getvalue())
    for element in root.iter():
        element.tag = element.tag.partition("}")[2] or element.tag
        _rewrite(element, name)
    for child in list(root):
        if child.tag == "metadata":
            root.remove(child)
    for unwanted in ("width", "height", "version"):
        root.attrib.pop(unwanted, None)
    for place, (tag, text) in enumerate((("title", title), ("desc", description))):
        said = ElementTree.Element(tag, {"id": f"{name}-{tag}"})
        said.text = text
        root.insert(place, said)
    root.attrib |= {"role": "img", "aria-labelledby": f"{name}-title {name}-desc"}
    return ElementTree.tostring(root, encoding="unicode")


def _rewrite(element: ElementTree.Element, name: str) -> None:
    """Give ids their prefix and colours their variables; drop what names a font or a namespace."""
    attributes = {key.partition("}")[2] or key: value for key, value in element.attrib.items()}
    for key, value in attributes.items():
        changed = _REFERENCE.sub(lambda found: f"url(#{name}-{found[1]})", value)
        if key == "id":
            changed = f"{name}-{changed}"
        elif key == "href":
            changed = f"#{name}-{changed.removeprefix('#')}"
        elif key in ("style", "fill", "stroke"):
            changed = _without_font(_COLOUR.sub(_variable, changed))
        attributes[key] = changed
    element.attrib.clear()
    element.attrib.update(attributes)


def _variable(found: re.Match[str]) -> str:
    return f"var({VARIABLES[found[0]]})" if found[0] in VARIABLES else found[0]


def _without_font(style_text: str) -> str:
    """Keep the size of text and leave its font to the page."""
    kept = []
    for declaration in style_text.split(";"):
        key, _, value = declaration.partition(":")
        size = re.search(r"[\d.]+px", value)
        if key.strip() == "font" and size is not None:
            kept.append(f"font-size: {size[0]}")
        elif key.strip() != "font-family":
            kept.append(declaration.strip())
    return "; ".join(kept)
