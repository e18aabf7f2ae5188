"""What several voices write, side by side on a terminal: a column each, as wide as there is room for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from bake.live.hear import describe_figures
from bake.live.writing import Continuation
from bake.support.text import without_controls

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

NARROWEST = 24  # columns of characters; more voices than fit stand below each other


def show_answers(
    console: Console, prompt: str | None, answers: Iterator[tuple[Continuation, ...]]
) -> tuple[Continuation, ...]:
    """Print answers as they grow, on a terminal; else once they are there. Returns the last of them."""
    from rich.live import Live
    from rich.text import Text

    if prompt is not None:
        console.print(Text(f"> {without_controls(prompt)}", style="bold"))
    last: tuple[Continuation, ...] = ()
    if console.is_terminal:
        with Live(console=console, auto_refresh=False, vertical_overflow="visible") as live:
            for last in answers:
                live.update(tabulate(last, console.width), refresh=True)
    else:
        last = list(answers)[-1]
        for each in last:
            console.print(Text(f"\n{each.voice.name}  ({describe_figures(each)})", style="bold"))
            console.print(Text(without_controls(each.text)), soft_wrap=True)
    console.print()
    return last


def tabulate(answers: Sequence[Continuation], width: int) -> Table:
    """Return the answers as columns; below each other where the terminal is too narrow for that."""
    from rich.table import Table
    from rich.text import Text

    if width < (NARROWEST + 3) * len(answers):
        table = Table.grid(padding=(0, 0, 1, 0))
        for each in answers:
            head = Text(f"{each.voice.name}  {describe_figures(each)}", style="bold")
            table.add_row(Text("\n").join([head, Text(without_controls(each.text))]))
        return table
    table = Table(box=None, expand=True, padding=(0, 2, 0, 0), show_footer=True)
    for each in answers:
        foot = Text(describe_figures(each), style="dim")
        table.add_column(each.voice.name, ratio=1, footer=foot, overflow="fold")
    table.add_row(*(Text(without_controls(each.text)) for each in answers))
    return table
