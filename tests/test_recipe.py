"""A recipe as a person writes it: what is read, and what is said when it is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from attar.errors import RecipeError, UsageError
from attar.recipe import Recipe, dump_recipe, load_recipe, presets
from attar.recipe.detecting import detect
from attar.recipe.starting import write_starting_recipe
from attar.stages.base import Context, Stage, stages
from attar.student import Student
from attar.units import parse_share, parse_size, readable

WHOLE = """\
data: {source: digits}
teacher:
  model: digits-wide
  train: {epochs: 3}
stages:
  - prune: {granularity: channel, ratio: 0.5, recover: {epochs: 2}}
  - share: {bits: 4}
budget: {max_drop: 0.5%, latency_ms: 0.2, size: 50KB, memory: 20MB}
"""


def written(tmp_path: Path, text: str, name: str = "mine.yaml") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def wrong(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(written(tmp_path, text), list(overrides))
    return str(caught.value)


def test_a_recipe_is_read_with_units_and_defaults(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, WHOLE))
    assert recipe.name == "mine"
    assert recipe.task == "image-classification"
    assert [stage.name for stage in recipe.stages] == ["prune", "share"]
    assert recipe.budget.max_drop == 0.005
    assert (recipe.budget.size, recipe.budget.memory) == (50_000, 20_000_000)
    assert recipe.deploy.runtime == "onnxruntime"


def test_the_resolved_recipe_reads_back_equal(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, WHOLE), ["data.validation={from: test}"])
    text = dump_recipe(recipe)
    assert "weight_decay" in text  # defaults are written out
    assert dump_recipe(load_recipe(written(tmp_path, text, "again.yaml"))) == text


@pytest.mark.parametrize("allowed", ["0.5%", "50%", "0%", "33.333%", 0.005])
def test_every_allowed_drop_reads_back(tmp_path: Path, allowed: object) -> None:
    recipe = load_recipe(written(tmp_path, WHOLE), [f"budget.max_drop={allowed}"])
    again = load_recipe(written(tmp_path, dump_recipe(recipe), "again.yaml"))
    assert again.budget == recipe.budget


@pytest.mark.parametrize(
    "name", ["digits", "mnist", "cifar10-cnn", "cifar10-resnet56", "pneumonia"]
)
def test_shipped_recipes_load_by_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTAR_DATA", "/somewhere")
    assert load_recipe(name).name == name
    assert presets()[name]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("teacher.train.optimzer={lr: 0.1}", "'optimzer'; did you mean 'optimizer'?"),
        ("stages.prune.ratoi=0.5", "stages[0].prune.ratoi (from --set): unknown key 'ratoi'"),
        ("budgets={}", "'budgets'; did you mean 'budget'?"),
        ("seed=many", "seed (from --set): 'many' does not work here: it should be a whole number"),
        ("deploy.runtime=onnxruntim", "did you mean 'onnxruntime'?"),
        ("deploy.runtime=mine.py:Runtime", "unknown runtime"),
        ("stages=[{mine.py:Shrink: {}}]", "unknown stage"),
        ("stages.prune.criterion=mine.py:Noise", "unknown pruning criterion"),
        ("task=image-clasification", "did you mean 'image-classification'?"),
        ("stages=[{shrink: {}}]", "unknown stage 'shrink'"),
        ("stages=[{prune: {}, share: {}}]", "a stage is one name with its settings"),
        ("budget.max_drop=0.5", "write 0.5%"),
        ("budget.size=50 pounds", "write it as 50KB"),
        ("name=../up", "a name of letters"),
        ("teacher.train=null", "the teacher knows nothing yet"),
        ("teacher.checkpoint=x.pt", "leave one of the two out"),
        ("student={model: digits-small}", "no stage teaches it: put `distill` first"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(tmp_path: Path, change: str, said: str) -> None:
    message = wrong(tmp_path, WHOLE, change)
    assert said in message
    assert "\n" not in message


def test_a_ratio_above_one_is_refused_with_its_line(tmp_path: Path) -> None:
    message = wrong(tmp_path, WHOLE.replace("ratio: 0.5", "ratio: 1.5"))
    assert "stages[0].prune.ratio (line 6): 1.5 does not work here" in message
    assert "'auto'" in message


def test_every_mistake_is_told_at_once(tmp_path: Path) -> None:
    message = wrong(tmp_path, WHOLE.replace("digits-wide", "[1]").replace("bits: 4", "bits: 99"))
    assert "2 mistakes" in message
    assert "teacher.model (line 3)" in message
    assert "stages[1].share.bits (line 7)" in message


def test_an_impossible_order_is_refused_with_the_reason(tmp_path: Path) -> None:
    class Last(Stage):
        name: ClassVar[str] = "test-last"

        def apply(self, student: Student, run: Context) -> Student:
            return student

    class Early(Last):
        name: ClassVar[str] = "test-early"
        not_after: ClassVar[dict[str, str]] = {"test-last": "nothing is left to do"}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "_parts", {**stages._parts, "test-last": Last, "test-early": Early})
        message = wrong(tmp_path, WHOLE, "stages=[test-last, test-early]")
        load_recipe(written(tmp_path, WHOLE), ["stages=[test-early, test-last]"])
    assert "test-early (stage 2) can't come after test-last: nothing is left to do" in message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("data: {source: digits", "not valid YAML"),
        ("seed: 1\nseed: 2\n", "line 2: not valid YAML: 'seed' is said twice"),
        ("- a list", "is not a recipe"),
        ("", "is not a recipe"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, text: str, said: str) -> None:
    assert said in wrong(tmp_path, text)


def test_words_stay_words_and_numbers_numbers(tmp_path: Path) -> None:
    recipe = load_recipe(
        written(tmp_path, WHOLE),
        ["stages=[{quantize: {fallback: off}}]", "data.classes=[no, yes]", "data.download=true"],
    )
    assert recipe.stages[0].fallback == "off"  # type: ignore[attr-defined]
    assert recipe.data.classes == ["no", "yes"]
    assert recipe.data.download is True
    assert load_recipe(written(tmp_path, dump_recipe(recipe), "b.yaml")).stages == recipe.stages


def test_a_recipe_that_is_not_there_names_a_near_one() -> None:
    with pytest.raises(RecipeError, match="did you mean 'digits'"):
        load_recipe("digit")
    with pytest.raises(RecipeError, match="no recipe file"):
        load_recipe("some/where.yaml")


def test_paths_start_at_the_recipe_and_those_of_overrides_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "recipes"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    text = WHOLE.replace("train: {epochs: 3}", "checkpoint: ../t.pt").replace(
        "digits-wide", "nets.py:net"
    )
    recipe = load_recipe(written(folder, text), ["data={source: npz, path: a.npz}"])
    assert recipe.teacher.checkpoint == str(tmp_path / "t.pt")
    assert recipe.teacher.model == f"{folder / 'nets.py'}:net"
    assert recipe.data.path == str(tmp_path / "a.npz")


def test_variables_are_filled_in_and_missed_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = WHOLE.replace("source: digits", "source: npz, path: '${PHOTOS}/a.npz'")
    monkeypatch.setenv("PHOTOS", "/photos")
    assert load_recipe(written(tmp_path, text)).data.path == "/photos/a.npz"
    monkeypatch.delenv("PHOTOS")
    assert "data.path needs the environment variable PHOTOS" in wrong(tmp_path, text)
    default = text.replace("${PHOTOS}", "${PHOTOS:-pics}")
    assert load_recipe(written(tmp_path, default)).data.path == str(tmp_path / "pics" / "a.npz")


def test_overrides_reach_into_lists_by_place_and_by_name(tmp_path: Path) -> None:
    path = written(tmp_path, WHOLE)
    for key in ("stages.1.share.bits", "stages[1].share.bits", "stages.share.bits"):
        (share,) = load_recipe(path, [f"{key}=2"]).stages[1:]
        assert share.bits == 2  # type: ignore[attr-defined]
    recipe = load_recipe(path, ["deploy.threads=2", "teacher.train.optimizer.lr=1e-3"])
    assert recipe.deploy.threads == 2
    assert recipe.teacher.train is not None
    assert recipe.teacher.train.optimizer.lr == 0.001


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("seed", "write it as key.path=value"),
        ("stages.7.share.bits=2", "there are only 2 items"),
        ("stages.shar.bits=2", "did you mean 'share'?"),
        ("stages=[share, share]", None),
        ("task.name=x", "has no 'name' inside"),
        ("seed={", "is not a YAML value"),
    ],
)
def test_overrides_that_can_not_be_are_refused(
    tmp_path: Path, override: str, said: str | None
) -> None:
    text = WHOLE + "task: image-classification\n"
    if said is None:
        assert "say which by its place, 0 or 1" in wrong(
            tmp_path, text, override, "stages.share.bits=3"
        )
    else:
        assert said in wrong(tmp_path, text, override)


@given(st.floats(0, 100, allow_nan=False))
def test_a_share_in_percent_is_a_hundredth(percent: float) -> None:
    assert parse_share(f"{percent:f}%") == pytest.approx(percent / 100, abs=1e-8)


@given(st.integers(1, 10**12))
def test_sizes_are_read_in_any_case_and_unit(count: int) -> None:
    assert parse_size(count) == parse_size(f"{count}B") == parse_size(f"{count} b") == count
    assert parse_size(f"{count}kb") == 1000 * count
    assert parse_size(f"{count}KiB") == 1024 * count


@given(st.integers(1000, 10**14))
def test_a_size_shown_reads_back_within_its_digits(count: int) -> None:
    assert parse_size(readable(count)) == pytest.approx(count, rel=0.006)


@given(st.text())
def test_units_never_break(text: str) -> None:
    for parse in (parse_share, parse_size):
        try:
            assert parse(text) >= 0
        except ValueError as error:
            assert "\n" not in str(error).replace(repr(text), "")


def test_python_objects_make_the_same_recipe(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, WHOLE))
    again = Recipe.model_validate({**recipe.model_dump(), "stages": recipe.stages})
    assert again == recipe


def test_data_are_found_out_from_paths_and_names(tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image

    np.savez(tmp_path / "a.npz", x_train=[0], y_train=[0], x_test=[0], y_test=[0])
    found = detect(str(tmp_path / "a.npz"))
    assert found.fields["source"] == "npz"
    assert found.splits == {"train", "test"}
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            Image.new("L", (20, 30)).save(folder / "1.png")
    found = detect(str(tmp_path / "photos"))
    assert found.fields["source"] == "folder"
    assert found.splits == {"train", "validation"}
    assert found.sizes == [(20, 30)] * 4
    assert found.gray
    assert detect("digits").fields == {"source": "digits"}
    assert detect("CIFAR10", Path("there")).fields["root"] == "there"
    assert detect("owner/set").fields == {"source": "huggingface", "name": "owner/set"}
    with pytest.raises(UsageError, match="did you mean 'CIFAR10'"):
        detect("CIFAR1O")


def test_a_starting_recipe_loads_and_keeps_its_reasons(tmp_path: Path) -> None:
    from PIL import Image

    for split in ("train", "test"):
        for name in ("cat", "dog"):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            Image.new("RGB", (50, 40)).save(folder / "1.png")
    checkpoint = tmp_path / "mine.pt"
    checkpoint.touch()
    out = tmp_path / "recipes" / "mine.yaml"
    arguments = {
        "task": "image-classification",
        "model": "resnet18",
        "data": str(tmp_path / "photos"),
        "checkpoint": checkpoint,
    }
    write_starting_recipe(out, **arguments)  # type: ignore[arg-type]
    recipe = load_recipe(out)
    assert recipe.student is None
    assert [stage.name for stage in recipe.stages] == ["prune", "quantize"]
    assert recipe.teacher.checkpoint == str(checkpoint)
    assert recipe.data.size == 224
    assert recipe.data.validation is not None
    assert recipe.data.validation.from_ == "test"
    assert recipe.budget.max_drop == 0.01
    with pytest.raises(UsageError, match="--overwrite"):
        write_starting_recipe(out, **arguments)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="did you mean 'resnet18'"):
        write_starting_recipe(tmp_path / "b.yaml", **{**arguments, "model": "resnet19"})  # type: ignore[arg-type]


@pytest.mark.parametrize(("other", "size"), [((8, 8), None), ((12, 10), 224)])
def test_a_network_of_ones_own_takes_images_as_they_are(
    tmp_path: Path, other: tuple[int, int], size: int | None
) -> None:
    from PIL import Image

    for name, shape in (("cat", (8, 8)), ("dog", other)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.new("L", shape).save(tmp_path / "photos" / name / "1.png")
    (tmp_path / "nets.py").write_text("def net(): ...\n")
    out = tmp_path / "mine.yaml"
    write_starting_recipe(
        out,
        task="image-classification",
        model=str(tmp_path / "nets.py:net"),
        data=str(tmp_path / "photos"),
    )
    assert load_recipe(out).data.size == size
    assert ("images differ in size" in out.read_text()) == (size is not None)


def test_a_scheme_that_the_runtime_lacks_is_refused_before_anything_is_trained():
    written = {
        "name": "mine",
        "data": {"source": "digits"},
        "teacher": {"model": "digits-wide", "train": {"epochs": 1}},
        "stages": [{"quantize": {"scheme": "int4-weights"}}],
    }
    Recipe.model_validate(written)
    with pytest.raises(ValidationError, match="executorch has no scheme int4-weights"):
        Recipe.model_validate({**written, "deploy": {"runtime": "executorch"}})
