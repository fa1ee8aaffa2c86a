"""Build step that puts the sample jobs, their schemas and documents into the wheel, below `pipeline/demo/sample/`.

They stand in `jobs/` and `schemas/`, where an editable install reads them (`pipeline/demo/sample_folder.py`). Everything else about the
build is in pyproject.toml.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

PATTERNS = ("jobs/*.yaml", "jobs/samples/*/*", "schemas/*.json")
TARGET = Path("pipeline/demo/sample")


def list_samples() -> list[str]:
    """Return the samples' paths. Raises SystemExit where a kind is missing: a wheel without them would be incomplete without a word."""
    found = {pattern: sorted(map(str, Path().glob(pattern))) for pattern in PATTERNS}
    if missing := [pattern for pattern, files in found.items() if not files]:
        raise SystemExit(f"no file is there for {' and '.join(missing)}: build in a complete copy of the repository")
    return [file for files in found.values() for file in files]


class BuildWithSamples(build_py):
    """Copies the samples after the package."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for file in list_samples():
            target = Path(self.build_lib) / TARGET / file
            self.mkpath(str(target.parent))
            self.copy_file(file, str(target))

    def get_source_files(self) -> list[str]:
        """Return what a source distribution contains."""
        return [*super().get_source_files(), *list_samples()]


setup(cmdclass={"build_py": BuildWithSamples})
