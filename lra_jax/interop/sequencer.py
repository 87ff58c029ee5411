"""Names of timm's Sequencer2D, and of the authors' Sequencer2D and VanillaSequencer (okojoalg/sequencer)."""

import re

import numpy as np


def rename(name: str) -> str:
  """The authors' names as timm's; timm's unchanged."""
  name = re.sub(r"^blocks\.(\d+)\.\d+\.down\.", lambda m: f"stages.{int(m[1]) + 1}.downsample.down.", name)
  name = re.sub(r"^blocks\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2.", name)
  return re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", name)


def entries(model):
  """Our parameter path → (tensor names, conversion); see `interop.Layout`."""
  result = {}

  def add(path, names, convert):
    result[path] = (names, convert)

  def dense(path, name):
    add((*path, "kernel"), [f"{name}.weight"], lambda ts: ts[0].T)
    add((*path, "bias"), [f"{name}.bias"], lambda ts: ts[0])

  def norm(path, name):
    add((*path, "scale"), [f"{name}.weight"], lambda ts: ts[0])
    add((*path, "bias"), [f"{name}.bias"], lambda ts: ts[0])

  if model.position is not None:
    add(("position",), ["absolute_pos_embed"], lambda ts: ts[0][0])
  for i, blocks in enumerate(model.stages):
    embed = f"stages.{i}.downsample.down" if i else "stem.proj"
    add(("embeds", i, "kernel"), [f"{embed}.weight"], lambda ts: ts[0].transpose(2, 3, 1, 0))
    add(("embeds", i, "bias"), [f"{embed}.bias"], lambda ts: ts[0])
    for j, block in enumerate(blocks):
      path, name = ("stages", i, j), f"stages.{i}.blocks.{j}"
      norm((*path, "norm1"), f"{name}.norm1")
      norm((*path, "norm2"), f"{name}.norm2")
      dense((*path, "mlp", "fc1"), f"{name}.mlp_channels.fc1")
      dense((*path, "mlp", "fc2"), f"{name}.mlp_channels.fc2")
      cells = ["rnn"]
      if block.fc is not None:
        cells = ["rnn_v", "rnn_h"]
        dense((*path, "fc"), f"{name}.rnn_tokens.fc")
      for ours, theirs, convert in (
        ("w_ih", "weight_ih", lambda ts: np.stack(ts).transpose(2, 0, 1)),
        ("w_hh", "weight_hh", lambda ts: np.stack(ts).transpose(0, 2, 1)),
        ("b_ih", "bias_ih", np.stack),
        ("b_hh", "bias_hh", np.stack),
      ):
        names = [f"{name}.rnn_tokens.{cell}.{theirs}_l0{way}" for cell in cells for way in ("", "_reverse")]
        add((*path, "lstm", ours), names, convert)
  norm(("norm",), "norm")
  dense(("head",), "head.fc")
  return result
