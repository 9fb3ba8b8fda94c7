"""Scikit-learn's handwritten digits: 1,797 images of 8 × 8, inside the library, no download."""

from __future__ import annotations

import numpy as np

from attar.data.config import DataConfig
from attar.data.parts import Examples, Parts, Source, sources


@sources.register("digits")
class Digits(Source):
    """Scikit-learn's 1,797 handwritten digits of 8 × 8 pixels; needs no download."""

    def load(self, config: DataConfig) -> Parts:
        from sklearn.datasets import load_digits

        found = load_digits()
        pixels = np.rint(found.images[:, None] * (255 / 16)).astype(np.uint8)
        names = tuple(str(n) for n in found.target_names)
        return Parts("digits", names, Examples(pixels, found.target.astype(np.int64)))
