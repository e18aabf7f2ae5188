"""What huggingface_hub raises, as one line that names the thing and the remedy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from bake.errors import HubError
from bake.redaction import without_secrets

LOG_IN = "run `hf auth login`, or set HF_TOKEN to a write token from https://huggingface.co/settings/tokens"


@contextmanager
def translated(name: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into one line that names the thing and the remedy."""
    from huggingface_hub import constants, errors

    try:
        yield
    except errors.HfHubHTTPError as error:
        raise HubError(_explained(error, name)) from error
    except errors.HTTPError as error:  # the HTTP library's own base class, whichever it is
        raise HubError(
            f"the Hub at {constants.ENDPOINT} cannot be reached ({type(error).__name__}): check "
            "the connection, and HF_ENDPOINT if it is set"
        ) from error
    except ValueError as error:  # card metadata that the Hub refuses, or an answer that is no JSON
        raise HubError(f"the Hub cannot take {name}: {one_line(error)}") from error
    except (RuntimeError, OSError) as error:  # one file's upload, around what happened to it
        cause = error.__cause__
        refused = isinstance(cause, errors.HfHubHTTPError)
        why = _explained(cause, name) if refused else "run the same command again"
        raise HubError(f"{one_line(error).rstrip('.')}: {why}") from error


def _explained(error: Any, name: str) -> str:
    """The line for an answer that refuses."""
    from huggingface_hub import errors

    status = error.response.status_code
    said = one_line(error.server_message or error)
    if isinstance(error, errors.GatedRepoError):
        return f"{name} is gated and this token may not see it ({said}): ask for access on its page"
    if isinstance(error, errors.DisabledRepoError):
        return f"{name} is disabled on the Hub ({said}): publish under another name"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{name} is not on the Hub, or this token may not see it: check the name, or {LOG_IN}"
        )
    if status == 401:
        return f"the Hub does not accept the Hugging Face token ({said}): {LOG_IN}"
    if status == 403:
        return f"this token may not write to {name} ({said}): {LOG_IN}"
    if status in (409, 412):
        return f"{name} changed on the Hub at the same time ({said}): run the same command again"
    if status == 429:
        return f"the Hub is limiting requests ({said}): wait and run the same command again"
    if status >= 500:
        return f"the Hub failed with status {status} ({said}): run the same command again later"
    return f"the Hub refuses {name} with status {status}: {said}"


def is_refusal(error: HubError) -> bool:
    """Tell whether the Hub said no, which it will again, rather than failed or could not be reached."""
    from huggingface_hub.errors import HfHubHTTPError

    cause = error.__cause__
    status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else 500
    return status < 500 and status != 429


def one_line(message: object) -> str:
    """Return a message of other software on one line, and short; what is secret goes before the cut."""
    return " ".join(without_secrets(str(message)).split())[:300]
