"""Compiles whole training steps for an NVIDIA H200 on a machine without one, and prints what they need there.

  python -m lra_jax.compile configs/fnet.py:lra_image configs/s5.py:lra_image --implementation xla,mosaic

Needs JAX's CUDA plugin and ptxas, but no GPU and no data set: nothing is executed, so there is no time either. A row
has the operations of the products, the memory that XLA plans for activations and other temporary arrays, that of the
state and a resident data set, and the Pallas kernels in the program with their registers per thread.
"""

import sys

from absl import flags

from lra_jax import config, errors

_IMPLEMENTATION = flags.DEFINE_list(
  "implementation", [""], "Implementations of the kernels to compare; empty: the best."
)
_DTYPE = flags.DEFINE_string("dtype", "bfloat16", "Compute dtype of the models.")
_BATCH = flags.DEFINE_integer("batch", None, "Examples per step, instead of the config's.", lower_bound=1)
_EXAMPLES = flags.DEFINE_integer("examples", 45_000, "Size of the resident training split.", lower_bound=1)

HEADER = """\
| config | implementation | batch | GFLOP | temporary MiB | state and data MiB | kernels: registers |
|---|---|---|---|---|---|---|"""


def compile_step(settings, examples: int):
  """Compiles the step that `train` would run with this config on one H200.

  Args:
    settings: the config, as of `config.load`.
    examples: N, size of the training split.

  Returns:
    (kernels.compile.Program, operations of the products, {operation: {implementation: reason}}).

  Raises:
    UserError: the CUDA plugin or ptxas is missing.
  """
  import jax
  import jax.numpy as jnp

  from kernels import compile, dispatch
  from lra_jax import flops, optim, train
  from lra_jax.data import resident, tasks

  if (lacking := compile.missing()) is not None:
    raise errors.UserError(f"cannot compile for a GPU: {lacking}; see the heading of kernels/compile.py")
  task = tasks.get(settings.task.name)
  plan = train.Plan.make(settings, examples, 1, "gpu")
  schedule = optim.make_schedule(settings.optim, plan.steps, plan.steps_per_epoch)
  graphdef, state, optimizer = train.init_state(settings, task, schedule)
  call = train.make_train_call(settings, task, graphdef, optimizer, schedule, 1, compile.mesh())
  data = resident.Resident(
    jax.ShapeDtypeStruct((examples, *task.image_shape), jnp.uint8), jax.ShapeDtypeStruct((examples,), jnp.int32)
  )
  indices = jax.ShapeDtypeStruct((1, plan.batch_size), jnp.int32)
  try:
    with dispatch.recording() as choices:
      program = compile.compile_for_h200(call, state, data, indices)
  except dispatch.UnsupportedError as error:
    raise errors.UserError(f"--implementation: {error}") from error
  with dispatch.compiling_for("gpu"):
    operations = flops.count(call.trace(state, data, indices).jaxpr)
  return program, operations, choices


def row(name: str, implementation: str, batch: int, program, operations: float) -> str:
  """A line of the table."""
  memory = program.compiled.memory_analysis()
  kernels = "; ".join(f"`{kernel.name}` {kernel.registers}" for kernel in program.kernels)
  temporary, arguments = memory.temp_size_in_bytes / 2**20, memory.argument_size_in_bytes / 2**20
  return (
    f"| {name} | {implementation or 'best'} | {batch} | {operations / 1e9:,.0f} | {temporary:,.0f} | {arguments:,.0f} "
    f"| {kernels or 'none'} |"
  )


def main() -> None:
  """Parses the flags and prints a row for every config and implementation."""
  arguments = errors.parse_flags(sys.argv, required=(), positional="config files", optional=True)
  if not arguments:
    raise errors.UserError("no config file given; try `python -m lra_jax.compile configs/fnet.py:lra_image`")
  from lra_jax import models

  print(HEADER, flush=True)
  for argument in arguments:
    path, _, options = argument.partition(":")
    for implementation in _IMPLEMENTATION.value:
      settings = config.load(config.find(path), options)
      settings.train.batch_size = _BATCH.value or settings.train.batch_size
      settings.model.dtype = _DTYPE.value
      if "implementation" in models.fields(settings.model.name):
        settings.model.implementation = implementation or None
      program, operations, _ = compile_step(settings, _EXAMPLES.value)
      print(row(argument, implementation, settings.train.batch_size, program, operations), flush=True)


if __name__ == "__main__":
  errors.exit_on_user_error(main)
