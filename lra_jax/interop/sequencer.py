"""Names of timm's Sequencer2D, and of the authors' Sequencer2D and VanillaSequencer (okojoalg/sequencer)."""

import re

import numpy as np

from lra_jax.interop.layout import Entries


def rename(name: str) -> str:
  """The authors' names as timm's; timm's unchanged."""
  name = re.sub(r"^blocks\.(\d+)\.\d+\.down\.", lambda m: f"stages.{int(m[1]) + 1}.downsample.down.", name)
  name = re.sub(r"^blocks\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2.", name)
  return re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", name)


def entries(model) -> Entries:
  """Layout of `sequencer.Sequencer`."""
  e = Entries()
  if model.position is not None:
    e.add(("position",), ["absolute_pos_embed"], lambda ts: ts[0][0], lambda a: [a[None]])
  for i, blocks in enumerate(model.stages):
    e.conv(("embeds", i), f"stages.{i}.downsample.down" if i else "stem.proj")
    for j, block in enumerate(blocks):
      path, name = ("stages", i, j), f"stages.{i}.blocks.{j}"
      e.norm((*path, "norm1"), f"{name}.norm1")
      e.norm((*path, "norm2"), f"{name}.norm2")
      e.dense((*path, "mlp", "fc1"), f"{name}.mlp_channels.fc1")
      e.dense((*path, "mlp", "fc2"), f"{name}.mlp_channels.fc2")
      cells = ["rnn"]
      if block.fc is not None:
        cells = ["rnn_v", "rnn_h"]
        e.dense((*path, "fc"), f"{name}.rnn_tokens.fc")
      for ours, theirs, axes in (
        ("w_ih", "weight_ih", (2, 0, 1)),
        ("w_hh", "weight_hh", (0, 2, 1)),
        ("b_ih", "bias_ih", (0, 1)),
        ("b_hh", "bias_hh", (0, 1)),
      ):
        names = [f"{name}.rnn_tokens.{cell}.{theirs}_l0{way}" for cell in cells for way in ("", "_reverse")]
        back = tuple(np.argsort(axes))
        e.add(
          (*path, "lstm", ours),
          names,
          lambda ts, axes=axes: np.stack(ts).transpose(axes),
          lambda a, back=back: list(a.transpose(back)),
        )
  e.norm(("norm",), "norm")
  e.dense(("head",), "head.fc")
  return e
