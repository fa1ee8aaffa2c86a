"""Commands become text and exit codes: words on stderr, data on stdout, one sentence for whatever is wrong."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result
from PIL import Image
from ray.job_submission import JobStatus

from pipeline import cli, engines, flow
from pipeline.cli import console, exit_codes
from pipeline.cli.exit_codes import Terminated
from pipeline.cli.run import show_run
from pipeline.cli.submit import follow_submission
from pipeline.errors import DamagedShard, DocumentError, EngineDead, JobError, RunError, SourceError
from pipeline.output import Output
from pipeline.render import sandbox
from pipeline.report import ExitCode, Report
from tests.support.engines import CUT, INVALID, VALID, ScriptedEngine, make_completion
from tests.support.ledger import LedgerWriter
from tests.support.workspace import JOB, SCHEMA, Workspace

COMMANDS = ("run", "settle", "submit", "check", "preview", "plan", "status", "eval", "compare", "review", "export", "init")


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments], catch_exceptions=False)


def shell(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run Python as a process of its own, where nothing can hide what it writes."""
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, cwd=Path(__file__).parents[3])


def refusal(*arguments: str | Path) -> str:
    """Return the one sentence with which a command is refused."""
    result = invoke(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    said, end = result.stderr.split("\n")
    assert (said.startswith("error: "), end) == (True, "")
    return said


def read_error(*arguments: str | Path) -> tuple[int, dict[str, Any]]:
    """Return the exit code and the error of a command with `--json`, whose sentence stands on stderr as it does without."""
    result, plain = invoke(*arguments, "--json"), invoke(*arguments)
    assert (result.stderr, result.exit_code, plain.stdout) == (plain.stderr, plain.exit_code, "")
    found = json.loads(result.stdout)
    assert (set(found), set(found["error"])) == ({"error", "exit_code"}, {"kind", "message", "file", "key"})
    assert found["error"]["message"] in " ".join(result.stderr.split())
    assert found["exit_code"] == result.exit_code
    return result.exit_code, found["error"]


# --- help


def test_help_names_the_commands() -> None:
    said = invoke("--help").stdout
    assert [name for name in COMMANDS if re.search(rf"^  {name} ", said, re.MULTILINE)] == list(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    result = invoke(command, "--help")
    assert (result.exit_code, result.stdout.startswith(f"Usage: main {command} ")) == (0, True)


WRONG_LINES = ["", "jump", "run", "run job.yaml --limit 0", "preview job.yaml a.pdf --page 0", "status", "submit job.yaml"]
WRONG_LINES += [f"submit --address http://127.0.0.1:1 {rest}" for rest in ("", "job.yaml --stop a", "--attach a --stop a")]


@pytest.mark.parametrize("line", WRONG_LINES)
def test_a_wrong_command_line_is_exit_code_2(line: str) -> None:
    result = invoke(*line.split())
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Usage: " in result.stderr


WRONG_OPTIONS = {
    **{f"{command} --jump": "--jump" for command in COMMANDS},
    "run job.yaml --limit 0": "--limit",
    "preview job.yaml a.pdf --page 0": "--page",
    "submit job.yaml": "--address",
    "init": None,
    "eval out": "--truth",
    "compare out": None,
    "export out --to parquet": "--to",
    "compare a b --max-drop 1": None,
    "jump": None,
    "status": None,
    "submit --address http://127.0.0.1:1": None,
}
"""Command lines, and the option that their usage error is about."""


@pytest.mark.parametrize("line", WRONG_OPTIONS)
def test_a_usage_error_is_json_too(line: str) -> None:
    code, error = read_error(*line.split())
    assert (code, error["kind"], error["file"], error["key"]) == (2, "usage", None, WRONG_OPTIONS[line])


# --- what is refused before anything starts


WRONG: dict[str, tuple[Callable[[Workspace], Any], list[str], str]] = {
    "no job": (lambda workspace: workspace.file.unlink(), [], r"cannot read the job file .*job\.yaml: No such file"),
    "no YAML": (lambda workspace: workspace.file.write_text("name: ["), [], r"job\.yaml is not valid YAML"),
    "unknown key": (
        lambda workspace: workspace.file.write_text(JOB + "modle: {}\n"),
        [],
        r"job\.yaml:7: unknown key modle; did you mean 'model'\?",
    ),
    "unknown key set": (lambda workspace: None, ["--set", "model.engin=x"], r"unknown key model\.engin; did you mean 'engine'\?"),
    "wrong engine": (lambda workspace: None, ["--set", "model.engine=nope"], r"model\.engine: should be 'auto', .*, found 'nope'"),
    "no schema": (lambda workspace: (workspace.folder / "schema.json").unlink(), [], r"schema\.json cannot be read: No such file"),
    "misspelt keyword": (lambda workspace: spoil(workspace, {"minimun": 0}), [], r"minimun"),
    "impossible keyword": (lambda workspace: spoil(workspace, {"$dynamicRef": "#x"}), [], r"'\$dynamicRef' .* not supported"),
    "failing rule": (
        lambda workspace: None,
        ["--set", "extract.rules=[{name: r, expression: total + 1 > 0.0, message: m}]"],
        r"the rule r fails on a record with all values: Unsupported operation: float \+ int",
    ),
    "no source": (lambda workspace: None, ["--set", "source.paths=[gone]"], r"source 'gone' does not exist"),
    "no files": (lambda workspace: (workspace.inputs / "a.pdf").unlink(), [], r"source 'in' holds no files"),
    "no password": (lambda workspace: None, ["--set", "source.password_env=NOT_SET_HERE"], r"variable NOT_SET_HERE, which is not set"),
    "a job server": (
        lambda workspace: None,
        ["--address", "http://head:8265"],
        r"ray\.address: an http\(s\) address is a cluster's job server",
    ),
    "a Ray Client address": (
        lambda workspace: None,
        ["--address", "ray://127.0.0.1:10001"],
        r"ray\.address: a cluster cannot be joined by ray://; `pipeline submit --address http://HEAD:8265` starts a run on it",
    ),
    "no checkpoint": (lambda workspace: None, ["--set", "model.name=./gone"], r"holds no checkpoint"),
}


def spoil(workspace: Workspace, keyword: dict[str, Any]) -> None:
    """Give a property of the schema one more keyword."""
    (workspace.folder / "schema.json").write_text(
        json.dumps(SCHEMA | {"properties": {"total": {"type": "number"} | keyword}, "required": []})
    )


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_job_is_refused_and_nothing_is_started(workspace: Workspace, case: str) -> None:
    spoiled, arguments, sentence = WRONG[case]
    workspace.put("a.pdf")
    spoiled(workspace)
    assert re.search(sentence, refusal("run", workspace.file, *arguments))
    assert not (workspace.folder / "out").exists()


FILES_AND_KEYS = {
    "no job": ("job", "job.yaml", None),
    "no YAML": ("job", "job.yaml", None),
    "unknown key": ("job", "job.yaml", "modle"),
    "unknown key set": ("job", "job.yaml", "model.engin"),
    "no schema": ("job", "schema.json", "extract.schema"),
    "no source": ("source", "job.yaml", "source.paths"),
    "no files": ("source", "job.yaml", "source.paths"),
    "no password": ("job", "job.yaml", "source.password_env"),
    "a Ray Client address": ("job", "job.yaml", "ray.address"),
    "no checkpoint": ("job", "job.yaml", "model.name"),
}
"""The error of some of these jobs as JSON: its kind, its file in the workspace and its key."""


@pytest.mark.parametrize("case", FILES_AND_KEYS)
def test_a_wrong_job_is_json_that_names_file_and_key(workspace: Workspace, case: str) -> None:
    spoiled, arguments, _ = WRONG[case]
    workspace.put("a.pdf")
    spoiled(workspace)
    kind, file, key = FILES_AND_KEYS[case]
    code, error = read_error("run", workspace.file, *arguments)
    assert (code, error["kind"], error["file"], error["key"]) == (2, kind, str(workspace.folder / file), key)


REFUSED: dict[str, tuple[list[str], str, str | None, str | None]] = {
    "run": (["{0}/job.yaml", "--retry", "later"], "job", None, "--retry"),
    "settle": (["{0}/job.yaml"], "job", "job.yaml", "output.path"),
    "submit": (["{0}/job.yaml", "--address", "head:8265"], "job", None, "--address"),
    "check": (["{0}/gone.yaml"], "job", "gone.yaml", None),
    "preview": (["{0}/job.yaml", "{0}/gone.pdf"], "job", "gone.pdf", None),
    "plan": (["{0}/gone.yaml"], "job", "gone.yaml", None),
    "status": (["{0}/in"], "job", "in", None),
    "eval": (["{0}/in", "--truth", "{0}/truth.csv"], "job", "in", None),
    "compare": (["{0}/in", "{0}/in"], "job", "in", None),
    "review": (["{0}/in"], "job", "in", None),
    "export": (["{0}/in", "--to", "csv"], "job", "in", None),
    "init": (["--sample", "{0}/job.yaml"], "job", "job.yaml/jobs", "--sample"),
}
"""What each command refuses: its arguments, and the kind, the file in the workspace and the key of its error."""


@pytest.mark.parametrize("command", REFUSED)
def test_every_command_refuses_in_json(workspace: Workspace, command: str) -> None:
    arguments, kind, file, key = REFUSED[command]
    workspace.put("a.pdf")
    code, error = read_error(command, *(argument.format(workspace.folder) for argument in arguments))
    assert (code, error["kind"], error["file"], error["key"]) == (2, kind, file and str(workspace.folder / file), key)


def test_every_command_has_a_case() -> None:
    assert [*REFUSED] == [*COMMANDS] == [*cli.main.commands]


def test_a_file_name_that_is_not_utf_8_is_escaped(workspace: Workspace) -> None:
    found = json.loads(invoke("check", workspace.folder / "gone\udc80.yaml", "--json").stdout)
    assert found["error"]["file"] == f"{workspace.folder}/gone\udc80.yaml"


def test_a_file_that_is_no_document_is_json(workspace: Workspace) -> None:
    code, error = read_error("preview", workspace.file, workspace.put("a.pdf", b"Dear Sir"), "--no-answer")
    assert (code, error["kind"], error["key"]) == (1, "document", None)


ALONE = {
    "no source": (["--set", "source.paths=[gone]"], "source 'gone' does not exist (looked for {0}/gone)"),
    "no cluster": (["--address", "127.0.0.1:1"], "nothing answers at 127.0.0.1:1: Connection refused"),
}
"""What is refused in a process of its own, in which no other test has started Ray: option and sentence."""


@pytest.mark.parametrize(("arguments", "sentence"), ALONE.values(), ids=ALONE)
def test_a_refusal_is_one_line_for_the_shell_too(workspace: Workspace, arguments: list[str], sentence: str) -> None:
    workspace.put("a.pdf")
    ended = shell("-m", "pipeline.cli", "run", workspace.file, *arguments)
    assert (ended.returncode, ended.stdout) == (2, "")
    phases, _, line = ended.stderr.rstrip("\n").rpartition("\n")
    assert line == f"error: {sentence.format(workspace.folder)}"
    assert not [phase for phase in phases.splitlines() if not phase.startswith("listing ")]


def test_settling_a_job_that_never_ran_is_refused(workspace: Workspace) -> None:
    assert "there is nothing to settle in" in refusal("settle", workspace.file)
    assert not (workspace.folder / "out").exists()


# --- check


def test_check_shows_prompt_and_columns(workspace: Workspace) -> None:
    result = invoke("check", workspace.file)
    assert (result.exit_code, result.stderr) == (0, "")
    for line in ("  name: slips", "  - total (number or null)", "  total: decimal128(18, 2)", "  _status: string"):
        assert f"\n{line}\n" in result.stdout
    assert f"\nfingerprint: {workspace.job().fingerprint}\n" in result.stdout


def test_check_says_what_an_a4_page_costs_the_jobs_model(workspace: Workspace) -> None:
    assert "\nan A4 page: 840×1176 px, 101.1 dpi, 1,260 visual tokens of 28×28 px (as the checkpoint's image processor says)\n" in (
        invoke("check", workspace.file).stdout
    )
    hub = ("--set", "model.name=Qwen/Qwen3-VL-8B-Instruct", "--json")
    unknown, told = (json.loads(invoke("check", workspace.file, *hub, *more).stdout) for more in ((), ("--set", "model.cell_px=32")))
    assert (unknown["a4_page"]["cell_px"], unknown["a4_page"]["cell_px_from"]) == (28, "assumed")
    assert (told["a4_page"]["visual_tokens"], told["a4_page"]["cell_px_from"]) == (962, "job")


def test_check_says_what_reading_again_costs_and_in_what_places_are_counted(workspace: Workspace) -> None:
    def check(*settings: str) -> str:
        return invoke("check", workspace.file, *(word for one in settings for word in ("--set", one))).stdout

    line = "located and read again by the model: 2 to 7 more requests each time; places in"
    assert line not in check()
    assert f"{line} pixels of a page (as models of this family do)" in check("evidence.model=on")
    told = check("evidence.model=on", "model.box_units=thousandths")
    assert f"{line} thousandths of a page (as model.box_units says)" in told
    guessed = check("evidence.model=on", "model.name=Qwen/Qwen2.5-VL-7B-Instruct-AWQ")
    assert f"{line} pixels of a page (by the model's name; model.box_units says it)" in guessed


def test_check_says_which_engine_this_machine_has(workspace: Workspace) -> None:
    assert "\nengine on this machine: transformers (" in invoke("check", workspace.file).stdout


def test_check_says_what_is_narrowed_and_what_the_grammar_leaves_out(workspace: Workspace) -> None:
    spoil(workspace, {"not": {"const": 7}})
    said = invoke("check", workspace.file).stdout
    assert "left to the validator by the grammar:\n  not enforced while decoding: /properties/total/not" in said


def test_check_says_what_this_machine_cannot_keep_renderers_from(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    gaps = json.loads(invoke("check", workspace.file, "--json").stdout)["not_confined"]
    assert gaps == list(sandbox.describe_confinement())
    monkeypatch.setattr(sandbox, "describe_confinement", lambda: ("network: a gap",))
    assert "\nwhat this machine cannot keep renderers from:\n  network: a gap\n" in invoke("check", workspace.file).stdout


def test_the_command_is_hidden_from_other_processes() -> None:
    code = "import ctypes, sys; from pipeline import cli\ntry: cli.start_program()\nfinally: print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))"
    assert shell("-c", code, "--version").stdout.endswith("\n0\n")


def test_check_prints_json_alone(workspace: Workspace) -> None:
    result = invoke("check", workspace.file, "--set", "pages.dpi=150", "--json")
    found = json.loads(result.stdout)
    assert (result.stderr, found["job"]["pages"]["dpi"], found["prompt"]) == ("", 150, workspace.job().system_message)
    assert found["columns"]["currency"].startswith("dictionary")


def test_check_starts_no_run(workspace: Workspace) -> None:
    code = "import sys; from pipeline import cli\ntry: cli.main(['check', sys.argv[1]])\nfinally: print(*sys.modules, file=sys.stderr)"
    ended = shell("-c", code, workspace.file)
    assert not {"ray", "torch", "transformers", "pymupdf"} & set(ended.stderr.split())
    assert ended.returncode == 0
    assert not (workspace.folder / "out").exists()


# --- preview


def test_preview_says_the_size_of_the_png_it_writes(workspace: Workspace) -> None:
    png = workspace.folder / "seen.png"
    result = invoke("preview", workspace.file, workspace.put("a.pdf"), "--no-answer", "--png", png)
    with Image.open(png) as image:
        assert f"{image.width}×{image.height} px, 200.0 dpi, 256 visual tokens" in result.stdout
    assert (result.exit_code, result.stderr) == (0, "")


def test_preview_shows_the_prompt(workspace: Workspace) -> None:
    said = invoke("preview", workspace.file, workspace.put("a.pdf"), "--no-answer").stdout
    assert said.endswith(f"\nprompt:\n{workspace.job().system_message}\n\n[page image]\nReturn the JSON object for this document.\n\n")


def test_preview_prints_json_alone(workspace: Workspace) -> None:
    result = invoke("preview", workspace.file, workspace.put("a.pdf"), "--no-answer", "--json")
    found = json.loads(result.stdout)
    assert (found["page_count"], found["width_px"], found["visual_tokens"], result.stderr) == (1, 448, 256, "")


@pytest.mark.parametrize(
    ("say", "code", "line"),
    [
        (make_completion(VALID), 0, f"answer (300 + 20 tokens, stop):\n{VALID}\n"),
        (make_completion(INVALID), 1, f"{INVALID}\ninvalid: $.total: -1 is less than 0\n"),
        (CUT, 1, "failed: the answer was cut after 20 tokens; raise sampling.max_tokens or lower pages.per_request\n"),
    ],
)
def test_preview_shows_the_answer(workspace: Workspace, monkeypatch: pytest.MonkeyPatch, say: Any, code: int, line: str) -> None:
    monkeypatch.setattr(engines, "load_engine", lambda job: ScriptedEngine(say))
    monkeypatch.setattr(engines, "count_gpus", lambda: 0)
    result = invoke("preview", workspace.file, workspace.put("a.pdf"))
    assert (result.exit_code, result.stderr) == (code, "")
    assert result.stdout.endswith(line)


def test_preview_says_aloud_that_the_demonstration_answers(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "load_engine", lambda job: ScriptedEngine())
    monkeypatch.setattr(engines, "count_gpus", lambda: 0)
    settings = ("--set", "model.name=Qwen/Qwen2.5-VL-7B-Instruct-AWQ", "--set", "model.without_gpu=demo")
    result = invoke("preview", workspace.file, workspace.put("a.pdf"), *settings)
    assert "the DEMONSTRATION MODEL of this package answers instead of Qwen/Qwen2.5-VL-7B-Instruct-AWQ" in result.stderr


def test_preview_of_what_is_no_document_is_exit_code_1(workspace: Workspace) -> None:
    result = invoke("preview", workspace.file, workspace.put("a.pdf", b"Dear Sir"), "--no-answer")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("failed: the content is none of PDF")


# --- status


@pytest.fixture
def output(workspace: Workspace) -> Output:
    made = Output(workspace.folder / "out")
    made.create()
    made.write_job({"job": {"name": "slips"}, "fingerprint": "f", "asked": {}})
    failure = {"stage": "render", "kind": "empty", "message": "no bytes\x1b[2J"}
    row = {"source": "in/[red]a\x1b[31m.pdf", "size_bytes": 0, "version": "1", "page_count": 0}
    with LedgerWriter(made) as ledger:
        ledger.add(row | {"key": "k1", "attempt": 1, "status": "failed", "failure": failure})
    return made


def test_status_is_words(output: Output) -> None:
    result = invoke("status", output.root)
    assert (result.exit_code, result.stdout) == (0, "")
    assert re.search(r"request failures: render/empty +│ 1", result.stderr)
    assert re.search(r"in/\[red\]a\\x1b\[31m\.pdf +│ 1 +│ 0 +│ 1 +│ render/empty", result.stderr)


def test_status_prints_json_alone(output: Output) -> None:
    result = invoke("status", output.root, "--json")
    assert (result.stderr, json.loads(result.stdout)["request_failures"]) == ("", {"render/empty": 1})


def test_status_of_something_else_is_refused(workspace: Workspace) -> None:
    assert "was not written by a run" in refusal("status", workspace.folder)


# --- submit


class FollowedServer:
    """A job server whose run ends as it is told to: a real one needs a cluster, and minutes to be lost (`tests/ray/test_submit.py`)."""

    address = "http://head:8265"

    def __init__(self, end: BaseException | ExitCode) -> None:
        self.end = end

    def follow(self, run: str, write: Callable[[str], object]) -> Any:
        if isinstance(self.end, BaseException):
            raise self.end
        return SimpleNamespace(status=JobStatus.FAILED if self.end else JobStatus.SUCCEEDED, driver_exit_code=int(self.end), message=None)


@pytest.mark.parametrize(
    ("end", "code", "kind", "message"),
    [
        (ExitCode.OK, 0, None, None),
        (ExitCode.DOCUMENTS_FAILED, 1, None, None),
        (ExitCode.JOB_WRONG, 2, "job", "the run on the cluster ended with exit code 2; its log says why"),
        (ExitCode.RUN_BROKEN, 3, "run", "the run on the cluster ended with exit code 3; its log says why"),
        (RunError("it does not answer any more"), 3, "run", "it does not answer any more"),
        (KeyboardInterrupt(), 130, "interrupted", "no longer following; the run goes on"),
        (Terminated(), 143, "terminated", "no longer following; the run goes on"),
    ],
)
def test_who_follows_a_run_has_its_id_beside_the_error(
    capsys: pytest.CaptureFixture[str], end: BaseException | ExitCode, code: int, kind: str | None, message: str | None
) -> None:
    server: Any = FollowedServer(end)
    assert follow_submission(server, "raysubmit_1", None, as_json=True) == code
    found = json.loads(capsys.readouterr().out)
    error = found.pop("error", {})
    assert (found, error.get("kind")) == ({"submission_id": "raysubmit_1", "exit_code": code}, kind)
    assert error.get("message", "").startswith(message or "")


# --- what ends a command


def test_the_end_of_a_run_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report("slips", "/tmp/out", "demo", True, documents=2, records=2, failures={"render/empty": 1})
    assert show_run(lambda _: report, "stopping", as_json=True) is ExitCode.DOCUMENTS_FAILED
    printed = capsys.readouterr()
    assert (json.loads(printed.out), printed.err) == (report.as_dict(), "")


def test_a_run_that_is_interrupted_answers_at_once_and_how_to_go_on(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flow, "run", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    result = invoke("run", workspace.file, "--json")
    stopped = "stopped; the answers so far are kept: run the same command again to go on"
    error = {"kind": "interrupted", "message": stopped, "file": None, "key": None}
    assert (result.exit_code, json.loads(result.stdout)) == (130, {"error": error, "exit_code": 130})
    assert result.stderr.splitlines() == [
        "stopping: the answers so far are being written",
        stopped,
    ]


def ended(act: Callable[[], Any], **given: Any) -> int:
    """Return the exit code of a command that does this, which was given these parameters."""
    with pytest.raises(SystemExit) as error:
        exit_codes.convert_to_exit_code(lambda **_: act())(**given)
    return int(error.value.code or 0)


def fail(error: BaseException) -> Callable[[], Any]:
    def act() -> None:
        raise error

    return act


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (JobError("bad job"), 2, "error: bad job"),
        (SourceError("no files"), 2, "error: no files"),
        (DocumentError("empty", "no bytes"), 1, "failed: no bytes"),
        (RunError("full disk"), 3, "error: full disk"),
        (EngineDead("no GPU"), 3, "error: no GPU"),
        (
            ModuleNotFoundError(name="ray"),
            2,
            "error: the package ray is not installed here: pip install -c constraints.txt . in a copy of this repository",
        ),
        (
            ModuleNotFoundError(name="matplotlib.pyplot"),
            2,
            "error: the package matplotlib.pyplot is not installed here: pip install 'pipeline-documents[eval]'",
        ),
        (KeyboardInterrupt(), 130, "stopped"),
    ],
)
def test_every_end_has_its_code_and_its_sentence(capsys: pytest.CaptureFixture[str], error: BaseException, code: int, said: str) -> None:
    assert ended(fail(error)) == code
    assert capsys.readouterr().err == said + "\n"


@pytest.mark.parametrize(
    ("error", "code", "kind", "file", "key"),
    [
        (JobError("bad job"), 2, "job", None, None),
        (JobError("bad key", key="model.name"), 2, "job", "/the/job.yaml", "model.name"),
        (JobError("bad option", key="--retry"), 2, "job", None, "--retry"),
        (SourceError("no files", "/list.csv"), 2, "source", "/list.csv", None),
        (ModuleNotFoundError(name="ray"), 2, "package", None, None),
        (DocumentError("empty", "no bytes"), 1, "document", None, None),
        (RunError("full disk"), 3, "run", None, None),
        (EngineDead("no GPU"), 3, "run", None, None),
        (DamagedShard("/out/a.parquet", "it is cut"), 3, "run", "/out/a.parquet", None),
        (ZeroDivisionError("division by zero"), 3, "internal", None, None),
        (KeyboardInterrupt(), 130, "interrupted", None, None),
    ],
)
def test_every_error_is_json(
    capsys: pytest.CaptureFixture[str], error: BaseException, code: int, kind: str, file: str | None, key: str | None
) -> None:
    assert ended(fail(error), as_json=True, job_file=Path("/the/job.yaml")) == code
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    message = found["error"].pop("message")
    assert found == {"error": {"kind": kind, "file": file, "key": key}, "exit_code": code}
    assert printed.err.endswith(f"{message}\n")


def test_a_terminated_command_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(lambda: os.kill(os.getpid(), signal.SIGTERM), as_json=True) == 143
    found = json.loads(capsys.readouterr().out)
    assert (found["error"]["kind"], found["exit_code"]) == ("terminated", 143)


def test_a_defect_says_where_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(fail(ZeroDivisionError("division by zero"))) == 3
    said = capsys.readouterr().err
    assert said.startswith("Traceback")
    assert said.endswith("\nerror: ZeroDivisionError: division by zero; this is a defect of the program: please report it\n")


def test_who_reads_only_the_first_lines_is_told_of_no_defect(workspace: Workspace) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "pipeline.cli", "check", workspace.file],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=Path(__file__).parents[3],
    ) as check:  # fmt: skip
        assert check.stdout is not None
        check.stdout.close()
        assert check.stderr is not None
        assert check.stderr.read() == b""


@pytest.mark.parametrize("code", [None, ExitCode.OK, ExitCode.DOCUMENTS_FAILED])
def test_what_a_command_returns_is_its_code(code: ExitCode | None) -> None:
    assert ended(lambda: code) == (code or 0)


def test_a_terminated_command_says_so_though_ray_makes_another_exception_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    def wait() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:
            raise KeyboardInterrupt from None

    assert ended(wait) == 143
    assert capsys.readouterr().err == "stopped\n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_to_the_same_end_does_not_disturb_it(capsys: pytest.CaptureFixture[str], number: int, code: int) -> None:
    def write_what_there_is() -> None:
        try:
            os.kill(os.getpid(), number)
        finally:
            os.kill(os.getpid(), number)
            console.print_message("written")

    assert ended(write_what_there_is) == code
    assert capsys.readouterr().err.startswith("written\n")


def test_a_terminated_command_stops_like_an_interrupted_one() -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert ended(lambda: os.kill(os.getpid(), signal.SIGTERM)) == 143
    assert signal.getsignal(signal.SIGTERM) is before
