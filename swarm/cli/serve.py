"""`swarm-server` and `swarm-dht`: run until Ctrl-C or SIGTERM, then leave politely."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path

from swarm.cli.common import (
    ENVIRONMENT,
    INTERRUPTED,
    Parser,
    add_swarm_arguments,
    add_verbose,
    peers_of,
    quick_imports,
    start_logging,
    swarm_key_of,
)
from swarm.errors import UsageError
from swarm.loop import run
from swarm.types import BlockRange

DHT_PORT = 31330

_SERVER_HELP = """\
Serve consecutive blocks of a model to a swarm.

examples:
  swarm-server --blocks 0:20                  start a swarm with the small bundled model
  swarm-server --peers /ip4/.../p2p/Qm...     join one; serve the blocks it needs most
  swarm-server meta-llama/Llama-3.1-8B --blocks 0:16 --device cuda
  swarm-server ./my-model --model-name me/my-model --swarm-key secret.key

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


def server_parser(program: str) -> Parser:
    parser = Parser(program, description=_SERVER_HELP, epilog=ENVIRONMENT)
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="what to serve; default: what the swarm that --peers belong to serves, and without "
        "peers the bundled model",
    )
    parser.add_argument("--model-name", metavar="NAME", help="the name by which others ask for it")
    parser.add_argument("--revision", help="branch, tag or commit of a repo")
    parser.add_argument("--token", help="for gated or private repos (default: HF_TOKEN)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--blocks", type=BlockRange.parse, metavar="A:B", help="serve blocks A to B-1"
    )
    which.add_argument(
        "--num-blocks",
        type=_positive,
        metavar="N",
        help="serve the N blocks that the swarm needs most (default: as many as fit)",
    )
    add_swarm_arguments(parser)
    _add_listening(parser, port=0)
    _add_server_choices(parser)
    add_verbose(parser)
    return parser


def _add_server_choices(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dht-port", type=_port, default=0, help="for the DHT (default: any free)")
    parser.add_argument(
        "--announce-host", metavar="HOST", help="the address to tell others (default: this one's)"
    )
    parser.add_argument("--name", default="", metavar="PUBLICNAME", help="who you are, for others")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="to compute in; auto (the default) takes what others in the swarm compute in, else "
        "float32 on a CPU, and elsewhere what the weights are stored in",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument(
        "--identity", type=Path, metavar="FILE", help="key file that keeps your peer id the same"
    )
    parser.add_argument(
        "--kv-tokens",
        type=_positive,
        default=1 << 16,
        metavar="N",
        help="positions of attention cache for all sessions together (default: %(default)s)",
    )


def dht_parser(program: str) -> Parser:
    parser = Parser(program, description=_DHT_HELP, epilog=ENVIRONMENT)
    add_swarm_arguments(parser)
    _add_listening(parser, port=DHT_PORT)
    folder = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    parser.add_argument(
        "--identity",
        type=Path,
        metavar="FILE",
        default=Path(folder) / "swarm" / "dht.identity",
        help="key file, made if missing (default: %(default)s)",
    )
    add_verbose(parser)
    return parser


def serve(program: str, argv: Sequence[str]) -> int:
    """`swarm-server`."""
    arguments = server_parser(program).parse_args(argv)
    key = swarm_key_of(arguments)
    start_logging(arguments.verbose)
    # From here on it takes seconds: what was typed is right, as far as that can be told cheaply.
    with quick_imports():
        from swarm.config import ServerLimits
        from swarm.server.node import ServerConfig, ServerNode

    config = ServerConfig(
        model=arguments.model,
        model_name=arguments.model_name,
        revision=arguments.revision,
        token=arguments.token,
        blocks=arguments.blocks,
        num_blocks=arguments.num_blocks,
        peers=peers_of(arguments),
        host=arguments.host,
        port=arguments.port,
        dht_port=arguments.dht_port,
        announce_host=arguments.announce_host,
        public_name=arguments.name,
        dtype=arguments.dtype,
        device=arguments.device,
        identity=arguments.identity,
        swarm_key=key,
        limits=ServerLimits(kv_tokens=arguments.kv_tokens),
    )

    async def work(life: _Life) -> None:
        async with ServerNode.running(config) as node:
            life.begin(node.ready_line)
            await node.wait(life.stop)
            await node.drain()

    return _live(work)


def serve_dht(program: str, argv: Sequence[str]) -> int:
    """`swarm-dht`."""
    arguments = dht_parser(program).parse_args(argv)
    key = swarm_key_of(arguments)
    start_logging(arguments.verbose)
    with quick_imports():
        from swarm.dht.addresses import joinable_at, own_host
        from swarm.dht.node import DhtNode
        from swarm.identity import Identity

    async def work(life: _Life) -> None:
        peers, identity = peers_of(arguments), Identity.load_or_create(arguments.identity)
        node = await DhtNode.create(
            identity, peers, host=arguments.host, port=arguments.port, key=key
        )
        try:
            host = own_host(arguments.host, peers)
            life.begin(f"ready peers={','.join(joinable_at(host, await node.visible_addresses()))}")
            await life.stop.wait()
        finally:
            await node.close()

    return _live(work)


class _Life:
    """Until the first Ctrl-C or SIGTERM, which sets `stop`; a second one ends it all at once."""

    def __init__(self, work: Callable[[_Life], Coroutine[None, None, None]]) -> None:
        self.stop = asyncio.Event()
        self._working = asyncio.create_task(work(self))
        self._begun = False
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self._end)

    def begin(self, ready_line: str) -> None:
        """The start is over: tell who waits for it. From now on strangers' doings are logged."""
        ours = logging.getLogger("swarm")
        ours.setLevel(min(ours.level, logging.INFO))
        print(ready_line, flush=True)
        self._begun = True

    async def wait(self) -> None:
        try:
            await self._working
        except asyncio.CancelledError:
            if not self.stop.is_set():
                raise
            os._exit(0)  # a thread may still load what nobody wants any more

    def _end(self) -> None:
        if self.stop.is_set():
            os._exit(INTERRUPTED)  # the DHT's daemon sees our end by itself
        self.stop.set()
        if not self._begun:
            self._working.cancel()


def _live(work: Callable[[_Life], Coroutine[None, None, None]]) -> int:
    async def live() -> int:
        await _Life(work).wait()
        return 0

    return run(live())


def _add_listening(parser: argparse.ArgumentParser, *, port: int) -> None:
    parser.add_argument(
        "--host",
        default="0.0.0.0",  # noqa: S104
        help="IP address to listen on (default: all of this machine's)",
    )
    parser.add_argument(
        "--port",
        type=_port,
        default=port,
        help=f"to listen on (default: {port or 'any free'})",
    )


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65_535:
        raise UsageError(f"'{text}' is not a port; give a number from 1 to 65535, or 0 for any")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 1 << 31:
        raise UsageError(f"'{text}' is not a number of things; give 1 or more")
    return int(text)
