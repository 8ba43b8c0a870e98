"""``python -m benchmarks host``: calls whose launches are counted and left out."""

from __future__ import annotations

import benchmark_helpers  # noqa: F401
import torch

from benchmarks import compiled, host_time
from fastmask.kernels import _launch


def test_every_call_is_told_with_its_launches(monkeypatch, capsys):
    monkeypatch.setattr(host_time, "WARM_UP", 1)
    monkeypatch.setattr(host_time, "ROUNDS", 1)
    monkeypatch.setattr(host_time, "CALLS_OF_A_ROUND", 1)
    threads, launch = torch.get_num_threads(), _launch.launch
    assert host_time.main() == 0
    assert (torch.get_num_threads(), _launch.launch) == (threads, launch)
    told = capsys.readouterr().out
    for name, call in host_time.calls().items():
        with compiled.recorded(_launch.H100) as launches:
            call()
        (line,) = [line for line in told.splitlines() if line.startswith(f"| {name} |")]
        _, median, least, number = line.strip("| ").split(" | ")
        assert 0 < int(least) <= int(median)
        assert int(number) == len(launches) > 0
