"""Connection of a run to Ray: joined or started as the job says, with Ray Data set up for long tasks."""

from __future__ import annotations

import logging

from pipeline import cluster
from pipeline.job import Job


def connect_for_job(job: Job, address: str | None = None) -> cluster.Resources:
    """Connect to Ray, where the job says or at this address, and keep Ray Data's progress bars and log off the terminal."""
    resources = cluster.connect_ray(address or job.sections.ray.address)
    import ray.data

    from pipeline.cluster import helper_actors

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = -1  # a block of documents may take longer to be answered; the watchdog looks
    context.autoscaling_config.actor_pool_util_upscaling_threshold = 1.0  # a pool grows when its actors have all they take
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    if cluster.is_started_here():
        helper_actors.replace_helper_actors()
    else:
        helper_actors.restore_helper_actors()  # an earlier run of this process may have replaced them
    return resources
