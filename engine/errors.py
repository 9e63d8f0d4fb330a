"""Every error that Kinetiq raises on purpose.

    KinetiqError
    ├── InputError             what the user gave cannot be used; exit status 2
    │   ├── RequestError       an option, or a combination of options
    │   ├── ShapeError         a tensor's shape, type or device
    │   ├── ClipError          a video, an image folder, or their frames
    │   ├── CheckpointError    a model folder, a weights file, a configuration
    │   └── OutputError        a path that cannot be written
    └── WorkError              the input was fine, the work failed; exit status 1
        ├── NonFiniteError     NaN or infinity appeared, with the place and the step
        ├── TrainingError      training had to stop
        ├── BusyError          too much is asked for at once; later it may be done
        └── MissingDependencyError   a package or a device that the work needs is not there

Messages say where, what must be, what came, and what to do. What goes on in another way than was
asked, and says so, is a `KinetiqWarning`.
"""


class KinetiqError(Exception):
    """Base of all errors of this package."""


class KinetiqWarning(UserWarning):
    """The work goes on, in another way than was asked; base of all warnings of this package."""


class InputError(KinetiqError):
    """What the user gave cannot be used."""


class RequestError(InputError):
    """An option of a request, or a combination of options, has no meaning."""


class ShapeError(InputError):
    """A tensor has the wrong shape, type or device."""


class ClipError(InputError):
    """A video or its frames cannot be read or used."""


class CheckpointError(InputError):
    """A model folder, a weights file or a configuration cannot be used."""


class OutputError(InputError):
    """A path cannot be written."""


class WorkError(KinetiqError):
    """The input was fine, the work failed."""


class NonFiniteError(WorkError):
    """NaN or infinity appeared."""


class TrainingError(WorkError):
    """Training had to stop."""


class BusyError(WorkError):
    """Too much is asked for at once; later it may be done."""


class MissingDependencyError(WorkError):
    """A package or a device that the work needs is missing."""
