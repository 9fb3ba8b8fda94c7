"""What can go wrong, said to the person in one sentence: what, where, and what would work."""


class AttarError(Exception):
    """A failure the person can act on. The command line prints it without a traceback.

    `exit_code` is what the `attar` command ends with.
    """

    exit_code = 1


class UsageError(AttarError):
    """The command, recipe or argument is wrong; nothing was started."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe that can't be run: an unknown key, a wrong type, an impossible order of stages."""


class DataError(AttarError):
    """Data that can't be read or don't fit the task."""


class CheckpointError(AttarError):
    """Weights that can't be read or belong to another network."""


class TrainingError(AttarError):
    """Training that broke down, for instance into a loss that is not a number."""


class ExportError(AttarError):
    """A model that the runtime's exporter can't take."""


class ParityError(AttarError):
    """An exported file that does not answer as the PyTorch model did."""


class ConstraintBroken(AttarError):
    """An edit's promise that no longer holds: a mask that grew back, a codebook that spread."""


class BundleError(AttarError):
    """A bundle that is damaged, incomplete, or from a newer version."""


class StorageError(AttarError):
    """A disk that is full, or a run's folder that another run is writing."""
