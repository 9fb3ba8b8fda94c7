"""Where a network's code takes the sizes of a reshape or the places of a cut from.

An exported graph has numbers: `x.view(n, length, self.heads, -1)` became `view(1, 196, 6, 64)`. The
statement it was written in says which of them are attributes of the module: those fall when
channels are removed, the others are fixed.
"""

from __future__ import annotations

import ast
import inspect
import linecache
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from types import CodeType, EllipsisType

from torch import nn
from torch.fx import Node

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')
_TORCH = {"torch", "F"}
_DEPTH = 3
"""How many assignments a local variable is followed through."""


@dataclass(frozen=True)
class Frame:
    """A line of code that an operator was written in."""

    file: str
    line: int


@dataclass(frozen=True)
class Attribute:
    """An integer attribute of a module, or an item of a sequence of them: `heads`, `shape[0]`."""

    path: str
    name: str
    value: int


Items = list["Attribute | EllipsisType | None"]
"""Sizes in order: the attribute each is, where it is one; `...` for an unknown number of them."""


def frames(node: Node) -> list[Frame]:
    """The lines that an operator was written in, innermost first; PyTorch's own only where there
    are no others."""
    found = _FRAME.findall(node.meta.get("stack_trace") or "")[::-1]
    own = [Frame(file, int(line)) for file, line in found if "/torch/" not in file]
    return own or [Frame(file, int(line)) for file, line in found]


def sizes(
    module: nn.Module, path: str, node: Node, call: str, values: Sequence[int]
) -> list[Attribute | None]:
    """The attribute that each of an operator's sizes is taken from, where it is one, plainly.

    path: of the innermost module that the operator was written in. call: the operator as it is
    written (`view`, `split`), empty for a slice. values: the sizes, or the slice's bounds.
    """
    for frame in frames(node):
        owner = _owner(module, path, frame)
        if owner is None:
            continue
        code = _Code(module, owner, *_statement(frame), frame.line)
        for part in (code, *code.called()):
            found = part.sizes(call, values) if call else part.bounds(values)
            if found is not None:
                return found
    return [None] * len(values)


def _owner(module: nn.Module, path: str, frame: Frame) -> str | None:
    """The path of the module whose class has this line: the one named, or the only one within."""
    place: nn.Module = module.get_submodule(path)
    if _has_line(type(place), frame):
        return path
    within = [name for name, m in place.named_modules() if _has_line(type(m), frame)]
    if len(within) != 1:
        return None
    return f"{path}.{within[0]}" if path else within[0]


def _has_line(kind: type, frame: Frame) -> bool:
    """Whether one of a class' functions has this line."""
    for base in kind.__mro__:
        for value in vars(base).values():
            code = getattr(inspect.unwrap(value), "__code__", None) if callable(value) else None
            if code is not None and code.co_filename == frame.file:
                first, last = _lines(code)
                if first <= frame.line <= last:
                    return True
    return False


@cache
def _lines(code: CodeType) -> tuple[int, int]:
    """A function's first and last line."""
    lines = [line for *_, line in code.co_lines() if line is not None]
    return min(lines), max(lines)


class _Code:
    """A statement, or a whole function, read with the values that a module's attributes have."""

    def __init__(
        self, module: nn.Module, path: str, statement: ast.AST, function: ast.AST, line: int
    ) -> None:
        self._module, self._path, self._owner = module, path, module.get_submodule(path)
        self._statement, self._function, self._line = statement, function, line

    def called(self) -> Iterator[_Code]:
        """The methods of this module, or of those within it, that are called here: graphs name
        lines of `forward` only."""
        for node in ast.walk(self._statement):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                within = _path_of(node.func.value)
                found = self._method(within, node.func.attr) if within is not None else None
                if found is not None:
                    yield found

    def _method(self, within: str, name: str) -> _Code | None:
        path = ".".join(part for part in (self._path, within) if part)
        try:
            method = inspect.unwrap(getattr(type(self._module.get_submodule(path)), name))
            frame = Frame(method.__code__.co_filename, method.__code__.co_firstlineno)
        except AttributeError:  # not of a module, or not written in Python
            return None
        function = _statement(frame)[1]
        return _Code(self._module, path, function, function, getattr(function, "end_lineno", 0))

    def sizes(self, call: str, values: Sequence[int]) -> list[Attribute | None] | None:
        """For each value, the attribute that stands in its place in the call; `None` where no such
        call is here."""
        for node in ast.walk(self._statement):
            if isinstance(node, ast.Call) and _name(node.func) == call:
                given = _aligned(self._given(node, call), len(values))
                pairs = [*zip(given or (), values, strict=False)]
                if given is not None and all(a is None or a.value == v for a, v in pairs):
                    return given
        return None

    def bounds(self, values: Sequence[int]) -> list[Attribute | None] | None:
        """For each value, the attribute that is a bound of a slice and has it; `None` where there
        is no slice."""
        slices = [node for node in ast.walk(self._statement) if isinstance(node, ast.Slice)]
        ends = [e for node in slices for e in (node.lower, node.upper) if e is not None]
        named = [a for a in (self._one(e) for e in ends) if a is not None]
        fitting = [next((a for a in named if a.value == value), None) for value in values]
        return fitting if slices else None

    def _given(self, node: ast.Call, call: str) -> Items:
        """The sizes that a call is given, one by one or in a sequence."""
        given = [*node.args, *(k.value for k in node.keywords if k.arg != "dim")]
        of = getattr(getattr(node.func, "value", None), "id", None)
        given = given[(of in _TORCH) + (call == "unflatten") :]
        if call == "split":
            given = given[:1]
        whole = self._sequence(given[0]) if given else []
        return [item for e in given for item in self._item(e)] if whole is None else whole

    def _sequence(self, e: ast.expr) -> Items | None:
        """The items of a sequence; `None` for what isn't known to be one."""
        e = self._resolved(e)
        if isinstance(e, (ast.List, ast.Tuple)):
            return [item for inner in e.elts for item in self._item(inner)]
        if isinstance(e, ast.BinOp) and isinstance(e.op, ast.Add):
            sides = [self._sequence(side) for side in (e.left, e.right)]
            if sides == [None, None]:
                return None
            return [item for side in sides for item in ([...] if side is None else side)]
        name = _of_self(e)
        held = getattr(self._owner, name, None) if name else None
        if isinstance(held, (list, tuple)) and all(type(n) is int for n in held):
            counts = [Attribute(self._path, f"{name}[{i}]", n) for i, n in enumerate(held)]
            return [count if count.value > 0 else None for count in counts]  # -1 is what is left
        return None

    def _item(self, e: ast.expr) -> Items:
        if isinstance(e, ast.Starred):
            whole = self._sequence(e.value)
            return [...] if whole is None else whole
        return [self._one(e)]

    def _one(self, e: ast.expr) -> Attribute | None:
        """The attribute that an expression is, plainly."""
        e = self._resolved(e)
        if isinstance(e, ast.Subscript) and isinstance(e.slice, ast.Constant):
            items, i = self._sequence(e.value), e.slice.value
            item = items[i] if items and type(i) is int and 0 <= i < len(items) else None
            return item if isinstance(item, Attribute) else None
        name = _of_self(e)
        value = getattr(self._owner, name, None) if name else None
        return Attribute(self._path, name, value) if name and type(value) is int else None

    def _resolved(self, e: ast.expr) -> ast.expr:
        """What was assigned last to a local variable before this line, itself resolved."""
        for _ in range(_DEPTH):
            if not isinstance(e, ast.Name):
                break
            before = [
                v for line, n, v in _assigned(self._function) if n == e.id and line < self._line
            ]
            if not before:
                break
            e = before[-1]
        return e


def _aligned(items: Items, count: int) -> list[Attribute | None] | None:
    """Items in their places among so many, counted from both ends where some are unknown; `None`
    where they are not as many."""
    if ... not in items:
        return [*items] if len(items) == count else None  # type: ignore[list-item]
    first = items.index(...)
    last = len(items) - 1 - items[::-1].index(...)
    left, right = items[:first], items[last + 1 :]
    missing = count - len(left) - len(right)
    return None if missing < 0 else [*left, *[None] * missing, *right]  # type: ignore[list-item]


def _name(function: ast.expr) -> str:
    """The name a function is called by: `view` of `x.view`."""
    return str(getattr(function, "attr", None) or getattr(function, "id", ""))


def _path_of(e: ast.expr) -> str | None:
    """`rel_pos` of `self.rel_pos`, empty for `self`; `None` for what is neither."""
    if isinstance(e, ast.Name):
        return "" if e.id == "self" else None
    if isinstance(e, ast.Attribute):
        before = _path_of(e.value)
        return None if before is None else f"{before}.{e.attr}".lstrip(".")
    return None


def _of_self(e: ast.expr) -> str | None:
    """`heads` of `self.heads`."""
    if isinstance(e, ast.Attribute) and isinstance(e.value, ast.Name) and e.value.id == "self":
        return e.attr
    return None


def _assigned(function: ast.AST) -> Iterator[tuple[int, str, ast.expr]]:
    """A function's assignments to local variables: line, name, value."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            target, value = node.targets[0], node.value
            if isinstance(target, ast.Name):
                yield node.lineno, target.id, value
            elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                pairs = zip(target.elts, value.elts, strict=False)
                yield from ((node.lineno, t.id, v) for t, v in pairs if isinstance(t, ast.Name))


@cache
def _statement(frame: Frame) -> tuple[ast.AST, ast.AST]:
    """The innermost statement at a line, and the innermost function around it; empty where the
    source isn't at hand."""
    try:
        tree: ast.AST = ast.parse("".join(linecache.getlines(frame.file)))
    except (SyntaxError, ValueError):
        tree = ast.Module([], [])
    around = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.stmt) and _first_line(node) <= frame.line <= (node.end_lineno or 0)
    ]
    around.sort(key=lambda node: (node.end_lineno or 0) - node.lineno)
    functions = [n for n in around if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    return next(iter(around), tree), next(iter(functions), tree)


def _first_line(node: ast.stmt) -> int:
    """Where a statement begins, its decorators with it."""
    return min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
