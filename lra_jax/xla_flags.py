"""What XLA is told by flags, each with its reason. They must be in the environment before JAX makes a program."""

import os

# Between devices.
OVERLAP = {
  # Starts what is exchanged as soon as it can be and puts other work between its start and its end.
  "xla_gpu_enable_latency_hiding_scheduler": "true",
  # In a loop over steps or layers: what the next turn needs is gathered during this one, and likewise the others.
  "xla_gpu_enable_pipelined_all_gather": "true",
  "xla_gpu_enable_pipelined_reduce_scatter": "true",
  "xla_gpu_enable_pipelined_all_reduce": "true",
}
# `config.deterministic`.
DETERMINISTIC = {
  # No atomic additions in an order that differs from run to run, no choice among algorithms by a stopwatch.
  "xla_gpu_deterministic_ops": "true",
}


def apply(deterministic: bool, several_devices: bool) -> None:
  """Adds flags to $XLA_FLAGS; those that are there already stay as they are.

  Args:
    deterministic: the same program shall give the same bits on the same kind of GPU.
    several_devices: there is something to exchange.
  """
  wanted = (DETERMINISTIC if deterministic else {}) | (OVERLAP if several_devices else {})
  given = os.environ.get("XLA_FLAGS", "")
  new = [f"--{name}={value}" for name, value in wanted.items() if f"--{name}" not in given]
  os.environ["XLA_FLAGS"] = " ".join([*given.split(), *new])
