"""Where networks come from: Attar's own by name, torchvision's, timm's, a person's file; and the
weights that are loaded into them."""

from attar.models.base import ModelSpec, models
from attar.models.building import build, resolve, shapes_of
from attar.models.checkpoints import load_checkpoint
from attar.models.inheriting import inherit

__all__ = ["ModelSpec", "build", "inherit", "load_checkpoint", "models", "resolve", "shapes_of"]
