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

# The largest error that a form may have, relative to the norm of the truth, in results and gradients, by the operands
# of its products: float32 as it is, float32 rounded to TF32 or split into halves by tensor cores, bfloat16.
BOUNDS = {"float32": 1e-5, "tf32": 1e-3, "bfloat16": 1e-2}
_WITHOUT_TENSOR_CORES = ("linear_recurrence",)

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
    draw: `draw(rng)` → the arguments as arrays, from a `numpy.random.RandomState` or `DeviceDraws`.
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
  draw: Callable[["np.random.RandomState | DeviceDraws"], tuple[np.ndarray | jax.Array, ...]]
  arguments: tuple[jax.ShapeDtypeStruct, ...]
  implementations: tuple[str, ...]
  batched: tuple[bool, ...]
  differentiate: tuple[int, ...]
  transferred: tuple[float, float]
  operations: tuple[float, float]
  steps: tuple[int, int] = (0, 0)

  def arrays(self, seed: int) -> tuple[jax.Array, ...]:
    """Arguments drawn for `seed`, in their dtypes."""
    drawn = self.draw(DeviceDraws(seed))
    return tuple(jnp.asarray(array, spec.dtype) for array, spec in zip(drawn, self.arguments, strict=True))

  @property
  def bound(self) -> float:
    """The entry of BOUNDS for "mosaic"."""
    exact = "float32" if self.operation in _WITHOUT_TENSOR_CORES else "tf32"
    return BOUNDS["bfloat16" if self.dtype == jnp.bfloat16 else exact]

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


class DeviceDraws:
  """Draws as `numpy.random.RandomState` does, but float32 on the device: a host takes seconds for the large shapes."""

  def __init__(self, seed: int):
    self._key = jax.random.key(seed)

  def _next(self) -> jax.Array:
    self._key, key = jax.random.split(self._key)
    return key

  def randn(self, *shape: int) -> jax.Array:
    """Standard normal numbers."""
    return jax.random.normal(self._next(), shape)

  def uniform(self, low: float, high: float, shape: tuple[int, ...]) -> jax.Array:
    """Numbers between `low` and `high`."""
    return jax.random.uniform(self._next(), shape, minval=low, maxval=high)

  def randint(self, low: int, high: int, shape: tuple[int, ...]) -> jax.Array:
    """Integers from `low` to `high` − 1."""
    return jax.random.randint(self._next(), shape, low, high)


def all_cases(operation: str) -> Iterator[Case]:
  """The cases of an operation, float32 and bfloat16."""
  return importlib.import_module(f"kernels.{operation}.shapes").cases()
