"""`python -m pipeline.sandbox DESCRIPTOR`: the renderer's process, as `Sandbox` starts it."""

import sys

from pipeline import render
from pipeline.sandbox.child import serve

serve(int(sys.argv[1]), render)
