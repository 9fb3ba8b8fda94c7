"""The commands. Each docstring is what `--help` teaches."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from attar.cli.failures import BUDGET_NOT_MET, Commands
from attar.cli.printing import print_json, print_lines, print_pairs

if TYPE_CHECKING:
    from attar.files import Trust

app = typer.Typer(
    name="attar",
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe's file, or the name of a shipped one.")
]
RunOrBundle = Annotated[
    Path, typer.Argument(metavar="RUN_OR_BUNDLE", help="A run's folder, or a bundle's.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="Lay a setting over the recipe's."),
]
TrustOption = Annotated[
    bool, typer.Option("--trust", help="Allow the Python files that the recipe names to run.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for other programs.")]
Threads = Annotated[int, typer.Option(min=1, help="Threads of one call.")]


class Part(StrEnum):
    """The parts of a data set."""

    test = "test"
    validation = "validation"
    train = "train"


class Granularity(StrEnum):
    """What pruning removes."""

    channel = "channel"
    weight = "weight"


def _version(show: bool) -> None:
    if show:
        import attar

        typer.echo(f"attar {attar.__version__}")
        raise typer.Exit


@app.callback()
def attar(
    debug: Annotated[
        bool,
        typer.Option("--debug", envvar="ATTAR_DEBUG", help="Show tracebacks of what goes wrong."),
    ] = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Distil, prune, share and quantize a trained model into a deployable file, with proof.

    See it work in a minute, then do it to a model of your own:

        attar run digits
        attar init image-classification -m resnet18 -c mine.pt -d photos
        attar check recipe.yaml
        attar run recipe.yaml

    The help of each command has examples of its own.
    """


@app.command()
def run(
    recipe: RecipeArgument,
    settings: Settings = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The run's folder.", show_default="runs/NAME"),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with what the folder holds.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run that the folder holds.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be done.")
    ] = False,
    track: Annotated[
        list[str] | None,
        typer.Option(
            "--track", metavar="TRACKER", help="Tell a tracker as well: tensorboard, mlflow, …"
        ),
    ] = None,
    trust: TrustOption = False,
    as_json: Json = False,
) -> None:
    """Run a recipe: every stage, each exported and measured, up to the deployable bundle.

    Ctrl-C stops it; --resume goes on. What was computed before is not computed again.

    Examples:

        attar run digits
        attar run recipe.yaml --set stages.prune.ratio=0.3 --out runs/gentle
        attar run runs/gentle --resume
        attar run digits --track tensorboard

    Exit code: 0 done and the budget met, 3 done but not met, 2 wrong usage or recipe, 1 failed.
    """
    from attar.recipe import load_recipe

    loaded = load_recipe(recipe, settings)
    if dry_run:
        from attar.pipeline import dry_run as steps

        print_lines(steps(loaded))
        return
    from attar.cli.folders import make_way, run_folder

    folder = out or run_folder(recipe, loaded.name)
    make_way(folder, resume=resume, overwrite=overwrite)

    from attar.events import several
    from attar.pipeline import run as start
    from attar.pipeline.tracking import tracked
    from attar.screen import Screen, screen_console

    with (
        Screen(screen_console(stderr=as_json)) as screen,
        tracked(track or [], loaded, folder) as tracker,
    ):
        tell = several(screen, tracker)
        finished = start(loaded, folder, resume=resume, tell=tell, trusted=_trust(trust))
    if as_json:
        print_json({"folder": str(folder), "ledger": finished.ledger})
    if not finished.budget_met:
        raise typer.Exit(BUDGET_NOT_MET)


@app.command()
def check(
    recipe: RecipeArgument, settings: Settings = None, trust: TrustOption = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Look before hours are spent: does it export, what can be pruned and quantized, how long.

    Examples:

        attar check recipe.yaml

    It reads the recipe and the data, exports the teacher and times it. Nothing is trained.
    """
    from attar.pipeline import check as look
    from attar.recipe import load_recipe

    found = look(load_recipe(recipe, settings), trusted=_trust(trust))
    if as_json:
        print_json(found)
    else:
        print_pairs({**found, "student": found["student"] or "a copy of the teacher"})


@app.command()
def init(
    task: Annotated[str, typer.Argument(metavar="TASK", help="Such as image-classification.")],
    model: Annotated[
        str,
        typer.Option("--model", "-m", help="A model's name, or path/to/file.py:function."),
    ],
    data: Annotated[
        str,
        typer.Option("--data", "-d", help="A folder, an .npz or Parquet file, or a name."),
    ],
    checkpoint: Annotated[
        Path | None,
        typer.Option("--checkpoint", "-c", help="The model's weights. Without, it is trained."),
    ] = None,
    root: Annotated[
        Path, typer.Option(help="Where torchvision's data sets are.")
    ] = Path("data"),
    out: Annotated[Path, typer.Option("--out", "-o", help="The recipe to write.")] = Path(
        "recipe.yaml"
    ),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the recipe that is there.")
    ] = False,
) -> None:  # fmt: skip
    """Write a commented recipe that makes your model smaller, and runs as it is.

    Examples:

        attar init image-classification -m resnet18 -c mine.pt -d photos
        attar init image-classification -m nets.py:small -d scans.npz
        attar init image-classification -m cifar-resnet20 -d CIFAR10

    Data are found out from the path: a folder of class folders, MedMNIST's .npz, Parquet files
    from the Hugging Face hub; a plain name is a torchvision data set.
    """
    from attar.recipe.starting import write_starting_recipe

    write_starting_recipe(
        out, task=task, model=model, data=data, root=root, checkpoint=checkpoint,
        overwrite=overwrite,
    )  # fmt: skip
    typer.echo(f"wrote {out}; next: attar check {out}, then attar run {out}")


@app.command("list")
def list_(
    what: Annotated[
        str | None, typer.Argument(metavar="WHAT", help="A kind of part; without, the kinds.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List what there is: recipes, models, stages, criteria and more.

    Examples:

        attar list
        attar list models

    Parts of your own join as `file.py:Name` in a recipe, or by an entry point.
    """
    from attar.cli.catalog import described, kinds

    found = kinds() if what is None else described(what)
    print_json(found) if as_json else print_pairs(found)


@app.command()
def evaluate(
    run_or_bundle: RunOrBundle,
    data: Annotated[
        str | None,
        typer.Option("--data", "-d", help="Other data than the run's, as in `attar init`."),
    ] = None,
    root: Annotated[
        Path, typer.Option(help="Where torchvision's data sets are.")
    ] = Path("data"),
    split: Annotated[Part, typer.Option(help="Which part of the data.")] = Part.test,
    trust: TrustOption = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Measure the deployed model's metric, with its interval.

    Examples:

        attar evaluate runs/digits
        attar evaluate runs/mine/bundle --data new-photos

    Other data are prepared as the bundle says that it wants them.
    """
    from attar.cli.answers import find_bundle
    from attar.pipeline import evaluate as measure
    from attar.recipe.detecting import detect, prepared_for
    from attar.runtimes.bundle import read_manifest

    config = None
    if data is not None:
        inputs = read_manifest(find_bundle(run_or_bundle))["inputs"]
        config = prepared_for(inputs, detect(data, root))
    found = measure(run_or_bundle, config, split=split.value, trusted=_trust(trust))
    print_json(found) if as_json else print_pairs(found)


@app.command()
def predict(
    run_or_bundle: RunOrBundle,
    inputs: Annotated[
        list[Path], typer.Argument(metavar="INPUT...", help="Images, or .npy of prepared inputs.")
    ],
    top: Annotated[int, typer.Option(min=1, help="How many classes to show.")] = 3,
    threads: Threads = 1,
    as_json: Json = False,
) -> None:
    """Answer with class names and probabilities. Needs no PyTorch (but for ExecuTorch).

    Examples:

        attar predict runs/digits seven.png
        attar predict bundle a.jpg b.jpg --top 1 --json

    The bundle has a predict.py that does the same where Attar is not installed.
    """
    from attar.cli.answers import answers

    for path, ranked in answers(run_or_bundle, inputs, threads):
        if as_json:
            best = [{"class": name, "probability": round(p, 6)} for name, p in ranked[:top]]
            print_json({"input": str(path), "answers": best}, indent=None)
        else:
            if len(inputs) > 1:
                typer.echo(f"{path}:")
            print_pairs({name: f"{probability:7.2%}" for name, probability in ranked[:top]})


@app.command()
def bench(
    bundle: RunOrBundle,
    threads: Threads = 1,
    batch: Annotated[int, typer.Option(min=1, help="Examples a call.")] = 1,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long to time.")] = 2.0,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="A JSON file to write, for attar report --bench."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Time the bundle on this machine and check its stored answers.

    Needs no PyTorch (but for ExecuTorch).

    Examples:

        attar bench runs/digits/bundle --threads 2
        attar bench bundle --out phone.json
        attar report runs/digits --bench phone.json

    The last is for the machine that built the bundle: its report shows both side by side.

    Exit code 1: this machine does not give the answers that were stored with the model.
    """
    from attar.cli.answers import find_bundle
    from attar.runtimes.bench import bench as measure

    found = measure(find_bundle(bundle), threads=threads, batch=batch, seconds=seconds)
    if out is not None:
        from attar.store import write_whole

        write_whole(out, json.dumps(found, indent=2) + "\n")
    print_json(found) if as_json else print_pairs(found)
    if not found["golden"]["agrees"]:
        raise typer.Exit(1)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Runs' folders.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="The page to write.",
            show_default="RUN/report.html or comparison.html",
        ),
    ] = None,
    benches: Annotated[
        list[Path] | None,
        typer.Option(
            "--bench", metavar="FILE", help="What attar bench --out wrote elsewhere; several."
        ),
    ] = None,
) -> None:
    """Write a run's report anew, or one page that compares several runs.

    Examples:

        attar report runs/digits
        attar report runs/a runs/b --out comparison.html
        attar report runs/digits --bench phone.json

    A page is one file that opens offline.
    """
    from attar.errors import UsageError
    from attar.report import compare_reports, write_report
    from attar.store import write_whole

    if len(runs) == 1 and out is None:
        page = write_report(runs[0], benches or ())
    elif benches:
        raise UsageError("--bench goes with one run's own page: give one RUN, and no --out")
    else:
        page = out or Path("comparison.html")
        write_whole(page, compare_reports(runs))
    typer.echo(f"report: {page}")


@app.command()
def compare(
    recipe: RecipeArgument,
    criteria: Annotated[
        list[str],
        typer.Option(
            "--criterion",
            "-k",
            metavar="CRITERION",
            help="A criterion, with settings where wanted: 'dkd: {others: 2}'.",
        ),
    ],
    seeds: Annotated[
        int, typer.Option(min=1, help="Trainings of each, from the recipe's seed on.")
    ] = 3,
    sizes: Annotated[
        list[int] | None,
        typer.Option(
            "--size", metavar="COUNT", min=1, help="Teach on so many training examples; several."
        ),
    ] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--method", metavar="METHOD", help="How those are chosen: random, herding, …; several."
        ),
    ] = None,
    settings: Settings = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Where the runs go.", show_default="runs/NAME-compared"),
    ] = None,
    trust: TrustOption = False,
    as_json: Json = False,
) -> None:
    """Teach the recipe's student by several criteria, and without a teacher, seed by seed.

    Only the recipe's stages up to distill are run. A comparison goes on where it was interrupted,
    and may be given more criteria or seeds later: finished trainings are not repeated.

    Examples:

        attar compare digits -k kd -k dist -k 'dkd: {others: 2}'
        attar compare recipe.yaml -k 'attention: {layers: auto, weight: 100}' --seeds 5
        attar compare recipe.yaml -k kd --size 500 --size 2000 --method herding --method random

    The order is by validation; a gain is the test metric's over the student alone, seed by seed.
    The folder's comparison.html shows it, after every training.
    """
    from attar.cli.printing import print_standings
    from attar.pipeline.comparison import compare as start
    from attar.pipeline.comparison import criteria_of, record
    from attar.recipe import load_recipe
    from attar.screen import Screen, screen_console

    loaded = load_recipe(recipe, settings)
    asked = [criteria_of(text) for text in criteria]
    folder = out or Path("runs") / f"{loaded.name}-compared"
    with Screen(screen_console(stderr=True)) as screen:
        done = start(
            loaded, asked, folder, seeds=seeds, sizes=sizes or (), methods=methods or (),
            tell=screen, trusted=_trust(trust),
        )  # fmt: skip
    found = record(done, folder)
    if as_json:
        print_json({"folder": str(folder), **found})
    else:
        print_standings(found)
        typer.echo(f"page: {folder / 'comparison.html'}")


@app.command()
def sensitivity(
    recipe: RecipeArgument,
    ratios: Annotated[
        str,
        typer.Option(metavar="R,R,…", help="Shares of each layer to remove, between 0 and 1."),
    ] = "0.25,0.5,0.75,0.9",
    stage: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Look at the student after so many stages.",
            show_default="before the first prune",
        ),
    ] = None,
    granularity: Annotated[
        Granularity | None,
        typer.Option(help="What is removed.", show_default="as the recipe's prune"),
    ] = None,
    criterion: Annotated[
        str | None,
        typer.Option(
            "--criterion",
            "-k",
            metavar="NAME",
            help="What goes first: `attar list prune-criteria`.",
            show_default="as the recipe's prune",
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--only", metavar="PATTERN", help="Layers to look at, by path, with *; several."
        ),
    ] = None,
    examples: Annotated[
        int, typer.Option(min=1, help="Validation examples to measure on, at most.")
    ] = 2000,
    settings: Settings = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Where the page goes.", show_default="runs/NAME-sensitivity"
        ),
    ] = None,
    trust: TrustOption = False,
    as_json: Json = False,
) -> None:
    """Measure how much each layer of the student can be pruned, on validation, without retraining.

    Only the recipe's stages before prune are run. One layer at a time loses a share of its channels
    (layers that share channels, as in a residual stage, lose them together), or of its weights.
    An analysis goes on where it was interrupted, and may be given more ratios later.

    Examples:

        attar sensitivity digits
        attar sensitivity recipe.yaml --ratios 0.1,0.3,0.5 --only 'layer3.*'
        attar sensitivity recipe.yaml --granularity weight --examples 500

    The folder's sensitivity.html shows it. What breaks first is worth a prune: {exclude: …}.
    """
    from attar.cli.printing import print_sensitivity
    from attar.pipeline.sensitivity import sensitivity_of
    from attar.recipe import load_recipe
    from attar.screen import Screen, screen_console

    loaded = load_recipe(recipe, settings)
    folder = out or Path("runs") / f"{loaded.name}-sensitivity"
    with Screen(screen_console(stderr=True)) as screen:
        found = sensitivity_of(
            loaded, folder, ratios=_numbers("ratios", ratios), stage=stage,
            granularity=granularity.value if granularity else None, criterion=criterion,
            only=only or (), examples=examples, tell=screen, trusted=_trust(trust),
        )  # fmt: skip
    if as_json:
        print_json({"folder": str(folder), **found})
    else:
        print_sensitivity(found)
        typer.echo(f"page: {folder / 'sensitivity.html'}")


def _numbers(option: str, text: str) -> list[float]:
    """Numbers with commas between them. Raises `UsageError`."""
    from attar.errors import UsageError

    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(
            f"--{option} {text}: write numbers with commas between: 0.25,0.5"
        ) from None


def _trust(allowed: bool) -> Trust:
    """Whether a person's file may run: said on the command line, or asked on a terminal."""
    import sys

    if allowed or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return allowed
    return lambda question: typer.confirm(question, err=True)
