"""hivemind, of which we use a part, stays whole for others in the same process."""

import subprocess
import sys

CODE = """
import os, sys, swarm.dht.node
assert 'hivemind.optim' not in sys.modules and 'scipy' not in sys.modules
for theirs in (
    'import hivemind', 'from hivemind.optim import Optimizer', 'from hivemind import *'
):
    if not (child := os.fork()):
        exec(theirs)
        import hivemind
        assert hivemind.DHT is hivemind.dht.DHT and hivemind.__version__
        assert hivemind.Optimizer.__module__ == 'hivemind.optim.optimizer'
        assert not hasattr(hivemind, 'nothing')
        sys.exit()
    assert os.waitpid(child, 0)[1] == 0, theirs
"""


def test_who_imports_us_and_then_hivemind_gets_all_of_it() -> None:
    """However they do it; each way in a fork of a process that has imported only us."""
    subprocess.run([sys.executable, "-c", CODE], check=True)
