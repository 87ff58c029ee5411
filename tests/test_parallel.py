"""The mesh, and the allocator's setting, by its effect: pages faulted in by a step."""

import json
import subprocess
import sys

import jax
import pytest
from commands import options

from lra_jax import errors, parallel


def test_mesh_takes_the_devices_asked_for():
  mesh = parallel.make_mesh(-1)
  assert mesh.axis_names == ("data", "fsdp") and mesh.size == mesh.shape["data"] == len(jax.devices())
  with pytest.raises(errors.UserError, match=r"config.parallel.data=99, fsdp=1: there are \d+ devices; take data=-1"):
    parallel.make_mesh(99)


FAULTS = """
import json, resource, sys
import jax, jax.numpy as jnp
from lra_jax import parallel
if sys.argv[1] == "kept":
  parallel.keep_freed_memory()
step = jax.jit(lambda x: jnp.sin(jnp.sin(x @ x.T) @ x @ x.T).sum())  # two temporary arrays of 36 MB
x = jnp.ones((3000, 8))
faults = []
for _ in range(14):
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  step(x).block_until_ready()
  faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(json.dumps(faults))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc alone")
def test_kept_memory_is_not_faulted_in_again():
  faults = {}
  for mode in ("kept", "plain"):
    process = subprocess.run([sys.executable, "-c", FAULTS, mode], **options())
    assert process.returncode == 0, process.stderr
    faults[mode] = sum(json.loads(process.stdout)[1:])  # a heap that still grows may fault a few times more
  assert faults["kept"] < faults["plain"] / 2 and faults["plain"] > 50_000, faults


def test_bench_prints_what_it_measured(python):
  process = python("lra_jax.bench", "--model=sequencer2d_digits", "--size=8", "--batch=4", "--rounds=1", "--steps=1")
  assert process.returncode == 0, process.stderr
  rows = [line for line in process.stdout.splitlines() if line.startswith("lra_jax")]
  assert [row.split("  ")[0] for row in rows] == ["lra_jax, kept memory", "lra_jax"]
  assert all(float(value) > 0 for row in rows for value in row.split("memory")[-1].replace("lra_jax", "").split())
