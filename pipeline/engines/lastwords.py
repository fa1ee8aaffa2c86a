"""What vLLM's processes log before they fail -> the one line that says why. Knows no model and no request.

What is raised here, and what the process that failed wrote into its log:

    RuntimeError: Engine core initialization failed. See root cause above.
    ValueError: To serve at least one request … increase gpu_memory_utilization …
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from functools import cache
from pathlib import Path

RAISED = re.compile(r"^(?:\w+\.)*(\w*(?:Error|Exception|Interrupt)): (.+)$", re.MULTILINE)
"""The line of a traceback that says what was raised."""
EMPTY = ("Engine core initialization failed", "EngineCore encountered an issue", "cancelled", "WorkerProc initialization failed")
"""What the processes further up say about it, in whose tracebacks no reason stands."""


@cache
def folder() -> tempfile.TemporaryDirectory[str]:
    """Return where this process keeps its log; it goes when the process ends."""
    return tempfile.TemporaryDirectory(prefix="pipeline-vllm-")


def file() -> Path:
    return Path(folder().name) / "errors.log"


def keep() -> int:
    """Have the vLLM of this process and of those it starts log errors to stderr and into a file, nothing else; return the file's length.

    vLLM's own way is every step of its work on stdout, where data belongs. A configuration that is set already stays.
    """
    hush()
    handlers = {
        "stderr": {"class": "logging.StreamHandler", "stream": "ext://sys.stderr", "level": "ERROR"},
        "file": {"class": "logging.FileHandler", "filename": str(file()), "level": "ERROR", "delay": True},
    }
    loggers = {"vllm": {"handlers": list(handlers), "level": "ERROR", "propagate": False}}
    config = Path(folder().name) / "logging.json"
    config.write_text(json.dumps({"version": 1, "disable_existing_loggers": False, "handlers": handlers, "loggers": loggers}))
    os.environ.setdefault("VLLM_LOGGING_CONFIG_PATH", str(config))
    return file().stat().st_size if file().exists() else 0


def hush() -> None:
    """Have vLLM say nothing but errors while it is imported: it reads its configuration later."""
    logging.getLogger("vllm").setLevel(logging.ERROR)


def since(length: int) -> str:
    """Return the first reason that was logged after the file had this length; "" where there is none."""
    if not file().exists():
        return ""
    with file().open("rb") as opened:
        opened.seek(length)
        text = opened.read().decode(errors="replace")
    reasons = [f"{kind}: {said}" for kind, said in RAISED.findall(text) if not said.startswith(EMPTY)]
    return " ".join(reasons[0].split())[:600] if reasons else ""
