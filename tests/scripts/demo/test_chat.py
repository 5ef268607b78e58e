"""The conversation in the terminal, without a server."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

pytest.importorskip("openai")

from scripts.demo.chat import Conversation, questions
from scripts.demo.figures import Figures
from scripts.demo.serving import Answer, Refused


class Server:
    """Answers with the number of messages; refuses more than ``limit`` of them."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.asked: list[list[str]] = []

    def answer(self, messages: list[dict[str, str]]) -> Answer:
        if len(messages) > self.limit:
            raise Refused("too long")
        self.asked.append([message["content"] for message in messages])
        return Answer(f"a{len(self.asked)}", False, Figures(1, 1.0, 1, 0, 0.0, 0.0))


def test_what_was_said_is_remembered() -> None:
    server = Server(limit=9)
    conversation = Conversation(server.answer)
    for question in ("q1", "q2"):
        conversation.ask(question)
    assert server.asked == [["q1"], ["q1", "a1", "q2"]]


def test_the_oldest_is_forgotten_where_the_context_is_full() -> None:
    server = Server(limit=3)
    conversation = Conversation(server.answer)
    for question in ("q1", "q2", "q3"):
        conversation.ask(question)
    assert server.asked[-1] == ["q2", "a2", "q3"]


def test_a_question_that_is_too_long_alone_is_refused_and_forgotten() -> None:
    server = Server(limit=9)
    conversation = Conversation(server.answer)
    conversation.ask("q1")
    server.limit = 0
    with pytest.raises(Refused):
        conversation.ask("q2")
    server.limit = 9
    conversation.ask("q3")
    assert server.asked[-1] == ["q1", "a1", "q3"]


@pytest.mark.parametrize("end", ["/exit\nafterwards\n", ""])
def test_questions_end_and_empty_lines_are_none(
    end: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(f"one\n\n  two [b]\n{end}"))
    assert list(questions(Console())) == ["one", "two [b]"]
    assert "> one\n" in capsys.readouterr().out
