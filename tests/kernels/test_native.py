"""Every Mosaic GPU kernel on a GPU, at full shapes and 20 seeds: `JAX_PLATFORMS=cuda pytest` with this file.

Elsewhere the comparison itself is tested, with forms that run everywhere. Arguments are drawn and results compared on
the device, and forward and gradient are one program, so that all of it fits into minutes of a borrowed GPU.
"""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from kernels import cases

SEEDS = range(20)
CASES = [case for operation in cases.OPERATIONS for case in cases.all_cases(operation)]
hopper = jax.default_backend() == "gpu" and str(jax.devices()[0].compute_capability).startswith("9.")


def name(case):
  return f"{case.operation}-{case.name}-{jnp.dtype(case.dtype).name}"


def both(case, implementation):
  """The result without a gradient (which may be another kernel), and with it."""
  forward, gradient = case.function(implementation, False), case.function(implementation, True)
  return jax.jit(lambda *arguments: (forward(*arguments), gradient(*arguments)))


@jax.jit
def deviations(ours, again, theirs):
  """The largest error relative to the norm, and whether the two calls gave the same bits."""

  def norm(x):
    return jnp.sqrt((x.astype(jnp.float32) ** 2).sum())

  pairs = list(zip(*map(jax.tree.leaves, (ours, again, theirs)), strict=True))
  errors = jnp.stack([norm(x.astype(jnp.float32) - z.astype(jnp.float32)) / norm(z) for x, _, z in pairs])
  return errors.max(), jnp.stack([(x == y).all() for x, y, _ in pairs]).all()


def check(case, implementation, seeds):
  """`implementation` is within the bounds for every seed; and has twice the same bits, as what moves is a race."""
  kernel = both(case, implementation)
  with jax.default_matmul_precision("highest"):
    reference = both(case, "reference")
    for seed in seeds:
      arguments = case.arrays(seed)
      exact = [a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a for a in arguments]
      error, same = deviations(kernel(*arguments), kernel(*arguments), reference(*exact))
      assert error < case.bound, f"seed {seed}: error {error} of the norm"
      assert same, f"seed {seed}: two calls differ"


@pytest.mark.skipif(not hopper, reason="no Hopper GPU")
@pytest.mark.parametrize("case", [case for case in CASES if "mosaic" in case.implementations], ids=name)
def test_equals_the_reference_and_itself(case):
  check(case, "mosaic", SEEDS)


SMALL = [
  case for case in CASES if case.name == "digits" and case.dtype == jnp.float32 and len(case.implementations) > 1
]


@pytest.mark.parametrize("case", SMALL, ids=name)
def test_the_comparison_accepts_a_right_form_and_no_wrong_one(case):
  form = next(form for form in ("xla", "associative") if form in case.implementations)
  check(case, form, range(2))

  def off(*arguments, implementation):
    result = case.run(*arguments, implementation=implementation)
    return jax.tree.map(lambda x: x * (1 + 2 * case.bound), result) if implementation == form else result

  with pytest.raises(AssertionError, match="of the norm"):
    check(dataclasses.replace(case, run=off), form, range(1))
