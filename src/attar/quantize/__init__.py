"""Quantization: grids chosen from a look at data, and the edit that makes the int8 graph from them.

Works without a recipe: `quantize(student, Scheme(), examples, example=..., dynamic_shapes=...)`
gives the student with its grids, `quantized_reference` the graph they make, in PyTorch.
`quantize_weights` and `quantize_dynamically` need no examples.
"""

from attar.quantize.cpu import safe_on, weight_bits
from attar.quantize.dynamic import QuantizedDynamically, quantize_dynamically
from attar.quantize.edit import Quantized, Scheme, quantized_reference
from attar.quantize.post_training import quantize
from attar.quantize.ranges import ranges
from attar.quantize.settling import settle_weights
from attar.quantize.weight_only import WeightsQuantized, quantize_weights

__all__ = [
    "Quantized",
    "QuantizedDynamically",
    "Scheme",
    "WeightsQuantized",
    "quantize",
    "quantize_dynamically",
    "quantize_weights",
    "quantized_reference",
    "ranges",
    "safe_on",
    "settle_weights",
    "weight_bits",
]
