"""The error tree. Knows nothing of who raises or prints them.

    PipelineError
    ├── JobError          before anything starts: job, schema or command line is wrong    exit 2
    │   └── SourceError   a path that the job names cannot be read or holds nothing       exit 2
    ├── DocumentError     this document, page or request failed: it becomes a row         exit 1
    └── RunError          the run cannot go on; what is written stays and is resumable    exit 3
        ├── EngineDead    the model's process is beyond use and must be replaced
        └── DamagedShard  a file of the output folder is not what was written

Every error is built from plain positional values, so that it survives pickling between Ray's processes.
"""


class PipelineError(Exception):
    """Anything this package raises on purpose."""


class JobError(PipelineError):
    """What the user wrote cannot be run; one sentence says where, what was found and what is allowed."""


class SourceError(JobError):
    """A path of the job cannot be read, or names nothing."""


class DocumentError(PipelineError):
    """One document, page or request failed.

    `kind` is a short stable word for counting and retrying (see `records.Failure`), `message` is for people.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(kind, message)
        self.kind = kind
        self.message = message

    def __str__(self) -> str:
        return self.message


class RunError(PipelineError):
    """The run stops here; the same command resumes it."""


class EngineDead(RunError):
    """The engine cannot answer any more; its actor must end so that Ray replaces it."""


class DamagedShard(RunError):
    """A shard of the output folder cannot be read, or holds something else. `file` is its path."""

    def __init__(self, file: str, why: str) -> None:
        super().__init__(file, why)
        self.file, self.why = file, why

    def __str__(self) -> str:
        return f"the shard {self.file} is damaged ({self.why}); run the job again: it is set aside and its requests are asked again"
