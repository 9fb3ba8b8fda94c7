"""Distillation: criteria between a student and its teacher, and what they need to work.

Works without a recipe: a criterion (a file each in `criteria`) is a module that is called with two
signals, `Capture` reads inner layers of any network, and `DistillObjective` joins the losses.
"""

from attar.distill.capture import Capture
from attar.distill.criterion import Criterion
from attar.distill.head import TeacherHead
from attar.distill.objective import DistillObjective
from attar.distill.pairing import pair_layers
from attar.distill.recovery import recovery_objective
from attar.distill.signal import Signal, Source
from attar.distill.teacher import Teacher

__all__ = [
    "Capture",
    "Criterion",
    "DistillObjective",
    "Signal",
    "Source",
    "Teacher",
    "TeacherHead",
    "pair_layers",
    "recovery_objective",
]
