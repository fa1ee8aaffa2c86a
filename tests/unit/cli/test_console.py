"""Terminal output: messages, whatever is in a document's name, and nothing of Ray."""

from __future__ import annotations

import os
import sys

import pytest

from pipeline.cli import console
from pipeline.errors import RunError


def test_a_strangers_file_name_does_not_drive_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_message("in/\x1b]0;owned\x07\u202efdp.exe\nnext line")
    assert capsys.readouterr().err == "in/\\x1b]0;owned\\x07\\u202efdp.exe\nnext line\n"


def test_what_rays_core_writes_is_not_for_the_user(capfd: pytest.CaptureFixture[str]) -> None:
    with console.capture_ray_output() as shown:
        os.write(2, b"core_worker.cc:2465: Actor with class name\n")
        print("(raylet) A worker died")
        os.write(1, b"core_worker.cc\n")
        print("ERROR services.py", file=sys.stderr)
        shown.print("ours")
    os.write(2, b"after\n")
    print("data")
    assert capfd.readouterr() == ("data\n", "ours\nafter\n")


@pytest.mark.parametrize(("cause", "shown"), [(ValueError("Ray's own"), "core_worker.cc\n"), (None, "")])
def test_what_rays_core_wrote_is_shown_if_it_broke_the_run(capfd: pytest.CaptureFixture[str], cause: Exception | None, shown: str) -> None:
    with pytest.raises(RunError), console.capture_ray_output():  # noqa: PT012  what is written inside is what is tested
        os.write(2, b"core_worker.cc\n")
        raise RunError("it broke") from cause
    assert capfd.readouterr().err == shown
