"""Version of this package, and the name under which it is installed."""

__version__ = "0.1.0"
DISTRIBUTION = "pipeline-documents"
"""The package and the command are called `pipeline`; on PyPI that name belongs to another project."""
