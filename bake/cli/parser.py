"""The command line's grammar, from the declarations in `bake.options`.

argparse and no larger library: options take several values (`--band 30:60 60:90`), `bake direction` takes a
model or the name of a command, and `bake --help` has to be there at once.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn, TextIO

from bake.options.declaration import Command, Option
from bake.support.color import BOLD, RED, paint
from bake.support.text import did_you_mean
from bake.version import __version__

DESCRIPTION = "Turn a steering direction into ordinary weights: plain transformers, no hooks."
EPILOG = (
    "bake COMMAND --help says more, with examples. Begin with bake demo, which downloads nothing.\n"
    "Exit codes: 0 done, 1 an error that one line names, 2 usage, 3 not equivalent."
)
_CHOICE = re.compile(r"invalid choice: '(?P<given>[^']*)' \(choose from (?P<known>.*)\)")
_HEADING = re.compile(r"^[^\s].*:$", re.MULTILINE)
# A value that begins with a dash, as in -m -auto and --multipliers -1,1: argparse takes it for an option.
_REVERSED = re.compile(r"-(auto$|\.?\d)")
JSON = Option("json", "print one JSON object", bool)
QUIET = Option("quiet", "print warnings and errors only on stderr", bool, short="-q")
ANYWHERE = (JSON, QUIET)  # They may stand before, between or after a command's words.


class Parser(argparse.ArgumentParser):
    """A parser whose usage is one line, and that suggests what was probably meant."""

    def __init__(self, *, examples: Sequence[str] = (), **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)
        self.examples = examples

    def format_help(self) -> str:
        """Return the help, with examples at its end."""
        text = super().format_help()
        if self.examples:
            text += "\nexamples:\n" + "".join(f"  {line}\n" for line in self.examples)
        return text

    def print_help(self, file: Any = None) -> None:
        """Print the help, its headings in bold where the terminal shows that."""
        stream: TextIO = file or sys.stdout
        text = _HEADING.sub(lambda found: paint(found[0], BOLD, stream), self.format_help())
        self._print_message(text, stream)

    def error(self, message: str) -> NoReturn:
        """Print one line of usage, and one of what is wrong; exit with 2."""
        told = message.replace("unrecognized arguments:", "no such option:")
        print_usage_error(self.prog, self.format_usage(), f"{told}{self._suggest(message)}")
        self.exit(2)

    def _suggest(self, message: str) -> str:
        given, known = message.rpartition("unrecognized arguments: ")[2].split(), []
        if choice := _CHOICE.search(message):
            given, known = [choice["given"]], re.findall(r"[^\s,']+", choice["known"])
        elif "unrecognized arguments: " in message:
            known = list(self._option_string_actions)
        words = [word.partition("=")[0] for word in given]
        short = [  # --device, where --device-map is meant: too far apart to be a slip of the pen
            f"; did you mean {option}?" for word in words for option in known
            if len(word) > 3 and option.startswith(word)
        ]  # fmt: skip
        return next(filter(None, (*short, *(did_you_mean(word, known) for word in words))), "")


def print_usage_error(program: str, usage: str, message: str) -> None:
    """Print what exit code 2 stands for: a line of usage, and a line with the mistake."""
    label = paint(f"{program}: error:", RED, sys.stderr)
    print(f"{usage.strip()}\n{label} {message}", file=sys.stderr)


def parse(commands: Mapping[str, Command], words: Sequence[str]) -> tuple[str, argparse.Namespace]:
    """Return the command's name and its options; exit with 2 where they are not what it takes.

    A command may be two words. What is in ANYWHERE may stand before, between or after them.
    """
    flags = {f"--{option.name}": option.name for option in ANYWHERE} | {"-q": QUIET.name}
    plain = _join_reversed([word for word in words if word not in flags])
    for length in (2, 1):
        name = " ".join(plain[:length])
        if name in commands and len(plain) >= length:
            given = {option.name: False for option in ANYWHERE}
            given |= {flags[word]: True for word in words if word in flags}
            command, parser = commands[name], make_parser(commands[name])
            # Words of which there may be any number can stand on either side of options.
            several = any(option.positional and option.many for option in command.options)
            read = parser.parse_intermixed_args if several else parser.parse_args
            return name, read(plain[length:], argparse.Namespace(**given))
    return _answer_without_command(commands, words)


def _join_reversed(words: Sequence[str]) -> list[str]:
    """Join an option with a value that begins with a dash."""
    joined: list[str] = []
    for word in words:
        before = joined[-1] if joined else ""
        if _REVERSED.match(word) and before.startswith("-") and "=" not in before:
            joined[-1] += f"={word}" if before.startswith("--") else word
        else:
            joined.append(word)
    return joined


def options_of(parsed: argparse.Namespace) -> dict[str, Any]:
    """Return a command's options by name, without what belongs to the command line itself."""
    own = {option.name for option in ANYWHERE}
    return {name: value for name, value in vars(parsed).items() if name not in own}


def _answer_without_command(commands: Mapping[str, Command], words: Sequence[str]) -> NoReturn:
    overview = make_overview(commands)
    overview.parse_args(list(words))
    overview.error("the command stands first: bake COMMAND …")


class _Overview(Parser):
    """The help of `bake` itself: the commands under their headings."""

    def __init__(self, commands: Iterable[Command]) -> None:
        super().__init__(prog="bake", description=DESCRIPTION, usage="bake COMMAND [options]")
        self.commands = list(commands)

    def format_help(self) -> str:
        """Return the commands under their headings; options and exit codes after them."""
        width = max(len(command.name) for command in self.commands) + 4
        lines = [f"{self.format_usage()}", DESCRIPTION]
        for heading in dict.fromkeys(command.heading for command in self.commands):
            lines += ["", f"{heading}:"]
            lines += [
                f"  {command.name:<{width}}{command.help}"
                for command in self.commands
                if command.heading == heading
            ]
        lines += ["", "options:", "  -h, --help, --version, --json, -q/--quiet", "", EPILOG, ""]
        return "\n".join(lines)


def make_overview(commands: Mapping[str, Command], *, whole: bool = False) -> Parser:
    """Return the parser of a line that names no command: help, version, or a mistake.

    whole: with every command's own parser in it, which is what completion needs.
    """
    parser = _Overview(command for name, command in commands.items() if " " not in name)
    parser.add_argument("--version", action="version", version=f"bake {__version__}")
    # Completion reads this tree, and needs neither a command nor its arguments to be there.
    names = parser.add_subparsers(
        dest="command", metavar="COMMAND", required=True, parser_class=Parser
    )
    for name, command in commands.items():
        if " " in name:
            continue
        made = names.add_parser(name, help=command.help)
        if whole:
            _fill(made, command)
            _add_below(made, name, commands)
    return parser


def _add_below(parser: argparse.ArgumentParser, name: str, commands: Mapping[str, Command]) -> None:
    """Add the commands of two words whose first one is `name`."""
    below = {key: each for key, each in commands.items() if key.startswith(f"{name} ")}
    if below:
        nested = parser.add_subparsers(dest="below", parser_class=Parser)
        for key, each in below.items():
            _fill(nested.add_parser(key.partition(" ")[2], help=each.help), each)


def make_parser(command: Command) -> Parser:
    """Return the parser of one command."""
    parser = Parser(
        prog=f"bake {command.name}",
        usage=usage_of(command),
        description=command.description,
        examples=command.examples,
    )
    _fill(parser, command)
    return parser


def usage_of(command: Command) -> str:
    """Return a command's usage in one line: what has to be given, and that there are options."""
    needed = []
    for option in command.options:
        if option.positional:
            optional = option.default is not None or option.excludes
            metavar = option.metavar or option.name.upper()
            more = " …" if option.many else ""
            needed.append(f"[{metavar}{more}]" if optional else f"{metavar}{more}")
    for option in command.options:
        if option.required and not option.positional:
            needed.append(f"{option.flag} {option.metavar or option.name.upper()}")
    return " ".join(["bake", command.name, *needed, "[options]"])


def _fill(parser: argparse.ArgumentParser, command: Command) -> None:
    parser.description = command.description
    groups: dict[str, Any] = {}
    for option in (*command.options, *ANYWHERE):
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
        told["nargs"] = "*" if option.many else "?"
    if not option.positional and option.required:
        told["required"] = True
    default = (
        list(option.default)
        if isinstance(option.default, tuple) and option.many
        else option.default
    )
    told["default"] = argparse.SUPPRESS if suppressed or option in ANYWHERE else default
    if option.kind is bool and told["default"] is not argparse.SUPPRESS:
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
