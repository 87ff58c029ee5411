"""kernels.lstm as a Mosaic GPU kernel: interpreted on the CPU, and compiled for an H200, against the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

import kernels.lstm
from kernels import cases, compile, dispatch
from kernels.lstm import mosaic

pytestmark = pytest.mark.timeout(240, method="thread")
compiled = pytest.mark.skipif(compile.missing() is not None, reason=f"{compile.missing()}")
# Interpreted, float32 products are exact.
BOUNDS = {jnp.float32: cases.BOUNDS["float32"], jnp.bfloat16: cases.BOUNDS["bfloat16"]}
ARGUMENTS = ("x", "w_ih", "w_hh", "b_ih", "b_hh")


def arrays(seed, shape, hidden, directions, dtype):
  """Arguments of `lstm` or `bilstm2d`; all are numbers of `dtype`, weights are float32 arrays as in the models."""
  rng = np.random.RandomState(seed)
  shapes = [(shape[-1], directions, 4 * hidden), (directions, hidden, 4 * hidden), *[(directions, 4 * hidden)] * 2]
  drawn = [rng.randn(*shape), *(rng.uniform(-1, 1, s) * 1.5 * hidden**-0.5 for s in shapes)]
  x, *weights = (jnp.asarray(a, dtype) for a in drawn)
  return x, *(w.astype(jnp.float32) for w in weights)


def result_and_gradients(run, arguments, seed):
  y, pull = jax.vjp(run, *arguments)
  return y, *pull(jnp.asarray(np.random.RandomState(1000 + seed).randn(*y.shape), y.dtype))


def check(run, arguments, seed, dtype):
  """`run(*arguments, implementation=)` and its gradients against the reference in float32."""

  def both(implementation, *arguments):
    return result_and_gradients(functools.partial(run, implementation=implementation), arguments, seed)

  ours = jax.jit(both, static_argnums=0)("mosaic", *arguments)
  truth = jax.jit(both, static_argnums=0)("reference", *(a.astype(jnp.float32) for a in arguments))
  assert ours[0].dtype == dtype
  for name, a, b in zip(("y", *ARGUMENTS), ours, truth, strict=True):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert np.linalg.norm(a - b) <= BOUNDS[dtype] * np.linalg.norm(b), name


@pytest.mark.parametrize(
  "seed,shape,hidden,reverse,dtype",
  [
    (0, (3, 7, 4), 8, (False, True), jnp.float32),  # more steps than the ring has slots, twice
    (1, (3, 7, 4), 24, (True, False), jnp.bfloat16),
    (2, (9, 2, 3), 5, (True,), jnp.float32),  # neither the batch nor the hidden units suit copies
    (3, (2, 3, 8), 96, (False, True), jnp.bfloat16),  # two warpgroups
    (4, (2, 3, 8), 72, (True,), jnp.float32),
    (6, (1, 3, 4), 104, (True,), jnp.float32),  # from here on, weights are copied at every step
    (7, (1, 2, 4), 152, (False,), jnp.bfloat16),
    (8, (1, 2, 4), 256, (True,), jnp.bfloat16),
  ],
)
def test_lstm_equals_reference(interpreter, seed, shape, hidden, reverse, dtype):
  run = functools.partial(kernels.lstm.lstm, reverse=reverse)
  check(run, arrays(seed, shape, hidden, len(reverse), dtype), seed, dtype)


@pytest.mark.parametrize(
  "seed,shape,hidden,dtype",
  [
    (10, (2, 3, 3, 6), 48, jnp.bfloat16),
    (11, (1, 9, 9, 3), 8, jnp.float32),  # neither rows nor columns suit copies
    (12, (1, 2, 9, 3), 4, jnp.bfloat16),  # two launches
    (13, (2, 1, 1, 3), 8, jnp.bfloat16),
  ],
)
def test_bilstm2d_equals_reference(interpreter, seed, shape, hidden, dtype):
  check(kernels.lstm.bilstm2d, arrays(seed, shape, hidden, 4, dtype), seed, dtype)


@pytest.mark.parametrize("lanes,dtype", [(16, jnp.float32), (32, jnp.bfloat16)])
def test_blocks_of_several_images_of_which_some_are_missing(interpreter, monkeypatch, lanes, dtype):
  """Real shapes take wide blocks, which small ones do not: images of two columns fill them only in part."""
  plans = mosaic._plans
  monkeypatch.setattr(mosaic, "_plans", lambda *a: (plan for plan in plans(*a) if plan.lanes == lanes))
  check(kernels.lstm.bilstm2d, arrays(lanes, (3, 2, 2, 3), 8, 4, dtype), lanes, dtype)


def test_three_warpgroups(interpreter):
  run = functools.partial(kernels.lstm.lstm, reverse=(False,))
  check(run, arrays(5, (2, 2, 8), 136, 1, jnp.bfloat16), 5, jnp.bfloat16)


def test_vmap_and_jit(interpreter):
  x, *weights = arrays(20, (4, 3, 2), 8, 2, jnp.float32)
  run = functools.partial(kernels.lstm.lstm, implementation="mosaic")
  mapped = jax.jit(jax.vmap(run, in_axes=(0, None, None, None, None)))(x.reshape(2, 2, 3, 2), *weights)
  truth = kernels.lstm.lstm(x, *weights, implementation="reference")
  assert np.abs(np.asarray(mapped.reshape(truth.shape) - truth)).max() < 1e-5


def test_shard_map(interpreter):
  x, *weights = arrays(21, (2, 2, 2), 8, 2, jnp.float32)
  mesh, split, whole = Mesh(np.array(jax.devices()[:1]), ("data",)), PartitionSpec("data"), PartitionSpec()

  def run(*arguments, implementation):
    function = functools.partial(kernels.lstm.lstm, implementation=implementation)
    specs = {"in_specs": (split, whole, whole, whole, whole), "out_specs": split}
    return jax.shard_map(function, mesh=mesh, check_vma=False, **specs)(*arguments)

  check(run, (x, *weights), 21, jnp.float32)


@pytest.mark.parametrize(
  "dtype,batch,hidden,reason",
  [
    (jnp.float16, 2, 8, "it takes float32 or bfloat16, and the input is float16"),
    (jnp.bfloat16, 2, 257, "it takes up to 256 hidden units, .*; not 257"),
    (jnp.float32, 2, 300, "it takes up to 256 hidden units, .*; not 300"),
    (jnp.float32, 0, 8, r"an input of shape \(0, 3, 4\) is empty"),
  ],
)
def test_refusals_say_why(dtype, batch, hidden, reason):
  arguments = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays(0, (batch, 3, 4), hidden, 2, dtype)]
  with dispatch.compiling_for("gpu"), dispatch.recording() as choices:
    with pytest.raises(ValueError, match=f"implementation='mosaic' cannot serve: .*{reason}"):
      jax.eval_shape(functools.partial(kernels.lstm.lstm, implementation="mosaic"), *arguments)
    jax.eval_shape(lambda *a: kernels.lstm.lstm(*a), *arguments)  # not traced before, hence chosen anew
  assert list(choices["lstm"]) == ["xla"]


@pytest.mark.parametrize("platform,expected", [(("gpu",), "mosaic"), (("gpu", "8.0"), "xla"), (("cpu",), "xla")])
def test_none_takes_the_kernel_on_hopper(platform, expected):
  arguments = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays(0, (2, 4, 4, 3), 24, 4, jnp.bfloat16)]
  with dispatch.compiling_for(*platform), dispatch.recording() as choices:
    jax.eval_shape(lambda *a: kernels.lstm.bilstm2d(*a), *arguments)  # not traced before, hence chosen anew
  assert list(choices["bilstm2d"]) == [expected]


@pytest.mark.parametrize(
  "dtype,batch,hidden,expected",
  [
    (jnp.bfloat16, 4096, 144, "mosaic"),  # all weights stay in shared memory
    (jnp.bfloat16, 64, 256, "mosaic"),
    (jnp.bfloat16, 4096, 256, "xla"),
    (jnp.float32, 64, 128, "mosaic"),
    (jnp.float32, 64, 256, "xla"),
  ],
)
def test_none_takes_the_kernel_where_it_is_predicted_to_be_faster(dtype, batch, hidden, expected):
  arguments = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays(0, (1, 2, 3), hidden, 2, dtype)]
  arguments[0] = jax.ShapeDtypeStruct((batch, 128, 3), dtype)
  with dispatch.compiling_for("gpu"), dispatch.recording() as choices:
    jax.eval_shape(lambda *a: kernels.lstm.lstm(*a), *arguments)  # not traced before, hence chosen anew
    ((name, reason),) = choices["lstm"].items()
    assert name == expected and ("predicted" in reason) == (expected == "xla")
    jax.eval_shape(functools.partial(kernels.lstm.lstm, implementation="mosaic"), *arguments)  # serves who asks


@pytest.mark.parametrize("dtype,resident", [(jnp.float32, 96), (jnp.bfloat16, 144)])
def test_every_hidden_size_up_to_the_largest(dtype, resident):
  """All weights stay in shared memory up to a size, and as many as fit above it."""
  itemsize = jnp.dtype(dtype).itemsize
  layout = mosaic._layout((2, 3, 1, 4), ((1, False),))
  for hidden in range(1, 257):
    assert mosaic.refuse(dtype, (2, 3, 4), hidden) is None
    for kind in (mosaic._FORWARD, mosaic._BACKWARD):
      plan = mosaic._best_plan(layout, mosaic._padded_hidden(hidden, itemsize), itemsize, *kind)
      assert (plan.weight_slots == 0) == (hidden <= resident)
      assert plan.shared_memory <= mosaic.mosaic.SHARED_MEMORY
      assert not plan.weight_slots or sorted(plan.order()) == sorted(set(plan.order()))
  assert all(mosaic.refuse(dtype, (2, 3, 4), hidden) for hidden in range(257, 300))


@compiled
@pytest.mark.parametrize(
  "shape,hidden,dtype",
  [
    ((100, 5, 4), 144, jnp.bfloat16),
    ((3, 14, 14, 4), 61, jnp.float32),
    ((700, 3, 3, 4), 190, jnp.bfloat16),  # blocks of 16 sequences
    ((20, 3, 3, 4), 250, jnp.bfloat16),
    ((20, 3, 3, 4), 250, jnp.float32),
    ((20, 9, 9, 4), 160, jnp.bfloat16),
    ((20, 9, 4), 104, jnp.float32),
  ],
)
def test_odd_sizes_compile_under_checkpoint(shape, hidden, dtype):
  run = kernels.lstm.lstm if len(shape) == 3 else kernels.lstm.bilstm2d
  arguments = arrays(0, shape, hidden, 2 if len(shape) == 3 else 4, dtype)

  def loss(*arguments):
    return (jax.checkpoint(functools.partial(run, implementation="mosaic"))(*arguments).astype(jnp.float32) ** 2).sum()

  resident = {jnp.float32: 96, jnp.bfloat16: 144}[dtype]
  program = compile.compile_for_h200(jax.grad(loss, argnums=range(5)), *arguments)
  assert {kernel.name for kernel in program.kernels} == {"lstm_forward", "lstm_backward"}
  for kernel in program.kernels:
    # C7519: an instruction that orders registers is put before a product that follows a wait.
    warnings = [line for line in kernel.warnings if "C7519" not in line or hidden <= resident]
    assert kernel.spilled == 0 and not warnings, kernel
