"""Which errors of MLflow, requests and the clients of S3 are worth another try."""

from __future__ import annotations

import json

import boto3.exceptions
import botocore.exceptions
import pytest
import requests
from mlflow.exceptions import MlflowException, RestException
from mlflow.protos import databricks_pb2 as codes
from mlflow.utils.rest_utils import verify_rest_response

from transplant_ray.tracking.outages import is_outage


def answer(status: int, body: str = "<html>nginx</html>") -> requests.Response:
    response = requests.Response()
    response.status_code, response._content = status, body.encode()
    return response


def raised_by_mlflow(status: int, body: str = "<html>nginx</html>") -> Exception:
    with pytest.raises(MlflowException) as caught:
        verify_rest_response(answer(status, body), "/api/2.0/mlflow/runs/create")
    return caught.value


def of_store(status: int) -> Exception:
    return botocore.exceptions.ClientError({"ResponseMetadata": {"HTTPStatusCode": status}}, "PutObject")


def failed_upload(reason: Exception) -> Exception:
    try:
        try:
            raise reason
        except type(reason) as error:
            raise boto3.exceptions.S3UploadFailedError(f"Failed to upload: {error}")  # noqa: B904  # as boto3 raises it
    except boto3.exceptions.S3UploadFailedError as failed:
        return failed


@pytest.mark.parametrize(
    "error",
    [
        MlflowException("API request to http://127.0.0.1:5000/api failed with exception HTTPConnectionPool"),
        MlflowException("(sqlite3.OperationalError) database is locked", codes.TEMPORARILY_UNAVAILABLE),
        RestException({"error_code": "TEMPORARILY_UNAVAILABLE", "message": "the database is away"}),
        RestException({"detail": "a proxy's own JSON"}),
        *(raised_by_mlflow(status) for status in (404, 429, 500, 502, 503, 504)),
        raised_by_mlflow(200, "<html>back soon</html>"),
        requests.ConnectionError("refused"),
        requests.ReadTimeout("slow"),
        *(requests.HTTPError("artifact", response=answer(status)) for status in (429, 500, 503)),
        ConnectionResetError("reset"),
        of_store(503),
        botocore.exceptions.EndpointConnectionError(endpoint_url="http://store"),
        botocore.exceptions.ReadTimeoutError(endpoint_url="http://store"),
        failed_upload(of_store(500)),
        failed_upload(botocore.exceptions.EndpointConnectionError(endpoint_url="http://store")),
    ],
    ids=repr,
)
def test_nobody_answered(error: Exception) -> None:
    assert is_outage(error)


@pytest.mark.parametrize(
    "error",
    [
        MlflowException("too long", codes.INVALID_PARAMETER_VALUE),
        RestException({"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no such run"}),
        raised_by_mlflow(404, json.dumps({"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no such run"})),
        *(raised_by_mlflow(status) for status in (400, 401, 403)),
        *(requests.HTTPError("artifact", response=answer(status)) for status in (400, 403, 413)),
        requests.exceptions.InvalidURL("http://"),
        FileNotFoundError("checkpoint/model.safetensors"),
        TypeError("our own mistake"),
        of_store(403),
        failed_upload(of_store(403)),
        failed_upload(FileNotFoundError("checkpoint/model.safetensors")),
    ],
    ids=repr,
)
def test_the_answer_was_no(error: Exception) -> None:
    assert not is_outage(error)
