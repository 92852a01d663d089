"""Benchmarks: `python -m benchmarks [groups ...] [--quick] [--output DIR] [--resume]`.

Each group is one file of this folder with the same name, with a table of its rows in
`TABLES` and the rows themselves in `cases`. A row measures everything that it compares
side by side, so both sides of a ratio ran at the same time on the same machine.
"""
