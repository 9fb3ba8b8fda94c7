"""A graph as a runtime runs it, operator by operator, and what in it computes in float, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["compute", "move", "convert"]
Place = Literal["inside", "before", "after"]
UNMARKED = "no grid was set on what it answers"


@dataclass(frozen=True)
class Operator:
    """One operator of the graph that is left after the runtime's passes.

    node: the file's name of it, which begins with the module's path. layer: the path of the module
    whose weights it computes with, else of the one that it was traced in. op: the runtime's name of
    what it does. kind: `compute`; `move` where values are handed on as they are (reshaping, another
    layout, shape arithmetic); `convert` between float and int8. precision: of what it reads: `int8`
    also for uint8, else `float32`, `int64`, …. us: its median time in microseconds. reads: the
    places in the list of the operators that make what it reads; constants are made by none.
    of_input: whether it reads the network's input. answers: whether it makes one of the network's
    outputs. has_int8: whether Attar has int8 kernels of the runtime take over such an operator.
    with_constant: whether a float constant is among what it reads.
    """

    node: str
    layer: str
    op: str
    kind: Kind
    precision: str
    us: float = 0.0
    reads: tuple[int, ...] = ()
    of_input: bool = False
    answers: bool = False
    has_int8: bool = False
    with_constant: bool = False

    @property
    def in_float(self) -> bool:
        """Whether it computes in float."""
        return self.kind == "compute" and "float" in self.precision

    @property
    def on_integers(self) -> bool:
        """Whether values pass it in int8, as an integer kernel's operand or when converted."""
        return self.kind == "convert" or self.precision == "int8"


@dataclass(frozen=True)
class FloatOperator:
    """An operator that computes in float beside int8 ones. place: `inside` the quantized region,
    or `before` or `after` it. avoidable: inside, and of a kind that int8 kernels take over."""

    node: str
    layer: str
    op: str
    place: Place
    avoidable: bool
    why: str
    us: float


def float_operators(
    operators: Sequence[Operator], kept: Mapping[str, str], runtime: str
) -> list[FloatOperator]:
    """Every operator that computes in float although some compute in int8, in the graph's order,
    and one reason for each. Empty where nothing is quantized.

    An operator lies *inside* the quantized region if every way from the network's input to it, and
    every way from it to an output, passes int8: an integer kernel or a conversion from or to int8.
    Ways from constants don't count. So a float convolution between two int8 ones lies inside, and
    so does all of attention between the int8 layers around it; a float head lies after the region.
    `avoidable` are those inside of a kind that int8 kernels take over (`Operator.has_int8`): for
    them something must be said, where an operator without such kernels speaks for itself.

    kept: why layers stay float, by module path; `*` for all. runtime: its name, for sentences.

    Example:
        >>> conv = dict(op="Conv", kind="compute", has_int8=True)
        >>> graph = [
        ...     Operator("q", "", "QuantizeLinear", "convert", "float32", of_input=True),
        ...     Operator("a/Conv", "a", precision="int8", reads=(0,), **conv),
        ...     Operator("b/Conv", "b", precision="float32", reads=(1,), **conv),
        ...     Operator("c/Conv", "c", precision="int8", reads=(2,), answers=True, **conv),
        ... ]
        >>> [(f.node, f.why) for f in float_operators(graph, {"b": "the recipe says so"}, "R")]
        [('b/Conv', 'the recipe says so')]
    """
    if not any(o.on_integers and o.reads for o in operators):
        return []
    before, after = _reached(operators, "reads"), _reached(operators, "readers")
    of_data = _of_data(operators)
    found = []
    for place, operator in enumerate(operators):
        if not (operator.in_float and of_data[place]):
            continue
        where: Place = "before" if before[place] else "after" if after[place] else "inside"
        found.append(
            FloatOperator(
                operator.node,
                operator.layer,
                operator.op,
                where,
                avoidable=where == "inside" and operator.has_int8,
                why=_why(operators, operator, where, kept, runtime),
                us=operator.us,
            )
        )
    return found


def _reached(operators: Sequence[Operator], by: Literal["reads", "readers"]) -> list[bool]:
    """By place: whether a way leads from it to the network's input, or by `readers` to an output,
    without passing int8."""
    ways: Sequence[Sequence[int]] = [o.reads for o in operators]
    places = range(len(operators))
    if by == "readers":
        ways, places = _readers(operators), places[::-1]
    reached = [False] * len(operators)
    for place in places:
        ends = operators[place].of_input if by == "reads" else operators[place].answers
        onward = (p for p in ways[place] if not operators[p].on_integers)
        reached[place] = ends or any(reached[p] for p in onward)
    return reached


def _readers(operators: Sequence[Operator]) -> list[list[int]]:
    readers: list[list[int]] = [[] for _ in operators]
    for place, operator in enumerate(operators):
        for source in operator.reads:
            readers[source].append(place)
    return readers


def _of_data(operators: Sequence[Operator]) -> list[bool]:
    """By place: whether it computes with what came from the input, not with constants alone."""
    found: list[bool] = []
    for operator in operators:
        found.append(operator.of_input or any(found[place] for place in operator.reads))
    return found


def _why(
    operators: Sequence[Operator],
    operator: Operator,
    where: Place,
    kept: Mapping[str, str],
    runtime: str,
) -> str:
    for layer, reason in kept.items():
        if layer == "*" or operator.layer == layer or operator.layer.startswith(layer + "."):
            return reason
    if not operator.has_int8:
        return f"Attar uses no int8 kernel of {runtime} for it"
    if where != "inside":
        return f"nothing comes {where} it in int8"
    sources = {s.node: None for place in operator.reads if (s := _source(operators, place))}
    named = " and ".join(sources)
    if not sources:
        return UNMARKED
    if operator.with_constant:
        return f"what it reads comes in float from {named}"
    every = len(operator.reads) > 1 and all(_source(operators, p) for p in operator.reads)
    return f"{'its operands come' if every else 'an operand comes'} in float from {named}"


def _source(operators: Sequence[Operator], place: int) -> Operator | None:
    """What computed a value in float, past operators that only move it; none where it was turned
    into float from a grid."""
    operator = operators[place]
    while operator.kind == "move" and operator.reads:
        operator = operators[operator.reads[0]]
    return None if operator.kind == "convert" else operator
