"""Options are declared once: commands, recipes and functions have the same, with the same defaults."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from bake import api
from bake.anatomy.routes import ROUTES
from bake.cli.main import COMMANDS
from bake.cli.reference import render
from bake.directions.extract import METHODS
from bake.directions.fit import METHODS as FITTED_METHODS
from bake.io.copy import SHARDS
from bake.options.export import EXPORT
from bake.options.shared import SITES
from bake.options.sweep import SWEEP
from bake.options.tune import TUNE
from bake.pipeline.recipe import Recipe
from bake.plan.dtypes import FLOAT_DTYPES
from bake.sites import SITES as ALL_SITES
from bake.strength.coefficients import LAWS
from bake.strength.norms import STATISTICS
from bake.sweeps.measured_law import MEASURED_LAW
from bake.sweeps.options import TrialOptions
from bake.tuning.options import TuneOptions

DECLARED = {command.name: command for command, _ in COMMANDS}
FUNCTIONS = {
    "export": api.export,
    "sweep": api.sweep,
    "tune": api.tune,
    "calibrate": api.calibrate,
    "direction": api.extract_direction,
    "direction convert": api.convert_direction,
    "direction show": api.show_direction,
    "publish": api.publish,
    "detect": api.detect,
    "diff": api.diff,
    "reproduce": api.reproduce,
    "rescale": api.rescale,
    "undo": api.undo,
}
# What the command line alone has, and keywords that have another name in Python.
ALONE = {"export": {"recipe", "estimate"}}
RENAMED = {
    "direction convert": {"file": "direction", "direction_site": "site"},
    "direction show": {"file": "direction", "direction_site": "site"},
}


def declared(name):
    """{keyword: default} of a command."""
    renamed = RENAMED.get(name, {})
    return {
        option.parameter or renamed.get(option.name, option.name): (
            False if option.kind is bool else option.default
        )
        for option in DECLARED[name].options
        if option.name not in ALONE.get(name, ())
    }


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_has_its_commands_options(name):
    parameters = inspect.signature(FUNCTIONS[name]).parameters
    wanted = declared(name)
    assert set(parameters) == set(wanted)
    for keyword, parameter in parameters.items():
        if parameter.default is not inspect.Parameter.empty and wanted[keyword] is not None:
            assert parameter.default == wanted[keyword], keyword


@pytest.mark.parametrize("function", [*FUNCTIONS.values(), api.estimate, api.verify, api.inspect])
def test_a_docstring_has_one_line_a_parameter(function):
    head, lines = inspect.getdoc(function).split("\n\nArgs:\n")
    assert head
    names = [line.strip().partition(": ")[0] for line in lines.splitlines()]
    assert names == list(inspect.signature(function).parameters)


def test_a_line_has_the_help_and_the_default():
    (line,) = (line for line in api.export.__doc__.splitlines() if line.startswith("    band: "))
    assert EXPORT["band"].help in line
    assert "40:90" in line


def test_an_estimate_has_the_options_of_an_export():
    assert list(inspect.signature(api.estimate).parameters) == list(
        inspect.signature(api.export).parameters
    )


@pytest.mark.parametrize(
    ("name", "kind"), [("export", Recipe), ("sweep", TrialOptions), ("tune", TuneOptions)]
)
def test_what_a_stage_is_given_has_the_declared_defaults(name, kind):
    wanted = declared(name)
    held = {field.name: field.default for field in fields(kind) if field.name != "added"}
    assert held.keys() == wanted.keys()
    for key, default in held.items():
        if default is not MISSING and key != "direction":
            assert default == wanted[key], key


def test_choices_are_those_of_the_stages():
    for option, choices in (
        (EXPORT["site"], ("auto", *ALL_SITES)),
        (EXPORT["direction_site"], ALL_SITES),
        (EXPORT["route"], ROUTES),
        (EXPORT["law"], (*LAWS, MEASURED_LAW)),
        (TUNE["site"], ALL_SITES),
        (TUNE["method"], FITTED_METHODS),
        (EXPORT["method"], METHODS),
        (EXPORT["shards"], SHARDS),
        (EXPORT["dtype"], FLOAT_DTYPES),
        (EXPORT["statistic"], STATISTICS),
        (SWEEP["site"], SITES),
    ):
        assert tuple(option.choices) == tuple(choices), option.name


def test_the_reference_page_is_what_the_declarations_say():
    page = Path(__file__).parents[2] / "docs" / "reference.md"
    assert page.read_text(encoding="utf-8") == render(), "run make docs"
