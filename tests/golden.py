"""The golden file of every architecture: how entries become its rows. Run as a script, it is rewritten."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from pathlib import Path

from bake.anatomy.catalogue import CatalogueEntry, examine_all

GOLDEN = Path(__file__).parent / "data" / "architectures.csv"
COLUMNS = ("model_type", "site", "route", "kind", "slots", "flags", "layers", "reason")


def rows_of(entries: Iterable[CatalogueEntry]) -> list[tuple[str, ...]]:
    """Return one row a route, and one a refused site."""
    rows: list[tuple[str, ...]] = []
    for entry in entries:
        place = (entry.model_type, entry.site)
        found = entry.routes
        rows += [
            (
                *place,
                route.route,
                route.kind,
                " ".join(route.slots),
                " ".join(route.flags),
                route.layers,
                "",
            )
            for route in found
        ]
        if not found:
            rows.append((*place, "none", "", "", "", "", shorten(entry.refusal or "")))
    return rows


def shorten(reason: str) -> str:
    """Return the start of a reason; measured errors, which differ between processors, are left out."""
    return re.sub(r"\d\.\d(e[+-]\d+)", "…", reason)[:160]


def read_golden() -> list[tuple[str, ...]]:
    with GOLDEN.open(encoding="utf-8", newline="") as file:
        header, *rows = map(tuple, csv.reader(file))
    assert header == COLUMNS
    return rows


def write_golden(rows: Iterable[tuple[str, ...]]) -> None:
    with GOLDEN.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(rows)


if __name__ == "__main__":
    write_golden(rows_of(entry for entries in examine_all() for entry in entries))
