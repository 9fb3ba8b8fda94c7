"""What XNNPACK's int8 kernels want of a graph, where ONNX Runtime's want something else."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from attar.runtimes.aten import argument, operator
from attar.runtimes.onnxruntime_quantizer import OnnxRuntimeQuantizer

IMAGE = ([2, 3], True)
"""A mean's arguments where it has a kernel."""


class XnnpackQuantizer(OnnxRuntimeQuantizer):
    """Marks what XNNPACK computes in int8: as for ONNX Runtime, but

    - every layer's output is on a grid, the last one's and those of attention too: a kernel takes
      integers and gives integers;
    - a mean over a whole image stays a mean, for which there is a kernel, and none for its average
      pooling;
    - there is no kernel for three-dimensional convolutions: they stay float.

    Grids and keys are as there (uint8 activations); `executorch_integers` makes int8 of them.
    """

    def transform_for_annotation(self, model: GraphModule) -> GraphModule:
        """Puts ReLUs next to what they fuse with, and global means into the form with a kernel."""
        super().transform_for_annotation(model)
        for node in list(model.graph.nodes):
            if operator(node) == "avg_pool2d" and _is_global(node):
                _average(model, node)
        model.recompile()
        return model

    def _is_float(self, node: Node) -> bool:
        return super()._is_float(node) or operator(node) == "conv3d"

    def _is_unary(self, node: Node) -> bool:
        return super()._is_unary(node) or (operator(node) == "mean" and node.args[1:] == IMAGE)

    def _answers_on_grid(self, layer: Node, wanted: set[Node]) -> bool:
        return True


def _is_global(pool: Node) -> bool:
    return list(argument(pool, 1)) == list(argument(pool).meta["val"].shape[2:])


def _average(model: GraphModule, pool: Node) -> None:
    mean = torch.ops.aten.mean.dim
    with model.graph.inserting_before(pool):
        node = model.graph.call_function(mean, (argument(pool), *IMAGE))
    node.meta = dict(pool.meta)
    pool.replace_all_uses_with(node)
    model.graph.erase_node(pool)
