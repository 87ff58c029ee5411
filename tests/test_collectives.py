"""What compiled programs exchange: lines as XLA writes them, and a program of 8 devices whose bytes are known."""

import subprocess
import sys

import pytest
from commands import options

from lra_jax import collectives

LINES = {  # one line, kind, payload, bytes that each device sends by rings
  "%a = f32[10,4]{1,0} all-reduce(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add": ("all-reduce", 160, 240),
  "%a = (f32[10]{0}, bf16[6]{0}) all-reduce(%x, %y), replica_groups=[1,8]<=[8], to_apply=%add": ("all-reduce", 52, 91),
  "%a = ((bf16[8]{0}), bf16[8]{0}) all-reduce-start(%x), replica_groups=mesh['data'=2,'fsdp'=4] {'data'}": (
    "all-reduce", 16, 16),
  "%a = ((bf16[4,4]{1,0}), bf16[16,4]{1,0}) all-gather-start(%x), replica_groups=[2,4]<=[8], dimensions={0}": (
    "all-gather", 128, 96),
  "%a = bf16[16,4]{1,0} all-gather(%x), replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}": ("all-gather", 128, 96),
  "%a = bf16[4,4]{1,0} reduce-scatter(%x), replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}": (
    "reduce-scatter", 128, 96),
  "%a = u8[3,32]{1,0} collective-permute(%x), replica_groups=[1,2]<=[2]": ("collective-permute", 96, 96),
}  # fmt: skip


@pytest.mark.parametrize("line", LINES)
def test_a_line_is_counted(line):
  kind, payload, wire = LINES[line]
  assert collectives.count(f"before\n  {line}, metadata={{}}\nafter all-reduce-done(%a)") == {kind: (1, payload, wire)}


def test_what_one_device_exchanges_with_itself_is_nothing():
  assert collectives.count("%a = f32[10]{0} all-reduce(%x), replica_groups={{0},{1}}") == {}


def test_the_least_is_what_rings_send():
  assert collectives.least(1000, 8, 1, 4) == 2 * 7 / 8 * 4000
  assert collectives.least(1000, 1, 8, 2) == 2 * 7 / 8 * 2000
  assert collectives.least(1000, 2, 4, 4) == 2 * 3 / 4 * 4000 + 2 * 1 / 2 * 4000 / 4


REAL = """
import functools
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from lra_jax import collectives, parallel
w, x = jnp.ones((64, 256)), jnp.ones((8192, 64))  # parameters are less than activations
for data, fsdp in ((8, 1), (1, 8), (2, 4)):
  mesh = parallel.make_mesh(data, fsdp)
  rule = parallel.by_rule({"w": w}, mesh)["w"]
  assert rule.spec == (P() if fsdp == 1 else P(None, "fsdp")), rule
  step = lambda w, x: w - jax.grad(lambda w: (jnp.tanh(x @ w) ** 2).sum())(w)
  step = jax.jit(step, in_shardings=(rule, parallel.sharded(mesh)), out_shardings=rule)
  found = collectives.count(step.lower(w, x).compile().as_text())
  sent = sum(exchange.wire for exchange in found.values())
  print(data, fsdp, sent, collectives.least(w.size, data, fsdp, 4), ",".join(found))
"""


def test_a_real_program_sends_no_less_than_the_least():
  process = subprocess.run([sys.executable, "-c", REAL], **options(env={"JAX_NUM_CPU_DEVICES": "8"}))
  assert process.returncode == 0, process.stderr
  rows = [line.split() for line in process.stdout.splitlines()]
  assert [row[:2] for row in rows] == [["8", "1"], ["1", "8"], ["2", "4"]]
  assert float(rows[0][2]) == float(rows[0][3]) and rows[0][4] == "all-reduce"
  for row in rows[1:]:
    assert float(row[3]) <= float(row[2]) <= 2 * float(row[3]), row
