"""Benchmarks run one at a time, in pytest's own process."""


def pytest_xdist_auto_num_workers() -> int:
    """What ``-n auto``, pyproject.toml's choice for the tests, means here."""
    return 0
