"""What is secret in an address is shown nowhere, however it is typed; what is none stays readable."""

from __future__ import annotations

import pytest

from transplant_ray.addresses import redact, redact_address

SECRETS = {
    "postgresql+psycopg2://mlflow:open-sesame@db/mlflow": "postgresql+psycopg2://db/mlflow",
    "postgresql+psycopg2://mlflow:open/sesame@db/mlflow": "postgresql+psycopg2://db/mlflow",
    "postgresql+psycopg2://mlflow:/sesame@open@db/mlflow": "postgresql+psycopg2://db/mlflow",
    "postgresql+psycopg2://mlflow:open sesame@db/mlflow": "postgresql+psycopg2://db/mlflow",
    "postgresql+psycopg2://mlflow:open?x=sesame#@db/mlflow": "postgresql+psycopg2://db/mlflow",
    "postgresql+psycopg2://mlflow:8080/sesame@db/mlflow": "postgresql+psycopg2://db/mlflow",
    "s3://AKIA:open/ses+ame@bucket/runs?region=eu-west-1&scheme=http": "s3://bucket/runs?region=eu-west-1&scheme=http",
    "s3://bucket/runs?secret_key=open-sesame&region=eu-west-1": "s3://bucket/runs?secret_key=***&region=eu-west-1",
    "https://host:5000/x?password=open#sesame": "https://host:5000/x?password=***",
    "https://host:5000/x?client_secret=open;sesame": "https://host:5000/x?client_secret=***",
    "https://host/x?X-Amz-Date=1&X-Amz-Signature=sesame": "https://host/x?X-Amz-Date=***&X-Amz-Signature=***",
    "https://store/x?sv=2026&sig=sesame%3D": "https://store/x?sv=***&sig=***",
    "https://store/x?sesame": "https://store/x?***",
    "https://store/x#access_token=sesame": "https://store/x#access_token=***",
    "s3://bucket/runs?endpoint_override=http://me:sesame@host": "s3://host",
    "s3://bucket/runs?endpoint_override=me:sesame%40host": "s3://bucket/runs?endpoint_override=***",
    "s3://bucket/runs?endpoint_override=host/?key=sesame": "s3://bucket/runs?endpoint_override=***",
    "//someone:sesame@host": "//host",
    "//sesame@host": "//host",
}


@pytest.mark.parametrize("address", SECRETS)
def test_an_address_is_shown_without_its_secrets(address: str) -> None:
    assert redact_address(address) == SECRETS[address]
    assert redact_address(SECRETS[address]) == SECRETS[address]


@pytest.mark.parametrize("around", ["{}", "cannot parse URI: '{}' (port)", "from {} to\n{} again", '{{"uri": "{}"}}', "see {}."])
@pytest.mark.parametrize("address", SECRETS)
def test_so_is_one_in_a_text(address: str, around: str) -> None:
    told = redact(around.format(address, address))
    assert not [word for word in ("open", "sesame", "ses+ame", "AKIA", "mlflow:") if word in told.replace("eu-west", "")]


@pytest.mark.parametrize(
    "text",
    [
        "runs",
        "~/me@home/runs",
        "sqlite:///mlflow.db",
        "http://127.0.0.1:5000 does not answer (ask ops@example.org)",
        "http://127.0.0.1:5000/mlflow: refused. Ask ops@example.org",
        "https://example.org/docs: write to me@example.org",
        "is it http://host:8265/?",
        "is it s3://bucket/runs?region=x&scheme=http, or s3://bucket/other?endpoint_override=127.0.0.1:9000",
        "see https://example.org/page#heading.",
        "a // b = c@d",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact(text) == text


def test_a_text_that_says_a_piece_of_the_secret_does_not_say_it() -> None:
    """As parsers do: host 'user:open', no such host 'sesame', unknown parameter value."""
    address = "https://someone:open/sesame@host/x?sig=abra%2Fcadabra"
    said = redact("host 'someone:open', path /sesame; open/sesame; abra/cadabra and abra%2Fcadabra are wrong", address)
    assert said == "host 'someone:***', path /***; ***; *** and *** are wrong"
    assert redact("nothing is known", "runs") == "nothing is known"
