"""The real uses of every operation, shared by the benchmark, the compilation for a GPU and the tests on one.

Every operation's `shapes.py` makes its own list; `all_cases` finds it.
"""

import dataclasses
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

OPERATIONS = (
  "fft_mixing",
  "nystrom_attention",
  "lstm",
  "lipschitz_rnn",
  "linear_recurrence",
  "depthwise_conv",
  "conv2d",
)


@dataclasses.dataclass(frozen=True)
class Case:
  """One operation at one shape and dtype.

  Attributes:
    operation: its name, a folder of `kernels`.
    name: of the shape.
    dtype: of the activations.
    run: `run(*arguments, implementation)` → an array or a tuple of them.
    draw: `draw(rng)` → the arguments as float64 or integer NumPy arrays, from a `numpy.random.RandomState`.
    arguments: their shapes and dtypes.
    implementations: those to be compared at this shape; each must serve or refuse with a ValueError.
    batched: for every argument, whether its first axis is the batch.
    differentiate: positions of the arguments that have a gradient.
    transferred: bytes that must cross device memory at least, (forward, forward and gradient).
    operations: floating-point operations of the products and transforms in the form that "mosaic" takes, likewise.
    steps: sequential steps, likewise; 0 where nothing is sequential.
  """

  operation: str
  name: str
  dtype: Any
  run: Callable
  draw: Callable[[np.random.RandomState], tuple[np.ndarray, ...]]
  arguments: tuple[jax.ShapeDtypeStruct, ...]
  implementations: tuple[str, ...]
  batched: tuple[bool, ...]
  differentiate: tuple[int, ...]
  transferred: tuple[float, float]
  operations: tuple[float, float]
  steps: tuple[int, int] = (0, 0)

  def arrays(self, seed: int) -> tuple[jax.Array, ...]:
    """Arguments drawn for `seed`, in their dtypes."""
    drawn = self.draw(np.random.RandomState(seed))
    return tuple(jnp.asarray(array, spec.dtype) for array, spec in zip(drawn, self.arguments, strict=True))

  def function(self, implementation: str | None, grad: bool) -> Callable:
    """The operation; or (its result, the gradient of half the sum of the result's squares by `differentiate`)."""

    def forward(*arguments):
      return self.run(*arguments, implementation=implementation)

    def half_square(*arguments):
      result = forward(*arguments)
      return sum((part.astype(jnp.float32) ** 2).sum() for part in jax.tree.leaves(result)) / 2, result

    def both(*arguments):
      grads, result = jax.grad(half_square, argnums=self.differentiate, has_aux=True)(*arguments)
      return result, grads

    return both if grad else forward


def all_cases(operation: str) -> Iterator[Case]:
  """The cases of an operation, float32 and bfloat16."""
  return importlib.import_module(f"kernels.{operation}.shapes").cases()
