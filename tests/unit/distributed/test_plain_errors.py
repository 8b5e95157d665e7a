"""What Ray raises reaches the user as an error of ours."""

from __future__ import annotations

import pytest
import ray

from transplant_ray.distributed.cluster import plain_errors
from transplant_ray.errors import DataError, ResourceError


def test_an_error_of_ours_loses_the_wrapping_of_ray() -> None:
    inner = ray.exceptions.RayTaskError("measure", "a traceback", DataError("example 3: too long"))
    with pytest.raises(DataError, match=r"^example 3: too long$"), plain_errors():
        raise ray.exceptions.RayTaskError("collect", "another", inner)


@pytest.mark.parametrize(
    "error",
    [
        ray.exceptions.ActorDiedError(),
        ray.exceptions.OwnerDiedError("00", None, ""),
        ray.exceptions.ObjectLostError("00", None, ""),
        ray.exceptions.OutOfMemoryError("too large"),
    ],
)
def test_an_actor_that_is_gone_or_what_it_gave_is_an_error_with_the_next_step(error: Exception) -> None:
    with (
        pytest.raises(ResourceError, match=r"an actor is gone for good \(.*\)\. The same command goes on where it stopped\."),
        plain_errors(),
    ):
        raise error


def test_so_is_one_that_a_task_waited_for() -> None:
    with pytest.raises(ResourceError, match="an actor is gone for good"), plain_errors():
        raise ray.exceptions.RayTaskError("collect", "a traceback", ray.exceptions.ActorDiedError())


def test_what_is_not_ours_stays_what_it_is() -> None:
    with pytest.raises(ray.exceptions.RayTaskError), plain_errors():
        raise ray.exceptions.RayTaskError("measure", "a traceback", ValueError("a bug"))
    with pytest.raises(KeyError), plain_errors():
        raise KeyError("x")
