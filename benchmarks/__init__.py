"""Benchmarks: ``python -m benchmarks`` (end to end), ``pytest benchmarks`` (each operation against eager)."""
