"""What is said on stderr: stages, lines where nobody watches, warnings, colour; and completion."""

from __future__ import annotations

import io
import logging
import re
import subprocess
import sys

import pytest

from bake.cli.main import main
from bake.cli.messages import render_messages
from bake.support import progress
from bake.support.progress import announce, track, warn
from bake.support.timing import Stopwatch


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


def open_terminal(monkeypatch):
    """Make stderr a terminal that shows colour; in the test itself, for pytest has its own before."""
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return stream


def test_stages_are_counted_and_told_once(capsys):
    clock = Stopwatch(("load", "calibrate"))
    for name in ("load", "plan", "calibrate", "load"):
        with clock.stage(name):
            pass
    lines = capsys.readouterr().err.splitlines()
    assert [re.sub(r"^\d\d:\d\d:\d\d ", "", line) for line in lines] == [
        "1/2 loading the model",
        "2/2 calibrating",
    ]
    assert list(clock.seconds) == ["load", "plan", "calibrate"]


def test_where_nobody_watches_a_line_comes_every_so_often(capsys, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    assert list(track([1, 2, 3, 4], "reading")) == [1, 2, 3, 4]
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == [
        "reading: 25%", "reading: 50%", "reading: 75%",
    ]  # fmt: skip
    assert all(re.match(r"\d\d:\d\d:\d\d ", line) for line in lines)


def test_a_terminal_shows_colour_and_no_time(monkeypatch):
    terminal = open_terminal(monkeypatch)
    with Stopwatch(("load",)).stage("load"):
        warn("too strong")
    assert terminal.getvalue() == (
        "\x1b[2m1/1 loading the model\x1b[0m\n\x1b[33mbake: warning:\x1b[0m too strong\n"
    )


def test_no_color_is_honoured(monkeypatch):
    terminal = open_terminal(monkeypatch)
    monkeypatch.setenv("NO_COLOR", "1")
    warn("too strong")
    assert terminal.getvalue() == "bake: warning: too strong\n"


def test_quiet_leaves_warnings(capsys):
    try:
        assert main(["prompts", "list", "-q"]) == 0
        announce("by the way")
        warn("too strong")
    finally:
        render_messages()
    assert capsys.readouterr().err == "bake: warning: too strong\n"


def test_a_library_prints_nothing_by_itself():
    code = "import logging, bake.support.progress as p; p.announce('hello')"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (finished.stdout, finished.stderr) == ("", "")
    assert logging.getLogger("bake").handlers  # The command line's, in this process.


def test_help_has_examples_and_usage_errors_one_line_of_usage(capsys):
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    assert "\nexamples:\n  bake export " in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        main(["direction", "m"])
    assert caught.value.code == 2
    usage, error = capsys.readouterr().err.splitlines()
    assert usage == "usage: bake direction MODEL --pairs FILE --output FILE [options]"
    assert error.startswith("bake direction: error: ")


def test_negative_numbers_are_values(capsys):
    for words in (["--multipliers", "-1,1"], ["--multipliers=-1,1"]):
        code = main(["sweep", "no/such/model", "--direction", "bake-demo", "-o", "o", *words])
        assert code == 1  # And not 2, for the model is not there.
        assert "no/such/model" in capsys.readouterr().err


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_knows_commands_and_options(capsys, shell):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for word in ("export", "direction", "convert", "--multiplier", "--held-out"):
        assert word in script or word.lstrip("-") in script


def test_bash_takes_the_completion_and_completes(tmp_path, capsys):
    main(["completion", "bash"])
    (tmp_path / "script").write_text(capsys.readouterr().out)
    ask = (
        "source ./script; COMP_WORDS=(bake exp); COMP_CWORD=1; "
        "$(complete -p bake | sed 's/.*-F \\([^ ]*\\).*/\\1/') bake exp bake; echo ${COMPREPLY[@]}"
    )
    finished = subprocess.run(["bash", "-c", ask], cwd=tmp_path, capture_output=True, text=True)
    assert finished.stdout.split() == ["export"]
