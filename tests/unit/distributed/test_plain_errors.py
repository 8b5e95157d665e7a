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


def test_an_actor_that_is_gone_is_an_error_with_the_next_step() -> None:
    with (
        pytest.raises(ResourceError, match=r"an actor is gone for good \(.*\)\. The same command goes on where it stopped\."),
        plain_errors(),
    ):
        raise ray.exceptions.ActorDiedError()


def test_what_is_not_ours_stays_what_it_is() -> None:
    with pytest.raises(ray.exceptions.RayTaskError), plain_errors():
        raise ray.exceptions.RayTaskError("measure", "a traceback", ValueError("a bug"))
    with pytest.raises(KeyError), plain_errors():
        raise KeyError("x")
