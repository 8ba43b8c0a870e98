"""A whole generation, against x-transformers' own (the baseline), the network's own time shown apart.

``python -m benchmarks --only generate``.
"""

from __future__ import annotations

from benchmarks import end_to_end

BENCHMARK = end_to_end.benchmark("generate")
