"""Storage: the name of a folder or of a prefix in an object store comes in, and its contents are listed, read and written by name.
This file imports nothing, because `job` needs `location` and must not load fsspec.
"""
