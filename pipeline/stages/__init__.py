"""Batch-shaped steps without Ray: documents come in, requests, answers and records go out.

The only place where an exception becomes a failure in a row: one document that cannot be read, one page that cannot be drawn, one
request that cannot be answered costs itself and nothing else.
"""
