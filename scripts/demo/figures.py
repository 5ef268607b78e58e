"""What answers cost, from two scrapes of ``/metrics`` and a clock."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields

from rich.table import Table


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one answer, or of several.

    Attributes:
        tokens: generated.
        seconds: from the question to the last token.
        hits, misses: experts that were needed, and were cached or not.
        read_bytes: of experts, waited for or read ahead.
        stall_seconds: in which layers waited for reads.
    """

    tokens: int
    seconds: float
    hits: float
    misses: float
    read_bytes: float
    stall_seconds: float

    @classmethod
    def between(
        cls,
        before: Mapping[str, float],
        after: Mapping[str, float],
        *,
        tokens: int,
        seconds: float,
    ) -> Figures:
        """From samples by name (``Server.metrics``) before and after the answer."""

        def change(counter: str) -> float:
            name = f"vllm:moe_offload_{counter}_total"
            return after[name] - before[name]

        return cls(
            tokens,
            seconds,
            change("hits"),
            change("misses"),
            change("read_bytes"),
            change("stall_seconds"),
        )

    @classmethod
    def total(cls, parts: Iterable[Figures]) -> Figures:
        """Of several answers that came one after the other."""
        rows = list(parts)
        return cls(*(sum(getattr(row, field.name) for row in rows) for field in fields(cls)))

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens per second, reading the prompt included."""
        return self.tokens / self.seconds

    @property
    def hit_rate(self) -> float:
        """Share of needed experts that were cached; 1 if none was needed."""
        needed = self.hits + self.misses
        return self.hits / needed if needed else 1.0

    @property
    def stall_share(self) -> float:
        """Share of the time that was waited for reads."""
        return self.stall_seconds / self.seconds

    def line(self) -> str:
        """All of it for people, in one line."""
        return (
            f"{self.tokens} tokens, {self.tokens_per_s:.1f} tokens/s, {self.hit_rate:.0%} hits, "
            f"{self.read_bytes / 1e9:.1f} GB read, waited {self.stall_share:.0%} of the time"
        )


def table(columns: Mapping[str, Figures]) -> Table:
    """Figures side by side, one column for each mode."""
    shown = Table()
    shown.add_column("")
    for mode in columns:
        shown.add_column(mode, justify="right")
    rows: dict[str, Callable[[Figures], str]] = {
        "tokens/s": lambda f: f"{f.tokens_per_s:.1f}",
        "needed experts that were cached (hit rate)": lambda f: f"{f.hit_rate:.1%}",
        "read from disk": lambda f: f"{f.read_bytes / 1e9:.1f} GB",
        "share of the time waited for reads": lambda f: f"{f.stall_share:.1%}",
    }
    for name, cell in rows.items():
        shown.add_row(name, *(cell(figures) for figures in columns.values()))
    return shown
