"""`swarm-api`: the HTTP API that OpenAI's clients speak, and the chat page."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from swarm.cli.common import (
    Parser,
    joining_parser,
    memory,
    need_peers,
    own_names,
    parse_joining,
    quick_imports,
    whole,
)
from swarm.errors import UsageError

_HELP = """\
Serve a swarm's models to whatever speaks OpenAI's API, and to people: the page at / is a chat.

examples:
  swarm-api --peers /ip4/.../p2p/Qm...          its model, on http://127.0.0.1:8000
  swarm-api Qwen/Qwen3-8B --host 0.0.0.0 --keys keys.toml
  curl http://127.0.0.1:8000/v1/models

Without keys whoever reaches the port may use it: give some before you listen on more than
127.0.0.1. docs/api.md has the format of the file, and what is supported.
"""


def api_parser() -> Parser:
    parser = joining_parser("swarm-api", _HELP)
    parser.add_argument(
        "models",
        nargs="*",
        metavar="MODEL",
        help="folders or Hugging Face repos (default: the one that most servers have)",
    )
    parser.add_argument("--revision", help="branch, tag or commit of a repo")
    parser.add_argument("--token", help="for gated or private repos (default: HF_TOKEN)")
    where = parser.add_argument_group("who may ask")
    where.add_argument("--host", default="127.0.0.1", help="to listen on (default: %(default)s)")
    where.add_argument(
        "--port",
        type=whole(0, 65_535),
        metavar="N",
        default=8000,
        help="to listen on; 0 takes any free one (default: %(default)s)",
    )
    where.add_argument(
        "--keys", type=Path, metavar="FILE", help="TOML: the keys that may ask, and their limits"
    )
    where.add_argument(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help="one more key; better in a file, as others on this machine can read command lines",
    )
    where.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name by which a proxy in front calls us; without keys only this machine's own are "
        "answered on 127.0.0.1",
    )
    where.add_argument(
        "--cors",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="a web site whose pages may ask, such as https://chat.example (default: none)",
    )
    _add_limits(parser)
    return parser


def _add_limits(parser: Parser) -> None:
    limits = parser.add_argument_group("limits")
    for name, most, default, what in (
        ("streams", 4096, 128, "texts that are written at a time"),
        ("queue", 4096, 128, "requests of one key that may wait for their turn"),
        ("patience", 3600, 30, "seconds that one may wait before it is told 429"),
        ("max-tokens", 1 << 20, 4096, "in one answer"),
    ):
        limits.add_argument(
            f"--{name}",
            type=whole(1, most),
            metavar="N",
            default=default,
            help=f"{what} (default: %(default)s)",
        )
    limits.add_argument(
        "--max-request",
        type=memory,
        metavar="SIZE",
        default=memory("2MiB"),
        help="of a request (default: 2MiB)",
    )


def api(argv: Sequence[str]) -> int:
    arguments = parse_joining(api_parser(), argv)
    peers = need_peers(arguments.peers)
    from swarm.api.keys import Keyring, read_grants

    grants = read_grants(arguments.keys, arguments.api_key)
    names = arguments.models or [_most_served(peers, arguments.swarm_key)]
    with quick_imports():
        from swarm.api.app import Api, ApiConfig
        from swarm.listening import serve
        from swarm.loop import run
    engines = {engine.name: engine for engine in (_engine(n, peers, arguments) for n in names)}
    hosts = None if grants else own_names(arguments.host, arguments.allow_host)
    config = ApiConfig(
        streams=arguments.streams,
        waiting=arguments.queue,
        patience=arguments.patience,
        body_bytes=arguments.max_request,
        cors=arguments.cors,
        hosts=hosts,
    )
    if hosts is None and not grants:
        logging.getLogger(__name__).warning(
            "there are no keys: whoever reaches %s may use this API; see --keys", arguments.host
        )
    app = Api(engines, Keyring(grants), config).app
    run(serve(app, arguments.host, arguments.port, lambda line: print(line, flush=True)))
    return 0


def _most_served(peers: Sequence[str], key: Any) -> str:
    """The name of the model that most servers have. Raises UsageError."""
    from swarm.cli.status import survey

    if not (views := survey(peers, key, None)):
        raise UsageError("this swarm serves no model yet: start a server with `swarm-server MODEL`")
    return views[0].model.name


def _engine(name: str, peers: Sequence[str], arguments: Any) -> Any:
    from swarm.api.engine import engine_of
    from swarm.client.model import AutoDistributedModelForCausalLM
    from swarm.models.checkpoint import Checkpoint

    source = {"revision": arguments.revision, "token": arguments.token}
    checkpoint = Checkpoint.open(name, **source)
    model = AutoDistributedModelForCausalLM.from_pretrained(
        name, peers, swarm_key=arguments.swarm_key, **source
    )
    return engine_of(checkpoint.name, model, checkpoint.fetch_tokenizer(), arguments.max_tokens)
