"""Every Mosaic GPU kernel on a GPU, at full shapes and 20 seeds: `JAX_PLATFORMS=cuda pytest` with this file."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import cases

SEEDS = range(20)
# Relative to the norm of the truth, forward and gradients. float32 products run as TF32; the recurrence of S5 and LRU
# has none, and is exact.
BOUNDS = {"float32": 1e-3, "bfloat16": 1e-2}
EXACT = {("linear_recurrence", "float32"): 1e-5}

CASES = [
  pytest.param(case, grad, id=f"{case.operation}-{case.name}-{case.dtype.__name__}-{'grad' if grad else 'forward'}")
  for operation in cases.OPERATIONS
  for case in cases.all_cases(operation)
  if "mosaic" in case.implementations
  for grad in (False, True)
]
hopper = jax.default_backend() == "gpu" and str(jax.devices()[0].compute_capability).startswith("9.")
pytestmark = pytest.mark.skipif(not hopper, reason="no Hopper GPU")


def norm_error(ours, truth):
  ours, truth = np.asarray(ours, np.float64), np.asarray(truth, np.float64)
  return np.linalg.norm(ours - truth) / np.linalg.norm(truth)


@pytest.mark.parametrize("case,grad", CASES)
def test_equals_the_reference_and_itself(case, grad):
  """Within the bounds for every seed; and twice the same bits, as a result that moves is a race."""
  dtype = jnp.dtype(case.dtype).name
  bound = EXACT.get((case.operation, dtype), BOUNDS[dtype])
  kernel = jax.jit(case.function("mosaic", grad))
  with jax.default_matmul_precision("highest"):
    reference = jax.jit(case.function("reference", grad))
    for seed in SEEDS:
      arguments = case.arrays(seed)
      ours, again = kernel(*arguments), kernel(*arguments)
      truth = reference(*(a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a for a in arguments))
      for mine, same, theirs in zip(*map(jax.tree.leaves, (ours, again, truth)), strict=True):
        assert norm_error(mine, theirs) < bound, seed
        assert (np.asarray(mine) == np.asarray(same)).all(), seed
