"""The house rules are kept: what a test leaves behind, or fetches from outside, makes it fail."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MESSY = """
import random, socket, subprocess, tempfile

def test_process():
    subprocess.Popen(["sleep", "60"], start_new_session=True)

def test_folder():
    tempfile.mkdtemp(prefix="swarm-")

def test_port():
    global server
    server = socket.create_server(("127.0.0.1", 0))

def test_stranger():
    socket.create_connection(("192.0.2.1", 80), timeout=5)

def test_seeds():
    assert random.random() == random.Random(0).random()
"""


def test_a_messy_file_of_tests_fails(tmp_path: Path) -> None:
    (tmp_path / "test_messy.py").write_text(MESSY)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "tests.conftest"]
    options = ["--rootdir", str(tmp_path), "-c", "/dev/null", str(tmp_path)]
    run = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True)
    assert "left behind: process sleep 60; port " in run.stdout
    assert "; path swarm-" in run.stdout
    assert "a test connects to 192.0.2.1" in run.stdout
    assert "1 failed, 4 passed, 1 error" in run.stdout.splitlines()[-1]
    assert run.returncode == 1
