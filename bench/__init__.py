"""Benchmarks: every claim of Kinetiq as a figure that a command measures.

`harness` says what a bench is and runs one, `measure` times and weighs, `figures` holds targets,
`records` keeps what was measured, `report` draws tables, `command` is the command line.
"""
