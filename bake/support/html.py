"""What a notebook shows of a result: a heading, sentences and a small table, everything escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape


def show(
    title: str,
    header: Sequence[str] = (),
    rows: Sequence[Sequence[str]] = (),
    notes: Sequence[str] = (),
) -> str:
    """Return HTML for `_repr_html_`: a title, a table, and a line below it for every note."""
    parts = [f"<p><b>{escape(title)}</b></p>"]
    if rows:
        parts += [
            "<table><thead><tr>",
            *(f"<th>{escape(cell)}</th>" for cell in header),
            "</tr></thead><tbody>",
            *(
                "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
                for row in rows
            ),
            "</tbody></table>",
        ]
    parts += [f"<p>{escape(note)}</p>" for note in notes if note]
    return "".join(parts)
