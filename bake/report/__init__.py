"""What a person reads on the terminal: tables and summaries of the values that the stages returned."""

from bake.report.ablations import describe_ablated
from bake.report.architectures import describe_anatomy, describe_entries, describe_totals
from bake.report.bakes import (
    describe_equivalence,
    describe_estimate,
    describe_export,
    describe_proven,
)
from bake.report.directions import (
    describe_direction,
    describe_norms,
    describe_reading,
    describe_set,
    describe_sets,
)
from bake.support.tables import format_table

__all__ = [
    "describe_ablated",
    "describe_anatomy",
    "describe_direction",
    "describe_entries",
    "describe_equivalence",
    "describe_estimate",
    "describe_export",
    "describe_norms",
    "describe_proven",
    "describe_reading",
    "describe_set",
    "describe_sets",
    "describe_totals",
    "format_table",
]
