"""The packed file: a student whose weights are stored at their entropy. See docs/packed-format.md.

`pack_student(student)` gives the bytes of a `.attar` file, `unpack_student(data, build=...)` the
student again, bit for bit; `read_tensors(data)` the weights alone.
"""

from attar.student.packed.file import load_packed, save_packed
from attar.student.packed.student import (
    Packed,
    coded_size,
    pack_student,
    packed,
    packed_size,
    read_tensors,
    unpack_student,
)

__all__ = [
    "Packed",
    "coded_size",
    "load_packed",
    "pack_student",
    "packed",
    "packed_size",
    "read_tensors",
    "save_packed",
    "unpack_student",
]
