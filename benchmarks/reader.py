"""Reads one stream of an API in a process of its own, and prints when each token was there.

    python -m benchmarks.reader URL MODEL TOKENS

Times are of CLOCK_MONOTONIC, which all processes of a machine share.
"""

from __future__ import annotations

import json
import sys
import time

import httpx


def read(url: str, model: str, tokens: int) -> list[float]:
    body = {"model": model, "prompt": [5, 6, 7], "max_tokens": tokens, "stream": True}
    times: list[float] = []
    # With logprobs, tokens without text have an event, too.
    body |= {"logprobs": 0, "temperature": 0}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=300) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                choice = json.loads(line[6:])["choices"][0]
                if choice["logprobs"]["tokens"]:
                    times.append(time.monotonic())
    return times


if __name__ == "__main__":
    print(json.dumps(read(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
