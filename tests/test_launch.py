"""The files of launch/, without a cluster: real processes under local.sh, and what SLURM and Kubernetes would start."""

import contextlib
import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
import yaml
from commands import ROOT, TINY, options, places, result_of, wait_for_steps
from test_scaling import SAVING

from lra_jax import processes

SETTINGS = (*TINY, "--config.train.steps=40", "--config.eval.every_epochs=0.5")
CONFIG = "configs/sequencer2d.py:digits"


def launch(*command, **env):
  """Starts a script of launch/ in a process group of its own."""
  script, *arguments = command
  keywords = options(env={"PYTHON": sys.executable, "JAX_PLATFORMS": "cpu", **env})
  return subprocess.Popen(["bash", f"launch/{script}", *map(str, arguments)], **keywords, start_new_session=True)


def descendants(pid):
  """All processes that a process started, and these."""
  for folder in pathlib.Path("/proc").glob("[0-9]*"):
    with contextlib.suppress(OSError):
      if int(re.search(r"^PPid:\s+(\d+)", (folder / "status").read_text(), re.M)[1]) == pid:
        yield folder
        yield from descendants(int(folder.name))


def kill(process, variable):
  """kill -9 of the training process with this variable in its environment, among those of a script."""
  (folder,) = (
    folder
    for folder in descendants(process.pid)
    if variable.encode() in (folder / "environ").read_bytes().split(b"\0")
    and (folder / "cmdline").read_bytes().split(b"\0")[2:4] == [b"-m", b"lra_jax.main"]
  )
  os.kill(int(folder.name), signal.SIGKILL)


def test_local_starts_processes_and_stops_all_when_one_dies(tmp_path):
  workdir = tmp_path / "run"
  command = ("local.sh", 2, CONFIG, "--workdir", workdir, *SETTINGS, SAVING)
  process = launch(*command)
  wait_for_steps(workdir, 4, [process])
  kill(process, "LRA_JAX_PROCESS=1")
  killed = time.monotonic()
  _, error = process.communicate(timeout=60)
  assert process.returncode == 128 + signal.SIGKILL and time.monotonic() - killed < 35
  assert "error: process 1 ended with exit code 137; ending the others\n" in error

  process = launch(*command)  # the same command goes on; a signal to the script reaches all
  wait_for_steps(workdir, 10, [process])
  process.terminate()
  printed, error = process.communicate(timeout=60)
  assert process.returncode == 0, error
  assert re.search(r"^resuming at step \d+ of 40$", printed, re.M)
  assert re.search(r"^stopped by .* at step \d+ of 40; saved", printed, re.M)

  process = launch(*command)
  printed, error = process.communicate(timeout=120)
  assert process.returncode == 0, error
  assert result_of(workdir)["steps"] == 40 and "2 × cpu" in printed and "2 processes" in printed
  lines = printed.splitlines()
  assert any(line.startswith("[1] ") for line in lines)  # of Gloo; else process 0 speaks alone
  assert not any(line.startswith("[1] ") and "Gloo" not in line for line in lines)
  assert not any("step" in line for line in error.splitlines() if line.startswith("[1] "))  # one progress bar


@pytest.mark.parametrize(
  ("arguments", "expected"),
  [
    ((), "expected a number of processes and a config"),
    ((0, CONFIG), "expected a number of processes and a config"),
    ((2,), "expected a number of processes and a config"),
    ((2, "configs/none.py"), "configs/none.py"),
  ],
)
def test_local_refuses(arguments, expected):
  process = launch("local.sh", *arguments)
  _, error = process.communicate(timeout=60)
  assert process.returncode == 2 and expected in error and "Traceback" not in error


def test_local_refuses_an_interpreter_that_is_not_there():
  process = launch("local.sh", 2, CONFIG, PYTHON="/nowhere/python")
  assert process.communicate(timeout=60)[1].startswith("error: no interpreter /nowhere/python; ")
  assert process.returncode == 2


SHOW = """#!/usr/bin/env bash
[[ $1 == -c ]] && { echo 1234; exit; }
echo "$LRA_JAX_PROCESS of $LRA_JAX_PROCESSES at $LRA_JAX_COORDINATOR: $CUDA_VISIBLE_DEVICES; $*"
"""


@pytest.mark.parametrize(
  ("env", "expected"),
  [
    ({}, ["0", "1"]),
    ({"CUDA_VISIBLE_DEVICES": "4,6,7"}, ["4", "6"]),
    ({"GPUS_PER_PROCESS": "2"}, ["0,1", "2,3"]),
    ({"GPUS_PER_PROCESS": "3"}, None),
  ],
)
def test_local_gives_each_process_its_gpus(tmp_path, env, expected):
  tool(tmp_path, "python", SHOW)
  tool(tmp_path, "nvidia-smi", "#!/bin/sh\nseq 0 3\n")
  process = launch(
    "local.sh", 2, "c.py", "--workdir", "w w", JAX_PLATFORMS="", PYTHON="python", **path_of(tmp_path), **env
  )
  printed, error = process.communicate(timeout=60)
  if expected is None:
    assert (
      process.returncode == 2 and error == "error: 2 processes with 3 GPUs each, but there are 4 GPUs; start fewer\n"
    )
    return
  flags = "-u -m lra_jax.main --config c.py --workdir w w"
  assert sorted(line.removeprefix("[1] ") for line in printed.splitlines()) == [
    f"{i} of 2 at 127.0.0.1:1234: {gpus}; {flags}" for i, gpus in enumerate(expected)
  ]


def tool(folder, name, text):
  (folder / name).write_text(text)
  (folder / name).chmod(0o755)


def path_of(folder):
  return {"PATH": f"{folder}:{os.environ['PATH']}"}


# srun, as far as the script relies on it (https://slurm.schedmd.com/srun.html): a process a task, the variables of a
# step, labelled lines, SIGTERM passed on to all, and all ended when one fails.
SRUN = f"""#!{sys.executable}
import os, signal, subprocess, sys, threading, time
arguments = sys.argv[1:]
options = {{a for a in arguments[: next(i for i, a in enumerate(arguments) if not a.startswith("--"))]}}
assert options == {{"--kill-on-bad-exit=1", "--label"}}, options
count, node = int(os.environ["SLURM_NTASKS"]), os.environ["SLURM_JOB_NODELIST"]
def say(i, stream, out):
  for line in stream:
    out.write(f"{{i}}: {{line}}")
    out.flush()
tasks, threads = [], []
signal.signal(signal.SIGTERM, lambda number, _: [task.send_signal(number) for task in tasks])
for i in range(count):
  env = os.environ | {{"SLURM_PROCID": str(i), "SLURM_STEP_NODELIST": node}}
  tasks.append(subprocess.Popen(arguments[len(options):], env=env, text=True, stdout=-1, stderr=-1))
  for stream, out in ((tasks[-1].stdout, sys.stdout), (tasks[-1].stderr, sys.stderr)):
    threads.append(threading.Thread(target=say, args=(i, stream, out)))
    threads[-1].start()
while any(task.poll() is None for task in tasks):
  if any(task.poll() for task in tasks):
    [task.kill() for task in tasks]
  time.sleep(0.05)
[thread.join() for thread in threads]
sys.exit(max(abs(task.returncode) for task in tasks))
"""


def test_slurm_runs_stops_before_the_limit_and_is_put_back(tmp_path):
  tool(tmp_path, "srun", SRUN)
  tool(tmp_path, "scontrol", f'#!/bin/sh\necho "$@" >> {shlex.quote(str(tmp_path))}/scontrol.log\n')
  workdir = tmp_path / "run"
  slurm = {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "localhost", **path_of(tmp_path)}
  command = ("slurm.sbatch", CONFIG, "--workdir", workdir, *SETTINGS, SAVING)

  process = launch(*command, **slurm)
  wait_for_steps(workdir, 4, [process])
  process.send_signal(signal.SIGUSR1)  # five minutes before the time limit, to the batch shell alone
  printed, error = process.communicate(timeout=60)
  assert process.returncode == 0, error
  assert re.search(r"^0: stopped by SIGTERM at step \d+ of 40; saved", printed, re.M), printed
  assert (tmp_path / "scontrol.log").read_text() == "requeue 77\n" and not (workdir / "result.json").exists()

  process = launch(*command, **slurm, SLURM_RESTART_COUNT="1")  # the job put back: the same command
  wait_for_steps(workdir, 12, [process])
  kill(process, "SLURM_PROCID=1")
  process.communicate(timeout=60)
  assert process.returncode == 9  # a failure is not put back by the script
  assert (tmp_path / "scontrol.log").read_text() == "requeue 77\n"

  process = launch(*command, **slurm, SLURM_RESTART_COUNT="2")
  printed, error = process.communicate(timeout=120)
  assert process.returncode == 0, error
  assert result_of(workdir)["steps"] == 40 and "2 processes" in printed
  assert (tmp_path / "scontrol.log").read_text() == "requeue 77\n"


def test_slurm_refuses_without_a_config():
  process = launch("slurm.sbatch")
  assert process.communicate(timeout=60)[1].startswith("error: no config given")
  assert process.returncode == 2


# Of https://slurm.schedmd.com/sbatch.html: the options of the script, and the form of their values.
SBATCH = {
  "job-name": r"\S+",
  "nodes": r"\d+(-\d+)?",
  "ntasks-per-node": r"\d+",
  "gpus-per-task": r"([a-z0-9]+:)?\d+",
  "cpus-per-task": r"\d+",
  "time": r"(\d+-)?\d+(:\d\d){0,2}",
  "signal": r"([RB]{1,2}:)?(\d+|[A-Z0-9]+)(@\d+)?",
  "requeue": None,
  "open-mode": "append|truncate",
  "output": r"\S+",
}


def test_slurms_directives_are_sbatchs():
  text = (ROOT / "launch" / "slurm.sbatch").read_text()
  directives = re.findall(r"^#SBATCH (.*)$", text, re.M)
  assert len(directives) == 10
  for directive in directives:
    name, _, value = directive.removeprefix("--").partition("=")
    assert directive.startswith("--") and name in SBATCH, directive
    assert not value if SBATCH[name] is None else re.fullmatch(SBATCH[name], value), directive
  head = text[: text.index("set -uo")]  # sbatch reads no directives after the first command
  assert head.count("#SBATCH") == len(directives) and not re.search(r"^[^#\n]", head, re.M)


@pytest.fixture(scope="module")
def jobset():
  return yaml.safe_load((ROOT / "launch" / "jobset.yaml").read_text())


def test_jobset_follows_its_published_schema(jobset):
  """Every field is one of the API, of its type, with all that are required: read and written it is the same."""
  import kubeflow_trainer_api.models as models

  parsed = models.JobsetV1alpha2JobSet.from_dict(jobset)
  assert json.loads(parsed.to_json()) == jobset


def test_jobset_starts_processes_that_find_each_other(jobset, tmp_path):
  name, (replicated,) = jobset["metadata"]["name"], jobset["spec"]["replicatedJobs"]
  spec = replicated["template"]["spec"]
  (container,) = spec["template"]["spec"]["containers"]
  env = {item["name"]: item["value"] for item in container["env"]}
  count = int(env["LRA_JAX_PROCESSES"])
  assert spec["completions"] == spec["parallelism"] == count and spec["completionMode"] == "Indexed"
  host, port = env["LRA_JAX_COORDINATOR"].split(":")
  assert host == f"{name}-{replicated['name']}-0-0.{name}" and jobset["spec"]["network"]["enableDNSHostnames"]
  assert container["ports"] == [{"containerPort": int(port), "protocol": "TCP"}]
  mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
  assert {volume["name"] for volume in spec["template"]["spec"]["volumes"]} == set(mounts)

  entry = json.loads(re.search(r"^ENTRYPOINT (\[.*\])$", dockerfile(), re.M)[1])
  arguments = [argument.replace(mounts["runs"], str(tmp_path)) for argument in container["args"]]
  (workdir,) = (pathlib.Path(a.partition("=")[2]) for a in arguments if a.startswith("--workdir="))
  arguments = [a.replace(":cifar10", ":digits") for a in arguments] + list(SETTINGS)
  for variable in ("TFDS_DATA_DIR", "LRA_JAX_CACHE"):
    assert env.pop(variable).startswith((mounts["runs"], "/tmp"))
  env["LRA_JAX_COORDINATOR"] = places(count)[0]["LRA_JAX_COORDINATOR"]  # for what the headless service resolves
  pods = [
    subprocess.Popen(
      [sys.executable, *entry[1:], *arguments],
      **options(env={"JAX_PLATFORMS": "cpu", **env, "JOB_COMPLETION_INDEX": str(i)}),
    )
    for i in range(count)
  ]
  outputs = [pod.communicate(timeout=120) for pod in pods]
  assert [pod.returncode for pod in pods] == [0] * count, outputs
  assert result_of(workdir)["steps"] == 40 and f"{count} processes" in outputs[0][0]


def dockerfile():
  return (ROOT / "launch" / "Dockerfile").read_text()


def test_image_has_what_the_package_needs():
  copied = {source for line in re.findall(r"^COPY (.*)$", dockerfile(), re.M) for source in line.split()[:-1]}
  assert all((ROOT / source).exists() for source in copied)
  packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
  assert copied == packages | {"setup.cfg", "pyproject.toml", "README.md"}
  assert processes.find_place({}) is None  # a pod alone needs no variables
