"""Fixtures for kernels that run on a GPU only."""

import pytest

from kernels import dispatch


@pytest.fixture
def interpreter(capfd):
  """Mosaic GPU kernels are interpreted on the CPU within the test, which fails if memory was accessed in a race."""
  # There is no public way to clear its state after an error, nor, in jax 0.11, to learn of a race but what it prints.
  from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

  interpret_pallas_call.reset_gpu_interpret_mode_state()
  with dispatch.interpreting():
    try:
      yield
    finally:
      interpret_pallas_call.reset_gpu_interpret_mode_state()
  output = capfd.readouterr()
  assert "RACE DETECTED" not in output.out + output.err
