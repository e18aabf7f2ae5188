"""The reference page, from the declarations: `python -m bake.cli.reference > docs/reference.md`."""

from __future__ import annotations

from collections.abc import Iterator

from bake.cli.main import COMMANDS
from bake.options.declaration import Command, Option


def render() -> str:
    """Return the page: a section for every command, a table for every group of its options."""
    lines = [
        "# Reference",
        "",
        "Every command takes `--json` (one JSON object on stdout) and `--help`. In Python the options are "
        "keyword arguments of the same name, with `_` for `-`; in a recipe they are keys. This page is "
        "written by `make docs` from `bake/options/`.",
    ]
    for command, _ in COMMANDS:
        lines += _section(command)
    return "\n".join(lines) + "\n"


def _section(command: Command) -> Iterator[str]:
    yield from ("", f"## bake {command.name}", "", command.description)
    if command.examples:
        yield from ("", "```console", *(f"$ {line}" for line in command.examples), "```")
    for group in dict.fromkeys(option.group for option in command.options):
        heading = group[0].upper() + group[1:] if group else "option"
        yield from ("", f"| {heading} | what it does | default |", "|---|---|---|")
        yield from (_row(option) for option in command.options if option.group == group)


def _row(option: Option) -> str:
    name = option.metavar or option.name.upper() if option.positional else option.flag
    value = "" if option.positional or option.kind is bool else f" {_value(option)}"
    short = f", `{option.short}`" if option.short else ""
    help_text = option.help.replace("|", "\\|")
    return f"| `{name}{value}`{short} | {help_text} | {_default(option)} |"


def _value(option: Option) -> str:
    value = option.metavar or "\\|".join(option.choices or (option.name.upper(),))
    value = f"[{value}]" if option.bare is not None else value
    return f"{value} …" if option.many == "listed" else value


def _default(option: Option) -> str:
    if option.required or (option.positional and option.default is None):
        return "required"
    shown = option.shown
    if shown is None:
        shown = "" if option.default is None or option.default is False else str(option.default)
    return shown.removeprefix("default: ").replace("|", "\\|")


if __name__ == "__main__":
    print(render(), end="")
