"""kernels.nystrom_attention against NumPy in float64, written from the paper's equations."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.nystrom_attention import nystrom_attention, shapes
from kernels.nystrom_attention.shapes import Shape

every_implementation = pytest.mark.parametrize("implementation", ["reference", "xla"])
CASES = [
  (Shape(2, 24, 2, 8, 6, 3), {}),
  (Shape(2, 23, 2, 8, 6, 0, masked=True), dict(pinv_init="global")),
  (Shape(1, 9, 1, 5, 9, 5, masked=True), {}),
  (Shape(3, 40, 1, 16, 7, 5, masked=True), dict(pinv_iterations=3)),
  (Shape(1, 12, 3, 4, 1, 1), {}),
]


def softmax(x):
  x = np.exp(x - x.max(-1, keepdims=True))
  return x / x.sum(-1, keepdims=True)


def truth(arrays, shape, *, pinv_iterations=6, pinv_init="per_matrix"):
  """Equations 11, 13 and 14 of arXiv 2102.03902, for one head of one sequence after the other."""
  q, k, v, *others = (np.asarray(array, np.float64) for array in arrays)
  mask = others.pop() if shape.masked else np.ones(shape[:2])
  q, k, v = (x * mask[..., None, None] for x in (q, k, v))
  size, longer = divmod(shape.tokens, shape.landmarks)
  edges = np.cumsum([0] + [size + (i < longer) for i in range(shape.landmarks)])
  heads = [(b, n) for b in range(shape.batch) for n in range(shape.heads)]
  scaled = {h: (q[h[0], :, h[1]] / shape.width**0.25, k[h[0], :, h[1]] / shape.width**0.25) for h in heads}
  means = {
    h: [np.stack([x[start:end].mean(0) for start, end in itertools.pairwise(edges)]) for x in scaled[h]] for h in heads
  }
  matrices = {h: softmax(means[h][0] @ means[h][1].T) for h in heads}
  largest = {h: matrices[h].sum(0).max() for h in heads}
  out = np.zeros(v.shape)
  for b, n in heads:
    (queries, keys), (q_means, k_means), a = scaled[b, n], means[b, n], matrices[b, n]
    z = a.T / (max(largest.values()) if pinv_init == "global" else largest[b, n])
    eye = np.eye(len(a))
    for _ in range(pinv_iterations):
      z = z @ (13 * eye - a @ z @ (15 * eye - a @ z @ (7 * eye - a @ z))) / 4
    hidden = np.where(mask[b], 0, -1e9)
    if shape.landmarks == shape.tokens:
      out[b, :, n] = softmax(queries @ keys.T + hidden) @ v[b, :, n]
    else:
      out[b, :, n] = softmax(queries @ k_means.T) @ z @ softmax(q_means @ keys.T + hidden) @ v[b, :, n]
    if shape.taps:
      padded = np.pad(v[b, :, n], ((shape.taps // 2, shape.taps // 2), (0, 0)))
      out[b, :, n] += sum(others[0][r, n] * padded[r : r + shape.tokens] for r in range(shape.taps))
  return out


def run(shape, options, implementation, arrays):
  q, k, v, *others = arrays
  mask = others.pop() if shape.masked else None
  w_skip = others.pop() if others else None
  return nystrom_attention(
    q, k, v, w_skip, landmarks=shape.landmarks, mask_BL=mask, implementation=implementation, **options
  )


def drawn(shape, dtype, seed=0):
  arrays = shapes.draw(shape, np.random.RandomState(seed))
  return [jnp.asarray(array, jnp.int32 if array.dtype == np.int64 else dtype) for array in arrays]


def error(x, y):
  x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
  return np.linalg.norm(x - y) / np.linalg.norm(y)


@every_implementation
@pytest.mark.parametrize("dtype,bound", [(jnp.float32, 1e-5), (jnp.bfloat16, 1e-2)])
@pytest.mark.parametrize("shape,options", CASES)
def test_equals_numpy(implementation, shape, options, dtype, bound):
  arrays = drawn(shape, dtype)
  out = jax.jit(functools.partial(run, shape, options, implementation))(arrays)
  assert out.dtype == dtype
  assert error(out, truth(arrays, shape, **options)) < bound


@pytest.mark.parametrize("shape,options", CASES)
def test_gradients_equal_the_reference(shape, options):
  arrays = drawn(shape, jnp.float32, 1)
  weights = np.random.RandomState(2).randn(*shape[:4])

  def gradients(implementation):
    count = 3 + bool(shape.taps)
    loss = lambda *inputs: (run(shape, options, implementation, [*inputs, *arrays[count:]]) * weights).sum()
    return jax.grad(loss, argnums=tuple(range(count)))(*arrays[:count])

  for ours, expected in zip(gradients("xla"), gradients("reference"), strict=True):
    assert error(ours, expected) < 1e-5


def test_nothing_as_large_as_tokens_times_landmarks_is_kept():
  shape = Shape(1, 512, 1, 8, 64, 0)
  arrays = drawn(shape, jnp.float32)
  for implementation, kept in (("reference", True), ("xla", False)):
    _, pull = jax.vjp(lambda *arrays, name=implementation: run(shape, {}, name, arrays), *arrays)
    assert any(leaf.size >= 512 * 64 for leaf in jax.tree.leaves(pull)) == kept


@every_implementation
def test_vmap_and_checkpoint(implementation):
  shape = Shape(2, 24, 2, 8, 6, 0)
  arrays = drawn(shape, jnp.float32)
  one = jax.checkpoint(lambda *arrays: run(shape, {}, implementation, [x[None] for x in arrays])[0])
  out = jax.jit(jax.vmap(one))(*arrays)
  assert error(out, truth(arrays, shape)) < 1e-5
