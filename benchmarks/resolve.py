"""Resolver benchmark: what pip finds for this package without constraints, and whether the ends of its bounds work.

    python benchmarks/resolve.py                      a dry run for the package alone and one for each extra, one at a time
    python benchmarks/resolve.py --only s3 dev        those of these extras; `.` is the package alone
    python benchmarks/resolve.py --matrix             installs the lowest and the newest versions, and runs tests/unit with both

A dry run that takes longer than two minutes has failed: pip then walks back through years of releases. It downloads what it resolves, 3 GB
with torch; `CPU` is pip's own time, which other work on the machine changes less. The matrix needs 7 GB of disk for the time of a test run,
in one temporary environment after the other. Exit code 1 where something failed.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
import tomllib
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
LIMIT_S = 120.0
BOUNDED = ("ray", "transformers", "pyarrow", "pymupdf")
"""Libraries whose lowest and newest versions are installed: those whose API this package depends on most."""
TESTS = ("tests/unit",)


@dataclass(frozen=True)
class Resolved:
    """What pip found: the seconds it took, those of CPU time, the versions by name, and the reason where there are none."""

    seconds: float
    cpu_s: float
    versions: dict[str, str]
    reason: str = ""

    def format_row(self, name: str) -> str:
        found = [self.versions.get(library, "") for library in (*BOUNDED, "torch")]
        result = f"{len(self.versions)} packages" if self.versions else self.reason
        return "| " + " | ".join([f"`{name}`", f"{self.seconds:.0f} s", f"{self.cpu_s:.0f} s", result, *found]) + " |"


def read_requirements() -> dict[str, list[Requirement]]:
    """Return the requirements of each extra; of the package alone under ``."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = {"": project["dependencies"], **project["optional-dependencies"]}
    return {name: [Requirement(line) for line in lines] for name, lines in lists.items()}


def resolve_extra(extra: str, limit_s: float) -> Resolved:
    """Let pip resolve the package with an extra, as in an empty environment and without constraints."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        options = ("--dry-run", "--ignore-installed", "--quiet", "--report", str(report))
        started_s, before_s = time.monotonic(), read_cpu_time()
        try:
            ended = subprocess.run(
                [sys.executable, "-m", "pip", "install", *options, f"{ROOT}[{extra}]" if extra else str(ROOT)],
                capture_output=True, text=True, check=False, timeout=limit_s,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return Resolved(limit_s, read_cpu_time() - before_s, {}, f"none within {limit_s:.0f} s")
        seconds, cpu_s = time.monotonic() - started_s, read_cpu_time() - before_s
        if ended.returncode:
            errors = [line for line in ended.stderr.splitlines() if line.startswith("ERROR")]
            return Resolved(seconds, cpu_s, {}, " ".join(errors)[:200] or f"exit code {ended.returncode}")
        found = [item["metadata"] for item in json.loads(report.read_text())["install"]]
        return Resolved(seconds, cpu_s, {normalize_name(item["name"]): item["version"] for item in found})


def read_cpu_time() -> float:
    """Return the CPU time of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def normalize_name(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pin_lowest() -> list[str]:
    """Return a requirement for the lowest version that the bounds of each of the bounded libraries allow."""
    bounds = {requirement.name: requirement.specifier for requirement in read_requirements()[""]}
    lowest = {name: next(bound.version for bound in bounds[name] if bound.operator == ">=") for name in BOUNDED}
    return [f"{name}=={version}" for name, version in lowest.items()]


def run_matrix() -> Iterator[tuple[str, Resolved, str]]:
    """Yield for the lowest and the newest versions: a name, what was installed, and the last line of the tests or why there is none."""
    for name, pins in (("lowest", pin_lowest()), ("newest", [])):
        with tempfile.TemporaryDirectory(dir=ROOT, prefix=".venv-matrix-") as folder:
            venv.create(folder, with_pip=True)
            python, started_s, before_s = str(Path(folder, "bin", "python")), time.monotonic(), read_cpu_time()
            install = [python, "-m", "pip", "install", "--quiet", "--editable", f"{ROOT}[dev]", *pins]
            installed = subprocess.run(install, capture_output=True, text=True, check=False)
            seconds, cpu_s = time.monotonic() - started_s, read_cpu_time() - before_s
            if installed.returncode:
                yield name, Resolved(seconds, cpu_s, {}, installed.stderr.strip()[-300:]), "not installed"
                continue
            listed = subprocess.run([python, "-m", "pip", "list", "--format=json"], capture_output=True, text=True, check=True).stdout
            versions = {normalize_name(item["name"]): item["version"] for item in json.loads(listed)}
            tested = subprocess.run([python, "-m", "pytest", "-q", *TESTS], cwd=ROOT, capture_output=True, text=True, check=False)
            print(tested.stdout[-4000:], file=sys.stderr)
            yield name, Resolved(seconds, cpu_s, versions), f"{tested.stdout.strip().splitlines()[-1]}, exit code {tested.returncode}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="EXTRA", help="extras to resolve; `.` is the package alone")
    parser.add_argument("--matrix", action="store_true", help="install the lowest and the newest versions and run the tests")
    parser.add_argument("--limit-s", type=float, default=LIMIT_S, help="longest time of one dry run")
    given = parser.parse_args()
    print(f"| what | time | CPU | result | {' | '.join((*BOUNDED, 'torch'))} |\n|{' --- |' * (5 + len(BOUNDED))}", flush=True)
    failed = 0
    if given.matrix:
        for name, installed, tests in run_matrix():
            print(installed.format_row(name), tests, flush=True)
            failed += not tests.endswith("exit code 0")
        return bool(failed)
    for extra in read_requirements() if given.only is None else [name.removeprefix(".") for name in given.only]:
        resolved = resolve_extra(extra, given.limit_s)
        print(resolved.format_row(f".[{extra}]" if extra else "."), flush=True)
        failed += not resolved.versions
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
