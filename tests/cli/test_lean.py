"""What a server does without, and that it is all there when somebody asks for it."""

import subprocess
import sys

import pytest

from swarm.cli import lean

STARTS = """
import sys
from swarm.cli.common import quick_imports

with quick_imports():
    import swarm.server.node

import torch
from swarm.models.checkpoint import Checkpoint
from swarm.models.loading import load_span
from swarm.models.selftest import prove_split
from swarm.server import throughput
from swarm.types import BlockRange

checkpoint = Checkpoint.open(None)
proof, numbers = prove_split(checkpoint.config), throughput.block_parameters(checkpoint.config)
cpu = torch.device("cpu")
span = load_span(checkpoint, BlockRange(0, 1), dtype=torch.float32, device=cpu, proof=proof)
span.store.budget = 1 << 20
assert numbers > 0 and throughput.measure(span, 2, 3) > 0
large = {"sympy", "scipy", "torch._dynamo.eval_frame", "torch.distributed.tensor"}
assert not large & sys.modules.keys(), large & sys.modules.keys()
"""

MULTIPLIES = """
import psutil
from swarm.cli.common import quick_imports
from swarm.server import heap

with quick_imports(models=False):
    import torch

torch.set_num_threads(1)
weight = torch.ops.mkldnn._reorder_linear_weight(torch.ones(1024, 256), None)
held = []
for rows in range(1, 601):
    torch.ops.mkldnn._linear_pointwise(torch.ones(rows, 256), weight, None, "none", [], "")
    if rows in (1, 600):
        heap.give_back(0)
        held.append(psutil.Process().memory_info().rss)
assert held[1] - held[0] < 80 << 20  # 310 MiB if all products are kept
"""

COMPILES = """
from transformers import PreTrainedModel

assert torch.distributed.is_available()
assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)).item() == 2
assert torch._dynamo is sys.modules["torch._dynamo"] and torch._dynamo.eval_frame
marked = PreTrainedModel.can_record_outputs.fget  # by transformers, while it was imported
assert id(marked) in torch._dynamo.trace_rules._allowed_callable_ids
"""


def test_a_server_starts_without_the_compiler_which_may_be_used_later_all_the_same() -> None:
    subprocess.run([sys.executable, "-c", STARTS + COMPILES], check=True)


def test_what_is_compiled_for_many_shapes_is_not_all_kept() -> None:
    subprocess.run([sys.executable, "-c", MULTIPLIES], check=True)


def test_another_torch_than_we_know_is_imported_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def there_is_none(name: str) -> None:
        raise ImportError(name)

    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    monkeypatch.setattr(lean, "import_module", there_is_none)
    lean.defer_compiler()
    assert "torch._dynamo" not in sys.modules
