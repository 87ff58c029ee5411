"""Command lines of the real tools, for tests that run them in processes of their own."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]

# A Sequencer2D of 700 parameters: a run of it takes as long as Python's and JAX's start.
TINY = (
  "--config.model.depths=(1,)",
  "--config.model.patch_sizes=(2,)",
  "--config.model.embed_dims=(8,)",
  "--config.model.hidden_sizes=(2,)",
  "--config.train.batch_size=32",
  "--config.optim.schedule.warmup_epochs=0.1",
)


def command(module: str, *arguments) -> list[str]:
  """The command line; `lra_jax.main` without arguments for config and model trains TINY on digits."""
  if module == "lra_jax.main" and not any(str(a).startswith("--config=") for a in arguments):
    arguments = ("--config=configs/sequencer2d.py:digits", *TINY, *arguments)
  return [sys.executable, "-W", "error::DeprecationWarning:lra_jax", "-m", module, *map(str, arguments)]


def options(**keywords) -> dict:
  """Keyword arguments for subprocess: from the checkout, text, both streams captured."""
  inherited = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "NPROC")}  # conftest's
  env = inherited | {"PYTHONPATH": str(ROOT), "JAX_NUMPY_RANK_PROMOTION": "raise"} | keywords.pop("env", {})
  return {"cwd": ROOT, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": env} | keywords


def places(count: int) -> list[dict[str, str]]:
  """The variables by which the processes of a run meet at a port that is free; none for a single process."""
  if count == 1:
    return [{}]
  with socket.socket() as free:
    free.bind(("", 0))
    port = free.getsockname()[1]
  meet = {"LRA_JAX_PROCESSES": str(count), "LRA_JAX_COORDINATOR": f"127.0.0.1:{port}"}
  return [meet | {"LRA_JAX_PROCESS": str(i)} for i in range(count)]


def start_run(count: int, *arguments, devices: int = 1) -> list[subprocess.Popen]:
  """Starts the processes of one run of lra_jax.main on CPU, each with so many devices."""
  command_line = [sys.executable, "-m", "lra_jax.main", *map(str, arguments)]
  own = {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"}
  return [subprocess.Popen(command_line, **options(env=own | place)) for place in places(count)]


def result_of(workdir: pathlib.Path) -> dict:
  """The content of a run's result.json."""
  return json.loads((workdir / "result.json").read_text())


def events_of(workdir: pathlib.Path) -> list[dict]:
  """The lines of a run's metrics.jsonl."""
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def steps_written(workdir: pathlib.Path) -> int:
  """Training steps in the metrics of a run."""
  path = workdir / "metrics.jsonl"
  return path.read_text().count("train/loss") if path.exists() else 0


def wait_for_steps(workdir: pathlib.Path, count: int, running: list[subprocess.Popen], seconds: float = 300) -> None:
  """Returns when so many steps are in the metrics; the processes must not end before."""
  deadline = time.monotonic() + seconds
  while steps_written(workdir) < count:
    ended = [process.communicate() for process in running if process.poll() is not None]
    assert not ended and time.monotonic() < deadline, ended
    time.sleep(0.002)
