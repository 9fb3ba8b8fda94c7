"""Networks whose inputs vary in more than the batch: texts of any length."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from attar.quantize import (
    Scheme,
    quantize,
    quantize_dynamically,
    quantize_weights,
    quantized_reference,
)
from attar.runtimes.onnxruntime import OnnxRuntime
from attar.student import Student

BATCH, LENGTH = torch.export.Dim("batch", min=1), torch.export.Dim("length", min=2, max=64)
TEXTS = torch.randint(0, 50, (4, 12), generator=torch.Generator().manual_seed(0))
TRACED = {"example": (TEXTS,), "dynamic_shapes": ({0: BATCH, 1: LENGTH},)}


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(50, 32), nn.Linear(32, 5)
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(tokens)).mean(1))


WAYS = {
    "int8": lambda student: quantize(student, Scheme(calibration=4), [(TEXTS,)], **TRACED),
    "int8-dynamic": lambda student: quantize_dynamically(student, **TRACED),
    "int4-weights": lambda student: quantize_weights(student, "int4", group=16, **TRACED),
}


@pytest.mark.parametrize("way", WAYS)
def test_texts_of_other_lengths_are_answered_alike(way, tmp_path):
    student = WAYS[way](Student(Words().eval()))
    OnnxRuntime().export(student, tmp_path, names=(["tokens"], ["logits"]), **TRACED)
    graph = quantized_reference(student.edits, student.module, *TRACED.values())
    session = OnnxRuntime().session(tmp_path)
    for shape in ((1, 5), (7, 31)):
        texts = torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            expected = graph(texts).numpy()
        np.testing.assert_allclose(session(texts.numpy())[0], expected, atol=1e-4)
