"""Quantization: grids chosen from a look at data, and the edit that makes the int8 graph from them.

Works without a recipe: `quantize(student, Scheme(), examples, example=..., dynamic_shapes=...)`
gives the student with its grids, `quantized_reference` the graph they make, in PyTorch.
"""

from attar.quantize.cpu import safe_on, weight_bits
from attar.quantize.edit import Quantized, Scheme, quantized_reference
from attar.quantize.post_training import quantize
from attar.quantize.ranges import ranges

__all__ = [
    "Quantized",
    "Scheme",
    "quantize",
    "quantized_reference",
    "ranges",
    "safe_on",
    "weight_bits",
]
