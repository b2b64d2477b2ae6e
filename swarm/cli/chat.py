"""`swarm chat`: a prompt, and what the swarm makes of it, over one inference session."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from swarm.cli.common import (
    Parser,
    add_json,
    add_model,
    joining_parser,
    need_peers,
    parse_joining,
    quick_imports,
    whole,
)
from swarm.cli.screen import plain
from swarm.errors import UsageError

_HELP = """\
Talk to a model that a swarm serves. Without a chat template the model goes on with your text.

examples:
  swarm chat --peers /ip4/.../p2p/Qm...
  swarm chat meta-llama/Llama-3.1-8B-Instruct --tokens 400 --temperature 0.7
  echo "Once upon a time" | swarm chat --json      an object for each line that is said

Volunteers' machines see what you say: docs/running/privacy.md.
Ctrl-C ends an answer; Ctrl-D, or Ctrl-C at the prompt, the conversation.
"""


def chat_parser() -> Parser:
    parser = joining_parser("swarm chat", _HELP)
    add_model(parser, "folder or Hugging Face repo (default: what the swarm serves)")
    parser.add_argument(
        "--tokens",
        type=whole(1, 1 << 20),
        metavar="N",
        default=200,
        help="at most, for one answer (default: %(default)s)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        default=0.8,
        help="0 takes the likeliest word (default: %(default)s)",
    )
    add_json(parser)
    return parser


def chat(argv: Sequence[str]) -> int:
    arguments = parse_joining(chat_parser(), argv)
    peers, key, model = need_peers(arguments.peers), arguments.swarm_key, arguments.model
    if model is None:
        from swarm.cli.status import survey

        if not (views := survey(peers, key, None)):
            raise UsageError(
                "this swarm serves no model yet: start a server with `swarm-server MODEL`"
            )
        model = views[0].model.name
    with quick_imports():
        from transformers import AutoTokenizer

        from swarm.client.model import AutoDistributedModelForCausalLM
        from swarm.models.checkpoint import Checkpoint
    source = {
        "name": arguments.model_name,
        "revision": arguments.revision,
        "token": arguments.token,
    }
    folder = Checkpoint.open(model, **source).fetch_tokenizer()
    remote = AutoDistributedModelForCausalLM.from_pretrained(model, peers, swarm_key=key, **source)
    conversation = _Conversation(remote, AutoTokenizer.from_pretrained(folder), arguments)
    view = cast(Any, remote).remote_blocks.connection.router.view
    if missing := ", ".join(map(str, view.missing_blocks())):
        print(f"nobody serves blocks {missing} now: answers wait for that", file=sys.stderr)
    if not arguments.json:
        print(f"{plain(model)}: say something (Ctrl-D ends)")
    with cast(Any, remote).inference_session() as session:
        while conversation.turn(session):
            pass
    return 0


@dataclass(frozen=True, slots=True)
class _Answer:
    """What `--json` tells of one, and the terminal in a line of its own."""

    text: str
    tokens: int
    seconds: float
    servers: tuple[str, ...]  # their addresses, in the order of the blocks
    lost: tuple[str, ...]  # causes, for each server that was replaced meanwhile

    def as_object(self) -> dict[str, object]:
        return {
            "text": self.text,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 4),
            "servers": list(self.servers),
            "lost": list(self.lost),
        }

    def __str__(self) -> str:
        words = [f"{self.tokens} tokens", f"{self.tokens / self.seconds:.1f} a second"]
        words.append(f"{len(self.servers)} servers" if len(self.servers) > 1 else "one server")
        words += [f"one was replaced ({cause})" for cause in self.lost]
        return f"({', '.join(words)})"


class _Conversation:
    def __init__(self, model: Any, tokenizer: Any, arguments: Any) -> None:
        from transformers import TextStreamer

        self._heard = heard = list[int]()
        self._json = as_json = arguments.json

        class Screen(TextStreamer):
            """Shows an answer as it comes, and remembers its ids in case it is interrupted."""

            def put(self, value: Any) -> None:
                if not self.next_tokens_are_prompt:
                    heard.extend(value.tolist())
                super().put(value)

            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                if not as_json:  # what volunteers computed may be anything
                    print(plain(text, len(text), lines=True), end="", flush=True)
                    print(end="\n" if stream_end else "")

        self._screen = Screen(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._model, self._tokenizer = model, tokenizer
        self._messages: list[dict[str, str]] = []
        self._options: dict[str, Any] = {
            "max_new_tokens": arguments.tokens,
            "do_sample": arguments.temperature > 0,
            "streamer": self._screen,
        }
        if arguments.temperature > 0:
            self._options["temperature"] = arguments.temperature

    def turn(self, session: Any) -> bool:
        """One line and its answer; False when the conversation is over."""
        import torch

        try:
            line = input("" if self._json else "> ")
        except (EOFError, KeyboardInterrupt):
            print(end="" if self._json else "\n")
            return False
        if not line.strip():
            return True
        ids = self._ids(line, session)
        self._heard.clear()
        before, begin = len(session.log), time.perf_counter()
        try:
            self._model.generate(ids, session=session, **self._options)
        except KeyboardInterrupt:
            self._screen.end()
            session.output_ids = torch.cat([ids, torch.tensor([self._heard], dtype=ids.dtype)], 1)
        answer = self._tokenizer.decode(self._heard, skip_special_tokens=True)
        self._messages.append({"role": "assistant", "content": answer})
        self._tell(answer, time.perf_counter() - begin, session, session.log[before:])
        return True

    def _tell(self, text: str, seconds: float, session: Any, recoveries: Any) -> None:
        servers = tuple(str(hop.endpoint) for hop in session.hops)
        lost = tuple(str(loss.cause) for recovery in recoveries for loss in recovery.losses)
        answer = _Answer(text, len(self._heard), seconds, servers, lost)
        if self._json:
            print(json.dumps(answer.as_object()), flush=True)
        elif sys.stdout.isatty():
            print(f"\x1b[2m{answer}\x1b[0m")

    def _ids(self, line: str, session: Any) -> Any:
        """The whole conversation as ids [1, T]; the session is rolled back to where they agree."""
        import torch

        known = session.output_ids
        if self._tokenizer.chat_template is None:
            ids = self._tokenizer(
                line, return_tensors="pt", add_special_tokens=known is None
            ).input_ids
            return ids if known is None else torch.cat([known, ids], dim=1)
        self._messages.append({"role": "user", "content": line})
        ids = self._tokenizer.apply_chat_template(
            self._messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        if known is not None:
            length = min(known.shape[1], ids.shape[1])
            same = (known[0, :length] == ids[0, :length]).long().cumprod(0).sum()
            session.position = min(int(same), session.position)
        return ids
