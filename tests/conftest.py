"""Settings of all tests, and fixtures that run the real commands."""

import atexit
import gc
import importlib.util
import os
import shutil
import subprocess
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # JAX_PLATFORMS=cuda pytest tests/kernels/test_native.py, on a GPU
if os.environ["JAX_PLATFORMS"] == "cpu":
  # Compiling takes most of the time of tests in this process; without LLVM's optimisations it is half. Commands that
  # tests start run as users run them (commands.options).
  os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
# Threads of XLA on CPU. Interpreted kernels block one for every warpgroup that waits, and hang when none is left.
os.environ.setdefault("NPROC", "16")

# What one test or command has compiled, the next of this session reads: a command then takes less than half the time.
# Not where programs are compiled for a GPU, as the compiler's reports are what those tests read.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ and importlib.util.find_spec("jax_cuda13_plugin") is None:
  os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="lra_jax_compiled_")  # pytest's workers inherit it
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
  atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import jax
import pytest
from commands import command, options

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="module")
def swept():
  """Of what fails, Orbax and TensorStore leave coroutines behind: they are found here, not in tests of other files."""
  yield
  gc.collect()


@pytest.fixture
def python():
  """Runs `python -m module arguments` as a user would, with TINY for the trainer; returns the finished process."""

  def run(module, *arguments, **keywords):
    return subprocess.run(command(module, *arguments), **options(**keywords), timeout=300)

  return run


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
