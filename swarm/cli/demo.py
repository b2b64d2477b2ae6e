"""`swarm demo`: a swarm on this machine writes a text, and loses a server in mid-sentence."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib import import_module
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING, Any, cast

from swarm.cli import INTERRUPTED
from swarm.cli.common import (
    Parser,
    add_json,
    add_verbose,
    quick_imports,
    start_logging,
    whole,
)
from swarm.cli.screen import plain
from swarm.errors import SwarmError, UsageError
from swarm.local import LocalServer, LocalSwarm
from swarm.models.demo import DEMO_MODEL, DEMO_NAME

if TYPE_CHECKING:
    from rich.console import Console

_HELP = """\
See a swarm survive: several server processes on this machine hold the blocks of the small bundled
model, text streams out of it, one server is killed (SIGKILL) in mid-sentence, another takes its
place, and at the end the text is compared with that of the same model in one piece.

examples:
  swarm demo
  swarm demo --prompt "It was a dark night" --tokens 120 --seed 7
  swarm demo --monitor --keep                 watch it in a browser, and leave it running
  swarm demo --json                           one object at the end, instead of the show

The exit status is 1 if the texts are not identical.
"""

# Two servers hold the middle: one of them will be killed. A process more costs 3 s to start here.
_SPANS = ("0:8", "8:16", "8:16", "16:24")
_PROMPT = "And it came to pass in those days, that"
_MOST_PROMPT = 500  # bytes, each a token at most; the model takes 2,048 with those that it writes
_SAMPLING = {"do_sample": True, "temperature": 0.7, "top_p": 0.9}


def demo_parser() -> Parser:
    parser = Parser("swarm demo", _HELP)
    parser.add_argument(
        "--prompt", metavar="TEXT", default=_PROMPT, help="what the text begins with"
    )
    parser.add_argument(
        "--tokens",
        type=whole(4, 1500),
        metavar="N",
        default=96,
        help="how many to write (default: 96)",
    )
    parser.add_argument(
        "--seed",
        type=whole(0, 1 << 31),
        metavar="N",
        default=0,
        help="of the sampling (default: 0)",
    )
    parser.add_argument("--keep", action="store_true", help="leave the swarm running at the end")
    parser.add_argument(
        "--monitor", action="store_true", help="show the swarm in a browser, too: prints the link"
    )
    add_json(parser)
    add_verbose(parser)
    return parser


def demo(argv: Sequence[str]) -> int:
    arguments = demo_parser().parse_args(argv)
    if len(arguments.prompt.encode()) > _MOST_PROMPT:
        raise UsageError(f"--prompt is too long for the small model: at most {_MOST_PROMPT} bytes")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # processes share few cores: this one as well
    start_logging(arguments.verbose, quiet=logging.ERROR)  # the failure is part of the show
    from rich.console import Console

    console = Console(highlight=False, quiet=arguments.json)
    show, count = _Show(console), len(_SPANS)
    local = LocalSwarm(spans=_SPANS, dtype="float32")
    importing = threading.Thread(target=_import, name="swarm-import", daemon=True)
    importing.start()
    began = time.monotonic()
    try:
        with ExitStack() as stack:
            show.line(f"starting {count + 1} processes")
            with console.status("they load"):
                swarm = stack.enter_context(local)
                importing.join()
            seconds = time.monotonic() - began
            show.line(f"{count} servers of {DEMO_NAME} are up, each a process ({seconds:.1f} s)")
            if arguments.monitor:
                link = stack.enter_context(_monitor(swarm))
                show.line(f"watch it at {link}", "bold cyan")
            result = _perform(swarm, show, arguments)
            if arguments.json:
                print(json.dumps({**result, "start_seconds": seconds}), flush=True)
            if arguments.keep:
                _keep(swarm, show)
    except SwarmError:
        importing.join()  # torch aborts a process that ends while it loads
        raise
    except KeyboardInterrupt:  # the swarm is closed; torch must not be disturbed while it loads
        os._exit(INTERRUPTED)
    return 0 if result["identical"] else 1


@contextmanager
def _monitor(swarm: LocalSwarm) -> Generator[str]:
    """`swarm-monitor` in a process of its own, which ends with us; its address."""
    command = [sys.executable, "-P", "-m", "swarm", "monitor", "--port", "0", "--history", ""]
    with subprocess.Popen(
        command,
        env=swarm.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,  # Ctrl-C is ours to answer
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not (found := re.search(r"http://\S+", line)):
                raise SwarmError("swarm-monitor does not start; try it by itself")
            yield found[0]
        finally:
            process.kill()


def _import() -> None:
    """What the client needs; it takes as long as the servers' start."""
    with quick_imports():
        import_module("transformers.models.llama.modeling_llama")
        import_module("swarm.client.model")


def _perform(swarm: LocalSwarm, show: _Show, arguments: Any) -> dict[str, Any]:
    """Write, kill, compare. What `--json` tells."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    from swarm.client.model import AutoDistributedModelForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    ids = tokenizer(arguments.prompt or tokenizer.bos_token, return_tensors="pt").input_ids
    count = arguments.tokens
    options: dict[str, Any] = {**_SAMPLING, "min_new_tokens": count, "max_new_tokens": count}

    remote = cast(Any, AutoDistributedModelForCausalLM.from_pretrained(None, swarm.peers))
    with remote.inference_session(max_length=ids.shape[1] + count) as session:
        stage = _Stage(swarm, session, show, tokenizer.decode, kill_at=count // 2)
        before = len(ids[0])
        torch.manual_seed(arguments.seed)
        output = remote.generate(ids, session=session, streamer=stage, **options)
        show.route("route after", after := _route(swarm, session))
    disable_progress_bar()
    local = cast(Any, AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32))
    torch.manual_seed(arguments.seed)
    identical = torch.equal(output, local.generate(ids, **options))
    show.line(f"pause: {stage.pause_ms:.0f} ms (other tokens: {stage.token_ms:.1f} ms each)")
    show.line(
        f"identical: {'yes' if identical else 'NO'} "
        f"({count} tokens, against the model in one piece)",
        "bold green" if identical else "bold red",
    )
    return {
        "identical": identical,
        "text": tokenizer.decode(output[0, before:]),
        "tokens": count,
        "pause_ms": stage.pause_ms,
        "token_ms": stage.token_ms,
        "route": [{"blocks": blocks, "address": server.address} for blocks, server in after],
    }


def _keep(swarm: LocalSwarm, show: _Show) -> None:
    with suppress(KeyboardInterrupt):
        show.line("the swarm stays up until Ctrl-C; in another terminal:")
        for command in (f"export SWARM_PEERS={swarm.peers[0]}", "swarm status", "swarm chat"):
            show.line(f"  {command}", "cyan")
        threading.Event().wait()


_Hop = tuple[str, LocalServer]  # its blocks, who serves them


def _route(swarm: LocalSwarm, session: Any) -> list[_Hop]:
    servers = {server.peer_id: server for server in swarm.servers}
    return [(str(hop.blocks), servers[hop.peer_id]) for hop in session.hops]


class _Stage:
    """A streamer for `generate`: shows each token, and kills a server after `kill_at` of them."""

    def __init__(
        self,
        swarm: LocalSwarm,
        session: Any,
        show: _Show,
        decode: Callable[[Sequence[int]], str],
        kill_at: int,
    ) -> None:
        self._swarm, self._session, self._show = swarm, session, show
        self._decode, self._kill_at = decode, kill_at
        self._ids: list[int] = []
        self._shown = ""
        self._times: list[float] = []

    def put(self, value: Any) -> None:
        """The prompt first, then every token, as generate calls it."""
        first = not self._ids
        self._ids += value.flatten().tolist()
        if first:
            return
        self._times.append(time.perf_counter())
        if len(self._times) == 1:
            self._show.route("route", _route(self._swarm, self._session))
        text = self._decode(self._ids)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # else a character is not complete yet
            self._show.text(plain(text[len(self._shown) :], len(text), lines=True))
            self._shown = text
        if len(self._times) == self._kill_at:
            self._kill()

    def end(self) -> None:
        """Nothing to do: the next line of the show ends the text."""

    @property
    def pause_ms(self) -> float:
        """From the token before the kill to the one after it."""
        return 1e3 * (self._times[self._kill_at] - self._times[self._kill_at - 1])

    @property
    def token_ms(self) -> float:
        """The median of the other tokens."""
        gaps = [1e3 * (b - a) for a, b in pairwise(self._times)]
        del gaps[self._kill_at - 1]
        return median(gaps)

    def _kill(self) -> None:
        blocks, server = _route(self._swarm, self._session)[1]
        what = f"server {server.index} (blocks {blocks}, process {server.pid}) is killed"
        self._show.line(what, "bold white on red")
        self._swarm.kill(server.index)


class _Show:
    """What is seen: lines, and a text that breaks between words; colours on a terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._column = 0  # of the text

    def line(self, line: str, style: str = "") -> None:
        """On a line of its own, also in the middle of a text."""
        if self._column:
            self._console.print()
            self._column = 0
        self._console.print(line, style=style, soft_wrap=True)

    def route(self, title: str, hops: Sequence[_Hop]) -> None:
        for blocks, server in hops:
            where = f"(process {server.pid}, {server.address})"
            self.line(f"{title}: blocks {blocks} on server {server.index} {where}", "cyan")

    def text(self, piece: str) -> None:
        for word in re.findall(r"\s*\S+|\s+", piece):
            if self._column + len(word) >= self._console.width and word[0].isspace():
                self._console.print()
                self._column = 0
            word = word if self._column else word.lstrip()
            self._console.out(word, end="", highlight=False)
            self._column = len(word.rpartition("\n")[2]) + (0 if "\n" in word else self._column)
