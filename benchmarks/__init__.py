"""Benchmarks: `python -m benchmarks [groups ...] [--quick] [--output DIR] [--resume]`.

Each group is one file of this folder with the same name, with a table of its rows in
`TABLES` and the rows themselves in `cases`. A row measures everything it compares, side
by side, so that each ratio is one of the same moments on the same machine.
"""
