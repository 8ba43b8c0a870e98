"""Files of the repository, run by Python in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def printed_by(file: str, *arguments: str, processes: int | None = None, timeout: int = 300) -> str:
    """What a file prints, run as it is or, on so many processes, by torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes else []), str(ROOT / file), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def report_of_ranks(file: str, folder: Path, timeout: int) -> dict[str, float]:
    """By how much ranks differ from one process, by case, as a file of cases writes it."""
    printed_by(file, str(folder), timeout=timeout)
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))
