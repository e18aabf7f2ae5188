"""The process that renders chat templates: a stranger's program, run where it can do no harm.

Run as a script, `python -P template_process.py < REQUEST`, never imported by bake; it needs Jinja and
nothing else. A template may loop for ever or ask for any amount of memory, so this process has little of
both. It renders as transformers does: the same sandbox, filters, functions and tags, but for the date,
which is the one that it is given, and chance, which begins anew with every text.

REQUEST is JSON: `template`, `date` [year, month, day], `options` {variable: value, passed on where the
template reads the variable}, `variables` {name: value}, `conversations` [[messages, whether the
assistant's turn is opened]], `seconds`, `bytes`, `characters`. The answer is JSON: `reads`, the variables
that the template reads, and `texts`; or `error`, and `conversation`, the number of the one that failed.
"""

import contextlib
import json
import random
import resource
import sys
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace


class Generation(jinja2.ext.Extension):
    """`{% generation %}` marks a reply for training; here its body stands as it is."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own way to say it.

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class PlainNamespace(Namespace):
    """Jinja's namespace without names that begin with an underscore, which lead out of the sandbox."""

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")
        super().__setitem__(name, value)


def make_namespace(**values: Any) -> PlainNamespace:
    namespace = PlainNamespace()
    for name, value in values.items():
        namespace[name] = value
    return namespace


class Dictionary:
    """What `dict` is to a template: a function, and not a type to climb about in."""

    def __call__(self, *items: Any, **more: Any) -> dict[Any, Any]:
        return dict(*items, **more)

    def fromkeys(self, *arguments: Any) -> dict[Any, Any]:
        return dict.fromkeys(*arguments)


def refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def make_environment(day: datetime) -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = to_json
    environment.globals.update(
        raise_exception=refuse,
        strftime_now=day.strftime,
        dict=Dictionary(),
        namespace=make_namespace,
    )
    return environment


def limit(seconds: int, size: int) -> None:
    """Take no more processor time and memory than this; not every system can limit memory."""
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (size, size))


def answer(request: dict[str, Any]) -> dict[str, Any]:
    environment = make_environment(datetime(*request["date"]))
    tree = environment.parse(request["template"])
    reads = sorted(jinja2.meta.find_undeclared_variables(tree))
    options = {name: value for name, value in request["options"].items() if name in reads}
    template = environment.from_string(request["template"])
    texts: list[str] = []
    for number, (messages, opens) in enumerate(request["conversations"]):
        random.seed(0)
        try:
            pieces, length = [], 0
            for piece in template.generate(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=opens,
                **{**request["variables"], **options},
            ):
                pieces.append(piece)
                length += len(piece)
                if length > request["characters"]:
                    raise MemoryError
            texts.append("".join(pieces))
        except Exception as error:  # A stranger's program may raise anything.
            return {"error": explain(error), "conversation": number}
    return {"reads": reads, "texts": texts}


def explain(error: Exception) -> str:
    """Return one line for what a template raised."""
    if isinstance(error, MemoryError | OverflowError):
        return "it asks for more than is allowed"
    if isinstance(error, RecursionError):
        return "it calls itself without end"
    text = " ".join(str(error).split())[:300]
    place = f" (line {error.lineno})" if isinstance(error, jinja2.TemplateSyntaxError) else ""
    named = isinstance(error, jinja2.TemplateError) and text
    return f"{text}{place}" if named else f"{type(error).__name__}: {text}".removesuffix(": ")


def main() -> None:
    request = json.loads(sys.stdin.buffer.read())
    limit(request["seconds"], request["bytes"])
    try:
        found = answer(request)
    except Exception as error:  # A template that is none.
        found = {"error": explain(error), "conversation": None}
    sys.stdout.buffer.write(json.dumps(found).encode())


if __name__ == "__main__":
    main()
