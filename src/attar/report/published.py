"""What papers report for a comparison's very setting, to be shown beside what was reached here."""

from __future__ import annotations

from dataclasses import dataclass

import yaml

from attar.pipeline.comparison import ALONE
from attar.recipe import Recipe
from attar.stages.distill import Distill

TIAN = "Tian et al. 2020, Contrastive Representation Distillation, table 1"
ZHAO = "Zhao et al. 2022, Decoupled Knowledge Distillation"
HUANG = "Huang et al. 2022, Knowledge Distillation from a Stronger Teacher"
CHEN = "Chen et al. 2021, Distilling Knowledge via Knowledge Review, as Wang et al. 2023 list it"
SUN = "Sun et al. 2024, Logit Standardization in Knowledge Distillation"

NOTE = (
    "Published figures are of the same data set, networks of the same names and as many epochs, "
    "with each paper’s own settings. They learn from all training images, where some are kept for "
    "validation here, and their networks’ shortcuts are 1 × 1 convolutions, where these pad."
)

DATA, TEACHER, STUDENT, EPOCHS = "cifar100", "cifar-resnet56", "cifar-resnet20", 240


@dataclass(frozen=True)
class Figure:
    """A figure in print. value: accuracy on test, a fraction. source: who reported it, where."""

    value: float
    source: str


FIGURES: dict[str, Figure] = {
    ALONE: Figure(0.6906, TIAN),
    "kd": Figure(0.7066, TIAN),
    "feature": Figure(0.6921, TIAN),
    "attention": Figure(0.7055, TIAN),
    "similarity": Figure(0.6967, TIAN),
    "correlation-congruence": Figure(0.6963, TIAN),
    "vid": Figure(0.7038, TIAN),
    "rkd": Figure(0.6961, TIAN),
    "pkt": Figure(0.7034, TIAN),
    "factor-transfer": Figure(0.6984, TIAN),
    "fsp": Figure(0.6995, TIAN),
    "nst": Figure(0.6960, TIAN),
    "crd": Figure(0.7116, TIAN),
    "dkd": Figure(0.7197, ZHAO),
    "dist": Figure(0.7175, HUANG),
    "reviewkd": Figure(0.7189, CHEN),
}
"""ResNet-20 taught by ResNet-56 (72.34 %) on CIFAR-100 for 240 epochs, by Attar's names."""

STANDARDIZED: dict[str, Figure] = {"kd": Figure(0.7143, SUN), "dkd": Figure(0.7232, SUN)}
"""The same with `standardize: true`."""


def published(recipe: Recipe, criterion: str) -> Figure | None:
    """What a paper reports for this criterion, where data, both networks and epochs are those of
    the recipe's first stage; else `None`.

    criterion: as a person types it, `kd` or `dkd: {others: 2}`; `alone` without a teacher.

    Example:
        >>> published(load_recipe("digits"), "kd") is None  # doctest: +SKIP
        True
    """
    if not _same_setting(recipe):
        return None
    read = yaml.safe_load(criterion)
    ((name, settings),) = read.items() if isinstance(read, dict) else [(read, {})]
    return (STANDARDIZED if settings.get("standardize") else FIGURES).get(name)


def _same_setting(recipe: Recipe) -> bool:
    data, teacher, student = recipe.data, recipe.teacher, recipe.student
    stage = recipe.stages[0] if recipe.stages else None
    return (
        (data.name or "").rpartition("/")[2].lower() == DATA
        and data.subset is None
        and (teacher.model, teacher.arguments, teacher.prepare) == (TEACHER, {}, [])
        and student is not None
        and (student.model, student.arguments, student.from_teacher) == (STUDENT, {}, {})
        and isinstance(stage, Distill)
        and stage.epochs == EPOCHS
        and stage.teacher is None
        and stage.transfer is None
    )
