"""Who only looks into the DHT does without torch, and can have it later all the same."""

import subprocess
import sys


def test_the_dht_is_imported_without_torch_which_may_come_later() -> None:
    code = (
        "import sys\n"
        "from swarm.dht.lean import without_torch\n"
        "with without_torch():\n"
        "    import swarm.dht.node\n"
        "assert 'torch' not in sys.modules and 'torch.nn' not in sys.modules\n"
        "import torch\n"
        "assert torch.ones(2).sum() == 2\n"
        "with without_torch():\n"
        "    assert sys.modules['torch'] is torch\n"
        "assert sys.modules['torch'] is torch\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
