"""What the package never does, read from its source; and a secret that leaves no trace."""

from __future__ import annotations

import ast
import json
import os
import pickle
import traceback
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pymupdf
import pytest

from pipeline import Job
from pipeline.errors import DocumentError, PipelineError, RunError
from pipeline.output import Output
from pipeline.render.sandbox import Sandbox
from pipeline.stages.render import RenderPlan, RenderStage
from tests.support.ledger import LedgerWriter
from tests.support.stages import Row, claim_all, render_rows
from tests.support.workspace import Workspace, draw_slip, make_listing_row

PACKAGE = Path(__file__).parents[2] / "pipeline"
SECRET = "correct-horse-7391"

# --- in the source

UNPICKLERS = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "jsonpickle"}
CODE = {"eval", "exec", "compile", "__import__"}
CALLS = {"os.system", "os.popen", "pd.read_pickle", "ssl._create_unverified_context", "tempfile.mktemp"}
YAML = {"safe_load", "safe_dump", "parse", "compose"}
ONLY = {"shell": False, "trust_remote_code": False, "allow_pickle": False, "verify": True, "use_safetensors": True, "weights_only": True}
"""The one value that a call may give these, wherever it gives them."""


def faults(source: str) -> Iterator[str]:
    """Yield what a module does that this package does not do."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (name for name in names if name.split(".")[0] in UNPICKLERS)
        elif isinstance(node, ast.Call):
            yield from call_faults(node)


def call_faults(call: ast.Call) -> Iterator[str]:
    name = ast.unparse(call.func)
    given = {word.arg: word.value for word in call.keywords}
    yield from (f"{word}=" for word, value in ONLY.items() if word in given and getattr(given[word], "value", None) is not value)
    if name in CODE or name in CALLS:
        yield name
    if name == "torch.load" and "weights_only" not in given:
        yield "torch.load without weights_only"
    if name.startswith("Auto") and name.endswith(".from_pretrained") and "trust_remote_code" not in given:
        yield f"{name} without trust_remote_code"
    module, _, function = name.rpartition(".")
    if module == "yaml" and (function not in YAML or (function in ("parse", "compose") and ast.unparse(call.args[1]) != "yaml.SafeLoader")):
        yield name


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_nothing_unpickles_runs_strings_or_trusts_code(file: Path) -> None:
    assert list(faults(file.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "line",
    ["import pickle", "from marshal import loads", "import joblib.externals", "eval('1')", "exec(text)", "os.system('ls')",
     "subprocess.run('ls', shell=True)", "subprocess.run('ls', shell=flag)", "AutoModel.from_pretrained(x, trust_remote_code=True)",
     "AutoModel.from_pretrained(x)", "torch.load(x)", "torch.load(x, weights_only=False)", "np.load(x, allow_pickle=True)",
     "loader.from_pretrained(x, use_safetensors=False)", "yaml.load(x)", "yaml.full_load(x)", "yaml.parse(x, yaml.Loader)",
     "requests.get(x, verify=False)"],
)  # fmt: skip
def test_each_of_these_is_seen(line: str) -> None:
    assert list(faults(line))


# --- a secret


@pytest.fixture
def job(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> Job:
    """A job with a password and three documents: one that it opens, one of another password, one that is broken."""
    monkeypatch.setenv("SLIP_PASSWORD", SECRET)
    for name, password in (("known", SECRET), ("unknown", "another")):
        document = pymupdf.open(stream=draw_slip(7), filetype="pdf")
        workspace.put(f"{name}.pdf", document.tobytes(encryption=pymupdf.PDF_ENCRYPT_AES_256, owner_pw="owner", user_pw=password))
    workspace.put("broken.pdf", b"%PDF-1.7 and nothing more")
    return workspace.job("source.password_env=SLIP_PASSWORD")


def rendered(job: Job) -> list[Row]:
    """Return what rendering the job's documents says of them, without the pixels."""
    files = sorted((job.file.parent / "in").iterdir())
    stage = RenderStage(RenderPlan.of_job(job), claim_all)
    try:
        rows = list(render_rows(stage, (make_listing_row(file, job.file.parent) for file in files)))
    finally:
        stage.close()
    assert SECRET not in repr(stage)
    return [{name: value for name, value in row.items() if name != "pixels"} for row in rows]


def test_the_secret_opens_what_it_should(job: Job) -> None:
    assert [(row.get("failure") or {}).get("kind") for row in rendered(job)] == ["broken", None, "encrypted"]


def test_what_is_kept_of_a_job_names_the_secrets_place_alone(job: Job) -> None:
    kept = json.dumps([job.dump_keys(), job.decisive_keys]) + repr(job) + job.system_message + job.fingerprint
    assert "SLIP_PASSWORD" in kept
    assert SECRET not in kept


def test_settings_do_not_show_the_secret(job: Job) -> None:
    settings = RenderPlan.of_job(job).read_settings()
    assert settings.password == SECRET
    assert SECRET not in f"{settings} {settings!r}"


def test_the_ledger_does_not_hold_the_secret(job: Job) -> None:
    rows = rendered(job)
    assert SECRET not in repr(rows)
    output = Output(job.output)
    output.create()
    with LedgerWriter(output) as ledger:
        for row in rows:
            ledger.add(row)
    files = [file for file in job.output.rglob("*") if file.is_file()]
    assert len(files) >= 2
    assert not any(SECRET.encode() in file.read_bytes() for file in files)


def test_no_error_says_the_secret(job: Job) -> None:
    unknown = (job.file.parent / "in" / "unknown.pdf").read_bytes()
    errors: list[Exception] = []
    for program in (Sandbox.program, ("-c", "raise SystemExit('broken')")):
        with Sandbox(RenderPlan.of_job(job).read_settings()) as sandbox:
            sandbox.program = program
            with pytest.raises(PipelineError) as caught:
                sandbox.open(unknown)
        errors.append(caught.value)
    assert [type(error) for error in errors] == [DocumentError, RunError]
    assert not any(SECRET in "".join(traceback.format_exception(error)) + repr(pickle.loads(pickle.dumps(error))) for error in errors)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
def test_other_users_do_not_see_the_secret_of_a_renderer(job: Job) -> None:
    with Sandbox(RenderPlan.of_job(job).read_settings()) as sandbox:
        sandbox.open((job.file.parent / "in" / "known.pdf").read_bytes())
        assert sandbox.child is not None
        shown = [Path(f"/proc/{sandbox.child.pid}/cmdline").read_bytes()]
        with suppress(PermissionError):  # root alone may read it
            shown.append(Path(f"/proc/{sandbox.child.pid}/environ").read_bytes())
    assert SECRET in os.environ.values()
    assert not any(SECRET.encode() in text for text in shown)
