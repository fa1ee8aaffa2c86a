"""Ray Data's helper actors: their functions are replaced for a Ray of one run, and put back after it."""

from __future__ import annotations

import pickle

from ray.data._internal import stats
from ray.data._internal.execution import streaming_executor

from pipeline.cluster import helper_actors


def test_what_starts_helper_actors_is_replaced_once_and_put_back() -> None:
    before = stats.get_or_create_stats_actor, streaming_executor.create_cluster_autoscaler
    helper_actors.replace_helper_actors()
    helper_actors.replace_helper_actors()
    try:
        assert isinstance(stats.get_or_create_stats_actor(), helper_actors.HelperHandle)
        assert streaming_executor.create_cluster_autoscaler is not before[1]
    finally:
        helper_actors.restore_helper_actors()
    assert (stats.get_or_create_stats_actor, streaming_executor.create_cluster_autoscaler) == before


def test_an_actor_can_be_given_the_handle() -> None:
    handle = pickle.loads(pickle.dumps(helper_actors.HelperHandle()))
    assert handle.update_actor_location.remote("actor", "node") is None
