"""What a renderer may read, and what is said of a system that grants less."""

from __future__ import annotations

import os
import re
import sys
import sysconfig
from pathlib import Path

import pytest

from pipeline.render.confine import describe_gaps, list_library_folders

EVERYTHING = {"abi": 7, "has_filter": True, "has_own_network": True, "has_own_user": True}


def is_readable(path: str) -> bool:
    return any(Path(path).resolve().is_relative_to(Path(folder).resolve()) for folder in list_library_folders())


@pytest.mark.parametrize("module", ["os", "numpy", "PIL", "pymupdf", "pipeline", "sysconfig"])
def test_libraries_may_be_read(module: str) -> None:
    assert is_readable(str(__import__(module).__file__))


def test_projects_and_homes_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path), "", *sys.path])
    paths = (tmp_path, Path.home() / ".ssh/id_rsa", Path("jobs/invoices.yaml"), Path(sys.prefix), Path("/etc/shadow"), Path("/proc"))
    assert [path for path in paths if is_readable(str(path))] == []


def test_a_virtual_environment_that_is_the_project_opens_its_packages_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packages = str(tmp_path / "lib/python3.11/site-packages")
    paths = sysconfig.get_paths() | {"purelib": packages, "platlib": packages}
    monkeypatch.setattr(sysconfig, "get_paths", lambda: paths)
    assert is_readable(os.path.join(packages, "a.py"))
    assert not is_readable(str(tmp_path / "job.yaml"))


def test_a_system_that_grants_everything_has_no_gaps() -> None:
    assert describe_gaps(**EVERYTHING) == []


@pytest.mark.parametrize(
    ("granted", "said"),
    [
        ({"abi": 0}, "files: no Landlock .* the system-call filter refuses to open any file"),
        ({"abi": 5}, "files: Landlock of ABI 5 does not restrict signals and abstract sockets; the system-call filter alone does"),
        ({"abi": 1}, "does not restrict truncating files, TCP, commands to devices, signals"),
        ({"has_filter": False}, "system calls: no filter"),
        ({"has_own_network": False}, "network: .* the system-call filter alone keeps a renderer off the network"),
        ({"has_own_user": False}, "user: a root without CAP_SETUID"),
    ],
)
def test_each_gap_is_said_once(granted: dict[str, int], said: str) -> None:
    (gap,) = describe_gaps(**(EVERYTHING | granted))
    assert re.search(said, gap)


def test_an_old_landlock_without_filter_is_not_made_better_than_it_is() -> None:
    assert describe_gaps(5, False, True, True)[0].endswith("signals and abstract sockets; nothing does")


def test_without_filter_and_landlock_the_worst_is_said() -> None:
    gaps = describe_gaps(0, has_filter=False, has_own_network=False, has_own_user=True)
    assert gaps[0] == "files: neither Landlock nor a system-call filter: a renderer can read and write what this user can"
    assert gaps[2].endswith("a renderer can use the network")
