"""A process beside this one that answers lines with lines: another client, a relay, a baseline."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from benchmarks.figures import NoFigure

ROOT = Path(__file__).parent.parent
_PATIENCE = 10.0  # seconds


class Child:
    """`python -m MODULE ARGUMENTS`; ended when the `with` block ends. Its stderr is ours."""

    def __init__(self, module: str, arguments: Sequence[str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, line: str) -> str:
        """Its answer. Raises NoFigure if it ended instead."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # reading says why
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        return self.read()

    def read(self) -> str:
        assert self.process.stdout is not None
        answer = self.process.stdout.readline()
        if not answer:
            raise NoFigure(f"{self.process.args} ended: {self.process.wait()}")
        return answer.strip()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        """Politely: the end of its input is the end of it, and of what it keeps on the disk."""
        process = self.process
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(BrokenPipeError):  # what it never read is still in the pipe
            process.stdin.close()
        try:
            process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
