"""The errors a user can meet, as a tree.

    TransplantError
    ├── RecipeError           the YAML recipe: a key, a value, a combination
    ├── DataError             task data: files, columns, templates, splits
    ├── CheckpointError       a model folder or hub repository: missing, unsafe, corrupt
    │   └── NumericsError     NaN or infinity in weights, statistics or logits
    ├── IncompatibleModels    two models that cannot give to or take from each other
    ├── VariantError          coefficients that do not fit the pair
    ├── OrganError            an organ: its layers, its files, its place in a recipient
    ├── ResourceError         more machines, GPUs or memory than there are
    │   └── UnfitNode         a node with other libraries than the driver's
    ├── DeviceError           a GPU that does not compute, or has no room for a model
    ├── JobError              a submitted job: its head, its token, its id
    ├── TrackingError         the MLflow server
    └── RunError              a run folder: missing, incomplete, of another recipe

Every message says where, what was found, what was expected and what to do next. Errors carry one string, for an
exception with further required arguments does not survive pickling between Ray processes.
"""


class TransplantError(Exception):
    """Base of all errors that a user can act on; the command line prints the message and exits with 2."""


class RecipeError(TransplantError):
    """The recipe asks for something that cannot be."""


class DataError(TransplantError):
    """Task data cannot be read, rendered or split as the recipe asks."""


class CheckpointError(TransplantError):
    """A checkpoint is missing, unsafe, truncated or not one we can read."""


class NumericsError(CheckpointError):
    """NaN or infinity where only finite numbers make sense."""


class IncompatibleModels(TransplantError):
    """Source and target cannot exchange modules, or a recipient cannot take an organ."""


class VariantError(TransplantError):
    """A variant names modules that the pair lacks, or coefficients that are out of range."""


class OrganError(TransplantError):
    """An organ cannot be cut out, read, placed or taken out as asked."""


class ResourceError(TransplantError):
    """The cluster has less than the recipe asks for."""


class UnfitNode(ResourceError):
    """A node has other libraries or other code of ours than the driver, by whose name its outcomes would go."""


class DeviceError(TransplantError):
    """A GPU has no room for a model, or no longer computes: that is wrong with one place, and not with what was asked of it."""


class JobError(TransplantError):
    """A job cannot be sent, found or followed."""


class TrackingError(TransplantError):
    """The tracking server cannot be reached or refuses."""


class RunError(TransplantError):
    """A run folder is missing, incomplete, or belongs to another recipe."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a verb as Ctrl-C does; no error of ours."""

    EXIT = 143
    """What shells make of it."""
