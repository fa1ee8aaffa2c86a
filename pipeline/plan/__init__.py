"""Plan of a run: what a job would read, ask and cost, found out without asking anything.

job -> survey.measure_documents() -> estimate.estimate_run() -> figures for a terminal or as JSON
"""
