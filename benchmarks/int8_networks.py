"""The networks that `int8_runtime.py` measures, and what they are asked."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from coverage_networks import VOCABULARY, Network, enliven
from torch import Tensor, nn

from attar.models.building import build, resolve

TOKENS = 128
BERT = {
    "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One network. transformer: whether other tools are to be told that it is one."""

    name: str
    transformer: bool = False

    def build(self, seed: int) -> nn.Module:
        """With random weights of a trained network's scale; nothing is downloaded."""
        torch.manual_seed(seed)
        if self.name.startswith("cifar-"):
            module = build(resolve(self.name, channels=3, classes=10))
        elif self.name == "bert":
            module = Network("transformers", "Bert", BERT).build()
        else:
            source = "timm" if self.transformer else "torchvision"
            module = Network(source, self.name).build()
        enliven(module.eval(), self.inputs(16, seed))
        return module

    def inputs(self, count: int, seed: int) -> tuple[Tensor, ...]:
        """Random images, or token ids."""
        random = torch.Generator().manual_seed(seed)
        if self.name == "bert":
            return (torch.randint(3, VOCABULARY, (count, TOKENS), generator=random),)
        pixels = 32 if self.name.startswith("cifar-") else 224
        return (torch.randn(count, 3, pixels, pixels, generator=random),)


CASES = (
    Case("cifar-resnet20"),
    Case("cifar-resnet56"),
    Case("mobilenet_v2"),
    Case("resnet18"),
    Case("efficientnet_b0"),
    Case("vit_tiny_patch16_224", transformer=True),
    Case("bert", transformer=True),
)
