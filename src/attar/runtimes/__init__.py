"""What executes the deployed model: runtimes, the bundles they load, and the gates before them.

Nothing here imports PyTorch until a model is exported: the machine that answers may not have it.
"""

from attar.runtimes.base import GraphPasses, Runtime, Session, runtimes

__all__ = ["GraphPasses", "Runtime", "Session", "runtimes"]
