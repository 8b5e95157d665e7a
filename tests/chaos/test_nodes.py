"""Nodes that join, leave or are not as they should be, without a model: evaluators here only sleep."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import ray
from chaos.machines import Machines, machines
from ray.actor import ActorHandle

from transplant_ray.distributed.cluster import Capacity, wait_for_room
from transplant_ray.distributed.fleet import RESIZE_SECONDS, fleet
from transplant_ray.distributed.overseer import Overseer
from transplant_ray.distributed.pool import Pool, Work
from transplant_ray.distributed.preflight import COMPARED, Needs, preflight
from transplant_ray.distributed.room import Refused
from transplant_ray.errors import ResourceError
from transplant_ray.evaluate.answers import VariantShard
from transplant_ray.evaluate.example import Rendered
from transplant_ray.evaluate.generate import GenerationSettings, Rules
from transplant_ray.evaluate.outcome import Outcome
from transplant_ray.graft.variant import Variant
from transplant_ray.recipe import ResourceSpec
from transplant_ray.shelf import Shelf
from transplant_ray.versions import versions

RULES = Rules(GenerationSettings(4, (2,)), "exact")
EXAMPLES = tuple(Rendered(f"e{i}", (1, i), (2,), "x") for i in range(2))
AUTO = ResourceSpec(gpus_per_model=1, evaluators="auto")
PATIENCE = 120
LARGE = 200_000
"""Bytes of a completion: objects from 100 kB on are kept by the node where they were made, and are lost with it."""


@ray.remote
class Sleeper:
    """Answers after a nap, with the id of its node, and with more than Ray sends along: it stays on that node till it is read."""

    def join(self) -> str:
        return str(ray.get_runtime_context().get_node_id())

    def evaluate(
        self, variants: Sequence[Variant], examples: Sequence[Rendered], _rules: Rules, _rows: int
    ) -> Iterator[VariantShard]:
        for variant in variants:
            time.sleep(0.15)
            said = self.join() + " " * LARGE
            yield VariantShard(variant.id, tuple(Outcome(variant.id, e.id, said, True, 1, True) for e in examples), 1.0)


@pytest.fixture
def nodes() -> Iterator[Machines]:
    with machines() as gathered:
        ray.init(address=gathered.address, log_to_driver=False)
        yield gathered
        ray.shutdown()


def pretended(folder: Path, package: str) -> dict[str, str]:
    """Environment in which a package says that it is of another version."""
    information = folder / f"{package}-0.0.1.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.0.1\n")
    return {"PYTHONPATH": str(folder)}


def alive() -> int:
    return sum(node["Alive"] for node in ray.nodes())


def wait_for(number: int) -> None:
    end = time.monotonic() + PATIENCE
    while alive() != number:
        assert time.monotonic() < end, f"{alive()} nodes are alive, expected {number}"
        time.sleep(0.2)


def test_the_fleet_grows_with_the_cluster_and_shrinks_with_it_and_loses_nothing(nodes: Machines) -> None:
    nodes.kill("target")
    wait_for(2)
    capacity = Capacity(AUTO)
    shards: list[VariantShard] = []
    places: list[str] = []
    sizes: list[int] = []
    given: list[Variant] = []

    def start(refused: Refused) -> ActorHandle:
        return capacity.start(Sleeper, "evaluator", refused=refused)

    def work() -> Iterator[Work]:
        """As much as it takes until a node has joined and another has died, and some more."""
        end = time.monotonic() + 2 * PATIENCE
        more = 4
        while more and time.monotonic() < end:
            more -= "source" not in nodes.nodes
            pack = tuple(Variant({f"module{len(given) + i}": 1.0}) for i in range(16))
            given.extend(pack)
            yield Work(pack, EXAMPLES, RULES)

    def take(shard: VariantShard) -> None:
        shards.append(shard)
        places.append(shard.outcomes[0].completion.strip())
        sizes.append(len(gathered))
        if len(shards) == 40:
            nodes.add("target")
        came = [place for place in set(places) if place != places[0]]
        if came and len(nodes.nodes) == 2 and places.count(came[0]) == 20:
            time.sleep(1)  # so that there are answers on it which nobody has read
            nodes.kill("source")

    with fleet(start, capacity.evaluators, Overseer(), print) as gathered:
        Pool(gathered, rows=8).run(work(), take)
        assert Counter(shard.variant for shard in shards) == dict.fromkeys((variant.id for variant in given), 1)
        assert not [shard for shard in shards if shard.error]
        assert len(set(places)) == 2, "the node that joined was given work"
        assert max(sizes) == 2
        end = time.monotonic() + PATIENCE
        while len(gathered) > 1 and time.monotonic() < end:
            time.sleep(0.5)
            gathered.resize()
        assert len(gathered) == 1, "the one whose node is gone is waited for no longer"


@pytest.mark.slow
def test_a_cluster_that_grows_is_shown_that_more_is_of_use(nodes: Machines) -> None:
    """One actor waits in vain till its node has come. A newcomer keeps off a node that was refused."""
    nodes.kill("target")
    wait_for(2)
    capacity = Capacity(AUTO.model_copy(update={"wait": PATIENCE}))
    places: list[str] = []

    def start(refused: Refused) -> ActorHandle:
        return capacity.start(Sleeper, "evaluator", refused=refused)

    def work() -> Iterator[Work]:
        end = time.monotonic() + 2 * PATIENCE
        while len(set(places)) < 2 and time.monotonic() < end:
            yield Work(tuple(Variant({f"module{len(places)}-{i}": 1.0}) for i in range(4)), EXAMPLES, RULES)

    def take(shard: VariantShard) -> None:
        places.append(shard.outcomes[0].completion.strip())
        if len(gathered.joining) == 1 and "target" not in nodes.nodes:
            nodes.add("target")

    with fleet(start, capacity.evaluators, Overseer(), print, grows=capacity.grows) as gathered:
        Pool(gathered, rows=8).run(work(), take)
        assert len(set(places)) == 2, "whoever waited went to the node that came"
        assert len(gathered) == 2, "nobody waits where no work does"
    avoided = Capacity(AUTO).start(Sleeper, "evaluator", refused={places[0]: 1})
    assert ray.get(avoided.join.remote(), timeout=PATIENCE) != places[0]


@pytest.mark.slow
def test_one_evaluator_outlives_its_nodes_as_ray_sees_them_die_by_itself() -> None:
    """One that is at work, and one that is idle; a node is known as dead after some fifteen seconds."""
    with machines(_system_config={}) as nodes:
        ray.init(address=nodes.address, log_to_driver=False)
        try:
            capacity = Capacity(AUTO.model_copy(update={"evaluators": 1}))
            packs = [tuple(Variant({f"module{number}-{i}": 1.0}) for i in range(16)) for number in range(3)]
            places: list[str] = []

            def kill(place: str) -> None:
                (role,) = [role for role, node in nodes.nodes.items() if node.node_id == place]
                nodes.kill(role)

            def take(shard: VariantShard) -> None:
                assert shard.error is None
                places.append(shard.outcomes[0].completion.strip())
                if len(places) == 4:
                    kill(places[0])
                    nodes.add("another")

            with fleet(
                lambda refused: capacity.start(Sleeper, "evaluator", refused=refused), lambda _: 1, Overseer(), print
            ) as one:
                Pool(one, rows=8).run([Work(pack, EXAMPLES, RULES) for pack in packs[:2]], take)
                assert len(places) == 32
                assert len(set(places)) == 2
                kill(places[-1])
                wait_for(2)
                time.sleep(RESIZE_SECONDS)  # after which it is looked around again
                Pool(one, rows=8).run([Work(packs[2], EXAMPLES, RULES)], take)
            assert len(places) == 48
            assert len(set(places)) == 3
        finally:
            ray.shutdown()


@pytest.mark.slow
def test_what_is_not_there_yet_is_waited_for(nodes: Machines) -> None:
    three = ResourceSpec(gpus_per_model=1, evaluators=3, wait=PATIENCE)
    with pytest.raises(ResourceError, match=r"3 evaluators with 1 GPUs .* which is 2 of them after 1 seconds"):
        wait_for_room(three.model_copy(update={"wait": 1}))
    nodes.add("third")
    wait_for_room(three)


def test_a_node_with_other_libraries_is_named_before_anything_starts(nodes: Machines, tmp_path: Path) -> None:
    needs = Needs({}, ("exact",), Shelf(str(tmp_path / "runs")), None, versions(COMPARED))
    notes: list[str] = []
    assert preflight(needs, AUTO, notes.append) == 2
    assert [note for note in notes if "Ray promises 1 GPUs and there are none" in note] == notes
    assert len(notes) == 2
    assert list((tmp_path / "runs").iterdir()) == []

    nodes.add("third", env_vars=pretended(tmp_path / "third", "math_verify"))
    nodes.add("fourth", env_vars=pretended(tmp_path / "fourth", "safetensors"))  # which transformers refuses to be imported beside
    with pytest.raises(ResourceError) as raised:
        preflight(needs, AUTO, notes.append)
    title, *told = str(raised.value).splitlines()
    assert title == "preflight: nothing was started."
    said = {role: [line for line in told if line.startswith(f"node {nodes.nodes[role].node_id[:8]} (")] for role in nodes.nodes}
    assert {role: len(lines) for role, lines in said.items()} == {"source": 0, "target": 0, "third": 1, "fourth": 1}
    assert "other versions: math-verify 0.0.1 (the driver has" in said["third"][0]
    assert "could not look (" in said["fourth"][0]
    assert "safetensors==0.0.1" in said["fourth"][0]
