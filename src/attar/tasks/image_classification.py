"""Image classification: one class of several for each image."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from attar.data.base import UNLABELLED, Batch, Data, Split, mean_of_labelled
from attar.data.images import Frame, framed, open_image
from attar.errors import DataError
from attar.tasks.base import Metric, Task, Verdicts, tasks

CORRECT, LABEL, ANSWER, CONFIDENCE, PROBABILITIES = range(5)
"""The columns of `statistics`; from the last on, a column a class."""
MOST_CLASSES = 100
"""With more classes, statistics hold no probabilities, and there is no AUC."""


@tasks.register("image-classification")
class ImageClassification(Task):
    """One class of several for each image, judged by accuracy.

    The network takes (N, C, H, W) and gives logits (N, classes), or what holds them: a tuple's
    first entry, a mapping's or an object's `logits`.
    """

    name = "image-classification"

    def __init__(self) -> None:
        self.metric = Metric("accuracy", "fraction")

    def arguments(self, batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The images, as the network's one argument."""
        return (batch.inputs,), {}

    def loss(self, output: Any, batch: Batch, *, label_smoothing: float = 0.0) -> Tensor:
        """Cross-entropy, the mean over the examples that have a label; 0 where none has."""
        logits, targets = self.logits(output), _labels(batch)
        losses = F.cross_entropy(
            logits,
            targets,
            ignore_index=UNLABELLED,
            label_smoothing=label_smoothing,
            reduction="none",
        )
        return mean_of_labelled(losses, targets)

    def logits(self, output: Any) -> Tensor:
        """(N, classes)."""
        if isinstance(output, Mapping):
            return output["logits"]
        if hasattr(output, "logits"):
            return output.logits
        return output[0] if isinstance(output, tuple | list) else output

    def statistics(self, output: Any, batch: Batch) -> np.ndarray:
        """Columns: whether the answer is right, the label, the answer, the probability of the
        answer, and with up to 100 classes the probability of each."""
        logits, label = self._array(output), _labels(batch).cpu().numpy()
        odds = np.exp(logits - logits.max(1, keepdims=True))
        probabilities = odds / odds.sum(1, keepdims=True)
        answer = logits.argmax(1)
        confidence = probabilities[np.arange(len(answer)), answer]
        columns = [answer == label, label, answer, confidence]
        if logits.shape[1] <= MOST_CLASSES:
            columns += list(probabilities.T)
        return np.stack(columns, axis=1).astype(np.float64)

    def value(self, statistics: np.ndarray) -> float:
        """Accuracy."""
        return float(statistics[:, CORRECT].mean())

    def hits(self, statistics: np.ndarray) -> np.ndarray:
        """Accuracy is a share."""
        return statistics[:, CORRECT]

    def further_values(self, statistics: np.ndarray) -> dict[str, float]:
        """`balanced_accuracy`, the mean of the classes' accuracies, and `auc`, the area under the
        ROC curve: of the second class where there are two, else the mean over the classes, each
        against the rest. Classes without examples are left out; without two classes, no AUC."""
        from sklearn.metrics import roc_auc_score

        label = statistics[:, LABEL].astype(np.int64)
        present = np.unique(label)
        right = statistics[:, CORRECT]
        values = {"balanced_accuracy": float(np.mean([right[label == c].mean() for c in present]))}
        scores = statistics[:, PROBABILITIES:]
        if len(present) > 1 and scores.shape[1]:
            positive = [1] if scores.shape[1] == 2 else present
            aucs = [roc_auc_score(label == c, scores[:, c]) for c in positive]
            values["auc"] = float(np.mean(aucs))
        return values

    def verdicts(self, statistics: np.ndarray) -> Verdicts:
        """Read from the statistics' first columns."""
        return Verdicts(
            statistics[:, CORRECT] == 1,
            statistics[:, LABEL].astype(np.int64),
            statistics[:, ANSWER].astype(np.int64),
            statistics[:, CONFIDENCE],
        )

    def per_class(self, statistics: np.ndarray, data: Data) -> tuple[np.ndarray, np.ndarray]:
        """Each class's accuracy and number of examples."""
        found = self.verdicts(statistics)
        size = len(data.classes)
        count = np.bincount(found.label, minlength=size)
        right = np.bincount(found.label[found.right], minlength=size)
        shares = np.full(size, np.nan)
        np.divide(right, count, out=shares, where=count > 0)
        return shares, count

    def agreement(self, a: Any, b: Any) -> np.ndarray:
        """Whether both name the same class."""
        return self._array(a).argmax(1) == self._array(b).argmax(1)

    def check_output(self, output: Any, data: Data) -> None:
        """Raises `DataError` where the network answers with another number of classes."""
        found, wanted = tuple(self._array(output).shape), len(data.classes)
        if len(found) != 2:
            raise DataError(f"the model answers with shape {found}: (images, classes) was expected")
        if found[1] != wanted:
            raise DataError(f"the model answers with {found[1]} classes and the data have {wanted}")

    def example(self, data: Data, count: int = 2) -> tuple[Tensor, ...]:
        """The first validation images."""
        return (data.validation.pick(range(min(count, len(data.validation)))).inputs,)

    def describe(self, data: Data) -> dict[str, Any]:
        """One input `image`, one output `logits`."""
        image = {
            "name": "image",
            "layout": "NCHW",
            "dtype": "float32",
            "shape": ["batch", *data.shape],
            **data.preparation,
        }
        logits = {"name": "logits", "meaning": "logits", "classes": list(data.classes)}
        return {"inputs": [image], "outputs": [logits]}

    def read(self, path: Path, inputs: list[dict[str, Any]]) -> tuple[np.ndarray, ...]:
        """An image file, framed and normalised as in training: float32 (1, C, H, W).

        Raises `DataError` for what is no image, or for a model whose preparation isn't known.
        """
        wanted = inputs[0]
        if wanted.get("scale") is None or wanted.get("color") is None:
            raise DataError(
                f"can't read {path} for this model: its data came from loaders that don't say how "
                "they prepare images (`preparation` of attar.from_loaders)"
            )
        pixels = framed(open_image(path, str(path)), _frame(wanted), str(path))
        mean, std = (np.asarray(wanted[k], np.float32).reshape(-1, 1, 1) for k in ("mean", "std"))
        prepared = (pixels.astype(np.float32) * np.float32(wanted["scale"]) - mean) / std
        return (np.ascontiguousarray(prepared[None]),)

    def answer(self, output: Any, outputs: list[dict[str, Any]]) -> list[tuple[str, float]]:
        """Class names with probabilities of the first image of the output, best first."""
        logits = self._array(output)[0]
        probabilities = np.exp(logits - logits.max())
        probabilities /= probabilities.sum()
        names = outputs[0].get("classes") or [str(i) for i in range(len(logits))]
        order = np.argsort(-probabilities, kind="stable")
        return [(names[i], float(probabilities[i])) for i in order]

    def show(self, split: Split, indices: Sequence[int], data: Data) -> list[str]:
        """The images as the network gets them, normalisation undone; where it isn't known, each
        from its darkest to its brightest."""
        if not len(indices):
            return []
        how = data.preparation
        inputs = split.pick(indices).inputs
        if how.get("scale"):
            mean, std = (torch.tensor(how[k]).view(1, -1, 1, 1) for k in ("mean", "std"))
            pixels = (inputs * std + mean) / how["scale"]
        else:
            low, high = inputs.amin((1, 2, 3), keepdim=True), inputs.amax((1, 2, 3), keepdim=True)
            pixels = (inputs - low) / (high - low).clamp_min(1e-12) * 255
        return [_png(image) for image in pixels.round().clamp(0, 255).to(torch.uint8).numpy()]

    def _array(self, output: Any) -> np.ndarray:
        """Logits as float64, from a tensor, an array, or whatever the network gives."""
        logits: Any = self.logits(output)
        if isinstance(logits, Tensor):
            logits = logits.detach().float().cpu().numpy()
        return np.asarray(logits, np.float64)


def _labels(batch: Batch) -> Tensor:
    if batch.targets is None:
        raise DataError("these examples have no labels to compare an answer with")
    return batch.targets


def _frame(wanted: dict[str, Any]) -> Frame:
    """The frame that a manifest's input describes."""
    _, _, height, width = wanted["shape"]
    resize = wanted.get("resize")
    return Frame(wanted["color"], height, width, resize.get("fit", "stretch") if resize else "same")


def _png(pixels: np.ndarray) -> str:
    """A picture of uint8 (C, H, W) as a data URI."""
    shown = pixels[0] if len(pixels) == 1 else pixels[:3].transpose(1, 2, 0)
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(shown)).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
