"""The two passes of a run on Ray Data: `passes` begins them, everything else is called from there or is an actor.

`run` and `settle` are imported when they are asked for: engine and render actors, which import this package, too, do without.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.flow.passes import run, settle

__all__ = ["run", "settle"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from pipeline.flow import passes

        return getattr(passes, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
