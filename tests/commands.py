"""Command lines of the real tools, for tests that run them in processes of their own."""

import os
import pathlib
import subprocess
import sys

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
