"""Writing changed copies of a checkpoint: what must differ differs, everything else keeps its bytes."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from header_files import sparse_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import DEEP_FAMILIES, save_tiny, tiny_config, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from transplant_ray.errors import CheckpointError
from transplant_ray.models import writing
from transplant_ray.models.checkpoint import SINGLE, Checkpoint, open_checkpoint
from transplant_ray.models.header import DTYPES, TensorInfo, header_text, parse_header, read_header
from transplant_ray.models.loading import load_tensors
from transplant_ray.models.writing import (
    MakeTensor,
    make_header,
    overwrite_tensor,
    stored_pieces,
    write_checkpoint,
    write_parts,
    write_safetensors,
)

NAMES = {dtype: name for name, dtype in DTYPES.items()}
Q, UP = "model.layers.1.self_attn.q_proj.weight", "model.layers.2.mlp.up_proj.weight"


def written(base: Checkpoint, replaced: Mapping[str, MakeTensor], out: Path) -> Checkpoint:
    out.mkdir()
    write_checkpoint(base, replaced, out)
    return open_checkpoint(str(out))


@pytest.fixture(params=["50GB", "20KB"], ids=["single", "sharded"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Checkpoint:
    return open_checkpoint(str(save_tiny(tmp_path / "base", shard=request.param)))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# -- whole checkpoints -------------------------------------------------------------------------------------------------------


def test_nothing_replaced_is_a_copy_byte_for_byte(base: Checkpoint, tmp_path: Path) -> None:
    assert files(written(base, {}, tmp_path / "out").fetch()) == files(base.fetch())


def test_only_the_bytes_of_replaced_tensors_differ(base: Checkpoint, tmp_path: Path) -> None:
    before = files(base.fetch())
    new = {name: torch.full(base.tensors[name].shape, -7.0) for name in (Q, UP)}
    after = files(written(base, {name: lambda name=name: new[name] for name in new}, tmp_path / "out").fetch())
    expected = {name: bytearray(content) for name, content in before.items()}
    for name, tensor in new.items():
        info = base.tensors[name]
        expected[info.file][info.start : info.start + info.num_bytes] = tensor.numpy().tobytes()
    assert expected == after
    assert {name for name in before if before[name] != after[name]} == {base.tensors[name].file for name in (Q, UP)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_changed_copy_is_loaded_by_transformers_with_the_new_tensors(dtype: torch.dtype, tmp_path: Path) -> None:
    target, source = tiny_model("llama", 1, dtype), tiny_model("llama", 2, dtype)
    target.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    new = {name: source.state_dict()[name] for name in (Q, UP)}
    written(open_checkpoint(str(tmp_path / "base")), {name: lambda t=t: t for name, t in new.items()}, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert loaded.keys() == target.state_dict().keys()
    assert all(torch.equal(tensor, new.get(name, target.state_dict()[name])) for name, tensor in loaded.items())


@pytest.mark.parametrize("family", DEEP_FAMILIES)
def test_a_copy_of_a_copy_undoes_the_change(family: str, tmp_path: Path) -> None:
    base = open_checkpoint(str(save_tiny(tmp_path / "base", family, shard="20KB")))
    name = max(base.tensors, key=lambda name: base.tensors[name].num_bytes)
    stored = load_file(base.fetch() / base.tensors[name].file)[name]
    changed = written(base, {name: lambda: stored + 1}, tmp_path / "changed")
    assert files(changed.fetch()) != files(base.fetch())
    assert files(written(changed, {name: lambda: stored}, tmp_path / "undone").fetch()) == files(base.fetch())


@pytest.mark.parametrize("view", [torch.arange(2048.0).view(32, 64)[:, ::2].T, torch.arange(64.0)[::2], torch.ones(1).expand(8, 4)])
def test_a_view_is_written_as_what_it_shows(view: torch.Tensor, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(view.shape), "b": torch.zeros(3)}, tmp_path / SINGLE)
    overwrite_tensor(tmp_path / SINGLE, "a", read_header(tmp_path / SINGLE)["a"], view)
    after = load_file(tmp_path / SINGLE)
    assert torch.equal(after["a"], view)
    assert torch.equal(after["b"], torch.zeros(3))


@pytest.mark.parametrize("tensor", [torch.zeros(32, 31), torch.zeros(1024), torch.zeros(32, 32, dtype=torch.bfloat16)])
def test_a_tensor_of_another_shape_or_dtype_is_refused(tensor: torch.Tensor, base: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"{Q}: {tensor.dtype} .* cannot replace F32 \(32, 32\)"):
        written(base, {Q: lambda: tensor}, tmp_path / "out")


def test_tensors_are_made_one_at_a_time_and_after_the_file_is_there(base: Checkpoint, tmp_path: Path) -> None:
    made: list[str] = []

    def make(name: str) -> torch.Tensor:
        assert (tmp_path / "out" / base.tensors[name].file).stat().st_size == (
            base.fetch() / base.tensors[name].file
        ).stat().st_size
        made.append(name)
        return torch.zeros(base.tensors[name].shape)

    written(base, {name: lambda name=name: make(name) for name in (UP, Q)}, tmp_path / "out")
    assert sorted(made) == sorted([Q, UP])


COMPANIONS = [
    "tokenizer.model",
    "merges.txt",
    "chat_template.jinja",
    "extra.json",
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
    "NOTICE.md",
]
STRANGERS = [
    "pytorch_model.bin",
    "training_args.bin",
    "optimizer.pt",
    "consolidated.00.pth",
    "x.pkl",
    "README.md",
    "code.py",
    "other.safetensors",
]


def test_companions_travel_and_pickles_and_strangers_do_not(base: Checkpoint, tmp_path: Path) -> None:
    own = {path.name for path in base.fetch().iterdir()}
    for name in (*COMPANIONS, *STRANGERS):
        (base.fetch() / name).write_text(name)
    (base.fetch() / "folder.json").mkdir()
    out = written(base, {}, tmp_path / "out").fetch()
    assert {path.name for path in out.iterdir()} == own | set(COMPANIONS)
    assert all((out / name).read_text() == name for name in COMPANIONS)
    assert AutoTokenizer.from_pretrained(out)("ab")["input_ids"] == [1, 3, 4]


def test_code_travels_where_the_recipe_accepts_it(base: Checkpoint, tmp_path: Path) -> None:
    (base.fetch() / "modeling.py").write_text("")
    written(open_checkpoint(base.model, accept=["remote_code"]), {}, tmp_path / "out")
    assert (tmp_path / "out" / "modeling.py").exists()


def test_links_into_a_hub_cache_become_files(base: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "links").mkdir()
    for path in base.fetch().iterdir():
        (tmp_path / "links" / path.name).symlink_to(path)
    before = files(base.fetch())
    out = written(open_checkpoint(str(tmp_path / "links")), {Q: lambda: torch.zeros(32, 32)}, tmp_path / "out").fetch()
    assert not any(path.is_symlink() for path in out.iterdir())
    assert files(base.fetch()) == before


# -- single files ------------------------------------------------------------------------------------------------------------

shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
contents = st.dictionaries(
    st.text('a.é"', min_size=1, max_size=5), st.tuples(st.sampled_from(sorted(NAMES.values())), shapes), max_size=5
)


@given(contents)
@settings(max_examples=40, deadline=None)
def test_the_librarys_own_reader_gives_back_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, described: dict[str, tuple[str, tuple[int, ...]]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    tensors = {name: (torch.rand(shape) * 9).to(DTYPES[dtype]) for name, (dtype, shape) in described.items()}
    layout = {name: TensorInfo("", NAMES[t.dtype], tuple(t.shape), 0, t.numel() * t.element_size()) for name, t in tensors.items()}
    write_safetensors(path, layout, {name: lambda t=t: t for name, t in tensors.items()})
    found = load_file(path)
    assert found.keys() == tensors.keys() == read_header(path).keys()
    assert all(found[name].dtype == t.dtype and torch.equal(found[name], t) for name, t in tensors.items())
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0


def test_a_file_of_changes_refuses_what_does_not_fit_its_header(tmp_path: Path) -> None:
    layout = {"a": TensorInfo("", "F32", (2, 3), 0, 24)}
    for wrong in (torch.zeros(3, 2), torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.int32)):
        with pytest.raises(CheckpointError, match=r"a: .* cannot replace F32 \(2, 3\)"):
            write_safetensors(tmp_path / "a.safetensors", layout, {"a": lambda wrong=wrong: wrong})


@pytest.mark.parametrize("dtype", sorted(NAMES.values()))
def test_overwriting_one_tensor_leaves_its_neighbours(dtype: str, tmp_path: Path) -> None:
    path = tmp_path / SINGLE
    before = {name: (torch.rand(3, 5) * 9).to(DTYPES[dtype]) for name in "abc"}
    save_file(before, path)
    new = (torch.rand(3, 5) * 9).to(DTYPES[dtype])
    overwrite_tensor(path, "b", read_header(path)["b"], new)
    after = load_file(path)
    assert all(torch.equal(after[name], tensor) for name, tensor in (before | {"b": new}).items())


# -- memory ------------------------------------------------------------------------------------------------------------------


def process_bytes(key: str) -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith(key))


def peak_of(work: Callable[[], object]) -> int:
    """Bytes of memory, mapped files included, that this process needs at most during `work` over what it has before."""
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 1_000_000)  # M_MMAP_THRESHOLD: tensors come from the system and go back to it, so that all use shows
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the highest mark so far is forgotten
    before = process_bytes("VmRSS")
    work()
    return process_bytes("VmHWM") - before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="measured by what Linux and glibc tell")
def test_blending_a_large_checkpoint_needs_less_memory_than_its_largest_shard(tmp_path: Path) -> None:
    shape = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 8}
    base, source = (
        open_checkpoint(str(sparse_checkpoint(tmp_path / role, tiny_config("llama", **shape), "F32", shard_bytes=50_000_000)))
        for role in ("target", "source")
    )
    replaced = {
        name: lambda name=name: torch.lerp(load_tensors(base, [name])[name], load_tensors(source, [name])[name], 0.5)
        for name in base.tensors
        if ".mlp." in name
    }
    sizes = [(base.fetch() / file).stat().st_size for file in base.weight_files()]
    assert (sum(sizes) > 200_000_000, len(sizes) > 3) == (True, True)
    assert 20_000_000 < peak_of(lambda: written(base, replaced, tmp_path / "out")) <= 1.2 * max(sizes)


# -- tensors that are only moved ----------------------------------------------------------------------------------------------


def test_a_file_of_the_librarys_can_be_made_again_to_the_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Header and all, in pieces smaller than a tensor."""
    path = save_tiny(tmp_path / "model") / SINGLE
    monkeypatch.setattr(writing, "PIECE_BYTES", 1000)
    layout = dict(sorted(read_header(path).items(), key=lambda item: item[1].start))
    write_parts(tmp_path / "again", make_header(layout, {"format": "pt"}), (stored_pieces(path, info) for info in layout.values()))
    assert (tmp_path / "again").read_bytes() == path.read_bytes()
    assert parse_header(path, header_text(path)[0]) == read_header(path)


def test_metadata_may_be_absent(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "with", {"format": "pt"})
    save_file({"a": torch.ones(3)}, tmp_path / "without")
    layout = read_header(tmp_path / "with")
    assert make_header(layout, {"format": "pt"}) == header_text(tmp_path / "with")[0]
    assert make_header(layout, None) == header_text(tmp_path / "without")[0]


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(300)}, tmp_path / "x.safetensors")
    info = read_header(tmp_path / "x.safetensors")["a"]
    with (tmp_path / "x.safetensors").open("r+b") as file:
        file.truncate(info.start + 5)
    with pytest.raises(CheckpointError, match=r"x\.safetensors: became shorter while it was read"):
        list(stored_pieces(tmp_path / "x.safetensors", info))
    with pytest.raises(CheckpointError, match=r"gone: cannot be read \(No such file"):
        list(stored_pieces(tmp_path / "gone", info))
