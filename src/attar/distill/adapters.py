"""From the student's features to the teacher's shape: size by pooling, width by a trained layer."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from attar.errors import UsageError

KINDS = {2: "(N, D)", 3: "(N, T, D)", 4: "(N, C, H, W)"}


def adapter(student: Tensor, teacher: Tensor) -> nn.Module:
    """The layer that gives features like `student` the width of those like `teacher`.

    A 1×1 convolution for maps (N, C, H, W), a linear layer for tokens (N, T, D) and vectors (N, D),
    nothing where the widths are the same. Made on the student's device, in its precision.
    Raises `UsageError` for features that can't be compared.
    """
    require_comparable(student, teacher)
    dim = 1 if student.dim() == 4 else -1
    before, after = student.shape[dim], teacher.shape[dim]
    if before == after:
        return nn.Identity()
    made = nn.Conv2d(before, after, 1) if student.dim() == 4 else nn.Linear(before, after)
    return made.to(student.device, student.dtype)


def resize(features: Tensor, like: Tensor) -> Tensor:
    """Maps (N, C, H, W) at the height and width of `like`: averaged where they shrink, interpolated
    where they grow. Tokens and vectors are left alone."""
    if features.dim() != 4 or features.shape[2:] == like.shape[2:]:
        return features
    size = (like.shape[2], like.shape[3])
    if features.shape[2] >= size[0] and features.shape[3] >= size[1]:
        return F.adaptive_avg_pool2d(features, size)
    return F.interpolate(features, size, mode="bilinear", align_corners=False)


def require_comparable(student: Tensor, teacher: Tensor) -> None:
    """Raises `UsageError` unless both are maps, both tokens (as many in both) or both vectors."""
    own, wanted = tuple(student.shape[1:]), tuple(teacher.shape[1:])
    if student.dim() != teacher.dim() or student.dim() not in KINDS:
        raise UsageError(
            f"features of shapes (N, {_listed(own)}) and (N, {_listed(wanted)}) can't be compared: "
            f"both layers should give {', '.join(list(KINDS.values())[:-1])} or {KINDS[4]}"
        )
    if student.dim() == 3 and own[0] != wanted[0]:
        raise UsageError(
            f"the student's layer gives {own[0]} tokens and the teacher's {wanted[0]}: tokens can "
            "only be compared one to one"
        )


def require_maps(criterion: str, *features: Tensor) -> None:
    """Raises `UsageError` unless all are maps (N, C, H, W). criterion: who asks."""
    for one in features:
        if one.dim() != 4:
            raise UsageError(
                f"{criterion} compares maps (N, C, H, W), and a layer gives "
                f"(N, {_listed(tuple(one.shape[1:]))})"
            )


def require_positions(criterion: str, *features: Tensor) -> None:
    """Raises `UsageError` unless all are maps or tokens. criterion: who asks."""
    for one in features:
        if one.dim() not in (3, 4):
            raise UsageError(
                f"{criterion} compares what layers give at several positions, (N, C, H, W) or "
                f"(N, T, D), and a layer gives (N, {_listed(tuple(one.shape[1:]))})"
            )


def channels(features: Tensor) -> Tensor:
    """Maps, tokens or vectors (one position) as (N, width, positions)."""
    if features.dim() == 3:
        return features.transpose(1, 2)
    return features.flatten(2) if features.dim() == 4 else features.unsqueeze(2)


def _listed(shape: tuple[int, ...]) -> str:
    return ", ".join(str(n) for n in shape)
