"""The network that flows: spec, edits, constraints, saving and rebuilding."""

from attar.student.edits import Edit
from attar.student.saving import load_student, save_student
from attar.student.student import Student

__all__ = ["Edit", "Student", "load_student", "save_student"]
