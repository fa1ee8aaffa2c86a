"""Model cache: copies a checkpoint from an object store into a folder of this machine, once for each revision.

    s3://models/qwen    ->    ~/.cache/pipeline/models/qwen-5f1c09b2a7d4-9a3be0c1d2f34455/

The last part of the name is the checkpoint's revision: a digest of the names, sizes and etags that the store lists. The first
process of a machine that needs a copy makes it, while the others wait for a file lock. A copy gets its name when it is complete, is
never changed, and is never deleted.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from glob import escape
from pathlib import Path

from pipeline.engines.checkpoint_files import CHECKPOINT_FILES
from pipeline.errors import JobError, RunError
from pipeline.storage import listing, object_store, store
from pipeline.storage.object_store import StoredObject

CACHE_ENV = "PIPELINE_CACHE"
"""The environment variable with the cache's folder: it belongs to the machine and not to the job."""
OFFLINE_ENV = "HF_HUB_OFFLINE"


def resolve_store_revision(uri: str, wanted: str | None = None) -> str:
    """Return the revision of a checkpoint: the store's current one, or `wanted` if that is current or in the cache.

    Raises JobError when there is no checkpoint, or only another revision. Offline, only the cache is searched.
    """
    if wanted and find_copy_folder(uri, wanted).is_dir():
        return wanted
    if is_offline():
        copies = sorted(find_cache_folder().glob(f"{escape(make_folder_stem(uri))}-*"), key=lambda copy: copy.stat().st_mtime)
        if not copies or wanted:
            raise JobError(f"the model {uri} is not in {find_cache_folder()}, and {OFFLINE_ENV} forbids fetching it", key="model.name")
        return copies[-1].name.rpartition("-")[2]
    found = compute_digest(list_checkpoint_files(uri))
    if wanted not in (None, found):
        raise JobError(
            f"model.revision is {wanted!r}, {uri} has the revision {found} now: leave the key out to take that", key="model.revision"
        )
    return found


def copy_checkpoint(uri: str, revision: str) -> Path:
    """Return the folder with a copy of a checkpoint, after making it if there is none. Raises JobError, RunError."""
    copy = find_copy_folder(uri, revision)
    if copy.is_dir():
        return copy
    with store.convert_os_errors(f"copy the model {uri} to {copy}"):
        copy.parent.mkdir(parents=True, exist_ok=True)
        with hold_file_lock(copy.with_name(f".{copy.name}.lock")):
            if not copy.is_dir():
                download_checkpoint(uri, revision, copy)
    return copy


def download_checkpoint(uri: str, revision: str, copy: Path) -> None:
    """Download a checkpoint into a temporary folder and rename that when it is complete and the revision is still the same.

    Raises RunError for a file that comes short, and for a checkpoint that has changed.
    """
    for leftover in copy.parent.glob(f".{escape(copy.name)}.*.tmp"):
        shutil.rmtree(leftover)
    draft = copy.with_name(f".{copy.name}.{os.getpid()}.tmp")
    draft.mkdir()
    files = list_checkpoint_files(uri)
    for file in files:
        target = draft / find_file_name(file)
        object_store.download_object(file.url, target)
        if target.stat().st_size != file.size_bytes:
            raise RunError(f"{file.url} has {file.size_bytes} bytes, but {target.stat().st_size} were received: run the same command again")
        with target.open("rb") as written:
            os.fsync(written.fileno())  # otherwise a power failure can leave the renamed folder with empty files
    if {compute_digest(files), compute_digest(list_checkpoint_files(uri))} != {revision}:
        shutil.rmtree(draft)
        raise RunError(f"the model {uri} has changed since the run began: it had the revision {revision}")
    draft.rename(copy)


def list_checkpoint_files(uri: str) -> list[StoredObject]:
    """Return the files of a checkpoint that are used, sorted by name. Raises JobError when there are none or the store fails."""
    try:
        found = listing.list_objects(uri)
    except OSError as error:
        raise JobError(f"the model {uri} cannot be listed: {object_store.format_os_error(error)}", key="model.name") from None
    prefix = f"{uri.rstrip('/')}/"
    inside = [file for file in found if file.url.partition(prefix)[2] == find_file_name(file)]
    files = [file for file in inside if any(fnmatchcase(find_file_name(file), pattern) for pattern in CHECKPOINT_FILES)]
    for needed in ("config.json", "*.safetensors"):
        if not any(fnmatchcase(find_file_name(file), needed) for file in files):
            raise JobError(f"model.name is {uri!r}, which holds no checkpoint (no {needed})", key="model.name")
    return sorted(files, key=find_file_name)


def find_file_name(file: StoredObject) -> str:
    return file.url.rpartition("/")[2]


def compute_digest(files: Sequence[StoredObject]) -> str:
    """Return 16 hex digits that depend on the name, size and version of every file."""
    text = "\n".join(f"{find_file_name(file)} {file.size_bytes} {file.version}" for file in files)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def find_copy_folder(uri: str, revision: str) -> Path:
    """Return the folder that holds the copy of a revision, if there is one."""
    return find_cache_folder() / f"{make_folder_stem(uri)}-{revision}"


def make_folder_stem(uri: str) -> str:
    bare = uri.rstrip("/")
    return f"{bare.rpartition('/')[2]}-{hashlib.sha256(bare.encode()).hexdigest()[:12]}"


def find_cache_folder() -> Path:
    return Path(os.environ.get(CACHE_ENV) or os.path.expanduser("~/.cache/pipeline")) / "models"


def is_offline() -> bool:
    """Return whether fetching is forbidden; the variable is read as Hugging Face's libraries read it."""
    return os.environ.get(OFFLINE_ENV, "").upper() in ("1", "ON", "YES", "TRUE")


@contextmanager
def hold_file_lock(lock: Path) -> Iterator[None]:
    """Hold an exclusive file lock; the kernel releases it if the process dies."""
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield
