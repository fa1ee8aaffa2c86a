"""`jobs/cluster/` describes clusters that can be, in the words of those who make them."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml

from pipeline.cli import main

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "jobs" / "cluster"
RAYJOB_SCHEMA = json.loads((ROOT / "tests/support/rayjob.schema.json").read_text())
LAUNCHER_SCHEMA = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
RAYJOB, CLAIM = yaml.safe_load_all((FOLDER / "rayjob.yaml").read_text())
LAUNCHER = yaml.safe_load((FOLDER / "cluster.yaml").read_text())
CLUSTER = RAYJOB["spec"]["rayClusterSpec"]
PODS = [group["template"]["spec"] for group in (CLUSTER["headGroupSpec"], *CLUSTER["workerGroupSpecs"])]
CONTAINERS = [container for pod in PODS for container in pod["containers"]]


def test_the_rayjob_has_the_shape_that_kuberay_publishes() -> None:
    jsonschema.Draft202012Validator(RAYJOB_SCHEMA).validate(RAYJOB)


@pytest.mark.parametrize(
    "at", ["spec", "spec.rayClusterSpec", "spec.rayClusterSpec.headGroupSpec", "spec.rayClusterSpec.autoscalerOptions"]
)
def test_a_field_that_kuberay_does_not_know_is_noticed(at: str) -> None:
    broken: Any = json.loads(json.dumps(RAYJOB))
    place = broken
    for name in at.split("."):
        place = place[name]
    place["maxReplica"] = 1
    assert not jsonschema.Draft202012Validator(RAYJOB_SCHEMA).is_valid(broken)


def test_what_the_rayjob_runs_is_a_command_of_this_package() -> None:
    program, command, *arguments = shlex.split(RAYJOB["spec"]["entrypoint"])
    given = main.commands[command].make_context(command, arguments).params
    assert (program, given["output"][:5], given["job_file"].parent) == ("pipeline", "s3://", Path("/home/ray/job"))


def test_the_rayjob_mounts_what_it_has() -> None:
    for pod in PODS:
        volumes = {volume["name"] for volume in pod["volumes"]}
        assert {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]} == volumes
    assert PODS[0]["volumes"][1]["persistentVolumeClaim"]["claimName"] == CLAIM["metadata"]["name"]


def test_gpu_workers_scale_as_far_as_the_actors_may() -> None:
    [group] = CLUSTER["workerGroupSpecs"]
    least, most = re.findall(r"ray\.actors=\[(\d+),(\d+)\]", RAYJOB["spec"]["entrypoint"])[0]
    assert (CLUSTER["enableInTreeAutoscaling"], group["minReplicas"], group["maxReplicas"]) == (True, int(least), int(most))
    assert "nvidia.com/gpu" in group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert "nvidia.com/gpu" not in PODS[0]["containers"][0]["resources"]["limits"]


def test_secrets_are_named_and_not_written() -> None:
    secret = re.compile("KEY|TOKEN|SECRET|PASSWORD")
    named = [variable for container in CONTAINERS for variable in container["env"] if secret.search(variable["name"])]
    assert named
    assert all("secretKeyRef" in variable.get("valueFrom", {}) for variable in named)


def test_the_launchers_file_has_the_shape_that_ray_publishes() -> None:
    jsonschema.Draft7Validator(LAUNCHER_SCHEMA).validate(LAUNCHER)
    assert LAUNCHER["head_node_type"] in LAUNCHER["available_node_types"]


def test_who_may_run_code_is_who_has_the_token() -> None:
    assert CLUSTER["authOptions"] == {"mode": "token"}
    starts = [line for name in ("head", "worker") for line in LAUNCHER[f"{name}_start_ray_commands"] if "ray start" in line]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token ray start" in line for line in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]


def test_everything_has_one_version_of_ray() -> None:
    pinned = re.search(r"^ray==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    image = re.search(r"^FROM rayproject/ray:([\d.]+)-py311", (FOLDER / "Dockerfile").read_text(), re.MULTILINE)
    assert pinned
    assert image
    assert CLUSTER["rayVersion"] == image[1] == pinned[1]


def test_the_image_copies_what_there_is() -> None:
    copied = re.findall(r"^COPY --chown=\S+ (.+) \S+$", (FOLDER / "Dockerfile").read_text(), re.MULTILINE)
    assert copied
    assert all((ROOT / name).exists() for line in copied for name in line.split())
