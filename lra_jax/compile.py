"""Compiles whole training steps for an NVIDIA H200 on a machine without one, and prints what they need there.

  python -m lra_jax.compile configs/fnet.py:lra_image configs/s5.py:lra_image --implementation xla,mosaic

Needs JAX's CUDA plugin and ptxas, but no GPU and no data set: nothing is executed, so there is no time either. A row
has the operations of the products, the memory that XLA plans for activations and other temporary arrays, that of the
state and a resident data set, and the Pallas kernels in the program with their registers per thread.

With `--devices 8 --fsdp 4` the step is one of 8 GPUs, the state split over groups of 4; batch and operations are those
of all, memory and what is exchanged those of each. The least is that of `collectives.least`.

With `--steps N` the steps are compiled for the device of this machine instead and executed on random data, a warm-up
and N steps, so that the rows have times; the implementations follow each other, config by config.
"""

import functools
import os
import statistics
import sys
import time

from absl import flags

from lra_jax import config, errors

_IMPLEMENTATION = flags.DEFINE_list(
  "implementation", [""], "Implementations of the kernels to compare; empty: the best."
)
_DTYPE = flags.DEFINE_string("dtype", "bfloat16", "Compute dtype of the models.")
_BATCH = flags.DEFINE_integer("batch", None, "Examples per step, instead of the config's.", lower_bound=1)
_EXAMPLES = flags.DEFINE_integer("examples", 45_000, "Size of the resident training split.", lower_bound=1)
_DEVICES = flags.DEFINE_integer("devices", 1, "H200s the step is compiled for.", lower_bound=1)
_FSDP = flags.DEFINE_integer("fsdp", 1, "How many of them share one copy of the state.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 0, "Steps to execute here; 0: only compile, for an H200.", lower_bound=0)

_COLUMNS = "| config | implementation | batch | GFLOP | temporary MiB | state and data MiB | "
HEADER = _COLUMNS + "kernels: registers |\n|---|---|---|---|---|---|---|"
SPLIT_HEADER = _COLUMNS + "exchanged: number, MiB sent by each device | least MiB |\n|---|---|---|---|---|---|---|---|"
TIMED_HEADER = _COLUMNS + "ms a step | examples/s | kernels |\n|---|---|---|---|---|---|---|---|---|"


def _prepare(settings, examples: int, mesh, platform: str):
  """(a function that makes the call that `train` would make for one step, the task, the state, the batch size)."""
  from lra_jax import optim, step, train
  from lra_jax.data import tasks

  known = tasks.REGISTRY.get(settings.task.name)  # names of classes that lie with the data do not matter here
  task = tasks.of(settings.task, known and known.class_names)
  plan = train.Plan.make(settings, examples, 1, platform)
  schedule = optim.make_schedule(settings.optim, plan.steps, plan.steps_per_epoch)
  graphdef, state, optimizer = step.init_state(settings, task, schedule)
  make = functools.partial(step.make_train_call, settings, task, graphdef, optimizer, schedule, 1, mesh)
  return make, task, state, plan.batch_size


def compile_step(settings, examples: int, devices: int = 1, fsdp: int = 1):
  """Compiles the step that `train` would run with this config on H200s.

  Args:
    settings: the config, as of `config.load`.
    examples: N, size of the training split.
    devices: how many of them.
    fsdp: as of `parallel.make_mesh`.

  Returns:
    (kernels.compile.Program, operations of the products).

  Raises:
    UserError: the CUDA plugin or ptxas is missing.
  """
  import jax
  import jax.numpy as jnp

  from kernels import compile, dispatch
  from lra_jax import flops, parallel
  from lra_jax.data import resident

  if (lacking := compile.missing()) is not None:
    raise errors.UserError(f"cannot compile for a GPU: {lacking}; see the heading of kernels/compile.py")
  mesh = jax.sharding.Mesh(compile.mesh(devices).devices.reshape(-1, fsdp), parallel.AXES)
  make, task, state, batch = _prepare(settings, examples, mesh, "gpu")
  whole, struct = parallel.replicated(mesh), functools.partial(jax.ShapeDtypeStruct, sharding=parallel.replicated(mesh))
  shardings = parallel.by_rule(state, mesh)
  state = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, shardings)
  make = functools.partial(make, shardings=(shardings, whole, parallel.sharded(mesh, 1)))
  data = resident.Resident(
    struct((examples, *task.stored_shape), task.stored_dtype),
    struct((examples,), jnp.int32),
    struct((examples, *task.stored_shape[:-1]), jnp.int32) if task.image_shape is None else None,
  )
  indices = jax.ShapeDtypeStruct((1, batch), jnp.int32, sharding=parallel.sharded(mesh, 1))
  program = compile.compile_for_h200(make(), state, data, indices)
  with dispatch.compiling_for("gpu"), dispatch.without_kernels():
    return program, flops.count(make().trace(state, data, indices).jaxpr)


def time_step(settings, examples: int, steps: int):
  """Compiles the same step for the device of this machine and runs it on random examples.

  Returns:
    (the compiled step, operations of the products, {operation: {implementation: reason}}, seconds of each step).
  """
  import jax
  import numpy as np

  from kernels import dispatch
  from lra_jax import flops, parallel
  from lra_jax.data import resident, sources

  parallel.keep_freed_memory()
  mesh = parallel.make_mesh(1)
  whole = parallel.replicated(mesh)
  make, task, state, batch = _prepare(settings, examples, mesh, mesh.devices.flat[0].platform)
  random = np.random.RandomState(0)
  inputs = random.randint(1, task.vocab_size or 256, (examples, *task.stored_shape), task.stored_dtype)
  labels = np.arange(examples, dtype=np.int32) % len(task.class_names)
  lengths = None
  if task.image_shape is None:
    lengths = random.randint(1, task.stored_shape[-1] + 1, (examples, *task.stored_shape[:-1]), np.int32)
  data = resident.put(sources.Split(inputs, labels, lengths), mesh)
  indices = jax.device_put(random.randint(0, examples, (1, batch), np.int32), whole)
  with dispatch.recording() as choices:
    traced = make().trace(state, data, indices)
  operations = flops.count_call(make, (state, data, indices), traced, choices)
  compiled = traced.lower().compile()
  state, seconds = jax.device_put(state, whole), []
  for _ in range(1 + steps):
    start = time.perf_counter()
    state, values = compiled(state, data, indices)
    jax.block_until_ready((state, values))
    seconds.append(time.perf_counter() - start)
  return compiled, operations, choices, seconds[1:]


def _exchanged(compiled, settings) -> tuple[str, str]:
  """The last columns of a row of several devices."""
  import jax.numpy as jnp
  from flax import nnx

  from lra_jax import collectives, models, runs
  from lra_jax.data import tasks

  found = collectives.count(compiled.as_text())
  text = "; ".join(f"{kind} {exchange.count}, {exchange.wire / 2**20:,.1f}" for kind, exchange in found.items())
  model = nnx.eval_shape(lambda: runs.create_model(settings, tasks.get(settings.task.name)))
  width = jnp.dtype(settings.model.dtype).itemsize
  least = collectives.least(models.count_params(model), _DEVICES.value // _FSDP.value, _FSDP.value, width)
  return text or "none", f"{least / 2**20:,.1f}"


def row(name: str, implementation: str, batch: int, compiled, operations: float, *others: str) -> str:
  """A line of the table; `others` are its last columns."""
  memory = compiled.memory_analysis()
  temporary, arguments = memory.temp_size_in_bytes / 2**20, memory.argument_size_in_bytes / 2**20
  numbers = f"{operations / 1e9:,.0f} | {temporary:,.0f} | {arguments:,.0f}"
  return f"| {name} | {implementation or 'best'} | {batch} | {numbers} | {' | '.join(others)} |"


def main() -> None:
  """Parses the flags and prints a row for every config and implementation."""
  arguments = errors.parse_flags(sys.argv, required=(), positional="config files", optional=True)
  if not arguments:
    raise errors.UserError("no config file given; try `python -m lra_jax.compile configs/fnet.py:lra_image`")
  if not _STEPS.value:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing runs; JAX would look for the libraries of a GPU
  from kernels import dispatch
  from lra_jax import models

  print(TIMED_HEADER if _STEPS.value else SPLIT_HEADER if _DEVICES.value > 1 else HEADER, flush=True)
  for argument in arguments:
    path, _, options = argument.partition(":")
    for implementation in _IMPLEMENTATION.value:
      settings = config.load(config.find(path), options)
      settings.train.batch_size = _BATCH.value or settings.train.batch_size
      settings.model.dtype = _DTYPE.value
      if "implementation" in models.fields(settings.model.name):
        settings.model.implementation = implementation or None
      batch = settings.train.batch_size
      try:
        if _STEPS.value:
          compiled, operations, choices, seconds = time_step(settings, _EXAMPLES.value, _STEPS.value)
          median = statistics.median(seconds)
          taken = ", ".join(f"{operation}: {'/'.join(forms)}" for operation, forms in choices.items())
          others = f"{median * 1e3:,.2f}", f"{batch / median:,.0f}", taken or "none"
        else:
          program, operations = compile_step(settings, _EXAMPLES.value, _DEVICES.value, _FSDP.value)
          compiled = program.compiled
          others = (
            _exchanged(compiled, settings)
            if _DEVICES.value > 1
            else ("; ".join(f"`{kernel.name}` {kernel.registers}" for kernel in program.kernels) or "none",)
          )
      except dispatch.UnsupportedError as error:
        raise errors.UserError(f"--implementation: {error}") from error
      print(row(argument, implementation, batch, compiled, operations, *others), flush=True)


if __name__ == "__main__":
  errors.exit_on_user_error(main)
