"""Networks that distillation is tested on: two families whose features criteria compare, in
float64, and a small one to train."""

import numpy as np
import torch
from torch import nn

from attar.distill import Capture, Signal

N, CLASSES = 6, 5


def flat_cnn(width: int, hidden: int | None = 24) -> nn.Module:
    """For 8 × 8 gray images and ten classes, ending in a linear layer, or in two with `hidden`
    units between them."""
    torch.manual_seed(0)
    body = [
        nn.Conv2d(1, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
    ]
    if hidden is None:
        return nn.Sequential(*body, nn.Linear(16 * width, 10))
    return nn.Sequential(*body, nn.Linear(16 * width, hidden), nn.ReLU(), nn.Linear(hidden, 10))


class Cnn(nn.Module):
    def __init__(self, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, width, 3, stride, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.act(self.conv(x)).mean((2, 3)))


class Transformer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Linear(3, width)
        self.block = nn.TransformerEncoderLayer(width, 2, 8, dropout=0.0, batch_first=True)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(self.embed(x))[:, 0])


def signal(net: nn.Module, x: torch.Tensor, *paths: str) -> Signal:
    with Capture(net, paths)() as features:
        answered = net(x)
    return Signal(answered, features)


FAMILIES = {
    "cnn": (lambda: Cnn(4), lambda: Cnn(6, stride=2), (N, 2, 4, 4), "conv"),
    "transformer": (lambda: Transformer(4), lambda: Transformer(6), (N, 3, 3), "block.linear2"),
    "vectors": (lambda: Cnn(4), lambda: Cnn(6), (N, 2, 4, 4), "head"),
}


def both(family: str) -> tuple[nn.Module, Signal, Signal, str]:
    """A student, its signal and a wider teacher's, in float64."""
    make_student, make_teacher, shape, path = FAMILIES[family]
    torch.manual_seed(3)
    student, teacher = make_student().double(), make_teacher().double()
    x = torch.randn(*shape, dtype=torch.float64)
    with torch.no_grad():
        wanted = signal(teacher.eval(), x, path)
    return student, signal(student, x, path), wanted, path


def pooled(own: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """4x4 maps averaged over 2x2 windows where the teacher's are 2x2."""
    if own.ndim != 4 or own.shape[2:] == wanted.shape[2:]:
        return own
    n, c, h, w = own.shape
    return own.reshape(n, c, h // 2, 2, w // 2, 2).mean((3, 5))
