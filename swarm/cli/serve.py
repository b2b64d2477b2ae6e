"""`swarm-server` and `swarm-dht`: run until Ctrl-C or SIGTERM, then leave politely."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import re
import signal
import threading
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from pathlib import Path

from swarm.cli import INTERRUPTED
from swarm.cli.common import (
    Parser,
    add_model,
    joining_parser,
    memory,
    parse_joining,
    quick_imports,
    read_peers,
    whole,
)
from swarm.loop import WORK_THREAD, run
from swarm.types import BlockRange

DHT_PORT = 31330
_MOST_TOKENS = 1e9  # per second, that a record may tell

_SERVER_HELP = """\
Serve consecutive blocks of a model to a swarm.

examples:
  swarm-server --blocks 0:20                  start a swarm with the small bundled model
  swarm-server --peers /ip4/.../p2p/Qm...     join one; serve the blocks it needs most
  swarm-server meta-llama/Llama-3.1-8B --blocks 0:16 --device cuda
  swarm-server ./my-model --model-name me/my-model --swarm-key secret.key
  swarm-server Qwen/Qwen3-8B --adapters poet=./my-adapter me/another-adapter

MODEL is a folder with safetensors weights or a Hugging Face repo id (OWNER/NAME); only the files
that hold the blocks are fetched. When the server can serve, it prints one line:
  ready model=NAME blocks=A:B address=HOST:PORT peers=ADDR[,ADDR...]
Others join through those peers. Ctrl-C leaves politely; a second Ctrl-C at once.
"""

_DHT_HELP = """\
Run a bootstrap node: a fixed address through which servers and clients find each other.

examples:
  swarm-dht --host 0.0.0.0                    prints: ready peers=ADDR[,ADDR...]
  swarm-dht --peers /ip4/.../p2p/Qm...        a second one for the same swarm

Its address stays the same from start to start, as its identity file and its port do.
"""


def server_parser() -> Parser:
    parser = joining_parser("swarm-server", _SERVER_HELP)
    add_model(
        parser,
        "what to serve; default: what the swarm that --peers belong to serves, and without "
        "peers the bundled model",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--blocks", type=BlockRange.parse, metavar="A:B", help="serve blocks A to B-1"
    )
    which.add_argument(
        "--num-blocks",
        type=whole(1, 1 << 20),
        metavar="N",
        help="serve the N blocks that the swarm needs most (default: as many as fit)",
    )
    _add_adapters(parser)
    _add_balancing(parser)
    _add_listening(parser, port=0)
    _add_metrics(parser)
    parser.add_argument(
        "--dht-port",
        type=whole(0, 65_535),
        metavar="N",
        default=0,
        help="for the DHT (default: any free)",
    )
    parser.add_argument(
        "--announce-host",
        type=_host,
        metavar="HOST",
        help="the address to tell others (default: this one's)",
    )
    parser.add_argument(
        "--name", dest="public_name", default="", metavar="WHO", help="who you are, for others"
    )
    _add_computing(parser)
    parser.add_argument(
        "--identity", type=Path, metavar="FILE", help="key file that keeps your peer id the same"
    )
    return parser


def _add_computing(parser: Parser) -> None:
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="to compute in; auto (the default) takes what others in the swarm compute in, else "
        "float32 on a CPU, and elsewhere what the weights are stored in",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument(
        "--compile",
        default="auto",
        choices=["auto", "on", "off"],
        help="auto (the default) runs steps as torch's tracer recorded them on a CPU, and replays "
        "decode steps as CUDA graphs, where a trial at start shows that it is exact and, for "
        "graphs, pays; on tries torch.compile, too, which can take minutes; off none of these",
    )
    parser.add_argument(
        "--kv-memory",
        dest="kv_bytes",
        type=memory,
        metavar="SIZE",
        help="for the keys and values of all sessions together, such as 2GB or 512MiB (default: a "
        "quarter of what is free beside the weights, on a GPU 70 %%)",
    )


def _add_adapters(parser: Parser) -> None:
    parser.add_argument(
        "--adapters",
        nargs="+",
        type=_adapter,
        default=(),
        metavar="[NAME=]ADAPTER",
        help="LoRA adapters to preload for everybody: folders that PEFT wrote, or repo ids; the "
        "first three are announced (docs/finetuning.md)",
    )
    parser.add_argument(
        "--adapter-memory",
        dest="adapter_bytes",
        type=memory,
        metavar="SIZE",
        help="for adapters and deep prompts that clients bring along (default: 256MiB; one client "
        "has at most half of it)",
    )


def _add_balancing(parser: Parser) -> None:
    group = parser.add_argument_group(
        "staying of use",
        "Without --blocks, a server moves to other blocks when the swarm gains by it. Sessions\n"
        "may leave first, and no block is left that nobody else holds (docs/placement.md).",
    )
    group.add_argument(
        "--balance-quality",
        type=_share,
        metavar="Q",
        default=0.75,
        help="from 0 to 1: move only while the swarm's rarest block carries less than Q of what "
        "all servers could carry if they were spread evenly (default: %(default)s)",
    )
    group.add_argument(
        "--no-rebalance",
        dest="balance_quality",
        action="store_const",
        const=0.0,
        help="stay where it began",
    )
    group.add_argument(
        "--throughput",
        type=_throughput,
        metavar="auto|eval|NUMBER",
        default="auto",
        help="what one block would give here, in tokens/s: auto (the default) measures it once and "
        "remembers, eval measures anew, and a number is believed",
    )


def _add_metrics(parser: Parser) -> None:
    parser.add_argument(
        "--metrics-port",
        type=whole(1, 65_535),
        metavar="N",
        help="show Prometheus metrics at http://HOST:N/metrics, and at /healthz whether it serves",
    )
    parser.add_argument(
        "--metrics-host",
        metavar="HOST",
        default="127.0.0.1",
        help="IP address for that (default: %(default)s, as anybody who reaches it may read it)",
    )


def dht_parser() -> Parser:
    parser = joining_parser("swarm-dht", _DHT_HELP)
    _add_listening(parser, port=DHT_PORT)
    folder = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    parser.add_argument(
        "--identity",
        type=Path,
        metavar="FILE",
        default=Path(folder) / "swarm" / "dht.identity",
        help="key file, made if missing (default: %(default)s)",
    )
    return parser


def _add_listening(parser: Parser, *, port: int) -> None:
    parser.add_argument(
        "--host",
        default="0.0.0.0",  # noqa: S104
        help="IP address to listen on (default: all of this machine's)",
    )
    parser.add_argument(
        "--port",
        type=whole(0, 65_535),
        metavar="N",
        default=port,
        help=f"to listen on (default: {port or 'any free'})",
    )


def _adapter(text: str) -> str:
    if not text.rpartition("=")[2]:
        raise argparse.ArgumentTypeError(f"'{text}' names no folder and no repo")
    return text


def _share(text: str) -> float:
    with suppress(ValueError):
        if 0 <= (share := float(text)) <= 1:
            return share
    raise argparse.ArgumentTypeError(f"'{text}' is no number from 0 to 1, such as 0.75")


def _throughput(text: str) -> float | str:
    if text in ("auto", "eval"):
        return text
    with suppress(ValueError):
        if 0 < (speed := float(text)) <= _MOST_TOKENS:
            return speed
    raise argparse.ArgumentTypeError(f"'{text}' is neither auto nor eval nor a number of tokens/s")


def _host(text: str) -> str:
    if not re.fullmatch(r"[\w.:-]{1,56}", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"'{text}' is neither an IP address nor a name")
    return text


def serve(argv: Sequence[str]) -> int:
    """`swarm-server`."""
    asked = vars(parse_joining(server_parser(), argv))
    # From here on it takes seconds: what was typed is right, as far as that can be told cheaply.
    with quick_imports():
        from swarm.config import ServerLimits
        from swarm.server.choice import ServerConfig
        from swarm.server.node import ServerNode

    del asked["verbose"], asked["log_format"]
    sizes = {name: asked.pop(name) for name in ("kv_bytes", "adapter_bytes")}
    limits = ServerLimits(**{name: size for name, size in sizes.items() if size is not None})
    peers, adapters = read_peers(asked.pop("peers")), tuple(asked.pop("adapters"))
    config = ServerConfig(peers=peers, limits=limits, adapters=adapters, **asked)

    async def work(life: _Life) -> None:
        async with ServerNode.running(config) as node:
            life.begin(node.ready_line)
            await node.wait(life.stop)
            await node.drain()
        if any(thread.name == WORK_THREAD for thread in threading.enumerate()):
            os._exit(0)  # it loads for a move that will not be, and torch would abort

    return _live(work)


def serve_dht(argv: Sequence[str]) -> int:
    """`swarm-dht`."""
    arguments = parse_joining(dht_parser(), argv)
    from swarm.dht.addresses import joinable_at, own_host
    from swarm.dht.lean import without_torch
    from swarm.identity import Identity

    with without_torch():
        from swarm.dht.node import DhtNode

    peers, host, key = read_peers(arguments.peers), arguments.host, arguments.swarm_key

    async def work(life: _Life) -> None:
        identity = Identity.load_or_create(arguments.identity)
        node = await DhtNode.create(identity, peers, host=host, port=arguments.port, key=key)
        try:
            addresses = joinable_at(own_host(host, peers), await node.visible_addresses())
            life.begin(f"ready peers={','.join(addresses)}")
            await life.stop.wait()
        finally:
            await node.close()

    return _live(work)


class _Life:
    """Until the first Ctrl-C or SIGTERM, which sets `stop`; a second one ends it all at once.

    While the start is not over, the first one cancels it.
    """

    def __init__(self) -> None:
        self.stop = asyncio.Event()
        self._starting = asyncio.current_task()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self._end)

    def begin(self, ready_line: str) -> None:
        """The start is over: tell who waits for it. From now on strangers' doings are logged."""
        self._starting = None
        ours = logging.getLogger("swarm")
        ours.setLevel(min(ours.level, logging.INFO))
        print(ready_line, flush=True)

    def _end(self) -> None:
        if self.stop.is_set():
            os._exit(INTERRUPTED)  # the DHT's daemon sees our end by itself
        self.stop.set()
        if self._starting is not None:
            self._starting.cancel()


def _live(work: Callable[[_Life], Coroutine[None, None, None]]) -> int:
    async def live() -> int:
        life = _Life()
        try:
            await work(life)
        except asyncio.CancelledError:
            if not life.stop.is_set():
                raise
            os._exit(0)  # a thread may still load what nobody wants any more
        return 0

    return run(live())
