"""Storage at an address: a sweep into an S3 interface, and into a file system under an address, is one into a folder."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import boto3
import pandas as pd
import pyarrow.fs
import pytest
from integration.helpers import Place, Swept, run_main, timeless
from moto.server import ThreadedMotoServer

from transplant_ray.errors import RunError
from transplant_ray.evaluate.answers import VariantShard
from transplant_ray.evaluate.example import Rendered
from transplant_ray.evaluate.ledger import Ledger
from transplant_ray.evaluate.outcome import Outcome
from transplant_ray.evaluate.parts import MANY
from transplant_ray.files import write_text
from transplant_ray.shelf import Shelf
from transplant_ray.storage import RunFolder

SECRET = "open-sesame"
EXAMPLES = tuple(Rendered(f"e{i}", (1, i + 5), (2,), f"a{i}") for i in range(6))
PAGE = "0" * 32


@pytest.fixture(scope="module")
def store() -> Iterator[str]:
    """Address of a bucket of an S3 interface, key and secret in it."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    client: Any = boto3.client(
        "s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1", aws_access_key_id="key", aws_secret_access_key=SECRET
    )
    client.create_bucket(Bucket="bucket")
    yield f"s3://key:{SECRET}@bucket/{{}}?scheme=http&region=us-east-1&endpoint_override={host}%3A{port}"
    server.stop()


def known(shelf: Shelf, notes: list[str]) -> list[int]:
    ledger = Ledger(shelf, notes.append)
    return [len(ledger.recall(PAGE, f"v{n}", EXAMPLES).outcomes) for n in range(MANY + 3)]


def test_a_ledger_in_a_bucket_is_merged_and_its_damage_found(store: str) -> None:
    shelf, notes = RunFolder.of(store.format("runs"), "name").ledger, list[str]()
    assert shelf.names(PAGE) == []
    ledger = Ledger(shelf, notes.append)
    for n in range(MANY + 3):
        outcomes = tuple(Outcome(f"v{n}", example.id, "says", True, 3, True) for example in EXAMPLES)
        ledger.keep(PAGE, VariantShard(f"v{n}", outcomes, 1.0), EXAMPLES)
        ledger.write()
    spoilt = shelf.names(PAGE)[7]
    shelf.write(spoilt, b"half a part")
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: known(shelf, notes), range(2))
    assert first == second
    assert sorted(first) == [0, *[len(EXAMPLES)] * (MANY + 2)]
    assert {note for note in notes if spoilt not in note} == set()
    assert known(shelf, notes) == first
    assert len(shelf.names(PAGE)) == 1


def test_files_of_a_run_go_to_a_bucket_and_come_back(store: str) -> None:
    folder = RunFolder.of(store.format("sent"), "name")
    folder.claim("identity", "name: name\n")
    write_text(folder.checkpoint / "README.md", "card")
    folder.send(folder.checkpoint / "README.md", folder.recipe)
    folder.path.joinpath("recipe.yaml").unlink()
    folder.fetch(folder.recipe)
    assert folder.recipe.read_text() == "name: name\n"
    assert folder.open_tests({"task": ["a"]}, "recipe") == {"task": 1}
    with folder.lent(folder.checkpoint) as home:
        assert home is not None
    shelf = Shelf(store.format("sent/name"))
    assert shelf.read_present("checkpoint/README.md") == b"card"
    assert shelf.read_present("checkpoint/none") is None
    shelf.discard("checkpoint/none")
    assert folder.public_address == "s3://bucket/sent/name"


def test_a_bucket_that_is_not_there_is_named_without_the_secret(store: str) -> None:
    with pytest.raises(RunError, match="s3://nowhere/runs: the storage cannot be used") as caught:
        Shelf(store.format("runs").replace("@bucket/", "@nowhere/")).write("x", b"x")
    assert SECRET not in str(caught.value)


def test_a_bucket_that_cannot_be_written_ends_a_sweep_before_a_model_is_loaded(cluster: None, place: Place, store: str) -> None:  # noqa: ARG001
    storage = store.format("swept").replace("@bucket/", "@nowhere/")
    refused = run_main("sweep", place.recipe(name="nowhere", storage=storage, ledger=False))
    assert refused.code == 2
    assert "s3://nowhere/swept/.ledger: the storage cannot be used" in refused.err
    assert "probe and rank" not in refused.err
    assert SECRET not in refused.out + refused.err


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["s3", "file"])
def test_a_sweep_into_an_address(swept: Swept, place: Place, store: str, kind: str) -> None:
    """The same results as in a folder; again, and everything is recalled; and the report is there."""
    storage = store.format("swept") if kind == "s3" else f"file://{place.path}/swept"
    recipe = place.recipe(name="addressed", storage=storage)  # not as the sweep in a folder: its model is registered by name
    run = RunFolder.of(storage, "addressed")
    assert run.address is not None
    finished = run_main("sweep", recipe)
    assert finished.code == 0, finished.err
    assert SECRET not in finished.out + finished.err
    parts = {page: run.ledger.names(page) for page in pages(run.ledger)}
    assert parts

    again = run_main("sweep", recipe)
    assert again.code == 0, again.err
    assert "taken from the ledger" in again.out
    assert {page: run.ledger.names(page) for page in pages(run.ledger)} == parts, "nothing was evaluated twice"
    fetched = RunFolder.open(run.address)
    ours, theirs = (timeless(pd.read_parquet(path)) for path in (fetched.results, swept.folder / "results.parquet"))
    pd.testing.assert_frame_equal(ours.drop(columns=["loss", "kl"]), theirs.drop(columns=["loss", "kl"]))
    assert SECRET not in fetched.recipe.read_text()

    page = Shelf(run.address).read("report.html")
    told = run_main("report", run.address)
    assert told.code == 0, told.err
    assert len(Shelf(run.address).read("report.html")) == pytest.approx(len(page), rel=0.1)
    assert SECRET.encode() not in page


def pages(shelf: Shelf) -> list[str]:
    system, root = pyarrow.fs.FileSystem.from_uri(shelf.place)
    return sorted(info.base_name for info in system.get_file_info(pyarrow.fs.FileSelector(root)))
