"""Settings of all tests, and helpers to run the real commands."""

import os
import pathlib
import subprocess
import sys

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]

jax.config.update("jax_numpy_rank_promotion", "raise")

# A Sequencer2D of 700 parameters: a run of it takes as long as Python's and JAX's start.
TINY = (
  "--config.model.depths=(1,)",
  "--config.model.patch_sizes=(2,)",
  "--config.model.embed_dims=(8,)",
  "--config.model.hidden_sizes=(2,)",
  "--config.train.batch_size=32",
  "--config.optim.schedule.warmup_epochs=0.1",
)


@pytest.fixture
def python():
  """Runs `python -m module arguments` as a user would, with TINY for the trainer; returns the finished process."""

  def run(module, *arguments, **keywords):
    return subprocess.run(command(module, *arguments), **options(**keywords), timeout=300)

  return run


def command(module: str, *arguments) -> list[str]:
  """The command line; `lra_jax.main` without arguments for config and model trains TINY on digits."""
  if module == "lra_jax.main" and not any(str(a).startswith("--config=") for a in arguments):
    arguments = ("--config=configs/sequencer2d.py:digits", *TINY, *arguments)
  return [sys.executable, "-W", "error::DeprecationWarning:lra_jax", "-m", module, *map(str, arguments)]


def options(**keywords) -> dict:
  """Keyword arguments for subprocess: from the checkout, text, both streams captured."""
  env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_NUMPY_RANK_PROMOTION": "raise"} | keywords.pop("env", {})
  return {"cwd": ROOT, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": env} | keywords


@pytest.fixture
def refused(python):
  """Runs a command that must end with exit code 2 and one line of error, without traceback. Returns the line."""

  def run(module, *arguments, **keywords):
    process = python(module, *arguments, **keywords)
    assert process.returncode == 2, process.stdout + process.stderr
    assert "Traceback" not in process.stderr
    lines = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and process.stderr.splitlines()[-1] == lines[0], process.stderr
    return lines[0]

  return run
