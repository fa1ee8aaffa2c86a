"""`python -m pipeline.cli`: what the command `pipeline` runs."""

from pipeline.cli import start_program

start_program()
