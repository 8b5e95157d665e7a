"""Files and folders appear whole or not at all, and a run folder belongs to one recipe."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest
from safetensors import SafetensorError

from transplant_ray import shelf, storage
from transplant_ray.errors import RunError
from transplant_ray.files import remove_debris, sha256_file, whole_file, whole_folder, writable_folder, write_json, write_text
from transplant_ray.shelf import Shelf
from transplant_ray.storage import RunFolder, copy_here
from transplant_ray.tables import read_rows, write_rows

FULL = (OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device (os error 28)"))
FAILURES = (ZeroDivisionError(), KeyboardInterrupt(), *FULL)


@pytest.fixture
def no_folder(tmp_path: Path) -> Path:
    """A place below a file, which nobody can write to, root neither."""
    (tmp_path / "file").write_text("in the way")
    return tmp_path / "file" / "below"


def write_and_fail(path: Path, failure: BaseException, *, folder: bool) -> None:
    with whole_folder(path, replace=True) if folder else whole_file(path) as temporary:
        (temporary / "part" if folder else temporary).write_text("half")
        assert not path.exists() or path.name == "old"
        raise failure


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
@pytest.mark.parametrize("folder", [False, True])
def test_what_fails_leaves_nothing(tmp_path: Path, failure: BaseException, folder: bool) -> None:
    with pytest.raises(RunError if failure in FULL else type(failure)):
        write_and_fail(tmp_path / "new", failure, folder=folder)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
@pytest.mark.parametrize("folder", [False, True])
def test_what_fails_keeps_what_was_there(tmp_path: Path, failure: BaseException, folder: bool) -> None:
    old = tmp_path / "old"
    if folder:
        old.mkdir()
    inside = old / "kept" if folder else old
    inside.write_text("before")
    with pytest.raises(RunError if failure in FULL else type(failure)):
        write_and_fail(old, failure, folder=folder)
    assert list(tmp_path.iterdir()) == [old]
    assert inside.read_text() == "before"


def test_a_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "file"
    with whole_file(path) as temporary:
        temporary.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole"
    write_text(path, "é\n")
    assert path.read_bytes() == "é\n".encode()
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_appears_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "folder"
    with whole_folder(path) as temporary:
        (temporary / "a").write_text("a")
        assert not path.exists()
        assert temporary.parent == path.parent  # on the same disk, so that a rename is all it takes
    assert [child.name for child in path.iterdir()] == ["a"]
    assert list(path.parent.iterdir()) == [path]
    assert stat.S_IMODE(path.stat().st_mode) == 0o755  # others may read what was private while it grew


def test_a_folder_that_is_there_is_refused_unless_it_may_be_replaced(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").write_text("old")
    with pytest.raises(RunError, match=f"{path}: is there already. Choose another place, or move it away"), whole_folder(path):
        pytest.fail("the block must not run")
    with whole_folder(path, replace=True) as temporary:
        (temporary / "new").write_text("new")
    assert [child.name for child in path.iterdir()] == ["new"]


def test_processes_of_one_id_on_two_machines_do_not_meet(tmp_path: Path) -> None:
    """Every pod has a process 1, and they share a file system."""
    (tmp_path / "x").write_text("before")
    with whole_file(tmp_path / "x") as mine, whole_file(tmp_path / "x") as theirs:
        assert mine != theirs
        for temporary in (mine, theirs):
            assert (temporary.name.startswith(".x."), temporary.suffix) == (True, ".part")
            temporary.write_text(temporary.name)
    (tmp_path / "folder").mkdir()
    (tmp_path / f".folder.{os.getpid()}.old" / "theirs").mkdir(parents=True)
    with whole_folder(tmp_path / "folder", replace=True) as temporary:
        assert (temporary.name.startswith(".folder."), temporary.suffix) == (True, ".part")
    assert (tmp_path / f".folder.{os.getpid()}.old" / "theirs").exists()


def test_a_place_that_cannot_be_written_is_named(no_folder: Path) -> None:
    for write in (
        lambda: writable_folder(no_folder),
        lambda: write_text(no_folder / "x", "text"),
        lambda: write_json(no_folder, {}),
        lambda: write_and_fail(no_folder / "x", ZeroDivisionError(), folder=True),
        lambda: take(RunFolder.of(str(no_folder), "run"), "identity", "recipe"),
    ):
        with pytest.raises(RunError, match=rf"{no_folder}.*: cannot be written \((Not a directory|File exists)\)"):
            write()


@pytest.mark.parametrize("address", ["s3://bucket/organ", "file:///tmp/organ", "gs://bucket"])
def test_an_address_where_only_a_folder_can_be_written_is_refused(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `--out` of the verbs on organs: a path makes one slash of two, and a folder `s3:` here."""
    monkeypatch.chdir(tmp_path)
    for write in (lambda: writable_folder(Path(address)), lambda: write_and_fail(Path(address), ZeroDivisionError(), folder=True)):
        with pytest.raises(RunError, match=r"an address, where only a folder can be written\. Give a folder"):
            write()
    assert list(tmp_path.iterdir()) == []


def test_the_home_of_nobody_is_refused() -> None:
    for make in (lambda: RunFolder.of("~nobody-of-this-name/runs", "x"), lambda: RunFolder.open("~nobody-of-this-name/runs/x")):
        with pytest.raises(RunError, match="~nobody-of-this-name"):
            make()


def test_a_writable_folder_is_made_and_left_empty(tmp_path: Path) -> None:
    assert writable_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_json_holds_only_what_json_can(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"é": [1, None, 0.5]})
    assert (tmp_path / "x.json").read_text(encoding="utf-8") == '{\n  "é": [\n    1,\n    null,\n    0.5\n  ]\n}\n'
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "y.json", {"accuracy": float("nan")})
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


SCHEMA = pa.schema([("name", pa.string()), ("n", pa.int32())])


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    rows = [{"name": "é", "n": 1}, {"name": None, "n": None}]
    write_rows(tmp_path / "rows.parquet", rows, SCHEMA)
    assert read_rows(tmp_path / "rows.parquet") == rows
    write_rows(tmp_path / "rows.parquet", [], SCHEMA)
    assert read_rows(tmp_path / "rows.parquet") == []


@pytest.mark.parametrize("content", [None, b"", b"PAR1", b"not a table"])
def test_a_broken_table_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "rows.parquet"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RunError, match=f"{path}: not a readable Parquet file .*Run the sweep again"):
        read_rows(path)


def test_a_hash_is_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256_file(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_what_a_killed_process_has_left_is_removed_and_what_it_set_aside_comes_back(tmp_path: Path) -> None:
    def make(*names: str) -> None:
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(name)

    kept = ["results.parquet", ".identity", ".hidden/.gitattributes", ".part", ".x.old", "delta/old"]
    make(*kept, ".results.parquet.0a1b.part", "outcomes/.main-test.parquet.26746.part")
    make(".checkpoint.x_4yz1.part/weights", ".checkpoint.0a1b.part/.weights.2c.part", ".merge-ties.ab12cd34.part/ties/weights")
    make(".checkpoint.77.old/before", ".delta.77.old/before")
    remove_debris(tmp_path)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()) == sorted(
        [*kept, "checkpoint/before"]
    )


# The run folder.


@pytest.fixture(params=["folder", "address"])
def runs(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A storage: a folder, or an address that pyarrow reads (here a file system too, as any object store would be)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return str(tmp_path / "runs") if request.param == "folder" else f"file://{tmp_path}/runs"


def take(folder: RunFolder, identity: str, recipe: str) -> RunFolder:
    folder.check_owner(identity)
    folder.claim(identity, recipe)
    return folder


def test_a_run_folder_is_claimed_by_one_recipe(runs: str) -> None:
    folder = take(RunFolder.of(runs, "name"), "identity", "name: name\n")
    folder.publish()
    assert folder.recipe.read_text() == "name: name\n"
    take(RunFolder.of(runs, "name"), "identity", "name: name  # told differently\n")
    assert folder.recipe.read_text() == "name: name  # told differently\n"
    with pytest.raises(RunError, match=r"holds the results of another recipe of this name\. Give this one another `name`"):
        take(RunFolder.of(runs, "name"), "other", "name: name\n")
    take(RunFolder.of(runs, "another"), "other", "name: another\n")


def test_a_refused_claim_changes_nothing(runs: str) -> None:
    folder = take(RunFolder.of(runs, "name"), "identity", "mine")
    folder.publish()
    with pytest.raises(RunError):
        take(RunFolder.of(runs, "name"), "other", "theirs")
    assert folder.recipe.read_text() == "mine"
    take(folder, "identity", "mine")


def test_a_name_that_another_recipe_took_in_the_meantime_is_refused(runs: str) -> None:
    mine, theirs = RunFolder.of(runs, "name"), RunFolder.of(runs, "name")
    mine.check_owner("mine")
    with theirs.claimed("theirs", "theirs"):
        theirs.publish()
    with pytest.raises(RunError, match="holds the results of another recipe of this name"), mine.claimed("mine", "mine"):
        pytest.fail("the block must not run")
    assert theirs.recipe.read_text() == "theirs"


def test_one_process_at_a_time_works_in_a_run_folder(runs: str) -> None:
    first, second = RunFolder.of(runs, "name"), RunFolder.of(runs, "name")
    with (
        first.claimed("identity", "first"),
        pytest.raises(RunError, match=r"/name: another process works in it\. Wait for it or stop it, or give this one another"),
        second.claimed("identity", "second"),
    ):
        pytest.fail("the block must not run")
    assert first.recipe.read_text() == "first"
    with second.claimed("identity", "second"), RunFolder.of(runs, "other").claimed("identity", "other"):
        assert second.recipe.read_text() == "second"


def test_who_is_killed_lets_go_of_the_folder(tmp_path: Path) -> None:
    code = """if True:
        import sys, time
        from pathlib import Path
        from transplant_ray.storage import RunFolder
        with RunFolder(Path(sys.argv[1])).claimed("identity", "killed"):
            print("works", flush=True)
            time.sleep(60)
    """
    folder = RunFolder(tmp_path / "run")
    with subprocess.Popen([sys.executable, "-c", code, str(folder.path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "works\n"
        with pytest.raises(RunError, match="another process works in it"), folder.claimed("identity", "again"):
            pytest.fail("the block must not run")
        process.kill()
    with folder.claimed("identity", "again"):
        assert folder.recipe.read_text() == "again"


def test_who_claims_a_folder_finds_no_debris_in_it(runs: str, tmp_path: Path) -> None:
    folder = take(RunFolder.of(runs, "name"), "identity", "recipe")
    write_text(folder.checkpoint / "weights", "w")
    folder.publish()
    write_text(folder.path / ".merge-ties.ab12cd34.part" / "weights", "w")
    write_text(tmp_path / "runs" / "name" / ".lent-77" / "weights", "w")
    left = tmp_path / "runs" / "name" / (".lent-77" if folder.address else ".merge-ties.ab12cd34.part")
    assert left.exists()
    with folder.claimed("identity", "recipe"):
        assert not left.exists()
        assert {path.name for path in folder.path.iterdir() if path.name[:5] != ".lent"} == {
            ".identity", ".lock", "checkpoint", "recipe.yaml",
        }  # fmt: skip


def test_only_what_a_reader_needs_is_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = RunFolder.of(f"file://{tmp_path}/store", "name")
    with folder.claimed("identity", "recipe"):
        for name in (".tune/state", ".merge-ties.ab.part/weights", ".checkpoint.ab.old/weights", "checkpoint/inner/.weights"):
            write_text(folder.path / name, "content")
        write_json(folder.summary, {})
        folder.publish()
    there = tmp_path / "store" / "name"
    assert sorted(str(path.relative_to(there)) for path in there.rglob("*") if path.is_file()) == [
        ".identity", "checkpoint/inner/.weights", "recipe.yaml", "summary.json",
    ]  # fmt: skip


def ran(storage: str, identity: str, *files: str) -> RunFolder:
    """A run under this name that wrote these files."""
    folder = RunFolder.of(storage, "name")
    with folder.claimed(identity, identity):
        for file in files:
            write_text(folder.path / file, identity)
        folder.publish()
    return folder


@pytest.mark.parametrize("elsewhere", [False, True], ids=["gone", "another machine's"])
def test_nothing_of_a_run_that_is_gone_from_the_address_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, elsewhere: bool
) -> None:
    storage, there = f"file://{tmp_path}/store", tmp_path / "store" / "name"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "here"))
    ran(storage, "old", "checkpoint/weights", "outcomes/main-test.parquet", "log.jsonl")
    shutil.rmtree(there)
    if elsewhere:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
        ran(storage, "new", "summary.json")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "here"))
    ran(storage, "new", "results.parquet")
    files = {str(path.relative_to(there)): path.read_text() for path in there.rglob("*") if path.is_file()}
    assert files.keys() == {".identity", "recipe.yaml", "results.parquet", *(["summary.json"] if elsewhere else [])}
    assert set(files.values()) == {"new"}


def test_the_local_copy_of_a_run_that_goes_on_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "here"))
    folder = ran(f"file://{tmp_path}/store", "mine", "checkpoint/weights")
    with folder.claimed("mine", "mine"):
        assert (folder.checkpoint / "weights").exists()


def test_a_log_that_was_sent_in_part_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an attempt that was killed before it published: the journal goes on with it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "here"))
    folder = RunFolder.of(f"file://{tmp_path}/store", "name")
    with folder.claimed("mine", "mine"):
        write_text(folder.log, "sent\n")
        folder.send(folder.log)
        write_text(folder.log, "sent\nand more\n")
    with folder.claimed("mine", "mine"):
        assert folder.log.read_text() == "sent\nand more\n"


def test_asking_for_the_owner_makes_no_folder(tmp_path: Path) -> None:
    RunFolder.of(str(tmp_path), "name").check_owner("identity")
    assert list(tmp_path.iterdir()) == []


def test_a_storage_that_cannot_be_looked_at_is_named() -> None:
    with pytest.raises(RunError, match=r"x/name: cannot be read \(File name too long\)\. Choose another `storage`"):
        RunFolder.of("x" * 300, "name").check_owner("identity")


def test_results_without_a_mark_are_another_recipes(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    write_text(folder.recipe, "name: by hand\n")
    with pytest.raises(RunError, match="another recipe"):
        folder.check_owner("identity")


@pytest.mark.parametrize("writes", [0, 1])
def test_a_claim_that_was_cut_short_can_be_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int) -> None:
    left = iter(range(writes))
    write = storage.write_text

    def write_or_die(path: Path, text: str) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        write(path, text)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_text", write_or_die)
        with pytest.raises(KeyboardInterrupt):
            RunFolder(tmp_path).claim("identity", "mine")
    take(RunFolder(tmp_path), "identity", "mine")
    assert RunFolder(tmp_path).recipe.read_text() == "mine"


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    folder = RunFolder.open(str(tmp_path))
    with pytest.raises(RunError, match=rf"{folder.summary}: not there\. Is {tmp_path} a run folder, and did its sweep finish"):
        folder.read_summary()
    write_json(folder.summary, {"winner": None})
    assert folder.read_summary() == {"winner": None}
    assert folder.require(folder.summary) == folder.summary
    folder.summary.write_text("{half")
    with pytest.raises(RunError, match=f"{folder.summary}: not a readable summary"):
        folder.read_summary()


def test_a_published_run_can_be_opened_by_its_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "here"))
    written = RunFolder.of(f"file://{tmp_path}/store/", "run")
    written.claim("identity", "name: run\n")
    write_rows(written.rankings, [{"name": "a", "n": 1}], SCHEMA)
    write_rows(written.results, [], SCHEMA)
    write_json(written.summary, {"winner": None})
    write_text(written.checkpoint / "README.md", "card")
    assert not (tmp_path / "store").exists()
    written.publish()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))  # another machine
    opened = RunFolder.open(f"file://{tmp_path}/store/run")
    assert opened.path != written.path
    assert (opened.recipe.read_text(), opened.read_summary()) == ("name: run\n", {"winner": None})
    assert read_rows(opened.rankings) == [{"name": "a", "n": 1}]
    assert not opened.checkpoint.exists()
    assert (tmp_path / "store" / "run" / "checkpoint" / "README.md").read_text() == "card"


@pytest.mark.parametrize("address", ["nosuch://bucket/runs", "file:///dev/null/runs/x"])
def test_a_storage_that_does_not_answer_is_named(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(RunError, match=f"{address}: the storage cannot be used .*Check address, credentials and bucket"):
        RunFolder.open(address)


@pytest.mark.parametrize(
    "address",
    [
        "nosuch://user:secret@host/runs",
        "nosuch://user:sec/secret@host/runs",
        "s3://AKIA:sec/secret@bucket/runs",
        "s3://bucket/runs?secret=secret",
        "s3://bucket/runs?region=x&secret_key=secret",
        "s3://key:secret@bucket/runs?region=us-east-1&scheme=http&endpoint_override=127.0.0.1:9",
    ],
)
def test_an_error_of_the_storage_holds_no_secret(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pyarrow quotes the whole address, or the setting that it does not know."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(RunError, match="the storage cannot be used") as caught:
        RunFolder.open(address)
    assert not [word for word in ("secret", "sec/", "AKIA", "user") if word in str(caught.value).replace("secret_key", "")]
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__, "a traceback would show what pyarrow said"


@pytest.mark.parametrize("credentials", ["key:secret", "key:sec/secret", "key:secret@secret"])
def test_credentials_and_settings_are_not_part_of_the_public_address(credentials: str) -> None:
    folder = RunFolder.of(f"s3://{credentials}@bucket/runs?region=x&endpoint_override=y", "name")
    assert folder.public_address == "s3://bucket/runs/name"
    assert RunFolder.of("runs", "name").public_address is None
    assert "secret" not in str(folder.path)
    assert os.fspath(folder.path).endswith("/name")


def test_single_files_are_sent_into_folders_that_are_not_there_yet(runs: str, tmp_path: Path) -> None:
    folder = RunFolder.of(runs, "name")
    write_text(folder.checkpoint / "README.md", "card")
    folder.send(folder.checkpoint / "README.md")
    assert (tmp_path / "runs" / "name" / "checkpoint" / "README.md").read_text() == "card"
    assert folder.open_tests({"task": ["a"]}, "recipe") == {"task": 1}
    assert RunFolder.of(runs, "other").open_tests({"task": ["a"]}, "another") == {"task": 2}


def test_a_file_at_an_address_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = Shelf(f"file://{tmp_path}/shelf")
    shelf.write("page/x.parquet", b"before")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(RunError, match="No space left"):
        shelf.write("page/x.parquet", b"after")
    assert shelf.read("page/x.parquet") == b"before"
    assert [path.name for path in (tmp_path / "shelf" / "page").iterdir()] == ["x.parquet"]


def test_an_address_is_asked_for_its_file_system_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    from_uri = pa.fs.FileSystem.from_uri

    class Counting:
        @staticmethod
        def from_uri(address: str) -> tuple[pa.fs.FileSystem, str]:
            asked.append(address)
            found: tuple[pa.fs.FileSystem, str] = from_uri(address)
            return found

    monkeypatch.setattr(storage.pa.fs, "FileSystem", Counting)
    for _ in range(3):
        Shelf(f"file://{tmp_path}/once").names("page")
    assert asked == [f"file://{tmp_path}/once"]


def test_openings_are_counted_by_task_over_runs_that_open_at_once(tmp_path: Path) -> None:
    """Twenty runs in twenty threads: each is counted once, and the order of the ids is no matter."""

    def run(number: int) -> dict[str, int]:
        own = {"facts": [f"own of {number}"]} if number else {}
        return RunFolder(tmp_path / f"run{number}").open_tests(
            {"task": ["a", "b"] if number % 2 else ["b", "a"], **own}, f"{number}"
        )

    with ThreadPoolExecutor(20) as pool:
        found = list(pool.map(run, range(20)))
    assert sorted(each["task"] for each in found) == list(range(1, 21))
    assert {each.get("facts") for each in found} == {None, 1}
    assert RunFolder(tmp_path / "another").open_tests({"task": ["a"]}, "x") == {"task": 1}
    assert run(7) == {"task": 20, "facts": 1}  # the same recipe again is no further look


def test_a_folder_is_lent_to_other_nodes_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run = RunFolder.of(f"file://{tmp_path}/store", "name")
    (run.checkpoint / "inner").mkdir(parents=True)
    (run.checkpoint / "inner" / "weights").write_text("w")
    with run.lent(run.checkpoint) as home:
        assert home is not None
        copy_here(home, tmp_path / "there")
        assert (tmp_path / "there" / "inner" / "weights").read_text() == "w"
    assert list((tmp_path / "store" / "name").iterdir()) == []
    with pytest.raises(RunError, match="cannot be used"):
        copy_here(home, tmp_path / "again")
    with RunFolder(tmp_path).lent(run.checkpoint) as nowhere:
        assert nowhere is None


@pytest.mark.parametrize(("address", "kind"), [("gs://anonymous@bucket/runs", "gcs"), ("s3://bucket/runs?region=us-east-1", "s3")])
def test_addresses_of_stores_are_understood(address: str, kind: str) -> None:
    """No more than that: Google's was never reached."""
    system, root = shelf._file_system(address)
    assert (system.type_name, root) == (kind, "bucket/runs")
