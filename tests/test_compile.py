"""Training steps compiled for a GPU that is not there."""

import pytest

from kernels import compile

needs_plugin = pytest.mark.skipif(compile.missing() is not None, reason=f"{compile.missing()}")


@needs_plugin
def test_a_training_step_compiles_for_a_gpu_with_the_kernels_asked_for(python):
  arguments = ("configs/lru.py:digits", "--implementation", "associative,mosaic", "--batch", "32")
  process = python("lra_jax.compile", *arguments)
  assert process.returncode == 0, process.stderr
  header, _, without, with_kernels = process.stdout.splitlines()
  assert header.startswith("| config |")
  assert without.startswith("| configs/lru.py:digits | associative | 32 |") and without.endswith("| none |")
  assert with_kernels.startswith("| configs/lru.py:digits | mosaic | 32 |") and "linear_recurrence" in with_kernels


def test_mistakes_are_one_line(refused):
  assert "did you mean 'configs/lru.py'" in refused("lra_jax.compile", "configs/lruu.py")
  assert "no config file given" in refused("lra_jax.compile")
