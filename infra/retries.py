"""Requests to a store, tried again with growing pauses until they are answered or time is up."""

import itertools
import os
import random
import sys
import time
from collections.abc import Callable
from typing import TypeVar

from infra.errors import Unreachable, UserError

T = TypeVar("T")

DEADLINE_VARIABLE = "CMFORGE_STORAGE_DEADLINE"
_DEADLINE = 60.0  # seconds for one request, all its tries and pauses together
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0
# Not the module's own generator: trainings seed that one, and their draws are not ours to take.
_JITTER = random.SystemRandom()

# What a store says about itself, not about the request; 5xx are besides these.
_PASSING = {
    "BadDigest",  # the body was damaged on its way, like the next two
    "IncompleteBody",
    "XAmzContentSHA256Mismatch",
    "ConcurrentModification",
    "ConditionalRequestConflict",
    "OperationAborted",
    "RequestTimeout",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
}


def deadline() -> float:
    """Seconds that one request may take in all: $CMFORGE_STORAGE_DEADLINE, else 60."""
    text = os.environ.get(DEADLINE_VARIABLE)
    if not text:
        return _DEADLINE
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise UserError(f"{DEADLINE_VARIABLE}={text}: not a number of seconds above 0; mend it")
    return seconds


def persist(url: str, attempt: Callable[[float], T]) -> T:
    """`attempt(seconds left)`, again after each transient error until the deadline.

    Unreachable at the deadline; every other error passes at once.
    """
    began, limit = time.monotonic(), deadline()
    for tries in itertools.count(1):
        try:
            return attempt(limit - (time.monotonic() - began))
        except Exception as error:
            if not transient(error):
                raise
            spent = time.monotonic() - began
            longest = min(_FIRST_PAUSE * 2 ** (tries - 1), _LONGEST_PAUSE)
            pause = longest * _JITTER.uniform(0.5, 1.0)
            if spent + pause >= limit:
                what = (str(error).splitlines() or [""])[0].strip() or type(error).__name__
                times = "1 try" if tries == 1 else f"{tries} tries"
                raise Unreachable(
                    f"{url}: no answer in {times} over {spent:.1f} s ({what}); check "
                    f"AWS_ENDPOINT_URL and the network, or set {DEADLINE_VARIABLE} above "
                    f"{limit:g} seconds"
                ) from error
        time.sleep(pause)
    raise AssertionError("counting ended")


def transient(error: BaseException) -> bool:
    """Whether the same request may succeed later: no answer, half an answer, or a busy store."""
    status, code = answer(error)
    if status is not None:
        return code in _PASSING or status == 429 or (status >= 500 and status != 501)
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        return False
    return isinstance(error, (ConnectionError, TimeoutError, *_client_errors()))


def answer(error: BaseException) -> tuple[int | None, str]:
    """(HTTP status, S3 error code) of a refusal; (None, "") where no answer came."""
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    if not isinstance(response, dict):
        return None, ""
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return (int(status) if status else None), str(response.get("Error", {}).get("Code", ""))


def _client_errors() -> tuple[type[BaseException], ...]:
    """Broken connections as the HTTP clients in use name them, of those that are imported."""
    names = {
        "aiohttp": ("ClientConnectionError", "ClientPayloadError"),
        "botocore.exceptions": ("ConnectionError", "HTTPClientError", "IncompleteReadError"),
        "botocore.parsers": ("ResponseParserError",),  # half an XML document
    }
    return tuple(
        getattr(sys.modules[module], name)
        for module, classes in names.items()
        if module in sys.modules
        for name in classes
    )
