"""A model with organs appears whole or not at all, says what it is, and gives its recipient back or says why not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hostile import Hand, ends_well
from safetensors.torch import load_file, save_file
from stacks import Pair, contents, make_pair

from transplant_ray.errors import CheckpointError, OrganError, RunError
from transplant_ray.models.checkpoint import open_checkpoint
from transplant_ray.organ import extract, folder, insert, remove
from transplant_ray.organ.extract import extract_organ
from transplant_ray.organ.folder import open_organ
from transplant_ray.organ.insert import write_insertion
from transplant_ray.organ.insertion import Insertion, Mode, Placement, plan_insertion
from transplant_ray.organ.remove import remove_organs

Damage = Callable[[Path], object]
FULL = OSError(28, "No space left on device")


def planned(pair: Pair, *positions: int, mode: Mode = "insert") -> Insertion:
    return plan_insertion(pair.recipient, [Placement(pair.organ, at) for at in positions], mode)


@pytest.fixture(scope="module")
def inserted(llama: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_insertion(planned(llama, 1, 4), tmp_path_factory.mktemp("inserted") / "model")


# -- nothing half-written -------------------------------------------------------------------------------------------------


def fail_after(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, calls: int, failure: BaseException) -> None:
    real, count = getattr(module, name), iter(range(calls + 1))

    def failing(*args: Any, **settings: Any) -> Any:
        if next(count) == calls:
            raise failure
        return real(*args, **settings)

    monkeypatch.setattr(module, name, failing)


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), FULL])
@pytest.mark.parametrize(
    ("module", "name", "calls"), [(insert, "stored_pieces", 9), (insert, "load_tensors", 2), (insert, "write_json", 0)]
)
def test_a_failed_insertion_leaves_nothing(
    llama: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any, name: str, calls: int, failure: BaseException
) -> None:
    insertion = planned(llama, 1)
    fail_after(monkeypatch, module, name, calls, failure)
    expected = RunError if failure is FULL else KeyboardInterrupt
    with pytest.raises(expected):
        write_insertion(insertion, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    write_insertion(insertion, tmp_path / "out")


@pytest.mark.parametrize(("module", "name"), [(extract, "load_tensors"), (folder, "write_json"), (folder, "sha256_file")])
def test_a_failed_extraction_leaves_nothing(
    llama: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any, name: str
) -> None:
    fail_after(monkeypatch, module, name, 0, FULL)
    with pytest.raises(RunError, match=r"organ: cannot be written \(No space left on device\)\. Free space"):
        extract_organ(llama.source, "4", tmp_path / "organ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "calls"), [("stored_pieces", 5), ("sha256_file", 0), ("sha256_file", 3)])
def test_a_failed_removal_leaves_nothing(
    inserted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, calls: int
) -> None:
    fail_after(monkeypatch, remove, name, calls, FULL)
    with pytest.raises(RunError, match="No space left on device"):
        remove_organs(inserted, tmp_path / "back")
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_not_overwritten(llama: Pair, inserted: Path) -> None:
    before = contents(inserted)
    for write in (lambda: write_insertion(planned(llama, 1), inserted), lambda: remove_organs(inserted, inserted)):
        with pytest.raises(RunError, match="is there already"):
            write()
    assert contents(inserted) == before


# -- what it says ---------------------------------------------------------------------------------------------------------


def test_the_record_and_the_card_say_where_every_layer_comes_from(llama: Pair, inserted: Path) -> None:
    record, card = json.loads((inserted / "insertion.json").read_text()), (inserted / "README.md").read_text()
    organ = llama.organ.manifest
    assert [(each["at"], each["fingerprint"], each["layers"]) for each in record["organs"]] == [
        (1, organ.fingerprint, "1-3"), (4, organ.fingerprint, "1-3"),
    ]  # fmt: skip
    assert record["recipient"] == llama.recipient.model
    assert [(layer["organ"], layer["index"]) for layer in record["layers"][:5]] == [(None, 0), (0, 0), (0, 1), (0, 2), (None, 1)]
    for line in ("- 0: layer 0 of the recipient", f"- 1: layer 0 of organ `{organ.id}`", "- 11: layer 5 of the recipient"):
        assert line in card.splitlines()
    assert f"before layer 4: layers 1-3 of `{llama.source.model}`" in card


def test_the_recipients_own_tensors_are_its_bytes(llama: Pair, inserted: Path) -> None:
    before, after = load_file(Path(llama.recipient.model) / "model.safetensors"), load_file(inserted / "model.safetensors")
    places = [index for index, layer in enumerate(planned(llama, 1, 4).layers) if layer.organ is None]
    for name, tensor in before.items():
        prefix, _, rest = name.partition("model.layers.")
        layer, _, path = rest.partition(".")
        new = f"model.layers.{places[int(layer)]}.{path}" if not prefix and layer.isdigit() else name
        assert after[new].equal(tensor)
    assert len(after) == len(before) + 2 * 27


def test_a_card_of_the_recipient_comes_back(llama: Pair, tmp_path: Path) -> None:
    own = Path(shutil.copytree(llama.recipient.model, tmp_path / "own"))
    (own / "README.md").write_text("---\nlicense: mit\n---\n# Mine")
    (own / "NOTICE").write_text("notice")
    write_insertion(plan_insertion(open_checkpoint(str(own)), [Placement(llama.organ, 1)]), tmp_path / "out")
    remove_organs(tmp_path / "out", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(own)


def licensed(pair: Pair, place: Path, recipient: str, organ: str | None) -> Insertion:
    """Of a recipient and an organ with licences and their files."""
    own = Path(shutil.copytree(pair.recipient.model, place / "own"))
    (own / "README.md").write_text(f"---\nlicense: {recipient}\n---\n# Mine")
    (own / "LICENSE").write_text("the recipient's")
    source = Path(shutil.copytree(pair.source.model, place / "source"))
    for name in ("LICENSE", "NOTICE.txt"):
        (source / name).write_text(f"the organ's {name}")
    cut = open_organ(extract_organ(open_checkpoint(str(source)), "1-3", place / "organ", organ))
    return plan_insertion(replace(open_checkpoint(str(own)), revision="abc"), [Placement(cut, 1)])


@pytest.mark.parametrize(("organ", "front"), [("mit", {"license": "mit"}), ("apache-2.0", {}), (None, {})])
def test_licences_of_recipient_and_organ_are_said(llama: Pair, tmp_path: Path, organ: str | None, front: dict[str, str]) -> None:
    card = (write_insertion(licensed(llama, tmp_path, "mit", organ), tmp_path / "out") / "README.md").read_text()
    said = yaml.safe_load(card.split("---")[1])
    assert said == {"library_name": "transformers", "tags": ["transplant-ray"], **front}
    assert f"put into `{tmp_path / 'own'}`, revision `abc` (mode `insert`)" in card
    assert "Licence of the recipient: mit." in card
    assert f"licence: {organ or 'not said'}" in card
    record = json.loads((tmp_path / "out" / "insertion.json").read_text())
    assert (record["licence"], record["organs"][0]["licence"]) == ("mit", organ)


def test_licence_files_of_an_organ_go_along_and_the_recipient_comes_back(llama: Pair, tmp_path: Path) -> None:
    insertion = licensed(llama, tmp_path, "mit", "mit")
    organ = insertion.placements[0].organ
    out = write_insertion(insertion, tmp_path / "out")
    names = [f"LICENSE.organ-{organ.manifest.id}", f"NOTICE.txt.organ-{organ.manifest.id}"]
    assert [(out / name).read_text() for name in names] == ["the organ's LICENSE", "the organ's NOTICE.txt"]
    assert (out / "LICENSE").read_text() == "the recipient's"
    card = (out / "README.md").read_text()
    assert all(f"Came with an organ: `{name}`." in card for name in names)
    (out / names[0]).write_text("as somebody mended it")
    before = contents(out)
    write_insertion(plan_insertion(open_checkpoint(str(out)), [Placement(organ, 8)]), tmp_path / "twice")  # the same again
    remove_organs(tmp_path / "twice", tmp_path / "once")
    assert contents(tmp_path / "once") == before
    remove_organs(tmp_path / "once", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(tmp_path / "own")


def test_a_header_that_another_library_wrote_comes_back(llama: Pair, tmp_path: Path) -> None:
    """Other order, spaces, no metadata."""
    own = Path(shutil.copytree(llama.recipient.model, tmp_path / "own"))
    content = (own / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header.pop("__metadata__")
    text = json.dumps(dict(reversed(header.items())), indent=1).encode()
    (own / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + content[end:])
    for mode in ("insert", "replace"):
        write_insertion(plan_insertion(open_checkpoint(str(own)), [Placement(llama.organ, 1)], mode), tmp_path / mode)  # type: ignore[arg-type]
        remove_organs(tmp_path / mode, tmp_path / f"back-{mode}")
        assert contents(tmp_path / f"back-{mode}") == contents(own)
    same = plan_insertion(open_checkpoint(str(own)), [Placement(llama.organ, 1)], "replace")
    write_insertion(same, tmp_path / "same")
    assert (tmp_path / "same" / "model.safetensors").read_bytes()[: 8 + len(text)] == (own / "model.safetensors").read_bytes()[
        : 8 + len(text)
    ]


# -- what is not given back -----------------------------------------------------------------------------------------------


def weights(change: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(model: Path) -> None:
        tensors = load_file(model / "model.safetensors")
        change(tensors)
        save_file(tensors, model / "model.safetensors", {"format": "pt"})

    return damage


def record(change: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(model: Path) -> None:
        said = json.loads((model / "insertion.json").read_text())
        change(said)
        (model / "insertion.json").write_text(json.dumps(said))

    return damage


CHANGES: dict[str, tuple[Damage, str]] = {
    "a tensor of the recipient": (
        weights(lambda t: t["model.layers.0.mlp.up_proj.weight"].mul_(2)),
        "model.safetensors would not be what the recipient had, for it was changed",
    ),
    "its embedding": (weights(lambda t: t["model.embed_tokens.weight"].mul_(2)), "model.safetensors would not be"),
    "a tensor that is gone": (weights(lambda t: t.pop("model.layers.0.mlp.up_proj.weight")), "mlp.up_proj.weight is missing"),
    "its tokenizer": (lambda m: (m / "tokenizer.json").write_text("{}"), "tokenizer.json would not be"),
    "a file that is gone": (lambda m: (m / "generation_config.json").unlink(), "generation_config.json is missing. Copy the model"),
    "the config that was kept": (lambda m: (m / "undo" / "config.json").write_text("{}"), "config.json would not be"),
    "all that was kept": (lambda m: shutil.rmtree(m / "undo"), "would not be"),
    "a header that was kept": (lambda m: (m / "undo" / "model.safetensors.json").write_text("{"), "header is corrupt"),
    "no record": (lambda m: (m / "insertion.json").unlink(), "nothing can be taken out.*`organ insert` wrote"),
    "a record that is none": (lambda m: (m / "insertion.json").write_text("[]"), "nothing can be taken out"),
    "another format": (record(lambda r: r.update(format=2)), "nothing can be taken out"),
    "layers in another order": (record(lambda r: r["layers"].reverse()), "would not be what the recipient had"),
    "a file outside": (record(lambda r: r["files"].update({"../../x": "0"})), "'../../x' is not a file inside"),
    "a file anywhere": (record(lambda r: r["files"].update({"/tmp/x": "0"})), "'/tmp/x' is not a file inside"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_what_would_not_be_the_recipient_is_not_written(inserted: Path, tmp_path: Path, name: str) -> None:
    damage, words = CHANGES[name]
    model = Path(shutil.copytree(inserted, tmp_path / "model"))
    damage(model)
    with pytest.raises((OrganError, CheckpointError), match=words) as raised:
        remove_organs(model, tmp_path / "back")
    assert str(tmp_path) in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_organ_that_was_changed_since_comes_out_all_the_same(inserted: Path, llama: Pair, tmp_path: Path) -> None:
    """It may have been trained on: only what was the recipient's has to be its own."""
    model = Path(shutil.copytree(inserted, tmp_path / "model"))
    weights(lambda tensors: tensors["model.layers.2.mlp.up_proj.weight"].mul_(2))(model)
    remove_organs(model, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(Path(llama.recipient.model))


def test_a_recipient_whose_shards_hold_more_than_its_index_comes_back(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, shard="60KB")
    index = Path(pair.recipient.model) / "model.safetensors.index.json"
    said = json.loads(index.read_text())
    del said["weight_map"]["lm_head.weight"]
    index.write_text(json.dumps({**said, "metadata": {}}))
    config = Path(pair.recipient.model) / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "tie_word_embeddings": True}))
    recipient = open_checkpoint(pair.recipient.model)
    write_insertion(plan_insertion(recipient, [Placement(pair.organ, 2)]), tmp_path / "out")
    remove_organs(tmp_path / "out", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(Path(pair.recipient.model))


@pytest.mark.parametrize("seed", range(60))
def test_a_spoilt_record_is_followed_or_refused_and_writes_nowhere_else(inserted: Path, tmp_path: Path, seed: int) -> None:
    hand = Hand(f"record {seed}", values=("../out", "undo", "undo/config.json", "model.safetensors", "a/../../b"))
    model = Path(shutil.copytree(inserted, tmp_path / "model"))
    kept = model / "undo" / "model.safetensors.json"
    spoilt = model / "insertion.json" if seed % 3 else kept
    spoilt.write_text(hand.json(json.loads(spoilt.read_text())))
    before = contents(model)
    ended_well = ends_well(lambda: remove_organs(model, tmp_path / "back"))
    assert {path.name for path in tmp_path.iterdir()} == ({"model", "back"} if ended_well else {"model"})
    assert contents(model) == before
