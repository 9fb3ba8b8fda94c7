"""What a person writes: the recipe, how it is read, and what is said when it is wrong."""

from attar.recipe.model import Budget, Deploy, Learner, Network, Recipe, Teacher
from attar.recipe.reading import dump_recipe, load_recipe, presets

__all__ = [
    "Budget",
    "Deploy",
    "Learner",
    "Network",
    "Recipe",
    "Teacher",
    "dump_recipe",
    "load_recipe",
    "presets",
]
