"""Work after the death of an evaluator: nothing answered is asked again, and one variant that kills takes no other with it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from transplant_ray.distributed.pool import MOST_DEATHS, MOST_NODES, Work
from transplant_ray.evaluate.generate import GenerationSettings, Rules
from transplant_ray.graft.variant import Variant

RULES = Rules(GenerationSettings(4, (2,)), "exact")
VARIANTS = tuple(Variant({f"m{i}": 1.0}) for i in range(8))


@given(st.sets(st.integers(0, 7)), st.integers(0, 7).flatmap(lambda n: st.lists(st.integers(0, 7), max_size=n, unique=True)))
def test_every_variant_is_answered_once_or_given_up(killers: set[int], unlucky: list[int]) -> None:
    """`killers` kill always; over the `unlucky` an evaluator dies once, for a reason of its own."""
    waiting, answered, given_up, left_unlucky = [Work(VARIANTS, (), RULES)], [], [], list(unlucky)
    num_deaths = 0
    while waiting:
        work, mine, died = waiting.pop(0), [], False
        for variant in work.variants:
            place = VARIANTS.index(variant)
            if place in killers or place in left_unlucky:
                died = True
                if place in left_unlucky:
                    left_unlucky.remove(place)
                break
            mine.append(variant.id)
        answered += mine
        if died:
            num_deaths += 1
            again, lost = work.after_a_death(mine, "node", {"node"})
            waiting = again + waiting
            given_up += [lost] if lost else []
    assert {VARIANTS.index(variant) for variant in given_up} == killers
    assert sorted(answered) == sorted(variant.id for place, variant in enumerate(VARIANTS) if place not in killers)
    assert num_deaths <= 2 * MOST_DEATHS * len(killers) + len(unlucky)


def test_what_takes_one_node_after_another_with_it_is_given_up_too() -> None:
    """Where memory runs out, a container ends with all in it, which may be the whole node."""
    waiting, given_up, num_deaths = [Work(VARIANTS, (), RULES)], list[Variant](), 0
    while waiting:
        work = waiting.pop(0)
        if VARIANTS[2] in work.variants:
            num_deaths += 1
            again, lost = work.after_a_death((), f"node {num_deaths}", alive=())
            waiting = again + waiting
            given_up += [lost] if lost else []
    assert (given_up, num_deaths) == ([VARIANTS[2]], 2 * MOST_NODES)


def test_a_death_with_the_whole_node_counts_for_less() -> None:
    work = Work(VARIANTS[:1], (), RULES)
    for node in ("a", "b", "c"):
        (work,), lost = work.after_a_death((), node, alive={"z"})
        assert lost is None
    for _ in range(MOST_DEATHS - 1):
        (work,), lost = work.after_a_death((), "z", alive={"z"})
        assert lost is None
    assert work.after_a_death((), "z", alive={"z"}) == ([], VARIANTS[0])
