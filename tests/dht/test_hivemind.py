"""hivemind, of which we use a part, stays whole for others in the same process."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "theirs", ["import hivemind", "from hivemind.optim import Optimizer", "from hivemind import *"]
)
def test_who_imports_us_and_then_hivemind_gets_all_of_it(theirs: str) -> None:
    code = (
        "import sys, swarm.dht.node\n"
        "assert 'hivemind.optim' not in sys.modules and 'scipy' not in sys.modules\n"
        f"{theirs}\n"
        "import hivemind\n"
        "assert hivemind.DHT is hivemind.dht.DHT and hivemind.__version__\n"
        "assert hivemind.Optimizer.__module__ == 'hivemind.optim.optimizer'\n"
        "assert not hasattr(hivemind, 'nothing')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
