"""The command line's grammar, from the declarations in `bake.options`.

argparse and no larger library: options take several values (`--band 30:60 60:90`), `bake direction` takes a
model or the name of a command, and `bake --help` has to be there at once.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from bake.options.declaration import Command, Option
from bake.version import __version__

DESCRIPTION = "Turn a steering direction into ordinary weights: plain transformers, no hooks."
EPILOG = (
    "bake COMMAND --help says more. Begin with bake demo, which downloads nothing. Exit codes: 0 done, 1 "
    "an error that one line names, 2 usage, 3 not equivalent."
)
_CHOICE = re.compile(r"invalid choice: '(?P<given>[^']*)' \(choose from (?P<known>.*)\)")
JSON = Option("json", "print one JSON object", bool)


class Parser(argparse.ArgumentParser):
    """A parser that suggests the option, command or value that was probably meant."""

    def error(self, message: str) -> NoReturn:
        """Print usage and message; exit with 2."""
        self.print_usage(sys.stderr)
        self.exit(2, f"{self.prog}: error: {message}{self._suggest(message)}\n")

    def _suggest(self, message: str) -> str:
        given, known = message.rpartition("unrecognized arguments: ")[2].split(), []
        if choice := _CHOICE.search(message):
            given, known = [choice["given"]], re.findall(r"[^\s,']+", choice["known"])
        elif "unrecognized arguments: " in message:
            known = list(self._option_string_actions)
        words = (word.partition("=")[0] for word in given)
        near = [match for word in words for match in get_close_matches(word, known, 1)]
        return f"; did you mean {near[0]}?" if near else ""


def parse(commands: Mapping[str, Command], words: Sequence[str]) -> tuple[str, argparse.Namespace]:
    """Return the command's name and its options; exit with 2 where they are not what it takes.

    A command may be two words. `--json` may stand before, between or after them.
    """
    plain = _join_reversed([word for word in words if word != f"--{JSON.name}"])
    for length in (2, 1):
        name = " ".join(plain[:length])
        if name in commands and len(plain) >= length:
            parser = _fill(Parser(prog=f"bake {name}"), commands[name])
            given = argparse.Namespace(json=f"--{JSON.name}" in words)
            return name, parser.parse_args(plain[length:], given)
    return _answer_without_command(commands, words)


def _join_reversed(words: Sequence[str]) -> list[str]:
    """Join an option with the value -auto, which argparse would take for an option of its own."""
    joined: list[str] = []
    for word in words:
        if word == "-auto" and joined and joined[-1] in ("-m", "--multiplier"):
            joined[-1] = f"--multiplier={word}"
        else:
            joined.append(word)
    return joined


def options_of(parsed: argparse.Namespace) -> dict[str, Any]:
    """Return a command's options by name, without what belongs to the command line itself."""
    return {name: value for name, value in vars(parsed).items() if name != JSON.name}


def _answer_without_command(commands: Mapping[str, Command], words: Sequence[str]) -> NoReturn:
    overview = _overview(commands)
    overview.parse_args(list(words))
    overview.error("the command stands first: bake COMMAND …")


def _overview(commands: Mapping[str, Command]) -> Parser:
    """Return the parser of a line that names no command: help, version, or a mistake."""
    parser = Parser(prog="bake", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("--version", action="version", version=f"bake {__version__}")
    names = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in commands.items():
        if " " not in name:
            names.add_parser(name, help=command.help)
    return parser


def _fill(parser: Parser, command: Command) -> Parser:
    parser.description, parser.epilog = command.description, command.epilog
    groups: dict[str, Any] = {}
    for option in (*command.options, JSON):
        place: Any = parser
        if option.group:
            place = groups.setdefault(option.group, None) or parser.add_argument_group(option.group)
            groups[option.group] = place
        if option.excludes:
            needed = any(o.positional for o in command.options if o.excludes == option.excludes)
            place = groups.setdefault(option.excludes, None) or (
                parser.add_mutually_exclusive_group(required=needed)
            )
            groups[option.excludes] = place
        names = [option.flag, option.short] if option.short else [option.flag]
        place.add_argument(*names, **_described(option, suppressed=command.from_recipe))
    return parser


def _described(option: Option, *, suppressed: bool) -> dict[str, Any]:
    """Return what argparse is told of an option; suppressed: not given, it stays out of the result."""
    told: dict[str, Any] = {"help": option.explained.replace("%", "%%")}
    if option.kind is bool:
        told["action"] = "store_true"
    else:
        told |= {"type": _converter(option.kind), "metavar": option.metavar}
        if option.choices:
            told["choices"] = option.choices
        if option.metavar is None:
            del told["metavar"]
    if option.many:
        told |= {"action": "append"} if option.many == "repeated" else {"nargs": "+"}
    if option.bare is not None:
        told |= {"nargs": "?", "const": option.bare}
    if option.positional and option.default is not None:
        told["nargs"] = "?"
    if not option.positional and option.required:
        told["required"] = True
    default = (
        list(option.default)
        if isinstance(option.default, tuple) and option.many
        else option.default
    )
    told["default"] = argparse.SUPPRESS if suppressed else default
    if option.kind is bool and not suppressed:
        told["default"] = False
    return told


def _converter(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    if isinstance(kind, type):
        return kind

    def convert(text: str) -> Any:
        try:
            return kind(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert
