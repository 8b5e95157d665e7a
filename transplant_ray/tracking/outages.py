"""Which errors mean that nobody answered, so that the same may go well later."""

from __future__ import annotations

import requests
from mlflow.exceptions import MlflowException

CODES = frozenset(
    {
        "INTERNAL_ERROR",  # also what the client makes of a connection that breaks, and of a 500
        "TEMPORARILY_UNAVAILABLE",  # also a database that is locked or gone
        "SERVICE_UNDER_MAINTENANCE",
        "WORKSPACE_TEMPORARILY_UNAVAILABLE",
        "DEADLINE_EXCEEDED",
        "CANCELLED",
        "ABORTED",
        "COULD_NOT_ACQUIRE_LOCK",
        "REQUEST_LIMIT_EXCEEDED",
        "RESOURCE_EXHAUSTED",
        "ENDPOINT_NOT_FOUND",  # the page of a proxy whose server is away: a run that is not there is RESOURCE_DOES_NOT_EXIST
    }
)
STATUSES = frozenset({404, 408, 429})
STORE_CLIENTS = ("botocore", "boto3", "s3transfer")
STORE_TROUBLES = frozenset({"ConnectionError", "HTTPClientError"})


def is_outage(error: BaseException | None) -> bool:
    """Whether the server, or the store of its artifacts, could not be asked. What it will never take is none."""
    if isinstance(error, MlflowException):
        return error.error_code in CODES
    if isinstance(error, requests.RequestException):
        if error.response is not None:
            return _is_passing(error.response.status_code)
        return not isinstance(error, ValueError)  # an address that is none
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    return type(error).__module__.partition(".")[0] in STORE_CLIENTS and _is_store_outage(error)


def _is_store_outage(error: BaseException | None) -> bool:
    """Of the clients of S3, which need not be installed: they are known by their names."""
    answer = getattr(error, "response", None)
    if isinstance(answer, dict):
        return _is_passing(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    if STORE_TROUBLES & {kind.__name__ for kind in type(error).__mro__}:
        return True
    return error is not None and is_outage(error.__cause__ or error.__context__)  # an upload that failed wraps its reason


def _is_passing(status: int) -> bool:
    return status >= 500 or status in STATUSES
