"""What a declaration of an option and of a command holds.

Nothing is imported here, and no value is checked that only a command can judge: the command line shows
its help without torch.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Option:
    """One option: on the command line, in a recipe and as a keyword argument.

    name: as in Python; `--name-with-dashes` on the command line.
    help: what it does; the default is added in parentheses.
    kind: str, int, float or bool (a switch), or a function from text that raises ValueError.
    default: what holds where it is not given; None where nothing does.
    shown: the default in words, where the value itself does not say it; "" to show none.
    metavar: what stands for the value in the help.
    choices: the values there are.
    short: a one-letter form, such as "-m".
    group: the heading it stands under in the help.
    positional: it has no dashes. required: it has to be given; a positional one unless it has a default.
    many: "repeated" (--x A --x B) or "listed" (--x A B); its value is then a list.
    bare: the value of the option without one, as in --calibrate [FILE].
    excludes: the name of a set of options of which one only can be given.
    parameter: the keyword's name in Python, where it has another one.
    """

    name: str
    help: str
    kind: Callable[[str], Any] = str
    default: Any = None
    shown: str | None = None
    metavar: str | None = None
    choices: tuple[str, ...] | None = None
    short: str | None = None
    group: str | None = None
    positional: bool = False
    required: bool = False
    many: str | None = None
    bare: Any = None
    excludes: str | None = None
    parameter: str | None = None

    @property
    def flag(self) -> str:
        """How it is written on the command line."""
        return self.name if self.positional else f"--{self.name.replace('_', '-')}"

    @property
    def explained(self) -> str:
        """The help with the default."""
        shown = self.shown
        if shown is None:
            written = self.default is not None and self.default is not False
            shown = str(self.default) if written else ""
        return f"{self.help} ({shown})" if shown else self.help

    def but(self, **changes: Any) -> Option:
        """Return the same option as another command has it."""
        return replace(self, **changes)


@dataclass(frozen=True)
class Command:
    """One command: what it is for, in short and at length, and its options in the order of the help.

    name: with its parent's before it, such as "direction show".
    heading: what it stands under in the overview of commands.
    examples: lines that work as they are, in the order of the commands; a test runs each.
    from_recipe: its options can stand in a recipe, so that none that is not given has a value.
    """

    name: str
    help: str
    description: str
    options: tuple[Option, ...]
    heading: str = ""
    examples: tuple[str, ...] = ()
    from_recipe: bool = False

    def __getitem__(self, name: str) -> Option:
        return next(option for option in self.options if option.name == name)

    def group(self, name: str) -> tuple[str, ...]:
        """Return the names of the options that stand under a heading."""
        return tuple(option.name for option in self.options if option.group == name)


def grouped(group: str, *options: Option) -> tuple[Option, ...]:
    """Put options under a heading."""
    return tuple(option.but(group=group) for option in options)


def write_command(command: Command, values: Mapping[str, Any], *, whole: bool = False) -> str:
    """Return the line that runs a command with these options, without those that have their defaults.

    values: by the keywords of Python. Of a path only the last part is written: a page tells nobody where
    files lie. whole: the line is for whoever has the files, and paths stay as they are.
    """
    words = ["bake", command.name]
    for option in command.options:
        value = values.get(option.parameter or option.name, option.default)
        if value == option.default or value is None or value is False:
            continue
        entries = value if isinstance(value, tuple | list) else [value]
        listed = [_word(entry, whole=whole) for entry in entries]
        if option.positional:
            words += listed
        elif option.kind is bool:
            words.append(option.flag)
        elif option.many == "listed":
            words += [option.flag, *listed]
        elif option.many == "repeated":
            words += [word for entry in listed for word in (option.flag, entry)]
        else:
            words += [option.flag, ",".join(listed)]
    return " ".join(words)


def _word(value: Any, *, whole: bool) -> str:
    if isinstance(value, int | float):
        return f"{value:g}"
    text = value if isinstance(value, str) else "MODEL"  # One in memory has no name.
    if whole:
        return shlex.quote(text)
    local = text.startswith(("/", "~", ".")) or text.count("/") > 1
    return shlex.quote(text.rstrip("/").rpartition("/")[2] if local else text)
