"""Benchmarks, one file a question; run them from the repository's root.

Each prints a table, or one JSON record a line with ``--json``. The harness is `sparsify.bench`.
"""
