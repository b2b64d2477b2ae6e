"""`swarm chat`: a prompt, and what the swarm makes of it, over one inference session."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, cast

from swarm.cli.common import (
    add_model,
    joining_parser,
    need_peers,
    parse_joining,
    quick_imports,
    whole,
)
from swarm.errors import UsageError

_HELP = """\
Talk to a model that a swarm serves. Without a chat template the model goes on with your text.

examples:
  swarm chat --peers /ip4/.../p2p/Qm...
  swarm chat meta-llama/Llama-3.1-8B-Instruct --tokens 400 --temperature 0.7

Ctrl-C ends an answer; Ctrl-D, or Ctrl-C at the prompt, the conversation.
"""


def chat(argv: Sequence[str]) -> int:
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
    arguments = parse_joining(parser, argv)
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
    print(f"{model}: say something (Ctrl-D ends)")
    with cast(Any, remote).inference_session() as session:
        while conversation.turn(session):
            pass
    return 0


class _Conversation:
    def __init__(self, model: Any, tokenizer: Any, arguments: Any) -> None:
        from transformers import TextStreamer

        self._heard = heard = list[int]()

        class Screen(TextStreamer):
            """Shows an answer as it comes, and remembers its ids in case it is interrupted."""

            def put(self, value: Any) -> None:
                if not self.next_tokens_are_prompt:
                    heard.extend(value.tolist())
                super().put(value)

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
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return False
        if not line.strip():
            return True
        ids = self._ids(line, session)
        self._heard.clear()
        try:
            self._model.generate(ids, session=session, **self._options)
        except KeyboardInterrupt:
            self._screen.end()
            session.output_ids = torch.cat([ids, torch.tensor([self._heard], dtype=ids.dtype)], 1)
        answer = self._tokenizer.decode(self._heard, skip_special_tokens=True)
        self._messages.append({"role": "assistant", "content": answer})
        return True

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
