"""The baseline for `offload`: transformers with accelerate's disk offload, a process of its own.

python -m benchmarks.offloader MODEL BYTES TOKENS [cold]; every line it reads is a prompt (JSON).
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from benchmarks.lab import Stopwatch, generate


class Forgetful(Stopwatch):
    """Drops the files from the page cache after each token."""

    def __init__(self, files: Iterable[Path]) -> None:
        super().__init__()
        self._files = list(files)

    def put(self, value: object) -> None:
        super().put(value)
        for file in self._files:
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)  # only what is on the disk can be dropped
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def main() -> None:
    path, cap, tokens = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    cold = "cold" in sys.argv[4:]
    process: Any = psutil.Process()
    torch.set_num_threads(1)
    disable_progress_bar()
    set_verbosity_error()
    with tempfile.TemporaryDirectory(prefix="swarm-offload-") as folder:
        model: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype="float32",
            device_map="auto",
            max_memory={"cpu": cap},
            offload_folder=folder,
        ).eval()
        places = {str(place) for place in model.hf_device_map.values()}
        assert places == {"cpu", "disk"}, f"nothing was offloaded: {places}"
        files = [*path.glob("*.safetensors"), *Path(folder).iterdir()] if cold else []
        print("ready", flush=True)
        for line in sys.stdin:
            before = process.io_counters().read_bytes
            watch = Forgetful(files)
            sequences = generate(model, torch.tensor(json.loads(line)), tokens, watch)
            found = {
                "sequences": sequences.tolist(),
                "gaps": watch.gaps,
                "resident": process.memory_info().rss,
                "read": process.io_counters().read_bytes - before,
            }
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
