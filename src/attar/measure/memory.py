"""How much memory a model adds to a process that has just its runtime loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from attar.errors import BundleError

PROGRAM = """
import json, sys
import numpy, psutil
from attar.runtimes import runtimes
folder, runtime, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
from pathlib import Path
kind = runtimes.get(runtime)()
kind.available()  # imports the runtime, whose own memory is not the model's
golden = numpy.load(Path(folder) / "golden.npz")
inputs = [golden[k][:1] for k in sorted(golden.files) if k.startswith("input")]
process = psutil.Process()
before = process.memory_info().rss
session = kind.session(Path(folder), threads=threads)
for _ in range(10):
    session(*inputs)
print(json.dumps(process.memory_info().rss - before))
"""


def session_memory_mb(folder: Path, runtime: str, *, threads: int = 1) -> float:
    """Megabytes (10^6 bytes) of resident memory that a session of the bundle in `folder` adds,
    answering one golden example at a time, in a fresh process.

    Raises `BundleError` with the process's last line when it can't load the model.
    """
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), runtime, str(threads)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise BundleError(f"{folder} does not load in a fresh process: {reason[0]}")
    return round(json.loads(done.stdout.strip().splitlines()[-1]) / 1e6, 2)
