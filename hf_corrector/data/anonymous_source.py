"""Cut functions and classes out of Python source, without their docstrings and, if wanted, without their names.

What a definition is called, and what its docstring says, are what a search for it is made of; the code that is left is
what has to be found. Where the name is what a question asks for, it stays.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
import warnings
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
MASK = "_"
# Marks where a docstring was, so that lines it leaves blank can be told from blank lines of the author's.
REMOVED = "\0"


@dataclass(frozen=True)
class Documented:
    """A definition with a docstring.

    Attributes:
        path: Dotted names of the enclosing definitions and its own, ``("JSONDecoder", "decode")``.
        kind: ``"function"``, ``"class"`` or ``"method"``.
        docstring: As :func:`inspect.cleandoc` gives it.
        node: Its syntax tree.
    """

    path: tuple[str, ...]
    kind: str
    docstring: str
    node: Definition


class SourceFile:
    """One parsed Python file.

    Args:
        text: Its contents.

    Raises:
        SyntaxError: If it cannot be parsed.
        ValueError: If it holds null bytes.
        RecursionError: If it is nested too deeply.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # outdated escapes in other people's strings
            self.tree = ast.parse(text)
        self._lines = io.StringIO(text).readlines()
        self._starts = [0]
        for line in self._lines:
            self._starts.append(self._starts[-1] + len(line))

    def documented(self) -> Iterator[Documented]:
        """Yield every function, class and method that has a docstring, in the order of the file."""
        for node, parent, path in _definitions(self.tree, self.tree, ()):
            docstring = ast.get_docstring(node)
            if docstring:
                inside = "method" if isinstance(parent, ast.ClassDef) else "function"
                yield Documented(path, "class" if isinstance(node, ast.ClassDef) else inside, docstring, node)

    def anonymous(self, node: Definition) -> str:
        """Return a definition's source, dedented, without docstrings and with its own name masked.

        The name is replaced wherever it is used as a name, in a recursive call or in ``super()`` too; where it cannot
        be taken for an English word (``read_all``, ``JSONDecoder``), in comments and strings as well. Docstrings of
        nested definitions go too: a class would otherwise repeat the queries for its methods.
        """
        start, end = self._span(node)
        return self._edited(start, end, [*self._docstrings_in(start, end), *self._own_names(node.name, start, end)])

    def undocumented(self, node: Definition) -> str:
        """Return a definition's source, dedented, without docstrings, those of nested definitions included."""
        start, end = self._span(node)
        return self._edited(start, end, self._docstrings_in(start, end))

    def _span(self, node: Definition) -> tuple[int, int]:
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        return self._starts[first - 1], self._offset(node.end_lineno, node.end_col_offset)

    def _docstrings_in(self, start: int, end: int) -> list[tuple[int, int, str]]:
        return self._docstrings[bisect_left(self._docstrings, (start,)) : bisect_left(self._docstrings, (end,))]

    def _edited(self, start: int, end: int, edits: list[tuple[int, int, str]]) -> str:
        pieces, position = [], start
        for edit_start, edit_end, replacement in sorted(edits):
            if edit_start >= position:  # a name inside a docstring has gone with it
                pieces += [self.text[position:edit_start], replacement]
                position = edit_end
        pieces.append(self.text[position:end])
        return _tidy("".join(pieces))

    @cached_property
    def _docstrings(self) -> list[tuple[int, int, str]]:
        """Where each docstring of a definition starts and ends, and what to put there, ascending."""
        edits = []
        for node, _, _ in _definitions(self.tree, self.tree, ()):
            if has_docstring(node):
                string = node.body[0]
                start = self._offset(string.lineno, string.col_offset)
                end = self._offset(string.end_lineno, string.end_col_offset)
                edits.append((start, end, REMOVED if len(node.body) > 1 else "..."))
        return sorted(edits)

    def _own_names(self, name: str, start: int, end: int) -> Iterator[tuple[int, int, str]]:
        names, prose_starts, prose_ends = self._tokens
        offsets = names.get(name, [])
        for offset in offsets[bisect_left(offsets, start) : bisect_left(offsets, end)]:
            yield offset, offset + len(name), MASK
        if "_" in name.strip("_") or name != name.lower():
            pattern = re.compile(rf"\b{re.escape(name)}\b")
            first, last = bisect_left(prose_starts, start), bisect_left(prose_starts, end)
            for prose_start, prose_end in zip(prose_starts[first:last], prose_ends[first:last], strict=True):
                for match in pattern.finditer(self.text, prose_start, prose_end):
                    yield match.start(), match.end(), MASK

    @cached_property
    def _tokens(self) -> tuple[dict[str, list[int]], list[int], list[int]]:
        """Offsets of every name, by name; and where comments and strings start and end. All ascending."""
        names: dict[str, list[int]] = {}
        prose_starts: list[int] = []
        prose_ends: list[int] = []
        for token in tokenize.generate_tokens(io.StringIO(self.text).readline):
            start = self._starts[token.start[0] - 1] + token.start[1]
            if token.type == tokenize.NAME:
                names.setdefault(token.string, []).append(start)
            elif token.type in _PROSE:
                prose_starts.append(start)
                # Not start + length: the string of a token unescapes doubled braces.
                prose_ends.append(self._starts[token.end[0] - 1] + token.end[1])
        return names, prose_starts, prose_ends

    def _offset(self, line: int | None, column: int | None) -> int:
        """Turn a position in the syntax tree, counted in UTF-8 bytes, into one in the text."""
        if line is None or column is None:
            return len(self.text)
        text = self._lines[line - 1]
        return self._starts[line - 1] + (column if text.isascii() else len(text.encode()[:column].decode()))


# Python 3.12 splits f-strings into parts, of which the middle ones are text.
_PROSE = {tokenize.COMMENT, tokenize.STRING} | {
    number for number, name in tokenize.tok_name.items() if name in {"FSTRING_MIDDLE", "TSTRING_MIDDLE"}
}


def _definitions(
    node: ast.AST, parent: ast.AST, path: tuple[str, ...]
) -> Iterator[tuple[Definition, ast.AST, tuple[str, ...]]]:
    """Yield definitions below ``node`` with the scope they belong to and their path, outer before inner.

    Only statements are entered, which is much faster than :func:`ast.walk`: expressions cannot hold definitions.
    """
    for child in ast.iter_child_nodes(node):
        if isinstance(child, DEFINITIONS):
            own_path = (*path, child.name)
            yield child, parent, own_path
            yield from _definitions(child, child, own_path)
        elif isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):
            yield from _definitions(child, parent, path)


def has_docstring(node: Definition) -> bool:
    """Tell whether the first statement is a bare string."""
    first = node.body[0]
    return isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)


def is_stub(node: Definition) -> bool:
    """Tell whether a body does nothing: docstring, ``pass``, ``...`` and NotImplementedError at most."""
    return all(_says_nothing(statement) for statement in node.body)


def _says_nothing(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Raise):
        raised = statement.exc.func if isinstance(statement.exc, ast.Call) else statement.exc
        return isinstance(raised, ast.Name) and raised.id == "NotImplementedError"
    return isinstance(statement, ast.Pass) or (
        isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    )


def _tidy(source: str) -> str:
    """Drop lines that only held a docstring, and the indentation of the first line from all."""
    lines = [line for line in source.split("\n") if line.strip(f" \t;{REMOVED}") or REMOVED not in line]
    indent = lines[0][: len(lines[0]) - len(lines[0].lstrip())]
    return "\n".join(line.removeprefix(indent).replace(REMOVED, "").rstrip() for line in lines).strip()
