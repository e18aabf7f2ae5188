"""The errors that bake raises, and the exit code of each.

Every message is one line that names the thing, what was found, what was expected and the remedy.
The command line prints the line and exits with `exit_code`; nothing else is caught anywhere. Software
that bake quotes may quote a token or an address with a password in it, and files of others hold control
characters: no message has either, and what it quotes is cut where it is long.
"""

from bake.support.text import one_message


class BakeError(Exception):
    """A known error: the command line prints its one line and exits with 1."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(one_message(message))


class UsageError(BakeError):
    """Something that has to be given is not: the command line shows its usage and exits with 2."""

    exit_code = 2


class UnknownOptionError(BakeError, TypeError):
    """A function was given a keyword that it does not have."""


class CheckpointError(BakeError):
    """The base, or a baked directory, cannot be read as a checkpoint."""


class UnsupportedError(BakeError):
    """The architecture, site or route cannot hold the push exactly."""


class DirectionError(BakeError):
    """A direction, or the contrast pairs it should come from, cannot be used."""


class PromptError(BakeError):
    """A prompt set cannot be read or holds nothing to measure."""


class OutputError(BakeError):
    """The output path cannot be written."""


class HubError(BakeError):
    """The Hub cannot be reached, or refuses."""


class EndpointError(BakeError):
    """A server cannot be asked, or has no model of that name."""


class EquivalenceError(BakeError):
    """The baked model does not do what the hooked model does: nothing is published, exit code 3."""

    exit_code = 3
