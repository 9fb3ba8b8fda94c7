"""Students that begin with layers of their teacher."""

from __future__ import annotations

import pytest
import torch

from attar.errors import UsageError
from attar.models import ModelSpec, build, inherit
from attar.recipe import load_recipe


def network(name: str, seed: int, **arguments: int):
    torch.manual_seed(seed)
    spec = ModelSpec(model=name, arguments=arguments, channels=3, classes=10)
    return build(spec).eval()


def test_the_layers_answer_as_the_teachers() -> None:
    teacher, student = network("cifar-resnet56", 0), network("cifar-resnet20", 1)
    inherit(student, teacher, {"conv1": "conv1", "bn1": "bn1", "layer2.0": "layer2.0"})
    inherit(student, teacher, {"layer1.1": "layer1.4"})
    x = torch.randn(2, 16, 8, 8)
    torch.testing.assert_close(student.layer1[1](x), teacher.layer1[4](x))
    torch.testing.assert_close(student.layer2[0](x), teacher.layer2[0](x))
    assert not torch.allclose(student.layer1[2](x), teacher.layer1[2](x))


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ({"layer1.7": "layer1.4"}, "the student has no layer 'layer1.7'"),
        ({"layer1.1": "layr1.4"}, "did you mean 'layer1.4'"),
        ({"layer1.1": "layer2.4"}, "bn1.bias is (16,)"),
        ({"layer1.1": "linear"}, "absent"),
    ],
)
def test_what_does_not_fit_is_a_sentence(layers: dict[str, str], said: str) -> None:
    with pytest.raises(UsageError, match="from_teacher") as caught:
        inherit(network("cifar-resnet20", 1), network("cifar-resnet56", 0), layers)
    assert said in str(caught.value)


def test_the_shipped_recipe_names_layers_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTAR_DATA", "/nowhere")
    student = load_recipe("cifar10-resnet56").student
    assert student is not None
    inherit(network(student.model, 1), network("cifar-resnet56", 0), student.from_teacher)
