"""Streams that outlive the actors that give them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import ray
from ray.actor import ActorHandle

from transplant_ray.distributed.cluster import GONE

MOST_BREAKS = 10
"""So often a stream may break before its next item has come. A node that dies may take several along until it is known as dead."""


def steady(actor: ActorHandle, begin: Callable[[], Any]) -> Iterator[Any]:
    """All that a stream of this actor gives, each item once, though the actor may die meanwhile.

    `begin` starts the stream from its first item, without retries by Ray: a stream that Ray itself had started again was seen to
    stand still. Here it is begun again when the actor is back, and what had come is skipped, so it must give the same each time.
    What broke it is raised where it breaks again and again at the same item. The first stream begins at once, not when it is read.
    """
    return _items(actor, begin, begin())


def _items(actor: ActorHandle, begin: Callable[[], Any], stream: Any) -> Iterator[Any]:
    given = breaks = 0
    while True:
        try:
            for number, ref in enumerate(stream):
                item = ray.get(ref)
                if number >= given:
                    given, breaks = number + 1, 0
                    yield item
            return
        except GONE as error:
            breaks += 1
            if breaks == MOST_BREAKS or isinstance(error, ray.exceptions.RayTaskError):  # the actor is there, and missed another
                raise
            ray.get(actor.__ray_ready__.remote())  # by the actor's own retries, which wait for it to come back
            stream = begin()
