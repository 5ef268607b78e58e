"""`make demo`: a model that speaks, served with a quarter of its experts cached.

Makes the model (once), serves it with `trace`, asks it questions, prints answers and figures;
then the same with `lru`, and both side by side. Everything lies under demo/.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from scripts.demo.figures import Figures, table
from scripts.demo.model import BuildError, Model
from scripts.demo.serving import Answer, ask, serve
from scripts.demo.terminal import model_of, parser_of, plain, wait
from scripts.demo_model import DemoModelError
from scripts.harness.options import end_on_sigterm
from scripts.harness.server import ServerDied

MODES = ("trace", "lru")
QUESTIONS = (
    "What is the capital of France, and what is it known for?",
    "What is the difference between a planet and a star?",
    "Who was Cleopatra?",
    "How can I sleep better?",
)
MAX_TOKENS = 72
NEXT = """\
Talk to it:       make demo-chat
Your own model:   .venv/bin/vllm-moe-offload plan MODEL --host-memory 64GiB
                  says what fits and prints the line that serves it
Read on:          docs/quickstart.md, then docs/README.md"""


def answers_of(
    model: Model, mode: str, console: Console, *, show: bool
) -> tuple[list[str], Figures]:
    """All answers of a server in this mode, and what they cost together."""
    with serve(model, mode) as server:
        wait(server, console, mode)
        ask(server, [{"role": "user", "content": "Hello"}], 4)  # the first one loads code
        answers = []
        for question in QUESTIONS:
            answer = ask(server, [{"role": "user", "content": question}], MAX_TOKENS)
            answers.append(answer)
            if show:
                _print(console, question, answer)
    return [answer.text for answer in answers], Figures.total(a.figures for a in answers)


def _print(console: Console, question: str, answer: Answer) -> None:
    console.print(Text(question, style="bold"))
    text = answer.text + (" ..." if answer.was_cut else "")
    console.print(Padding(Text(text), (0, 0, 0, 4)))
    console.print(Padding(Text(answer.figures.line(), style="dim"), (0, 0, 1, 4)))


def demo(args: argparse.Namespace, console: Console) -> None:
    """See the module's docstring."""
    began = time.perf_counter()
    model = model_of(args, console)
    texts, figures = {}, {}
    for mode in MODES:
        is_first = mode == MODES[0]
        if not is_first:
            plain(console, f"The same questions with {mode}, for comparison:")
        texts[mode], figures[mode] = answers_of(model, mode, console, show=is_first)
    same = sum(a == b for a, b in zip(*texts.values(), strict=True))
    console.print(table(figures))
    plain(
        console,
        f"{same} of {len(QUESTIONS)} answers are the same with both: what is cached changes the "
        f"time, not the text. All of this took {time.perf_counter() - began:.0f} s.\n",
    )
    console.print("[bold]What to do next[/bold]")
    plain(console, NEXT)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    args = parser_of(__doc__).parse_args(argv)
    end_on_sigterm()
    try:
        demo(args, Console())
    except (BuildError, DemoModelError, ServerDied, TimeoutError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
