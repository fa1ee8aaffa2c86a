"""Plot of a review: the shares of errors that are left when the least certain values are reviewed, as a PNG."""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import JobError
from pipeline.score.evaluation import EvaluationResult


def plot_reviews(found: EvaluationResult, file: Path) -> None:
    """Write the curve of all documents and of each group. Raises JobError where there is none, or the file cannot be written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves = {"all": found["scores"], **found["groups"]}
    shown = {name: group["certainty"]["review"] for name, group in curves.items() if group["certainty"] and group["certainty"]["errors"]}
    if not shown:
        raise JobError("there is nothing to plot: no wrong value has log-probabilities in the ledger", file, "--plot")
    figure = Figure(figsize=(7, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, rows in shown.items():
        points = [(100 * row["reviewed"], 100 * (row["share_of_errors_left"] or 0.0)) for row in rows]
        axes.plot(*zip(*points, strict=True), label=name)
    axes.plot([0, 100], [100, 0], color="grey", linestyle=":", label="at random")
    axes.set(xlabel="least certain values reviewed (%)", ylabel="errors left (%)", xlim=(0, 100), ylim=(0, 100))
    axes.legend()
    try:
        figure.savefig(file, format="png", dpi=150)
    except OSError as error:
        raise JobError(f"cannot write {file}: {error}", file, "--plot") from None
