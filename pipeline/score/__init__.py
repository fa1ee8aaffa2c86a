"""Scores of an output: records and their truth in; how many values are right, how sure to be of that, and what two outputs differ in, out.

`evaluation` and `comparison` are what `pipeline eval` and `pipeline compare` print; docs/evaluation.md has the definitions.
"""
