"""Documents of an output are found near it and are the ones that were read."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import DocumentError
from pipeline.output import Output
from pipeline.output.records import read_record_table
from pipeline.review.drawing import PageArtist, find_documents_folder
from tests.support.scored import write_output
from tests.support.workspace import Workspace


@pytest.mark.parametrize("job_folder", ["", "jobs", "jobs/daily"])
def test_the_documents_are_found(tmp_path: Path, job_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    out = write_output(tmp_path / "out/x", {"in/a.pdf": {}})
    records = read_record_table(str(out))
    place = tmp_path / job_folder / "in"
    place.mkdir(parents=True)
    (place / "a.pdf").write_bytes(b"")
    found = find_documents_folder(records, ["in/a.pdf"])
    assert found == (tmp_path / job_folder if job_folder != "jobs/daily" else tmp_path)  # two levels down is not looked at


def test_other_bytes_are_not_shown(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    file = workspace.put("a.pdf")
    job = workspace.job()
    out = write_output(tmp_path / "out", {"in/a.pdf": {}})
    Output(out).write_job({"job": job.dump_keys(), "fingerprint": "f", "asked": read_record_table(str(out)).job["asked"]})
    artist = PageArtist(read_record_table(str(out)), tmp_path)
    artist.listed = {"in/a.pdf": {"source": "in/a.pdf", "size_bytes": 1, "version": "1"}}
    with pytest.raises(DocumentError, match="its bytes have changed"):
        artist.read_bytes("in/a.pdf", "0" * 64)
    file.unlink()
    with pytest.raises(OSError, match="No such file"):
        artist.read_bytes("in/a.pdf", "0" * 64)
    artist.close()
