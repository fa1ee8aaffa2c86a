"""Exception tree of the package, with the exit code of a run that ends with each.

    PipelineError
    ├── JobError          before anything starts: job, schema or command line is wrong    exit 2
    │   └── SourceError   a path that the job names cannot be read or holds nothing       exit 2
    ├── DocumentError     this document, page or request failed: it becomes a row         exit 1
    └── RunError          the run cannot continue; what is written stays and is resumable exit 3
        ├── EngineDead    the model's process cannot be used any more and must be replaced
        └── DamagedShard  a file of the output folder is not what was written

Every error is built from plain positional values, so that it survives pickling between Ray's processes.
"""

from __future__ import annotations

from pathlib import PurePath


class PipelineError(Exception):
    """Base class of all exceptions that this package raises on purpose.

    `file` and `key` say for programs what the message says for people: the file that is wrong, and the dotted key of the job or the option
    of the command line; None where there is none, or where the place that raised the error does not know it.
    """

    file: str | None = None
    key: str | None = None


class JobError(PipelineError):
    """The user's input cannot be run; the message says in one sentence where, what was found and what is allowed."""

    def __init__(self, message: str, file: str | PurePath | None = None, key: str | None = None) -> None:
        super().__init__(message, None if file is None else str(file), key)
        self.message, self.file, self.key = self.args

    def __str__(self) -> str:
        return str(self.message)


class SourceError(JobError):
    """A path of the job cannot be read, or there is no file at it."""


class DocumentError(PipelineError):
    """One document, page or request failed.

    `kind` is a short stable word for counting and retrying (see `records.Failure`), `message` is a sentence for the user.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(kind, message)
        self.kind = kind
        self.message = message

    def __str__(self) -> str:
        return self.message


class RunError(PipelineError):
    """The run must stop; the same command resumes it."""


class EngineDead(RunError):
    """The engine cannot answer requests any more; its actor must end so that Ray replaces it."""


class DamagedShard(RunError):
    """A shard of the output folder cannot be read or has other contents than were written. `file` is its path."""

    file: str

    def __init__(self, file: str, reason: str) -> None:
        super().__init__(file, reason)
        self.file, self.reason = file, reason

    def __str__(self) -> str:
        return f"the shard {self.file} is damaged ({self.reason}); run the job again: it is set aside and its requests are asked again"
