"""The documents say what is so: links lead somewhere, snippets run, tables have every key."""

from __future__ import annotations

import importlib
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_args

import pytest
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
READMES = ("README.md", "README.zh-CN.md")
FENCE = re.compile(
    r"(?:<!-- (?P<mark>[^>]+?) -->\n\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S
)

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


class Block(NamedTuple):
    """A fenced block: what the comment before it says, its language, its text."""

    mark: str
    language: str
    code: str


def blocks(page: Path) -> list[Block]:
    found = FENCE.finditer(page.read_text(encoding="utf-8"))
    return [Block(f["mark"] or "", f["language"], f["code"]) for f in found]


def prose(page: Path) -> str:
    """The page's text without its fenced blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def headings(page: Path) -> list[str]:
    return re.findall(r"^#+ .+$", prose(page), re.M)


def anchor(heading: str) -> str:
    """The fragment that GitHub makes of a heading."""
    text = heading.lstrip("#").strip().lower().replace("`", "")
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


# -- links ------------------------------------------------------------------------------------


@pages
def test_links_lead_somewhere(page: Path) -> None:
    text = prose(page)
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    for link in links:
        if re.match(r"https?://|mailto:", link):
            continue
        path, _, fragment = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links to {link}"
        if fragment:
            assert fragment in map(anchor, headings(target)), f"{page.name} links to {link}"


# -- the two READMEs ----------------------------------------------------------------------------


def test_both_readmes_have_the_same_build() -> None:
    english, chinese = (ROOT / name for name in READMES)

    def depths(page: Path) -> list[int]:
        return [len(heading.split(" ")[0]) for heading in headings(page)]

    assert depths(english) == depths(chinese)
    assert [b.language for b in blocks(english)] == [b.language for b in blocks(chinese)]
    assert table_sizes(english) == table_sizes(chinese)


def test_both_readmes_show_the_same_code_and_output() -> None:
    """Comments are translated, commands and figures are not."""
    english, chinese = ([uncommented(b.code) for b in blocks(ROOT / name)] for name in READMES)
    assert english == chinese


def test_each_readme_links_to_the_other() -> None:
    for name, other in zip(READMES, reversed(READMES), strict=True):
        top = (ROOT / name).read_text(encoding="utf-8")[:400]
        assert f"]({other})" in top


def uncommented(code: str) -> str:
    return re.sub(r" *#.*", "", code)


def table_sizes(page: Path) -> list[int]:
    return [table.count("\n") for table in re.findall(r"(?:^\|.*\n)+", prose(page), re.M)]


# -- snippets -----------------------------------------------------------------------------------


@pages
def test_snippets_are_python(page: Path) -> None:
    for block in blocks(page):
        if block.language == "python":
            compile(block.code, page.name, "exec")


@pytest.mark.parametrize("name", ["README.md", "docs/extending.md"])
def test_snippets_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In their order, as one reads them; `file` blocks are files, which later ones import."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    try:
        run(blocks(ROOT / name), "tested")
    finally:
        for module in {Path(file).stem for file in written_files(name)} - before:
            sys.modules.pop(module, None)
        forget_parts()


def run(given: list[Block], mark: str, values: dict[str, Any] | None = None) -> None:
    values = {"__name__": "snippet", **(values or {})}
    ran = 0
    for block in given:
        if block.mark.startswith("file: "):
            Path(block.mark.removeprefix("file: ")).write_text(block.code, encoding="utf-8")
        elif block.mark == mark:
            exec(compile(block.code, mark, "exec"), values)
            ran += 1
    assert ran, f"no block is marked {mark!r}"


def written_files(name: str) -> list[str]:
    marks = [block.mark for block in blocks(ROOT / name)]
    return [mark.removeprefix("file: ") for mark in marks if mark.startswith("file: ")]


def forget_parts() -> None:
    """Takes back what snippets registered, so that other tests see only Attar's own parts."""
    for registry in registries().values():
        for name, part in list(registry._parts.items()):
            if getattr(part, "__module__", "") == "snippet":
                del registry._parts[name]


def registries() -> dict[str, Any]:
    from attar.cli.catalog import REGISTRIES

    found = {}
    for kind, (place, _) in REGISTRIES.items():
        module, _, name = place.partition(":")
        found[kind] = getattr(importlib.import_module(module), name)
    return found


def test_parts_of_a_file_join_a_recipe(tmp_path: Path) -> None:
    """The page's YAML with the page's files: the names turn into parts once they are allowed."""
    from attar.errors import UsageError
    from attar.pipeline.job import job_of
    from attar.recipe import load_recipe

    page = ROOT / "docs" / "extending.md"
    recipe: dict[str, Any] = {"teacher": {"model": "nets.py:plain", "train": {"epochs": 1}}}
    for block in blocks(page):
        if block.mark.startswith("file: "):
            (tmp_path / block.mark.removeprefix("file: ")).write_text(block.code, encoding="utf-8")
        elif block.language == "yaml":
            recipe |= yaml.safe_load(block.code)
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")

    loaded = load_recipe(path)
    with pytest.raises(UsageError, match="--trust"):
        job_of(loaded)
    job = job_of(loaded, trusted=True)
    assert job.data.classes == ("lying", "standing")
    assert len(job.data.train) + len(job.data.validation) + len(job.data.test) == 600
    assert job.task.metric.name == "balanced accuracy"
    assert job.student is not None
    network: Any = job.student.fresh().module
    assert network[0].out_channels == 8
    (criterion,) = job.stages[0]._built().values()  # type: ignore[attr-defined]
    assert (criterion.weight, criterion.settings.power) == (2, 0.5)


def test_a_program_reads_a_bundle_as_its_page_says(
    digits: Any,
    tiny_net: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from PIL import Image
    from sklearn.datasets import load_digits

    from attar.cli.answers import answers

    monkeypatch.chdir(tmp_path)
    bundle = bundle_of(tiny_net(), digits, Path("runs/digits/bundle"))
    pixels = (load_digits().images[7] * (255 / 16)).round().astype("uint8")
    Image.fromarray(pixels).save("seven.png")
    ((_, ranked),) = answers(bundle, [Path("seven.png")])

    run(blocks(ROOT / "docs" / "bundle.md"), "tested")
    assert capsys.readouterr().out.strip() == ranked[0][0]


def bundle_of(net: Any, data: Any, folder: Path) -> Path:
    """The network's bundle for ONNX Runtime."""
    from attar.runtimes.bundle import write_bundle
    from attar.runtimes.onnxruntime import OnnxRuntime
    from attar.student import Student
    from attar.tasks.image_classification import ImageClassification

    task, runtime = ImageClassification(), OnnxRuntime()
    example = task.example(data)
    folder.parent.mkdir(parents=True)
    write_bundle(
        folder,
        runtime=runtime,
        export=lambda place: runtime.export(
            Student(net.eval()),
            place,
            example=example,
            dynamic_shapes=task.dynamic_shapes(example),
            names=(["image"], ["logits"]),
        ),
        task=task.name,
        description=task.describe(data),
        golden=tuple(x.numpy() for x in example),
    )
    return folder


def test_an_entry_point_joins_as_the_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from attar.registry import Registry

    page = blocks(ROOT / "docs" / "extending.md")
    (declared,) = (tomllib.loads(b.code) for b in page if b.language == "toml")
    ((group, entries),) = declared["project"]["entry-points"].items()
    module, _, name = entries["cosine"].partition(":")
    place = tmp_path.joinpath(*module.split("."))
    place.parent.mkdir(parents=True)
    (code,) = (b.code for b in page if b.mark == "file: losses.py")
    place.with_suffix(".py").write_text(code, encoding="utf-8")
    record = tmp_path / "my_package-1.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Name: my_package\nVersion: 1\n", encoding="utf-8")
    written = f"[{group}]\ncosine = {entries['cosine']}\n"
    (record / "entry_points.txt").write_text(written, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)

    fresh: Registry[Any] = Registry("criterion", "attar.distill.criteria")
    assert fresh.get("cosine").__name__ == name
    assert fresh.describe()["cosine"] == "How far the logits' directions are apart."


def test_every_kind_of_part_has_its_entry_point_group() -> None:
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    for registry in registries().values():
        assert f"`attar.{registry.kind.replace(' ', '-')}`" in text


@pytest.mark.long
def test_the_python_face_of_the_readme_runs(
    digits: Any, tiny_net: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    loaders = {
        name: [(b.inputs, b.targets) for b in getattr(digits, name).batches(64)]
        for name in ("train", "validation", "test")
    }
    run(blocks(ROOT / "README.md"), "a whole run", {"net": tiny_net(16), **loaders})


# -- names --------------------------------------------------------------------------------------


@pages
def test_commands_that_are_named_exist(page: Path) -> None:
    from typer.main import get_command

    from attar.cli import app

    commands = get_command(app).commands  # type: ignore[attr-defined]
    code = [b.code for b in blocks(page) if b.language in ("bash", "console", "text")]
    inline = re.findall(r"`(attar [^`]+)`", prose(page))
    lines = [line for text in code for line in text.splitlines()] + inline
    for line in lines:
        found = re.match(r"(?:\$ )?attar ([a-z]+)(.*)", line)
        if not found:
            continue
        name, rest = found.groups()
        assert name in commands, f"{page.name}: {line}"
        known = {option for p in commands[name].params for option in p.opts} | {"--help"}
        used = re.findall(r"(?<![\w-])(--[a-z][\w-]*|-[a-z])(?=[ =]|$)", rest.split(" #")[0])
        assert set(used) <= known, f"{page.name}: {line}"


@pytest.mark.parametrize("readme", READMES)
def test_readmes_name_every_shipped_part(readme: str) -> None:
    from attar.cli.catalog import described

    text = (ROOT / readme).read_text(encoding="utf-8")
    for kind in ("recipes", "sources", "stages", "criteria", "prune-criteria"):
        for name in described(kind):
            assert f"`{name}`" in text, f"{readme} does not name {kind} {name}"


@pytest.mark.parametrize("readme", READMES)
def test_readmes_say_what_the_shipped_recipes_are(readme: str) -> None:
    from attar.recipe import load_recipe, presets

    text = (ROOT / readme).read_text(encoding="utf-8")
    for name in presets():
        recipe = load_recipe(name)
        (row,) = re.findall(rf"^\| `{name}` \| .* → .*$", text, re.M)
        assert recipe.student is not None
        assert f"`{recipe.teacher.model}` → `{recipe.student.model}`" in row
        if recipe.budget.max_drop:
            assert f" {recipe.budget.max_drop:.2%}".rstrip("0%").rstrip(".") in row
        if recipe.budget.size:
            assert f"{recipe.budget.size // 1000} KB" in row


# -- docs/recipes.md ----------------------------------------------------------------------------

RECIPES = ROOT / "docs" / "recipes.md"
TABLE = re.compile(r"<!-- fields: (\S+):(\w+) -->\n\n((?:\|.*\n)+)")


def tables() -> dict[type[BaseModel], dict[str, str]]:
    """Each documented model with its table: key to default."""
    found = {}
    for module, name, table in TABLE.findall(RECIPES.read_text(encoding="utf-8")):
        rows = [[cell.strip() for cell in row.split(" | ")] for row in table.splitlines()[2:]]
        cells = {row[0].strip("|` "): row[1] for row in rows}
        found[getattr(importlib.import_module(module), name)] = cells
    return found


def models_of_recipes() -> set[type[BaseModel]]:
    """Every model whose keys a recipe may hold."""
    from attar.recipe import Recipe
    from attar.stages.base import stages

    found: set[type[BaseModel]] = set()
    waiting: set[type[BaseModel]] = {Recipe, *(stages.get(name) for name in own(stages))}
    while waiting:
        model = waiting.pop()
        found.add(model)
        for field in model.model_fields.values():
            waiting |= set(inside(field.annotation)) - found
    return {model for model in found if model.model_fields}


def own(registry: Any) -> list[str]:
    """The names of Attar's own parts: entry points of what else is installed are theirs."""
    return [n for n in registry.names() if registry.get(n).__module__.startswith("attar.")]


def inside(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models in a field's type, however deep."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from inside(part)


def expected_keys(model: type[BaseModel], documented: set[type[BaseModel]]) -> set[str]:
    """A model's keys, without those that a documented base has in a table of its own."""
    inherited = {f for base in model.__mro__[1:] if base in documented for f in base.model_fields}
    fields = model.model_fields.items()
    return {field.alias or name for name, field in fields if name not in inherited}


def test_every_key_of_a_recipe_is_documented() -> None:
    documented = tables()
    missing = models_of_recipes() - set(documented)
    assert not missing, f"docs/recipes.md lacks {sorted(m.__name__ for m in missing)}"
    for model, rows in documented.items():
        assert set(rows) == expected_keys(model, set(documented)), model.__name__


def test_documented_defaults_are_the_defaults() -> None:
    for model, rows in tables().items():
        fields = {field.alias or name: field for name, field in model.model_fields.items()}
        for key, cell in rows.items():
            assert says(cell, fields[key]), f"{model.__name__}.{key}: {cell}"


def says(cell: str, field: FieldInfo) -> bool:
    if field.is_required():
        return cell == "required"
    default = field.get_default(call_default_factory=True)
    if isinstance(default, BaseModel):
        return cell == "below"
    return yaml.safe_load(cell.strip("`")) == default


def test_every_criterion_is_documented_with_its_settings() -> None:
    from attar.distill.criterion import criteria

    table = RECIPES.read_text(encoding="utf-8").partition("<!-- criteria -->")[2]
    rows = dict(re.findall(r"^\| `([\w-]+)` \| `(\{.*?\})` \|", table, re.M))
    assert set(rows) == set(own(criteria))
    for name, cell in rows.items():
        fields = criteria.get(name).Settings.model_fields
        wanted = {k: "required" if f.is_required() else f.default for k, f in fields.items()}
        assert yaml.safe_load(cell) == wanted, name


def test_every_variable_of_the_environment_is_documented() -> None:
    source = "\n".join(p.read_text(encoding="utf-8") for p in (ROOT / "src").rglob("*.py"))
    text = RECIPES.read_text(encoding="utf-8")
    for name in set(re.findall(r"\bATTAR_[A-Z]+\b", source)):
        assert f"`{name}`" in text, name
