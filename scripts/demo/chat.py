"""`make demo-chat`: talk to the demo's model in the terminal; /exit, Ctrl-D or Ctrl-C ends it.

After each answer one line says what it cost. The model, its store and logs are those of the
demo, and are made if they are not there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.text import Text

from scripts.demo.model import BuildError
from scripts.demo.serving import Answer, Refused, ask, serve
from scripts.demo.terminal import model_of, parser_of, plain, wait
from scripts.demo_model import DemoModelError
from scripts.harness.options import end_on_sigterm
from scripts.harness.server import ServerDied

EXIT = "/exit"
MAX_TOKENS = 200

Messages = list[dict[str, str]]
Asking = Callable[[Messages], Answer]


class Conversation:
    """What was said so far; forgets its beginning where the server's context is full."""

    def __init__(self, asking: Asking) -> None:
        self._asking = asking
        self._messages: Messages = []

    def ask(self, question: str) -> Answer:
        """The answer, which is remembered.

        Raises:
            Refused: the question alone is too long; the conversation is as before.
        """
        asked = [*self._messages, {"role": "user", "content": question}]
        while True:
            try:
                answer = self._asking(asked)
                break
            except Refused:
                if len(asked) == 1:
                    raise
                asked = asked[2:]
        self._messages = [*asked, {"role": "assistant", "content": answer.text}]
        return answer


def questions(console: Console) -> Iterator[str]:
    """What is typed, until the end; what is piped in is shown, as nobody saw it typed."""
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            console.print()
            return
        if not sys.stdin.isatty():
            plain(console, line)
        if line == EXIT:
            return
        if line:
            yield line


def chat(args: argparse.Namespace, console: Console) -> None:
    """See the module's docstring."""

    def show(piece: str) -> None:
        console.print(Text(piece), end="", soft_wrap=True)

    model = model_of(args, console)
    with serve(model, args.mode) as server:
        wait(server, console, args.mode)
        plain(console, f"Ask it something; {EXIT}, Ctrl-D or Ctrl-C ends the conversation.")
        conversation = Conversation(lambda said: ask(server, said, MAX_TOKENS, show))
        for question in questions(console):
            try:
                answer = conversation.ask(question)
            except Refused as error:
                plain(console, f"The server refused that: {error}")
                continue
            console.print(" ..." if answer.was_cut else "")
            console.print(Text(answer.figures.line(), style="dim"))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = parser_of(__doc__)
    parser.add_argument("--mode", default="trace", help="of the cache (default: trace)")
    args = parser.parse_args(argv)
    end_on_sigterm()
    console = Console()
    try:
        chat(args, console)
    except KeyboardInterrupt:
        console.print()
    except (BuildError, DemoModelError, ServerDied, TimeoutError) as error:
        print(f"demo-chat: {error}", file=sys.stderr)
        return 1
    console.print("Server stopped.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
