"""The model of weak scaling: limits that follow from its equation, and published counts of operations."""

import pytest

from lra_jax import errors, scaling


def seconds(gpus, **changes):
  machine = scaling.Machine(**{"peak": 1e12, "nvlink": 1e9, "network": 1e8, "latency": 1e-3, "hidden": 0.5} | changes)
  return scaling.step_seconds(10**6, 1e8, 10, gpus, 0.5, machine)


def test_by_hand():
  compute = 3 * 1e8 * 10 / 0.5e12  # 6 ms, of which the backward pass can hide 2
  assert seconds(1) == pytest.approx(compute)
  assert seconds(2) == pytest.approx(compute)  # 2 · 1/2 · 2 MB at 1 GB/s are 2 ms
  assert seconds(8) == pytest.approx(compute + 2 * 7 / 8 * 2e-3 - 2e-3)
  assert seconds(16) == pytest.approx(compute + 2 * 7 / 8 * 2e-3 + 2 * 1 / 2 * 2e6 / 8 / 1e8 - 2e-3 + 2e-3)
  assert seconds(1024, hidden=100.0) == pytest.approx(compute + 2 * 7 * 1e-3)  # all hidden but the latency of 128 nodes


def test_more_gpus_never_make_a_step_faster():
  times = [seconds(gpus) for gpus in scaling.GPUS]
  assert times == sorted(times)


def test_operations_are_twice_the_published_multiplications():
  """ViT-B/16: 17.6 G multiply-adds at 224 px and 86.57 M parameters (timm's results table: 17.58)."""
  parameters, operations = scaling.describe("vit_b16", 224)
  assert parameters == 86_567_656 and operations == pytest.approx(2 * 17.58e9, rel=0.01)


def test_the_command_prints_every_row(python, refused):
  process = python("lra_jax.scaling", "vit_ti16@32")
  assert process.returncode == 0 and process.stdout.count("\n|") == 2 + len(scaling.GPUS), process.stderr
  assert "such as vit_b16@224" in refused("lra_jax.scaling", "vit_ti16")
  with pytest.raises(errors.UserError):
    scaling.describe("vit_b17", 224)
