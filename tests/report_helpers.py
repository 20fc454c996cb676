"""Read a rendered page as a browser does, and find whatever it would ask for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "link", "br", "img", "input", "hr"}


@dataclass
class Parsed(HTMLParser):
    """A page as a browser reads it: elements with their attributes and the text in them."""

    elements: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    texts: list[tuple[str, str]] = field(default_factory=list)
    unclosed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.unclosed.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.unclosed.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.unclosed[-1] if self.unclosed else "", data))

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        return "".join(text for _, text in self.texts)


def parsed(page: str) -> Parsed:
    reader = Parsed()
    reader.feed(page)
    reader.close()
    assert reader.unclosed == []
    return reader


def references(page: str) -> Iterator[str]:
    """Yield whatever a browser might fetch or follow."""
    reader = parsed(page)
    for _, attributes in reader.elements:
        for name, value in attributes.items():
            if name in (
                "src",
                "srcset",
                "href",
                "xlink:href",
                "action",
                "formaction",
                "poster",
                "data",
                "background",
                "ping",
            ):
                yield value
            yield from (found.strip("'\" ") for found in re.findall(r"url\(([^)]*)\)", value))
    for tag, text in reader.texts:
        if tag == "style":
            yield from (found.strip("'\" ") for found in re.findall(r"url\(([^)]*)\)", text))
            yield from re.findall(r"@import[^;]*", text)


def assert_asks_for_nothing(page: str) -> None:
    reader, ids = parsed(page), [one["id"] for _, one in parsed(page).elements if "id" in one]
    for reference in references(page):
        assert reference.startswith("data:,") or reference.removeprefix("#") in ids, reference
    forbidden = {"script", "iframe", "object", "embed", "img", "form", "base", "audio", "video", "source", "input"}
    assert not forbidden & {name for name, _ in reader.elements}
    assert not [name for _, one in reader.elements for name in one if name.startswith("on")]
    refresh = [one for one in reader.all("meta") if one.get("http-equiv", "").lower() == "refresh"]
    assert refresh == []
    assert len(set(ids)) == len(ids)
