"""Training steps compiled for a GPU that is not there."""

import pytest
from flax import nnx

from kernels import compile
from lra_jax import collectives, config, models, runs
from lra_jax.compile import compile_step
from lra_jax.data import tasks

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


@needs_plugin
def test_a_training_step_of_8_exchanges_the_least():
  """Every parameter of a BiLSTM is gathered once and its gradient scattered once, whichever axes it has."""
  settings = config.load("configs/sequencer2d.py", "cifar10")
  settings.model.dtype = "bfloat16"
  settings.model.update({"depths": (1,), "patch_sizes": (4,), "embed_dims": (256,), "hidden_sizes": (64,)})
  program, _ = compile_step(settings, 45_000, devices=8, fsdp=8)
  found = collectives.count(program.compiled.as_text())
  model = nnx.eval_shape(lambda: runs.create_model(settings, tasks.get("cifar10")))
  least = collectives.least(models.count_params(model), 1, 8, 2)
  # What is below parallel.SMALL is summed up whole, in float32.
  assert 0.97 * least < found["all-gather"].wire + found["reduce-scatter"].wire <= least
  assert found["all-reduce"].wire < 0.05 * least


def test_mistakes_are_one_line(refused):
  assert "did you mean 'configs/lru.py'" in refused("lra_jax.compile", "configs/lruu.py")
  assert "no config file given" in refused("lra_jax.compile")
  wrong = ("configs/lru.py:digits", "--implementation", "mosaic", "--steps", "1")
  assert "implementation='mosaic' cannot serve" in refused("lra_jax.compile", *wrong)


def test_steps_are_run_here_and_have_times(python):
  """On whatever device there is, beside what it would need."""
  arguments = ("configs/lru.py:digits", "--implementation", "sequential,associative", "--batch", "32")
  process = python("lra_jax.compile", *arguments, "--steps", "2", "--examples", "64")
  assert process.returncode == 0, process.stderr
  header, _, *rows = process.stdout.splitlines()
  names = [name.strip() for name in header.strip("|").split("|")]
  for implementation, line in zip(("sequential", "associative"), rows, strict=True):
    values = dict(zip(names, (value.strip() for value in line.strip("|").split("|")), strict=True))
    assert values["kernels"] == f"linear_recurrence: {implementation}"
    rate = float(values["examples/s"].replace(",", ""))
    assert abs(rate - 32e3 / float(values["ms a step"].replace(",", ""))) <= 1
