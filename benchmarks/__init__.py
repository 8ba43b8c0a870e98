"""Benchmarks: ``python -m benchmarks`` (everything), ``pytest benchmarks`` (the same cases, pytest-benchmark)."""
