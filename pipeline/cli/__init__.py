"""Command line: the program `pipeline`, its commands, and the supervised process that those run in which start Ray.

A command is a file of this folder: its options, and what it prints. Messages go to stderr, data (`--json`) to stdout. Each command imports
what it needs when it runs: `pipeline --help` loads neither Ray nor torch.
"""

from __future__ import annotations

import os
import sys

import click

from pipeline.cli.check import check_command, preview_command
from pipeline.cli.compare import compare_command
from pipeline.cli.console import detach_streams, erase_line, print_message
from pipeline.cli.eval import eval_command
from pipeline.cli.exit_codes import CommandError, CommandGroup, ErrorKind
from pipeline.cli.export import export_command
from pipeline.cli.init import init_command
from pipeline.cli.plan import plan_command
from pipeline.cli.review import review_command
from pipeline.cli.run import run_command, settle_command
from pipeline.cli.status import status_command
from pipeline.cli.submit import submit_command
from pipeline.processes import hide_process
from pipeline.report import ExitCode
from pipeline.scratch import PRIVATE_UMASK
from pipeline.version import __version__


@click.group(cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Turn folders of PDFs and images into typed, validated Parquet with an open vision-language model."""


for command in (
    *(run_command, settle_command, submit_command, check_command, preview_command, plan_command),
    *(status_command, eval_command, compare_command, review_command, export_command, init_command),
):
    main.add_command(command)


def start_program() -> None:
    """The program `pipeline`. What starts Ray runs supervised, so that every way in which it can end has an exit code.

    All files that it and its child processes write are this user's alone.
    """
    os.umask(PRIVATE_UMASK)
    hide_process()  # its environment has keys and passwords; the supervised processes are forked and hidden, too
    sweeps = sys.argv[1:2] == ["eval"] and any(word.startswith("--sweep") for word in sys.argv)
    if sys.argv[1:2] not in (["run"], ["settle"]) and not sweeps:
        main()
        return
    from pipeline.cli.supervisor import run_supervised

    sys.exit(run_supervised(run_main, report_broken_run))


def run_main() -> int:
    """Run the command line in a process in which Ray runs, too, and return the exit code."""
    detach_streams()
    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else bool(end.code)
    return ExitCode.OK


def report_broken_run(how: str) -> int:
    """Say that the process of `run` or `settle` has died, and how, and return the exit code."""
    erase_line()
    word = f"the run's process is gone: {how}; the answers written so far are kept: run the same command again to go on"
    print_message(f"error: {word}")
    if "--json" in sys.argv[1:]:
        CommandError(ErrorKind.RUN, word).print_as_json()
    return ExitCode.RUN_BROKEN
