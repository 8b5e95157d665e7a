"""A disk that is full or cannot be written: what is said, what is left behind, and that the same again works when there is room."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest
from integration.helpers import Place, folder_bytes, read_results, run_main, weight_bytes
from runs import Made, write_run
from stacks import Pair, make_pair
from tiny import VOCABULARY, tiny_pair, tiny_tokenizer
from trainings import begin, sums, training_spec

from transplant_ray.errors import RunError
from transplant_ray.evaluate import spool as spools
from transplant_ray.evaluate.answers import VariantShard
from transplant_ray.evaluate.example import Rendered
from transplant_ray.evaluate.ledger import Ledger
from transplant_ray.evaluate.outcome import Outcome
from transplant_ray.evaluate.spool import Spool
from transplant_ray.files import whole_file, whole_folder, write_json
from transplant_ray.graft.export import apply_delta, export_checkpoint, export_delta
from transplant_ray.graft.variant import Variant
from transplant_ray.models.compare import Comparison
from transplant_ray.models.loading import load_model, read_tokenizer
from transplant_ray.models.scratch import save_tokenizer
from transplant_ray.organ.extract import extract_organ
from transplant_ray.organ.insert import write_insertion
from transplant_ray.organ.insertion import Placement, plan_insertion
from transplant_ray.organ.learners import FullLearner, LoraLearner, OrganLearner
from transplant_ray.organ.pack import Pack, pack_text, training_cut
from transplant_ray.organ.progress import read_progress, save_progress
from transplant_ray.organ.remove import remove_organs
from transplant_ray.organ.text import Passage
from transplant_ray.pipeline.demo_models import _write
from transplant_ray.pipeline.organ_training import train
from transplant_ray.pipeline.reporting import report
from transplant_ray.recipe import WorkerSpec
from transplant_ray.shelf import Shelf
from transplant_ray.storage import RunFolder
from transplant_ray.tables import write_rows

PAGE = 4096
"""What tmpfs hands out."""
EXAMPLES = tuple(Rendered(f"e{i}", (1, i + 5), (2,), f"a{i}") for i in range(40))
KEYS = ("0" * 32, "1" * 32)


@dataclass(frozen=True)
class Disk:
    """A small disk of its own."""

    path: Path

    @property
    def free(self) -> int:
        return shutil.disk_usage(self.path).free

    def leave(self, num_bytes: int) -> None:
        """Fill it up to so many bytes, in whole pages."""
        with self._filler.open("wb") as filler:
            filler.write(bytes(max(0, self.free - num_bytes // PAGE * PAGE)))

    def make_room(self) -> None:
        self.remount("rw")
        self._filler.unlink(missing_ok=True)

    def remount(self, how: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{how}", str(self.path)], check=True)

    @property
    def files(self) -> set[str]:
        """Names of all files and folders, hidden ones too, but for what fills it."""
        return {str(path.relative_to(self.path)) for path in self.path.rglob("*")} - {self._filler.name}

    @property
    def _filler(self) -> Path:
        return self.path / "filler"


def mounted(path: Path, size: str) -> Iterator[Disk]:
    path.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a disk cannot be mounted here: {done.stderr.strip()}")
    try:
        yield Disk(path)
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    yield from mounted(tmp_path / "disk", "8m")


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    return tiny_pair(tmp_path_factory.mktemp("pair"), shard="40KB")


NEXT = "(Free space|Choose another|Check the disk|whether there is room)"
FULL, READ_ONLY = f"No space left on device.*{NEXT}", f"Read-only file system.*{NEXT}"
WORDS = {"full": FULL, "ro": READ_ONLY}
ROOMS = [0, PAGE, 2 * PAGE, 5 * PAGE, 10 * PAGE]
"""Bytes that are left when a thing of 20 pages or more is to be written."""


def stop(disk: Disk, how: str) -> None:
    if how == "full":
        disk.leave(0)
    else:
        disk.remount("ro")


def check_refused(write: Callable[[], object], place: Path, words: str = FULL) -> None:
    """A RunError that names the place, says what is wrong and what to do."""
    with pytest.raises(RunError, match=words) as caught:
        write()
    assert str(place) in str(caught.value)
    assert "\n" not in str(caught.value)


def noise(seed: object, length: int) -> str:
    """Text that no compression makes shorter by much."""
    return "".join(random.Random(str(seed)).choices("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789", k=length))


# The ledger.


def shard(key: str) -> VariantShard:
    outcomes = (Outcome("v", example.id, noise((key, example.id), 3000), True, 3, True) for example in EXAMPLES)
    return VariantShard("v", tuple(outcomes), 1.0)


def remember(ledger: Ledger) -> None:
    for key in KEYS:
        ledger.keep(key, shard(key), EXAMPLES)


def parts(disk: Disk) -> list[str]:
    return sorted(path.parent.name for path in disk.path.rglob("*.parquet"))


def check_all_recalled(place: str) -> None:
    notes: list[str] = []
    ledger = Ledger(Shelf(place), notes.append)
    assert [ledger.recall(key, "v", EXAMPLES).outcomes for key in KEYS] == [shard(key).outcomes for key in KEYS]
    assert notes == []


@pytest.mark.parametrize("room", [*ROOMS, 30 * PAGE])
def test_a_ledger_without_room_says_so_and_is_written_when_there_is(disk: Disk, room: int) -> None:
    place = disk.path / "ledger"
    ledger = Ledger(Shelf(str(place)), pytest.fail)
    remember(ledger)
    disk.leave(room)
    check_refused(ledger.write, place)
    kept = parts(disk)
    assert len(kept) < len(KEYS)
    assert not [name for name in disk.files if name.endswith(".part")]
    known = Ledger(Shelf(str(place)), pytest.fail)  # whoever reads it now finds whole parts or none
    assert [key for key in KEYS if known.recall(key, "v", EXAMPLES).outcomes] == kept
    disk.make_room()
    more = Rendered("more", (1, 99), (2,), "more")
    for key in KEYS:
        ledger.keep(key, VariantShard("v", (Outcome("v", more.id, "more", True, 3, True),), 1.0), [more])
    ledger.write()
    asked = [(path.parent.name, mark) for path in place.rglob("*.parquet") for mark in pd.read_parquet(path)["asked"]]
    assert len(asked) == len(set(asked)) == len(KEYS) * (len(EXAMPLES) + 1)  # each once, also what there was room for
    check_all_recalled(str(place))


def test_a_ledger_that_may_not_be_written_says_so(disk: Disk) -> None:
    ledger = Ledger(Shelf(str(disk.path / "ledger")), pytest.fail)
    remember(ledger)
    disk.remount("ro")
    check_refused(ledger.write, disk.path, READ_ONLY)
    disk.make_room()
    ledger.write()
    check_all_recalled(str(disk.path / "ledger"))


def test_a_full_disk_under_an_address_leaves_no_half_part(disk: Disk) -> None:
    place, notes = f"file://{disk.path}/ledger", []
    ledger = Ledger(Shelf(place), notes.append)
    remember(ledger)
    disk.leave(10 * PAGE)
    check_refused(ledger.write, disk.path)
    assert parts(disk) == []
    disk.make_room()
    ledger.write()
    assert not notes
    check_all_recalled(place)


def test_a_damaged_part_that_cannot_be_set_aside_is_not_trusted(disk: Disk) -> None:
    (disk.path / KEYS[0]).mkdir()
    (disk.path / KEYS[0] / f"{'f' * 64}.parquet").write_bytes(b"half a part")
    disk.remount("ro")
    check_refused(lambda: Ledger(Shelf(str(disk.path)), pytest.fail).recall(KEYS[0], "v", EXAMPLES), disk.path, READ_ONLY)


# Export.


def variant(comparison: Comparison) -> Variant:
    return Variant.uniform(list(comparison.pairs)[:6], 0.5)


@pytest.fixture(scope="module")
def exported(comparison: Comparison, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint and its delta, where there was room."""
    folder = tmp_path_factory.mktemp("exported")
    export_checkpoint(comparison, variant(comparison), folder / "checkpoint", "card")
    export_delta(comparison, variant(comparison), folder / "checkpoint", folder / "delta")
    return folder


def writers(comparison: Comparison, exported: Path, out: Path) -> dict[str, Callable[[], Path]]:
    made, target = variant(comparison), str(comparison.target.folder)
    return {
        "checkpoint": lambda: export_checkpoint(comparison, made, out, "card", replace=True),
        "delta": lambda: export_delta(comparison, made, exported / "checkpoint", out, replace=True),
        "apply": lambda: apply_delta(exported / "delta", target, out),
    }


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("what", ["checkpoint", "delta", "apply"])
def test_an_export_without_room_leaves_nothing(disk: Disk, comparison: Comparison, exported: Path, what: str, room: int) -> None:
    out = disk.path / "runs" / "out"
    out.parent.mkdir()
    write = writers(comparison, exported, out)[what]
    disk.leave(room)
    check_refused(write, out.parent)
    assert disk.files == {"runs"}
    disk.make_room()
    assert write() == out
    assert weight_bytes(out) == weight_bytes(exported / ("delta" if what == "delta" else "checkpoint"))


@pytest.mark.parametrize("what", ["checkpoint", "delta"])
def test_an_export_without_room_keeps_the_one_before(disk: Disk, comparison: Comparison, exported: Path, what: str) -> None:
    write = writers(comparison, exported, disk.path / "out")[what]
    write()
    before = folder_bytes(disk.path)
    disk.leave(5 * PAGE)
    check_refused(write, disk.path)
    disk.make_room()
    assert folder_bytes(disk.path) == before


@pytest.mark.parametrize("what", ["checkpoint", "delta", "apply"])
def test_an_export_to_where_nobody_may_write_is_refused(disk: Disk, comparison: Comparison, exported: Path, what: str) -> None:
    disk.remount("ro")
    check_refused(writers(comparison, exported, disk.path / "out")[what], disk.path, READ_ONLY)


# Organs.


@pytest.fixture(scope="module")
def organs(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """An organ, and in `inserted` a model that it was put into, where there was room."""
    folder = tmp_path_factory.mktemp("organs")
    pair = make_pair(folder, shard="40KB")
    write_insertion(plan_insertion(pair.recipient, [Placement(pair.organ, 1)]), folder / "inserted")
    return pair


def movers(pair: Pair, out: Path) -> dict[str, Callable[[], Path]]:
    inserted = Path(pair.organ.checkpoint.model).with_name("inserted")
    return {
        "extract": lambda: extract_organ(pair.source, "1-4", out),
        "insert": lambda: write_insertion(plan_insertion(pair.recipient, [Placement(pair.organ, 1)]), out),
        "replace": lambda: write_insertion(plan_insertion(pair.recipient, [Placement(pair.organ, 1)], "replace"), out),
        "remove": lambda: remove_organs(inserted, out),
        "export": lambda: write_insertion(plan_insertion(pair.recipient, [Placement(pair.organ, 1)]), out, replace_old=True),
    }


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("what", ["extract", "insert", "replace", "remove", "export"])
def test_layers_without_room_leave_nothing(disk: Disk, organs: Pair, what: str, room: int) -> None:
    out = disk.path / "runs" / "out"
    out.parent.mkdir()
    move = movers(organs, out)[what]
    disk.leave(room)
    check_refused(move, out.parent)
    assert disk.files == {"runs"}
    disk.make_room()
    assert move() == out
    if what == "remove":
        assert folder_bytes(out) == folder_bytes(Path(organs.recipient.model))


@pytest.mark.parametrize("what", ["extract", "insert", "remove"])
def test_layers_to_where_nobody_may_write_are_refused(disk: Disk, organs: Pair, what: str) -> None:
    disk.remount("ro")
    check_refused(movers(organs, disk.path / "out")[what], disk.path, READ_ONLY)


def test_the_winner_of_an_organ_sweep_without_room_keeps_the_one_before(disk: Disk, organs: Pair) -> None:
    export = movers(organs, disk.path / "checkpoint")["export"]
    export()
    before = folder_bytes(disk.path)
    disk.leave(5 * PAGE)
    check_refused(export, disk.path)
    disk.make_room()
    assert folder_bytes(disk.path) == before


# Trainings.


def shippers(pair: Pair, out: Path) -> dict[str, Callable[[], object]]:
    """What learners give away, untrained; and the model of a demo."""
    recipient = pair.recipient
    learners = {
        "organ": OrganLearner(recipient, pair.organ),
        "lora": LoraLearner(recipient, rank=16, alpha=16.0),
        "full": FullLearner(recipient),
    }
    ships = {name: partial(learner.ship, {}, out, {}) for name, learner in learners.items()}
    model, tokenizer = load_model(recipient, "float32"), read_tokenizer(recipient)
    record = {"asked": {"family": "llama", "layers": 6, "seed": 0}, "parameters": 1, "tokens": 1, "perplexity": PERPLEXITY}
    return {**ships, "demo": lambda: _write(model, tokenizer, record, out)}


PERPLEXITY = {"contexts": 1, "model": 1.0, "unigram": 1.0, "bigram": 1.0}


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("what", ["organ", "lora", "full", "demo"])
def test_what_was_learnt_is_shipped_whole_or_not(disk: Disk, organs: Pair, what: str, room: int) -> None:
    out = disk.path / "lessons" / "shipped"
    out.parent.mkdir()
    ship = shippers(organs, out)[what]
    disk.leave(room)
    check_refused(ship, out.parent)
    assert disk.files == {"lessons"}
    disk.make_room()
    ship()
    assert list(out.glob("*.safetensors"))


def test_a_tokenizer_without_room_is_said(disk: Disk, organs: Pair) -> None:
    tokenizer = read_tokenizer(organs.recipient)
    disk.leave(PAGE)

    def write() -> None:
        with whole_folder(disk.path / "tokenizer") as folder:
            save_tokenizer(tokenizer, folder)  # type: ignore[arg-type]  # it is one

    check_refused(write, disk.path)
    assert disk.files == set()


LONG = training_spec(steps=4000, held_out=0)
"""Reads 256,000 tokens, which are 125 pages on disk."""


def packed(folder: Path) -> Pack:
    return pack_text(map(Passage, sums(12_000)), tiny_tokenizer(), VOCABULARY, training_cut(LONG), folder)


@pytest.mark.parametrize("room", ROOMS)
def test_a_text_without_room_leaves_nothing(disk: Disk, room: int) -> None:
    disk.leave(room)
    check_refused(lambda: packed(disk.path / "pack"), disk.path)
    assert disk.files == set()
    disk.make_room()
    assert packed(disk.path / "pack").train.num >= 4000 * 4


def test_a_training_without_room_for_its_text_leaves_nothing(disk: Disk, organs: Pair, tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in sums(12_000)))
    spec = LONG.model_copy(update={"data": (str(tmp_path / "text.jsonl"),)})
    organ = Path(organs.organ.checkpoint.folder or "")
    disk.leave(20 * PAGE)
    check_refused(lambda: train(organs.recipient.model, spec, disk.path / "organ", organ=organ), disk.path)
    assert disk.files == set()


@pytest.mark.parametrize("room", ROOMS)
def test_a_checkpoint_without_room_is_not_gone_on_from(disk: Disk, organs: Pair, tmp_path: Path, room: int) -> None:
    training = begin(organs, tmp_path / "pack", steps=1)
    list(training.run())
    folder = disk.path / "checkpoint"
    folder.mkdir()
    disk.leave(room)
    check_refused(lambda: save_progress(training, folder), folder)
    assert read_progress(folder) is None
    disk.make_room()
    save_progress(training, folder)
    assert read_progress(folder) is not None


@pytest.mark.slow
def test_a_training_without_room_for_its_checkpoint_ends_and_can_be_begun_again(
    disk: Disk,
    organs: Pair,
    tmp_path: Path,
    cluster: None,  # noqa: ARG001
) -> None:
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in sums(60)))
    spec = training_spec(data=[str(tmp_path / "text.jsonl")])
    organ = Path(organs.organ.checkpoint.folder or "")

    def run() -> object:
        return train(organs.recipient.model, spec, disk.path / "organ", organ=organ, workers=WorkerSpec(cpus=1))

    disk.leave(30 * PAGE)
    with pytest.raises(RunError, match=FULL):
        run()
    assert "organ" not in disk.files
    disk.make_room()
    run()
    assert disk.files == {"organ", *(f"organ/{path.name}" for path in (disk.path / "organ").iterdir())}


# Tables, report, claims, openings.


@pytest.mark.parametrize("room", ROOMS)
def test_a_table_without_room_keeps_the_one_before(disk: Disk, room: int) -> None:
    path, schema = disk.path / "results.parquet", pa.schema([("text", pa.string())])
    write_rows(path, [{"text": "before"}], schema)
    before = path.read_bytes()
    disk.leave(room)
    rows = [{"text": noise(n, 3000)} for n in range(50)]
    check_refused(lambda: write_rows(path, rows, schema), path)
    assert disk.files == {path.name}
    assert path.read_bytes() == before
    disk.make_room()
    write_rows(path, rows, schema)
    assert list(pd.read_parquet(path)["text"]) == [row["text"] for row in rows]


SMALL = Made(rankers=("lae",), kinds=("all",), ks=(1, 2), num_layers=2, num_examples=20, guards=())


@pytest.mark.parametrize("room", [0, PAGE, 4 * PAGE])
def test_a_report_without_room_is_not_half_there(disk: Disk, room: int) -> None:
    run = write_run(disk.path / "run", SMALL)
    report(run.path)
    whole = {path.name: path.read_bytes() for path in run.reports}
    run.variants_csv.unlink()
    run.variants_tex.unlink()
    disk.leave(room)
    check_refused(lambda: report(run.path), run.path)
    there = {path.name: path.read_bytes() for path in run.reports if path.exists()}
    assert run.report.name in there
    assert there.items() <= whole.items()
    assert not [name for name in disk.files if name.endswith(".part")]
    disk.make_room()
    report(run.path)
    assert {path.name: path.read_bytes() for path in run.reports} == whole


def test_a_report_of_a_run_that_may_not_be_written_is_refused(disk: Disk) -> None:
    write_run(disk.path / "run", SMALL)
    disk.remount("ro")
    check_refused(lambda: report(disk.path / "run"), disk.path, READ_ONLY)


@pytest.mark.parametrize("how", ["full", "ro"])
def test_a_folder_is_claimed_whole_or_not(disk: Disk, how: str) -> None:
    folder = RunFolder(disk.path / "run")
    stop(disk, how)
    check_refused(lambda: folder.claim("identity", "name: run\n"), disk.path, WORDS[how])
    assert disk.files <= {"run"}
    disk.make_room()
    folder.check_owner("identity")
    folder.claim("identity", "name: run\n")
    folder.check_owner("identity")
    with pytest.raises(RunError, match="another recipe"):
        folder.check_owner("another")


@pytest.mark.parametrize("how", ["full", "ro"])
def test_an_opened_test_split_is_counted_when_it_can_be_written(disk: Disk, how: str) -> None:
    folder = RunFolder(disk.path / "run")
    assert folder.open_tests({"task": ["a"]}, "first") == {"task": 1}
    before = folder.openings.read_bytes()
    stop(disk, how)
    many = {f"guard{n}": [noise(n, 10)] for n in range(100)}
    check_refused(lambda: folder.open_tests({"task": ["a"], **many}, "second"), disk.path, WORDS[how])
    assert folder.openings.read_bytes() == before
    disk.make_room()
    assert folder.open_tests({"task": ["a"]}, "second") == {"task": 2}


def test_a_file_without_room_keeps_the_one_before(disk: Disk) -> None:
    path = disk.path / "summary.json"
    write_json(path, {"before": 1})
    disk.leave(0)
    check_refused(lambda: write_json(path, {"text": "x" * 10_000}), path)

    def write_by_hand() -> None:
        with whole_file(path) as temporary, temporary.open("wb") as file:
            file.write(b"x" * 10_000)

    check_refused(write_by_hand, path)
    assert disk.files == {path.name}
    assert path.read_text() == '{\n  "before": 1\n}\n'


# A sweep.


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Disk]:
    yield from mounted(tmp_path / "small", "24m")


@pytest.mark.slow
def test_a_sweep_without_room_for_the_checkpoint_goes_on_from_the_ledger(place: Place, small: Disk, cluster: None) -> None:  # noqa: ARG001
    (place.path / "target" / "notes.txt").write_bytes(
        bytes(30 * 2**20)
    )  # travels with the checkpoint, and is all that does not fit
    recipe = place.recipe(storage=str(small.path / "runs"), guards={"text": None}, sweep={"k": [2], "kind": ["all"]})
    run = RunFolder(small.path / "runs" / "tiny")
    finished = run_main("sweep", recipe)
    assert finished.code == 2, finished.out + finished.err
    said = [line for line in finished.err.splitlines() if "Error" in line]
    assert said == [f"RunError: {run.checkpoint}: cannot be written (No space left on device). Free space or choose another place."]
    assert "Traceback" not in finished.err
    assert not [path for path in (run.checkpoint, run.delta, run.results, run.summary, run.report) if path.exists()]
    assert not [name for name in small.files if name.endswith(".part")]
    written = sum(len(pd.read_parquet(path)) for path in small.path.rglob("*.parquet") if ".ledger" in path.parts)
    assert written

    small.remount("rw,size=256m")
    finished = run_main("sweep", recipe)
    assert finished.code == 0, finished.err
    assert "taken from the ledger" in finished.out
    assert run.read_summary()["recalled"] >= written
    assert run.read_summary()["test_opened"] == 1
    assert (run.checkpoint / "notes.txt").stat().st_size == 30 * 2**20
    assert read_results(run.path)["error"].isna().all()


def test_answers_without_room_are_said_and_those_before_are_there(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where temporary files are, for the spool is one."""
    monkeypatch.setattr(tempfile, "tempdir", str(disk.path))
    monkeypatch.setattr(spools, "IN_MEMORY", 3 * PAGE)
    spool = Spool()
    said = [tuple(Outcome("v", f"e{i}", noise((part, i), PAGE), True, 3, True) for i in range(3)) for part in range(2)]
    first = spool.keep(said[0])
    disk.leave(2 * PAGE)
    for _ in range(2):
        with pytest.raises(RunError, match=f"answers cannot be kept in {disk.path}: No space left on device") as caught:
            spool.keep(said[1])
        assert "TMPDIR" in str(caught.value)
    disk.make_room()
    assert (spool.read(first), spool.read(spool.keep(said[1]))) == tuple(said)
    assert disk.files == set(), "it has no name"
