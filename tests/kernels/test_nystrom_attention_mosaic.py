"""The Mosaic GPU form of kernels.nystrom_attention, interpreted with race detection, against the plain form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from kernels import compile, dispatch, mosaic
from kernels.nystrom_attention import nystrom_attention, shapes
from kernels.nystrom_attention.shapes import Shape

pytestmark = pytest.mark.timeout(240, method="thread")
BOUNDS = {jnp.float32: 1e-4, jnp.bfloat16: 1e-2}  # float32 as sums of two bfloat16 numbers


def arguments(seed, dtype, shape):
  """q, k, v and the skip filter or None; the options."""
  q, k, v, *others = shapes.draw(shape, np.random.RandomState(seed))
  options = dict(landmarks=shape.landmarks)
  if shape.masked:
    options["mask_BL"] = jnp.asarray(others.pop())
  arrays = q, k, v, *(others or [None])
  return tuple(None if array is None else jnp.asarray(array, dtype) for array in arrays), options


def with_gradients(implementation, arrays, options, seed=9):
  """The result and the gradients of its product with a random array."""
  weights = np.random.RandomState(seed).randn(*arrays[0].shape)

  def loss(*arrays):
    out = nystrom_attention(*arrays, implementation=implementation, **options)
    return (out.astype(jnp.float32) * weights).sum(), out

  present = tuple(i for i, array in enumerate(arrays) if array is not None)
  grads, out = jax.jit(jax.grad(loss, argnums=present, has_aux=True))(*arrays)
  return out, *grads


def check(results, arrays, options, bound):
  """Against the plain form in float32: the norm of the difference, relative to the norm of the truth."""
  wide = [None if array is None else array.astype(jnp.float32) for array in arrays]
  names = ["out", "dq", "dk", "dv", "dw"][: len(results)]
  for name, result, expected in zip(names, results, with_gradients("reference", wide, options), strict=True):
    assert result.dtype == arrays[0].dtype, name
    result, expected = (np.asarray(x, np.float64) for x in (result, expected))
    assert np.linalg.norm(result - expected) <= bound * np.linalg.norm(expected), name


@pytest.mark.parametrize(
  "dtype,shape,options,steps",
  [
    (jnp.bfloat16, Shape(1, 72, 2, 32, 16, 3), {}, "few"),
    pytest.param(jnp.bfloat16, Shape(1, 330, 1, 64, 20, 0), {}, "many", marks=pytest.mark.exhaustive),
    (jnp.bfloat16, Shape(1, 390, 1, 16, 100, 0, masked=True), dict(pinv_init="global"), "many"),
    (jnp.bfloat16, Shape(2, 69, 1, 24, 64, 5, masked=True), dict(pinv_iterations=3), "few"),
    pytest.param(jnp.bfloat16, Shape(1, 140, 1, 96, 70, 0), {}, "few", marks=pytest.mark.exhaustive),
    (jnp.float32, Shape(1, 330, 1, 32, 20, 0, masked=True), {}, "many"),
    (jnp.float32, Shape(1, 140, 1, 32, 128, 0), dict(pinv_init="global"), "few"),
    (jnp.float32, Shape(1, 75, 1, 80, 7, 3), {}, "few"),
  ],
)
def test_equals_the_plain_form_with_gradients(interpreter, monkeypatch, dtype, shape, options, steps):
  """Lengths that no tile divides, odd widths; in "many" steps a block uses its shared memory over and over."""
  if steps == "many":
    monkeypatch.setattr(mosaic, "MULTIPROCESSORS", 1)
  arrays, keywords = arguments(shape.tokens, dtype, shape)
  check(with_gradients("mosaic", arrays, keywords | options), arrays, keywords | options, BOUNDS[dtype])


def test_a_sequence_of_padding_alone_gives_zeros(interpreter):
  arrays, options = arguments(1, jnp.bfloat16, Shape(2, 40, 1, 16, 8, 0, masked=True))
  options["mask_BL"] = options["mask_BL"].at[1].set(0)
  results = with_gradients("mosaic", arrays, options)
  check(results, arrays, options, 1e-2)
  for result in results:
    np.testing.assert_array_equal(np.asarray(result[1], np.float32), 0)


def test_padding_of_whole_tiles_chunks_and_segments(interpreter, monkeypatch):
  """Two chunks of two tiles of keys: of the first chunk one tile is padding, of the second both are."""
  monkeypatch.setattr(mosaic, "MULTIPROCESSORS", 1)
  arrays, options = arguments(4, jnp.bfloat16, Shape(1, 400, 1, 16, 8, 0, masked=True))
  tokens = np.arange(400)
  options["mask_BL"] = jnp.asarray((tokens >= 150) & (tokens < 250))[None]
  check(with_gradients("mosaic", arrays, options), arrays, options, 1e-2)


@pytest.mark.parametrize("landmarks,parts,bound", [(64, 2, 1e-4), (20, 3, 1e-6)])
def test_pseudo_inverse_and_its_gradients(interpreter, landmarks, parts, bound):
  """Against float64, after two steps: later ones hardly depend on the start, whose gradient vanishes."""
  from kernels.nystrom_attention import mosaic, reference

  rng = np.random.RandomState(landmarks)
  a = jax.nn.softmax(jnp.asarray(rng.randn(2, 1, landmarks, landmarks), jnp.float32))
  weights = rng.randn(*a.shape)
  with jax.enable_x64(True):
    wide = a.astype(jnp.float64)
    expected = reference.first_inverse(wide, "per_matrix"), reference.pseudo_inverse(wide, 2, "per_matrix")

    def from_start(a, z):
      for _ in range(2):
        x = a @ z
        z = 0.25 * (13 * z - z @ (15 * x - x @ (7 * x - x @ x)))
      return z

    np.testing.assert_allclose(from_start(wide, expected[0]), expected[1], rtol=1e-9, atol=1e-9)
    pull = jax.vjp(from_start, wide, expected[0])[1]
    expected = [np.asarray(x) for x in (expected[1], *pull(jnp.asarray(weights, jnp.float64)))]
  run = functools.partial(mosaic._inverse, iterations=2, parts=parts)
  z, pull = jax.vjp(run, a, reference.first_inverse(a, "per_matrix"))
  for result, truth in zip((z, *pull(jnp.asarray(weights, jnp.float32))), expected, strict=True):
    assert np.linalg.norm(result - truth) <= bound * np.linalg.norm(truth)
  np.testing.assert_array_equal(run(a, reference.first_inverse(a, "per_matrix")), z)


def test_large_scores_do_not_overflow(interpreter):
  (q, k, v, _), options = arguments(2, jnp.bfloat16, Shape(1, 72, 1, 16, 8, 0))
  arrays = 40 * q, 40 * k, v, None
  out = nystrom_attention(*arrays, implementation="mosaic", **options)
  assert np.isfinite(np.asarray(out, np.float32)).all()


def test_vmap_jit_and_shard_map(interpreter):
  (q, k, v, _), options = arguments(3, jnp.float32, Shape(2, 40, 1, 16, 8, 0))
  mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
  run = functools.partial(nystrom_attention, **options)

  def mapped(implementation):
    one = functools.partial(run, implementation=implementation)
    several = jax.vmap(lambda q, k, v: one(q[None], k[None], v[None])[0])
    split = jax.shard_map(
      several, mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec("data"), check_vma=False
    )
    return jax.jit(jax.value_and_grad(lambda *arrays: (split(*arrays) ** 2).sum(), argnums=(0, 1, 2)))(q, k, v)

  for result, expected in zip(jax.tree.leaves(mapped("mosaic")), jax.tree.leaves(mapped("reference")), strict=True):
    assert np.linalg.norm(result - expected) <= 1e-4 * np.linalg.norm(expected)


@pytest.mark.parametrize(
  "shape,landmarks,dtype,reason",
  [
    ((1, 16, 1, 16), 16, jnp.float32, "16 landmarks for 16 tokens are plain softmax attention"),
    ((1, 300, 1, 16), 129, jnp.bfloat16, "at most 128 landmarks, not 129"),
    ((1, 300, 1, 136), 8, jnp.bfloat16, "heads of width 128 at most, not 136"),
    ((1, 300, 1, 16), 8, jnp.float16, "bfloat16 or float32 for all, not float16"),
    ((1, 300, 1, 64), 128, jnp.float32, "128 landmarks and heads of width 64 in float32 need more shared memory"),
    ((0, 300, 1, 64), 64, jnp.bfloat16, "nothing to do"),
  ],
)
def test_refuses_with_the_reason(shape, landmarks, dtype, reason):
  x = jax.ShapeDtypeStruct(shape, dtype)
  run = functools.partial(nystrom_attention, landmarks=landmarks)
  with dispatch.compiling_for("gpu"):
    with pytest.raises(ValueError, match=f"'mosaic' cannot serve: .*{reason}"):
      jax.eval_shape(functools.partial(run, implementation="mosaic"), x, x, x)
    with dispatch.recording() as choices:
      jax.eval_shape(run, x, x, x)
  assert list(choices["nystrom_attention"]) == ["xla"]


@pytest.mark.parametrize(
  "platform,capability,expected",
  [("gpu", "9.0", "mosaic"), ("gpu", "8.0", "xla"), ("gpu", "10.0", "xla"), ("cpu", "9.0", "xla")],
)
def test_default_by_device(platform, capability, expected):
  x = jax.ShapeDtypeStruct((2, 64, 2, 32), jnp.float32)
  with dispatch.compiling_for(platform, capability), dispatch.recording() as choices:
    run = functools.partial(nystrom_attention, landmarks=8)
    jax.make_jaxpr(run)(x, x, x)
  assert list(choices["nystrom_attention"]) == [expected]


@pytest.mark.skipif(compile.missing() is not None, reason=f"{compile.missing()}")
def test_rematerialised_and_nothing_as_long_as_the_tokens_times_the_landmarks():
  """Compiled only: an interpreted kernel cannot lie in `jax.checkpoint`."""
  x = jax.ShapeDtypeStruct((1, 8192, 1, 32), jnp.bfloat16)

  def loss(q, k, v):
    run = functools.partial(nystrom_attention, landmarks=128)
    return jax.checkpoint(run)(q, k, v).astype(jnp.float32).sum()

  text = compile.compile_for_h200(jax.grad(loss, argnums=(0, 1, 2)), x, x, x).compiled.as_text()
  assert text.count("mosaic_gpu") >= 5  # both forward kernels again
  assert "8192,128]" not in text and "128,8192]" not in text


@pytest.mark.skipif(compile.missing() is not None, reason=f"{compile.missing()}")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_memory_grows_with_the_tokens_times_the_width(dtype):
  """Forward and gradient at 16,384 tokens, compiled: a few arrays like q, and none of tokens times landmarks."""
  x = jax.ShapeDtypeStruct((1, 16_384, 2, 32), dtype)
  run = functools.partial(nystrom_attention, landmarks=128, implementation="mosaic")
  grad = jax.grad(lambda *arrays: (run(*arrays).astype(jnp.float32) ** 2).sum(), argnums=(0, 1, 2))
  compiled = compile.compile_for_h200(grad, x, x, x).compiled
  text = compiled.as_text()
  assert "16384,128]" not in text and "128,16384]" not in text
  assert compiled.memory_analysis().temp_size_in_bytes < 8 * x.size * jnp.dtype(dtype).itemsize
