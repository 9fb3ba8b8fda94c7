"""How much each layer can be pruned: each cell is what masking by hand gives, and is kept."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner, Result

from attar.cli import app
from attar.errors import ExportError, UsageError
from attar.models.cifar_resnet import CifarResNet
from attar.pipeline import sensitivity as pipeline
from attar.pipeline.sensitivity import sensitivity_of
from attar.prune import RemovalFailed, Widths, criteria, prune_channels
from attar.prune import sensitivity as library
from attar.prune.naming import joined
from attar.prune.sensitivity import Cell, Row, Sensitivity, sensitivity
from attar.recipe import load_recipe
from attar.student import Student
from run_fixture import write_recipe

RATIOS = [0.25, 0.5, 0.9]


class Encoder(nn.Module):
    """A small transformer: one layer of attention and hidden units between embedding and head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 16)
        self.block = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.embed(x)).mean(1))


def looked(net: nn.Module, x: Tensor, **how: Any) -> tuple[Sensitivity, Callable[..., float]]:
    def evaluate(module: nn.Module) -> float:
        return float(module(x).square().mean())

    found = sensitivity(
        Student(net),
        (x,),
        evaluate=evaluate,
        **{"criterion": criteria.get("magnitude")(), "ratios": RATIOS, **how},
    )

    def value(module: nn.Module) -> float:
        with torch.no_grad():
            return evaluate(module.eval())

    return found, value


def row(found: Sensitivity, layer: str) -> Row:
    (one,) = (r for r in found.rows if layer in r.layers)
    return one


def lowest(count: int, *sides: Tensor) -> Tensor:
    """The indices that matter least: each side's L1 norms over their mean, averaged."""
    scores = sum(side / side.mean() for side in sides)
    return scores.argsort(stable=True)[:count]  # type: ignore[union-attr]


def test_a_cell_of_a_cnn_is_the_network_with_those_channels_masked(tiny_net) -> None:
    net, x = tiny_net().eval(), torch.randn(16, 1, 8, 8)
    found, value = looked(net, x)
    assert found.baseline == value(net) and [r.name for r in found.rows] == ["0", "4"]
    assert found.kept == {"8": "its channels are the network's output"}
    made, read = (net.get_submodule(path).weight.detach().abs() for path in ("0", "4"))
    for cell, count in zip(row(found, "0").cells, (2, 4, 7), strict=True):
        gone = lowest(count, made.sum((1, 2, 3)), read.sum((0, 2, 3)))
        masked = tiny_net().eval()
        with torch.no_grad():
            for tensor in masked[0].weight, masked[0].bias, masked[1].weight, masked[1].bias:
                tensor[gone] = 0
            masked[4].weight[:, gone] = 0
        assert cell.removed == count
        assert cell.metric == pytest.approx(value(masked), rel=1e-5)
        assert cell.drop == pytest.approx(found.baseline - value(masked), abs=1e-6)
        # each channel: nine weights, a bias, a norm's two, and nine weights of sixteen readers
        assert cell.parameters == found.parameters - count * (9 + 1 + 2 + 9 * 16)
        assert cell.macs == found.macs - count * (9 * 64 + 9 * 16 * 16)  # type: ignore[operator]


def test_a_cell_of_a_transformer_is_the_network_with_those_units_masked() -> None:
    torch.manual_seed(0)
    net, x = Encoder().eval(), torch.randn(8, 5, 6)
    found, value = looked(net, x)
    into, out = net.block.linear1.weight.detach().abs(), net.block.linear2.weight.detach().abs()
    for cell, count in zip(row(found, "block.linear1").cells, (6, 12, 22), strict=True):
        gone = lowest(count, into.sum(1), out.sum(0))
        masked = Encoder().eval()
        masked.load_state_dict(net.state_dict())
        with torch.no_grad():
            masked.block.linear1.weight[gone] = 0
            masked.block.linear1.bias[gone] = 0
            masked.block.linear2.weight[:, gone] = 0
        assert cell.removed == count
        assert cell.metric == pytest.approx(value(masked), rel=1e-5)


@pytest.mark.parametrize(
    ("make", "shape"), [(Encoder, (8, 5, 6)), (lambda: CifarResNet((1, 1, 1), 3, 5), (4, 3, 8, 8))]
)
def test_every_cell_is_what_pruning_those_layers_gives(make, shape) -> None:
    torch.manual_seed(0)
    net, x = make().eval(), torch.randn(*shape)
    found, value = looked(net, x, ratios=[0.5])
    layers = {layer for r in found.rows for layer in r.layers} | set(found.kept)
    assert found.rows
    for one in found.rows:
        pruned, said = prune_channels(
            Student(net),
            (x,),
            criterion=criteria.get("magnitude")(),
            ratio=0.5,
            widths=Widths(1, 1),
            exclude=sorted(layers - set(one.layers)),
        )
        assert {layer for layer, (a, b) in said.widths.items() if b < a} == set(one.layers)
        assert one.cells[0].metric == pytest.approx(value(pruned.module), rel=1e-5)
        assert one.cells[0].parameters == sum(p.numel() for p in pruned.module.parameters())


def test_layers_that_share_channels_are_one_row() -> None:
    net = CifarResNet((2, 2, 2), 3, 5).eval()
    found, _ = looked(net, torch.randn(2, 3, 8, 8), ratios=[0.5])
    shared = row(found, "conv1")
    assert "layer3.1.conv2" in shared.layers and len(shared.layers) == 7
    assert shared.name == "conv1, layer1–3.0.conv2, layer1–3.1.conv2"
    assert [r.name for r in found.rows][1:3] == ["layer1.0.conv1", "layer1.1.conv1"]


def test_a_cell_of_weights_has_the_smallest_of_one_matrix_at_zero(tiny_net) -> None:
    net, x = tiny_net().eval(), torch.randn(16, 1, 8, 8)
    found, value = looked(net, x, granularity="weight")
    assert [(r.name, r.size) for r in found.rows] == [("0", 72), ("4", 1152), ("8", 160)]
    for cell in row(found, "4").cells:
        count = int(cell.ratio * 1152)
        masked = tiny_net().eval()
        weight = masked[4].weight.data.view(-1)
        weight[weight.abs().argsort(stable=True)[:count]] = 0
        assert (cell.removed, cell.macs) == (count, None)
        assert cell.metric == pytest.approx(value(masked), rel=1e-6)
        assert cell.parameters == found.parameters - count


def test_the_student_stays_as_it_is_and_each_cell_is_told(tiny_net) -> None:
    net, told = tiny_net().train(), []
    before = {name: t.clone() for name, t in net.state_dict().items()}
    found, _ = looked(net, torch.randn(4, 1, 8, 8), on_cell=told.append)
    assert net.training and all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    assert [(p.done, p.of) for p in told] == [(i, 6) for i in range(1, 7)]
    assert [p.cell for p in told] == [cell for r in found.rows for cell in r.cells]


def test_nothing_is_measured_where_nothing_can_be_removed() -> None:
    net, asked = nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 3)).eval(), []

    def evaluate(module: nn.Module) -> float:
        asked.append(module)
        return 0.5

    l1 = criteria.get("magnitude")()
    found = sensitivity(
        Student(net), (torch.randn(2, 4),), evaluate=evaluate, criterion=l1, ratios=[0.2]
    )
    assert (found.rows[0].cells[0].removed, found.rows[0].cells[0].drop) == (0, 0.0)
    assert len(asked) == 1


def test_a_drop_is_positive_where_a_lower_metric_is_better(tiny_net) -> None:
    net, x = tiny_net().eval(), torch.randn(4, 1, 8, 8)
    up, _ = looked(net, x)
    down, _ = looked(net, x, higher_is_better=False)
    assert [c.drop for c in up.rows[0].cells] == [-c.drop for c in down.rows[0].cells]


def test_a_removal_that_fails_its_check_is_told(tiny_net, monkeypatch) -> None:
    real = library.remove_verified

    def failing(module: nn.Module, removal: Any, *rest: Any, **how: Any) -> nn.Module:
        if len(removal.removed["4.weight"].get(0, [])) > 4:
            raise RemovalFailed("the smaller network fails")
        return real(module, removal, *rest, **how)

    monkeypatch.setattr(library, "remove_verified", failing)
    found, _ = looked(tiny_net(), torch.randn(4, 1, 8, 8))
    assert [r.name for r in found.rows] == ["0"]
    assert found.kept["4"] == "the smaller network fails"


def test_a_criterion_that_needs_data_sees_it(tiny_net) -> None:
    net, x = tiny_net(), torch.randn(4, 1, 8, 8)
    with pytest.raises(UsageError, match="hand in calls"):
        looked(net, x, criterion=criteria.get("activation")())
    found, _ = looked(net, x, criterion=criteria.get("activation")(), calls=lambda: [((x,), {})])
    assert len(found.rows) == 2


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"ratios": [0.5, 1.0]}, "ratio is 1: the share to remove lies between 0 and 1"),
        ({"ratios": [0]}, "ratio is 0"),
        ({"ratios": []}, "no ratio"),
        ({"only": ["conv*"]}, "only: no layer matches 'conv"),
        ({"only": ["8"]}, "all channels stay in 8: its channels are the network's output"),
        ({"criterion": criteria.get("activation")(), "granularity": "weight"}, "scores channels"),
    ],
)
def test_what_cannot_be_asked_is_said_in_a_sentence(tiny_net, how, said) -> None:
    with pytest.raises(UsageError, match=said):
        looked(tiny_net(), torch.randn(4, 1, 8, 8), **how)


def test_only_some_layers_are_looked_at(tiny_net) -> None:
    found, _ = looked(tiny_net(), torch.randn(4, 1, 8, 8), only=["4"])
    assert [r.name for r in found.rows] == ["4"] and found.kept == {}


def cells(*drops: float) -> list[Cell]:
    return [Cell((i + 1) / 10, 1, 1, 1, 1 - drop, drop) for i, drop in enumerate(drops)]


def test_what_a_row_tolerates_ends_with_the_first_drop_beyond_it() -> None:
    steady, broken = Row(("a",), 8, cells(0, 0.01, 0.005)), Row(("b",), 8, cells(0, 0.02, 0.0))
    nothing = Row(("c",), 8, cells(math.nan, 0, 0))
    assert [r.tolerated(0.01) for r in (steady, broken, nothing)] == [0.3, 0.1, 0.0]
    worse = Row(("d",), 8, cells(0, 0.5, 0.5))
    found = Sensitivity("channel", 1.0, 1, 1, [steady, broken, worse, nothing], {})
    assert [r.name for r in found.ranked(0.01)] == ["c", "d", "b", "a"]


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        (["fc"], "fc"),
        (["a.0", "a.1", "a.2", "a.4"], "a.0–2, a.4"),
        ([f"layer{s}.{b}.conv2" for s in (1, 2) for b in range(3)],
         "layer1.0–2.conv2, layer2.0–2.conv2"),
        (["encoder_layer_0.mlp.0", "encoder_layer_1.mlp.0", "head"],
         "encoder_layer_0–1.mlp.0, head"),
        (["b", "a"], "b, a"),
    ],
)  # fmt: skip
def test_layers_in_few_words(layers, said) -> None:
    assert joined(layers) == said


# -- recipes --------------------------------------------------------------------------------------

RECIPE = """\
name: looked
data: {source: digits, subset: 300}
teacher: {model: digits-small, train: {epochs: 3, batch_size: 32, optimizer: {lr: 0.01}}}
stages:
  - distill: {criteria: [], epochs: 1}
  - prune: {ratio: 0.5}
  - quantize
budget: {max_drop: 2%}
"""
OWN = """\
from torch import nn

class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(64, 16), nn.Linear(16, 10)

    def forward(self, x):
        x = self.first(x.flatten(1))
        return self.head(x.relu() if x.sum() > 0 else x.abs())
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(tmp_path, RECIPE)


def attar(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["sensitivity", *map(str, arguments)])


def evaluations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The splits that networks are measured on from here on."""
    seen, real = [], pipeline.statistics_of

    def counted(module: nn.Module, split: Any, task: Any) -> Any:
        seen.append(split.name)
        return real(module, split, task)

    monkeypatch.setattr(pipeline, "statistics_of", counted)
    return seen


def test_the_command_prints_a_table_and_writes_figures_and_a_page(recipe, tmp_path) -> None:
    folder = tmp_path / "out"
    shown = attar(recipe, "--out", folder, "--ratios", "0.9,0.25")
    assert shown.exit_code == 0, shown.output
    record = json.loads((folder / "sensitivity.json").read_text())
    assert (record["schema"], record["granularity"], record["criterion"]) == (
        1, "channel", "magnitude",
    )  # fmt: skip
    assert record["student"]["after"] == ["distill"] and record["limit"] == 0.02
    assert record["ratios"] == [0.25, 0.9] and record["split"] == "validation"
    assert [r["name"] for r in record["rows"]] == ["conv1", "conv2", "linear1"]
    for line in ("25 %", "90 %", "can lose", "linear1", "not pruned: linear2", "for at most 2.00"):
        assert line in shown.stdout
    for one in record["rows"]:
        for cell in one["cells"]:
            assert cell["drop"] == pytest.approx(record["baseline"] - cell["metric"])
            assert f"{100 * cell['drop']:.2f}".replace("-", "−") in shown.stdout
    page = (folder / "sensitivity.html").read_text()
    assert "how much each layer can be pruned" in page and f"page: {folder}" in shown.stdout
    again = attar(recipe, "--out", folder, "--ratios", "0.25,0.9", "--json")
    assert json.loads(again.stdout) == {"folder": str(folder), **record}


def test_what_was_measured_is_kept(recipe, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("ATTAR_CACHE", str(tmp_path / "cache"))
    seen, heard = evaluations(monkeypatch), []
    loaded, folder = load_recipe(recipe), tmp_path / "out"

    def stops(event: dict[str, Any]) -> None:
        heard.append(event)
        if event["event"] == "cell" and event["done"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sensitivity_of(loaded, folder, ratios=RATIOS, tell=stops)
    assert len(seen) == 1 + 3 and set(seen) == {"validation"}
    first = sensitivity_of(loaded, folder, ratios=RATIOS)
    assert len(seen) == 1 + 9
    assert sensitivity_of(loaded, tmp_path / "elsewhere", ratios=RATIOS) == first
    assert len(seen) == 1 + 9
    sensitivity_of(loaded, folder, ratios=[*RATIOS, 0.7])
    assert len(seen) == 1 + 12
    sensitivity_of(loaded, folder, ratios=RATIOS, examples=10)
    assert len(seen) == 2 * (1 + 9) + 3
    assert [e["name"] for e in heard if e["event"] == "stage"] == [
        "teacher", "01-distill", "sensitivity",
    ]  # fmt: skip


def test_examples_are_drawn_from_validation(recipe, tmp_path) -> None:
    loaded = load_recipe(recipe)
    few = sensitivity_of(loaded, tmp_path, ratios=[0.5], examples=10)
    every = sensitivity_of(loaded, tmp_path, ratios=[0.5])
    assert few["examples"] == 10 < every["examples"]
    assert round(few["baseline"] * 10) == pytest.approx(few["baseline"] * 10)
    assert few["student"]["fingerprint"] == every["student"]["fingerprint"]


def test_weights_are_looked_at_where_the_recipe_prunes_weights(recipe, tmp_path) -> None:
    loaded = load_recipe(recipe, ["stages.prune.granularity=weight"])
    found = sensitivity_of(loaded, tmp_path, ratios=[0.5])
    assert (found["granularity"], found["macs"]) == ("weight", None)
    assert [r["name"] for r in found["rows"]] == ["conv1", "conv2", "linear1", "linear2"]
    assert "weights" in (tmp_path / "sensitivity.html").read_text()


@pytest.mark.parametrize(
    ("stages", "stage", "after"),
    [
        ("[prune: {ratio: 0.5}, prune: {ratio: 0.2}]", None, []),
        ("[prune: {ratio: 0.5}, prune: {ratio: 0.2}]", 1, ["prune"]),
        ("[distill: {criteria: [], epochs: 1}, share, quantize]", None, ["distill"]),
        ("[distill: {criteria: [], epochs: 1}]", None, ["distill"]),
        ("[distill: {criteria: [], epochs: 1}]", 0, []),
        ("[]", None, []),
    ],
)
def test_the_student_is_looked_at_before_it_is_pruned(
    recipe, tmp_path, stages, stage, after
) -> None:
    loaded = load_recipe(recipe, [f"stages={stages}"])
    found = sensitivity_of(loaded, tmp_path, ratios=[0.5], stage=stage, only=["conv1"])
    assert found["student"]["after"] == after and found["student"]["trained"]


def test_a_student_that_knows_nothing_is_told(recipe, tmp_path) -> None:
    taught = "student={model: digits-small}"
    early = attar(recipe, "--set", taught, "--stage", 0, "--out", tmp_path, "--ratios", 0.5)
    assert "No stage has taught this student yet" in early.stdout
    assert "No stage has taught" in (tmp_path / "sensitivity.html").read_text()
    late = attar(recipe, "--set", taught, "--out", tmp_path, "--ratios", "0.5")
    assert "No stage" not in late.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--ratios", "0.5,1.5"], "ratio is 1.5: the share to remove lies between 0 and 1"),
        (["--ratios", "half"], "--ratios half: write numbers with commas between"),
        (["--only", "conv9"], "only: no layer matches 'conv9'; did you mean 'conv"),
        (["--only", "linear2"], "its channels are the network's output"),
        (["--stage", "4"], "stage: 4 is none of this recipe's, which has 3"),
        (["--stage", "3"], "too late to prune, for quantize comes before"),
        (["--criterion", "magnitud"], "did you mean 'magnitude'"),
        (["-k", "apoz", "--granularity", "weight"], "scores channels, not single weights"),
        (["--set", "data.source=python"], "handed in from Python"),
        (["--examples", "0"], "--examples"),
    ],
)
def test_bad_input_is_one_clear_sentence(recipe, tmp_path, words, said) -> None:
    shown = attar(recipe, "--out", tmp_path / "out", *words)
    assert shown.exit_code == 2 and "Traceback" not in shown.output
    assert said in " ".join(shown.output.split())
    assert not (tmp_path / "out" / "sensitivity.json").exists()


def test_a_graph_that_cannot_be_read_leaves_single_weights(tmp_path) -> None:
    (tmp_path / "nets.py").write_text(OWN)
    text = RECIPE.replace("model: digits-small", "model: nets.py:Branching")
    path = write_recipe(tmp_path, text.replace("  - quantize\n", ""))
    words = [path, "--trust", "--out", tmp_path / "out", "--ratios", "0.5"]
    shown = attar(*words)
    assert shown.exit_code == 1 and "Traceback" not in shown.output
    assert "nets.py:9" in shown.output and "--granularity weight needs no graph" in shown.output
    weights = attar(*words, "--granularity", "weight")
    assert weights.exit_code == 0 and "first" in weights.stdout
    with pytest.raises(ExportError):
        sensitivity_of(load_recipe(path), tmp_path / "out", trusted=True)
