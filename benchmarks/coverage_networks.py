"""The networks that `prune_coverage.py` tries, and the random weights that it gives them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

LARGEST = 100e6
TORCHVISION_PIXELS = {"inception_v3": 299}
TORCHVISION_ARGUMENTS: dict[str, dict[str, Any]] = {
    # the default initialisation of both is slow; with its weights GoogLeNet has no side outputs
    "googlenet": {"init_weights": False, "aux_logits": False},
    "inception_v3": {"init_weights": False},
}
IMAGE_CLASSES, TEXT_CLASSES = 1000, 10
VOCABULARY, TOKENS = 2000, 32
BLOCKS = 4

TIMM = [
    "resnet18", "resnetv2_18", "mobilenetv3_small_100", "efficientnet_b0", "convnextv2_atto",
    "vit_tiny_patch16_224", "deit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "regnetx_002",
    "densenet121", "mixer_s32_224", "resmlp_12_224", "poolformer_s12", "mobilevit_xxs",
    "levit_128s", "efficientformer_l1", "ghostnet_050", "repvgg_a0", "xcit_nano_12_p16_224",
    "beit_base_patch16_224", "cait_xxs24_224", "pvt_v2_b0", "pit_ti_224", "maxvit_rmlp_pico_rw_256",
    "coatnet_nano_rw_224", "edgenext_xx_small", "fastvit_t8", "hrnet_w18_small", "dla34",
    "resnest14d", "twins_svt_small", "visformer_tiny", "davit_tiny", "volo_d1_224", "repvit_m0_9",
    "starnet_s1", "mobileone_s0", "mobilenetv4_conv_small", "tiny_vit_5m_224",
    "eva02_tiny_patch14_224", "efficientvit_m0", "inception_next_tiny", "nfnet_l0", "dpn48b",
    "res2net50_14w_8s", "vit_relpos_small_patch16_224", "gmlp_s16_224", "hardcorenas_a",
    "crossvit_tiny_240",
]  # fmt: skip
TIMM_ARGUMENTS: dict[str, dict[str, Any]] = {
    # the library has no small one
    "beit_base_patch16_224": {"embed_dim": 192, "depth": BLOCKS, "num_heads": 3},
}

_BERT = {"hidden_size": 256, "num_hidden_layers": BLOCKS, "num_attention_heads": 4}
_LLAMA = {
    "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": BLOCKS,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32,
}  # fmt: skip
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "Bert": {**_BERT, "intermediate_size": 1024},
    "Roberta": {**_BERT, "intermediate_size": 1024},
    "DistilBert": {"dim": 256, "hidden_dim": 1024, "n_layers": BLOCKS, "n_heads": 4},
    "GPT2": {"n_embd": 256, "n_layer": BLOCKS, "n_head": 4},
    "Llama": _LLAMA,
    "Qwen3": _LLAMA,
}
"""Classifiers of text by the names of their classes, and their configurations."""


class Logits(nn.Module):
    """A classifier of the library transformers that takes token ids and gives a tensor."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.classifier(input_ids=ids).logits
        return logits


@dataclass(frozen=True)
class Network:
    """One network: a library's name for it, and what it is built with."""

    source: str
    name: str
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """`timm:resnet18`."""
        return f"{self.source}:{self.name}"

    @property
    def classes(self) -> int:
        return TEXT_CLASSES if self.source == "transformers" else IMAGE_CLASSES

    def load_library(self) -> None:
        """Imports all that building it takes, so that no import is measured."""
        if self.source == "torchvision":
            import torchvision  # noqa: F401
        elif self.source == "timm":
            import timm  # noqa: F401
        else:
            _text_classes(self.name)

    def build(self) -> nn.Module:
        """The network with random weights, evaluating. Nothing is downloaded."""
        makers = {"torchvision": _torchvision, "timm": _timm, "transformers": _transformers}
        return makers[self.source](self.name, self.arguments).eval()

    def example(self, module: nn.Module, count: int) -> tuple[Tensor, ...]:
        """Random images of the network's own size, or random token ids."""
        if self.source == "transformers":
            return (torch.randint(3, VOCABULARY, (count, TOKENS)),)
        if self.source == "timm":
            shape = module.pretrained_cfg["input_size"]  # type: ignore[index]
            return (torch.randn(count, *shape),)
        pixels = TORCHVISION_PIXELS.get(self.name, 224)
        return (torch.randn(count, 3, pixels, pixels),)


def _torchvision(name: str, arguments: dict[str, Any]) -> nn.Module:
    import torchvision

    given = {**TORCHVISION_ARGUMENTS.get(name, {}), **arguments}
    module: nn.Module = torchvision.models.get_model(name, weights=None, **given)
    return module


def _timm(name: str, arguments: dict[str, Any]) -> nn.Module:
    import timm

    module: nn.Module = timm.create_model(
        name, pretrained=False, num_classes=IMAGE_CLASSES, **arguments
    )
    return module


def _text_classes(name: str) -> tuple[Any, Any]:
    import transformers

    return (
        getattr(transformers, f"{name}Config"),
        getattr(transformers, f"{name}ForSequenceClassification"),
    )


def _transformers(name: str, arguments: dict[str, Any]) -> nn.Module:
    configuration, classifier = _text_classes(name)
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    plain = {"vocab_size": VOCABULARY, "num_labels": TEXT_CLASSES, **tokens}
    config = configuration(**plain, **arguments)
    config.use_cache = False  # a cache is of no use to one answer
    return Logits(classifier(config))


@cache
def networks() -> list[Network]:
    """All of them: torchvision's classifiers up to 100 M parameters, timm's families, text."""
    import torchvision

    found = torchvision.models.list_models(module=torchvision.models)
    sizes = {n: torchvision.models.get_model_weights(n).DEFAULT.meta["num_params"] for n in found}
    return [
        *(Network("torchvision", name) for name in found if sizes[name] <= LARGEST),
        *(Network("timm", name, TIMM_ARGUMENTS.get(name, {})) for name in TIMM),
        *(Network("transformers", name, given) for name, given in TRANSFORMERS.items()),
    ]


def network(key: str) -> Network:
    """The one that goes by this key."""
    return next(n for n in networks() if n.key == key)


@torch.no_grad()
def enliven(module: nn.Module, example: tuple[Tensor, ...]) -> None:
    """Weights as after training, in place, so that a wrong channel shows.

    Parameters that begin as one value (zeros, ones, a small layer scale) or next to it get random
    ones about it; layers whose weights are so small that they would hardly answer (attention that
    looks everywhere alike) get larger ones. Batch norms' statistics are about those of the example.
    """
    for parameter in module.parameters():
        middle, spread = float(parameter.mean()), float(parameter.std(correction=0))
        if spread <= 1e-3 and abs(middle) < 0.1:
            parameter.normal_(0, 0.2)
        elif spread <= 1e-3:
            parameter.uniform_(0.5, 1.5).mul_(middle)
        elif parameter.dim() > 1:
            gain = spread * parameter[0].numel() ** 0.5
            parameter.mul_(max(1.0, 1 / gain))
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    usual = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train().momentum = 1.0
    if norms:
        module(*example)
    for norm, momentum in zip(norms, usual, strict=True):
        norm.eval().momentum = momentum
        variance = norm.running_var
        assert variance is not None and norm.running_mean is not None
        norm.running_mean += torch.randn_like(variance) * 0.3 * variance.sqrt()
        variance.mul_(torch.empty_like(variance).uniform_(0.5, 1.5)).add_(1e-3)
