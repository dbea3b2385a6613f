"""What goes wrong between here and the Hugging Face hub, in one line each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rotq.errors import RotqError, reason

LOG_IN = "log in with hf auth login, or set HF_TOKEN"


@contextmanager
def hub_errors(what: str, repo: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into a RotqError.

    Args:
        what: The model as it was named.
        repo: ``ORG/NAME``.
    """
    try:
        yield
    except RotqError:
        raise
    except Exception as error:
        raise RotqError(_line(error, what, repo)) from error


def is_unreachable(error: Exception) -> str:
    """Why the hub gave no answer, in words; empty where it gave one, or a proxy did."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        return f"{constants.ENDPOINT} answers {status}" if status >= 500 else ""
    if _is_of_network(error) and type(error).__name__ != "ProxyError":
        return f"{constants.ENDPOINT} cannot be reached ({reason(error)})"
    return ""


def _line(error: BaseException, what: str, repo: str) -> str:
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{repo}"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"{what}: HF_HUB_OFFLINE is set"
    if isinstance(error, errors.LocalTokenNotFoundError):
        return f"{what}: {LOG_IN}"
    if isinstance(error, errors.GatedRepoError):
        return f"{what} is gated: ask for access at {page}, then {LOG_IN}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{what}: {page} has no such revision"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{what} is no folder here, and {constants.ENDPOINT} has no such model; for a private "
            f"one {LOG_IN}"
        )
    if isinstance(error, errors.HfHubHTTPError):
        return _status_line(error, what)
    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        return _line(error.__cause__, what, repo)
    if type(error).__name__ == "ProxyError":
        return f"{what}: the proxy refuses ({reason(error)}); see HTTPS_PROXY and NO_PROXY"
    if _is_of_network(error):
        return f"{what}: the connection to {constants.ENDPOINT} broke ({reason(error)})"
    if isinstance(error, OSError) and error.strerror:
        return f"{what}: cannot write to {constants.HF_HUB_CACHE}: {error.strerror}"
    return f"{what}: {reason(error)}"


def _status_line(error: object, what: str) -> str:
    """Of an answer that is no file."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    assert isinstance(error, HfHubHTTPError)
    status = error.response.status_code
    said = f": {error.server_message}" if error.server_message else ""
    if status in (401, 403):
        return f"{what}: {constants.ENDPOINT} refuses access ({status}{said}); {LOG_IN}"
    if status == 429:
        return f"{what}: {constants.ENDPOINT} takes no more requests for now (429{said}); {LOG_IN}"
    return f"{what}: {constants.ENDPOINT} answers {status}{said}"


def _is_of_network(error: BaseException) -> bool:
    """Whether the library below huggingface_hub raised it: httpx, or httpx2 in newer ones."""
    return type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2")
