"""`swarm demo`: a swarm on this machine writes a text, and loses a server in mid-sentence."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING, Any, cast

from swarm.cli.common import INTERRUPTED, Parser, add_verbose, quick_imports, start_logging
from swarm.errors import UsageError
from swarm.local import LocalSwarm
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
  swarm demo --keep                           leave the swarm running, to play with

The exit status is 1 if the texts are not identical.
"""

# Two servers hold the middle: one of them will be killed. A process more costs 3 s to start here.
_SPANS = ("0:8", "8:16", "8:16", "16:24")
_PROMPT = "And it came to pass in those days, that"
_SAMPLING = {"do_sample": True, "temperature": 0.7, "top_p": 0.9}


def demo(argv: Sequence[str]) -> int:
    parser = Parser("swarm demo", description=_HELP)
    parser.add_argument("--prompt", default=_PROMPT, help="what the text begins with")
    parser.add_argument("--tokens", type=int, default=96, help="how many to write (default: 96)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default: 0)")
    parser.add_argument("--keep", action="store_true", help="leave the swarm running at the end")
    add_verbose(parser)
    arguments = parser.parse_args(argv)
    if not 4 <= arguments.tokens <= 1500:
        raise UsageError("--tokens is between 4 and 1500, so that there is a middle to kill in")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # processes share few cores: this one as well
    start_logging(arguments.verbose)
    if not arguments.verbose:
        import logging

        logging.getLogger("swarm").setLevel(logging.ERROR)  # the failure is part of the show
    from rich.console import Console

    show = _Show(Console(highlight=False))
    importing = threading.Thread(target=_import, name="swarm-import", daemon=True)
    importing.start()
    began = time.monotonic()
    try:
        with show.starting(len(_SPANS) + 1) as on_ready:
            swarm = LocalSwarm(spans=_SPANS, dtype="float32", on_ready=on_ready).__enter__()
    except KeyboardInterrupt:  # the swarm is closed; torch must not be disturbed while it loads
        os._exit(INTERRUPTED)
    try:
        importing.join()
        seconds = time.monotonic() - began
        show.line(f"{len(_SPANS)} servers of {DEMO_NAME} are up, each a process ({seconds:.1f} s)")
        identical = _perform(swarm, show, arguments)
        if arguments.keep:
            _keep(swarm, show)
    finally:
        swarm.close()
    return 0 if identical else 1


def _import() -> tuple[object, object]:
    """What the client needs; it takes as long as the servers' start."""
    with quick_imports():
        from transformers.models.llama import LlamaForCausalLM

        from swarm.client.model import AutoDistributedModelForCausalLM
    return LlamaForCausalLM, AutoDistributedModelForCausalLM


def _perform(swarm: LocalSwarm, show: _Show, arguments: Any) -> bool:
    """Write, kill, compare. Whether the texts are identical."""
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
        torch.manual_seed(arguments.seed)
        output = remote.generate(ids, session=session, streamer=stage, **options)
        show.route("route after", _route(swarm, session))
    disable_progress_bar()
    local = cast(Any, AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32))
    torch.manual_seed(arguments.seed)
    expected = local.generate(ids, **options)
    show.pause(stage.pause_ms, stage.token_ms)
    identical = torch.equal(output, expected)
    show.verdict(identical, count)
    return identical


def _keep(swarm: LocalSwarm, show: _Show) -> None:
    with suppress(KeyboardInterrupt):
        show.line("the swarm stays up until Ctrl-C; in another terminal:")
        for command in (f"export SWARM_PEERS={swarm.peers[0]}", "swarm status", "swarm chat"):
            show.line(f"  {command}")
        threading.Event().wait()


@dataclass(frozen=True, slots=True)
class _Row:
    """One hop of a route, for people."""

    blocks: str
    server: int
    pid: int
    address: str


def _route(swarm: LocalSwarm, session: Any) -> list[_Row]:
    servers = {server.peer_id: server for server in swarm.servers}
    hops = [(str(hop.blocks), servers[hop.peer_id]) for hop in session.hops]
    return [_Row(blocks, server.index, server.pid, server.address) for blocks, server in hops]


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
        self._prompt_length = 0
        self._shown = ""
        self._times: list[float] = []

    def put(self, value: Any) -> None:
        """The prompt first, then every token, as generate calls it."""
        self._ids += value.flatten().tolist()
        if not self._prompt_length:
            self._prompt_length = len(self._ids)
            return
        self._times.append(time.perf_counter())
        if len(self._times) == 1:
            self._show.route("route", _route(self._swarm, self._session))
        text = self._decode(self._ids)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # else a character is not complete yet
            self._show.text(text[len(self._shown) :])
            self._shown = text
        if len(self._times) == self._kill_at:
            self._kill()

    def end(self) -> None:
        self._show.end_text()

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
        middle = _route(self._swarm, self._session)[1]
        self._show.killed(middle)
        self._swarm.kill(middle.server)


class _Show:
    """What is seen: colours and tables on a terminal, plain lines elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._fancy = console.is_terminal
        self._column = 0
        self._line: list[str] = []  # text that waits for its line's end, off a terminal

    def line(self, text: str) -> None:
        if self._fancy:
            self._console.print(f"[green]●[/] {text}" if text[0] != " " else f"[cyan]{text}[/]")
        else:
            print(text, flush=True)

    @contextmanager
    def starting(self, total: int) -> Generator[Callable[[], None]]:
        """A progress bar; call what it gives each time that one of `total` processes is ready."""
        if not self._fancy:
            print(f"starting {total} processes", flush=True)
            yield lambda: None
            return
        from rich.progress import BarColumn, Progress, SpinnerColumn, TimeElapsedColumn

        columns = (
            SpinnerColumn(),
            "starting {task.total} processes",
            BarColumn(),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self._console, transient=True) as progress:
            task = progress.add_task("", total=total)
            yield lambda: progress.advance(task)

    def route(self, title: str, rows: Sequence[_Row]) -> None:
        if not self._fancy:
            for row in rows:
                print(f"{title}: blocks {row.blocks} on server {row.server}", end=" ")
                print(f"(process {row.pid}, {row.address})", flush=True)
            return
        from rich.table import Table

        table = Table(title=title, title_justify="left", box=None, header_style="dim")
        for name in ("blocks", "server", "process", "address"):
            table.add_column(name)
        for row in rows:
            table.add_row(row.blocks, f"#{row.server}", str(row.pid), row.address)
        self._console.print()
        self._console.print(table)
        self._console.print()

    def text(self, piece: str) -> None:
        """Breaks lines between words."""
        if not self._fancy:
            self._line.append(piece)
            return
        for word in re.findall(r"\s*\S+|\s+", piece):
            if self._column + len(word) >= self._console.width and word[0].isspace():
                self._console.print()
                self._column, word = 0, word.lstrip()
            self._console.out(word, end="", highlight=False)
            self._column = len(word) if "\n" in word else self._column + len(word)

    def end_text(self) -> None:
        if self._fancy:
            self._console.print()
        elif self._line:
            print("text:", "".join(self._line).strip(), flush=True)
        self._column, self._line = 0, []

    def killed(self, row: _Row) -> None:
        what = f"server {row.server} (blocks {row.blocks}, process {row.pid}) is killed"
        if self._fancy:
            self._console.print(f" [bold white on red] ✗ {what} [/] ", end="")
            self._column += len(what) + 6
        else:
            self.end_text()
            print(what, flush=True)

    def pause(self, pause_ms: float, token_ms: float) -> None:
        self.line(f"pause: {pause_ms:.0f} ms (other tokens: {token_ms:.1f} ms each)")

    def verdict(self, identical: bool, count: int) -> None:
        answer = "yes" if identical else "NO"
        if self._fancy:
            answer = f"[bold {'green' if identical else 'red'}]{answer}[/]"
        self.line(f"identical: {answer} ({count} tokens, against the model in one piece)")
