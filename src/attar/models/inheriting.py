"""A student that begins with some of its teacher's own layers."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from attar.errors import UsageError
from attar.registry import near


def inherit(student: nn.Module, teacher: nn.Module, layers: Mapping[str, str]) -> None:
    """Copies the weights and statistics of the teacher's layers into the student, in place.

    layers: the student's module paths, each with the teacher's: a shallow student of the teacher's
    widths starts far ahead of random weights (as DistilBERT does, Sanh et al. 2019, section 3).
    Raises `UsageError` for a path that isn't there or layers of other shapes.

    Example:
        >>> layers = {"conv1": "conv1", "layer1.1": "layer1.4"}
        >>> inherit(resnet20, resnet56, layers)  # doctest: +SKIP
    """
    for own, other in layers.items():
        target, source = _layer(student, own, "student"), _layer(teacher, other, "teacher")
        weights = source.state_dict()
        wanted = {name: tuple(t.shape) for name, t in target.state_dict().items()}
        given = {name: tuple(t.shape) for name, t in weights.items()}
        if wanted != given:
            name = next(n for n in sorted(wanted | given) if wanted.get(n) != given.get(n))
            raise UsageError(
                f"from_teacher: the student's {own} can't take the teacher's {other}: {name} is "
                f"{wanted.get(name, 'absent')} in the one and {given.get(name, 'absent')} in the "
                "other"
            )
        target.load_state_dict(weights)


def _layer(module: nn.Module, path: str, whose: str) -> nn.Module:
    layers = dict(module.named_modules())
    if path not in layers or not path:
        known = [name for name in layers if name]
        raise UsageError(f"from_teacher: the {whose} has no layer {path!r}{near(path, known)}")
    return layers[path]
