"""Every error that a user can correct, and the one of an exchange that failed."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

_OF_FILES = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG}
_OF_FILES |= {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class UserError(ValueError):
    """What a user can correct. The message is one sentence that names the setting, the rule and the remedy.

    Programs print it without a traceback and end with exit code 2.

    Attributes:
        alike: the part of the message that ranks which make the same mistake have in common; one of them prints it.
    """

    @property
    def alike(self) -> str:
        return str(self)


def first_line(error: BaseException, limit: int = 300) -> str:
    """The first line of an error's message, or its class's name. Libraries write advice and traces behind it."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:limit]


def one_line(error: BaseException, limit: int = 200) -> str:
    """The message of an error without line ends, or its class's name."""
    return " ".join(str(error).split())[:limit] or type(error).__name__


def reason_of(error: BaseException) -> str:
    """Why something failed, in one line, without the path, which the sentence around it names."""
    return getattr(error, "strerror", None) or one_line(error, 300).rstrip(". ")


def mistake_of_path(error: BaseException) -> UserError | None:
    """An OSError whose cause a user can correct, as such an error; None for all others."""
    if not isinstance(error, OSError) or error.errno not in _OF_FILES:
        return None
    name = "" if error.filename is None else f"{error.filename}: "
    return UserError(f"{name}{error.strerror}; correct the path or its permissions, or make room")


class ScMoEConfigError(UserError):
    """A setting that its user can correct: the message has the JSON path, the value, the rule and the remedy."""


class ArgumentError(UserError):
    """A flag that its user can correct."""


class DataError(UserError):
    """Data, a tokenizer file or a data flag is unusable; the message says what was found and what to do."""


class CheckpointError(UserError):
    """A checkpoint that cannot be written or used, and why."""


class TrainingError(UserError):
    """Training cannot go on, and why.

    Attributes:
        since: the first iteration whose numbers were not finite.
    """

    def __init__(self, message: str, since: int | None = None) -> None:
        super().__init__(message)
        self.since = since


class OutOfMemoryError(UserError):
    """The device's or the host's memory does not suffice.

    Args:
        where: "" or the iteration.
        reason: the library's message.
    """

    alike = "out of memory"

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(
            f"{where}out of memory ({reason or 'of the host'}): lower train_micro_batch_size_per_gpu (in other "
            "programs --batch-size) or the model's sizes, set --recompute-granularity full, or use more ranks"
        )


class GenerationError(UserError):
    """A prompt or a setting of generation that its user can correct."""


class EvaluationError(UserError):
    """A text, a task or a result that cannot be evaluated; the message says what was found and what to do."""


class AnalysisError(UserError):
    """A model, data set or record that cannot be analysed; the message says what was found and what to do."""


class ModelError(UserError):
    """Sizes that no model has, or a method or layout that a model cannot run with."""


class ClusterError(UserError):
    """A description of a cluster, or a profile of one, that its user can correct."""


class PlanError(UserError):
    """A model or a question that a plan for a cluster cannot answer; the message says what was found and what to do."""


class RankDisagreementError(UserError):
    """Ranks of one run hold different settings or data."""


class LauncherError(UserError):
    """A launcher did not set all variables that a rank needs."""


class MissingPackageError(UserError, ImportError):
    """A package that one of the extras of pyproject.toml installs."""


@contextmanager
def imports_of(extra: str, purpose: str, otherwise: str = "") -> Iterator[None]:
    """Around imports of packages that only one purpose needs: a missing one is named, and what installs it.

    Raises:
        MissingPackageError: an import in the block failed.
    """
    try:
        yield
    except ImportError as error:
        package = (error.name or str(error)).split(".")[0]
        remedy = f'pip install "scmoe_ds[{extra}]"' + (f", or {otherwise}" if otherwise else "")
        raise MissingPackageError(f"{purpose} needs {package}: {remedy}") from error


class ExchangeError(RuntimeError):
    """An exchange that failed.

    Attributes:
        collective: what it was, in words that the ranks follow.
        ranks: global ranks of its group.
        peers: those of them whose connection failed, or all others.
        reason: the library's message.
    """

    def __init__(self, collective: str, ranks: Sequence[int], peers: Sequence[int], reason: str) -> None:
        super().__init__(f"{collective} {', '.join(map(str, ranks))} failed: {reason}")
        self.collective, self.ranks, self.peers, self.reason = collective, list(ranks), list(peers), reason
