"The recipes for clusters on the page about several machines, checked by their form: shell, Python and YAML."
from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from subnet_explorer.recipes.options import read_yaml
from subnet_explorer.recipes.papers import PAPERS, paper_file
from subnet_explorer.recipes.start import order
from subnet_explorer.recipes.study import find_recipe

PAGE = Path(__file__).parents[2] / "nbs/explain/clusters.ipynb"


def blocks(language: str) -> list[str]:
    "Blocks of one language on the page."
    cells = json.loads(PAGE.read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands() -> list[list[str]]:
    "Every command of this library on the page."
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    found = [shlex.split(line) for line in lines if line.startswith("subnet-explorer")]
    for one in documents():
        if one["kind"] == "RayJob": found.append(shlex.split(one["spec"]["entrypoint"]))
        if one["kind"] == "Job": found.append(containers(one["spec"]["template"])[0]["command"])
    return found


def documents() -> list[dict[str, Any]]: return [yaml.safe_load(block) for block in blocks("yaml")]


def containers(template: dict[str, Any]) -> list[dict[str, Any]]: return template["spec"]["containers"]


def test_there_are_recipes_for_all():
    assert len(blocks("bash")) == 4 and len(blocks("python")) == 3
    assert [one["kind"] for one in documents()] == ["DaskCluster", "Job", "RayJob"]


@pytest.mark.parametrize("script", blocks("bash"))
def test_shell(script):
    said = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_commands_are_understood(words):
    assert words[:2] == ["subnet-explorer", "run"]
    written: dict[str, Any] = {"recipe": "lamp", "model": "pocket-bert", "facts": "pocket"}
    if words[2].startswith(PAPERS): written = read_yaml(paper_file(words[2]))
    found = order(find_recipe(written.pop("recipe")), words[3:], written)
    assert found.values["out"].startswith(("/shared/runs", "runs"))
    if "--scheduler" in words: assert found.values["scheduler"] == words[words.index("--scheduler") + 1]


@pytest.mark.parametrize("number, wanted", [
    (0, ["#SBATCH -p gpu", "#SBATCH -A my-project", "#SBATCH --cpus-per-task=4", "#SBATCH --gres=gpu:1",
         "#SBATCH --requeue", "#SBATCH -t 04:00:00"]),
    (1, ["#PBS -q gpu", "#PBS -A my-project", "#PBS -l select=1:ncpus=4:ngpus=1:mem=16GB",
         "#PBS -l walltime=04:00:00"]),
])
def test_queues(number, wanted):
    "The job that a queue would get."
    pytest.importorskip("dask_jobqueue")
    made: dict[str, Any] = {}
    exec(compile(blocks("python")[number], "page", "exec"), made)
    with made["cluster"] as cluster: script = cluster.job_script()
    lines = script.splitlines()
    assert not [line for line in wanted if line not in lines], script
    assert "export OMP_NUM_THREADS=4" in lines and "--nthreads 1 " in lines[-1]
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


def test_what_is_done_with_a_cluster():
    from distributed import Client
    from distributed.deploy import Cluster
    from joblib._dask import DaskDistributedBackend
    tree = ast.parse(blocks("python")[2])
    assert {"Client", "parallel_config"} <= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert callable(Client) and hasattr(Cluster, "adapt")
    assert "wait_for_workers_timeout" in DaskDistributedBackend.__init__.__code__.co_varnames


def test_kubernetes():
    dask, job, ray = documents()
    scheduler, worker = dask["spec"]["scheduler"], dask["spec"]["worker"]
    assert containers(scheduler)[0]["args"] == ["dask", "scheduler"]
    assert containers(worker)[0]["args"][:2] == ["dask", "worker"]
    served = scheduler["service"]["selector"]
    assert served == {"dask.org/cluster-name": dask["metadata"]["name"], "dask.org/component": "scheduler"}
    head, group = ray["spec"]["rayClusterSpec"]["headGroupSpec"], ray["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    pods = [worker, job["spec"]["template"], head["template"], group["template"]]
    for pod in pods:
        mounted = {mount["name"]: mount["mountPath"] for mount in containers(pod)[0]["volumeMounts"]}
        assert mounted == {"runs": "/shared/runs"}      # one folder, under one name
        assert [volume["name"] for volume in pod["spec"]["volumes"]] == ["runs"]
