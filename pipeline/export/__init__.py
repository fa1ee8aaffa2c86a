"""Records for other programs: pandas DataFrames, CSV, JSON lines, Excel workbooks and DuckDB databases.

output folder -> records.RecordTable -> tables (nested, exploded, or one for each array) -> frame or file
"""
