"""The models, by name. `create` builds one, `names` lists them, `count_params` counts."""

import inspect
import math
from collections.abc import Callable

import jax
from flax import nnx

from lra_jax import errors
from lra_jax.models import (
  convmixer,
  dual,
  fnet,
  gmlp,
  layers,
  lipschitz_rnn,
  lra_transformer,
  lru,
  mlp_mixer,
  nystromformer,
  pit,
  resnet,
  s5,
  sequencer,
  trellisnet,
  vit,
)

# name → (constructor, its arguments). Plain, so that one can search for a name and find all of it.
REGISTRY: dict[str, tuple[Callable, dict]] = {
  **{name: (sequencer.Sequencer, dict(two_dimensional=True, **v)) for name, v in sequencer.SEQUENCER2D.items()},
  **{name: (sequencer.Sequencer, dict(two_dimensional=False, **v)) for name, v in sequencer.VANILLA_SEQUENCER.items()},
  **{
    name: (constructor, preset)
    for constructor, presets in (
      (trellisnet.TrellisNet, trellisnet.TRELLISNET),
      (lipschitz_rnn.LipschitzRnn, lipschitz_rnn.LIPSCHITZ_RNN),
      (vit.Vit, vit.VIT),
      (vit.Vit, pit.PIT),
      (nystromformer.Nystromformer, nystromformer.NYSTROMFORMER),
      (fnet.Fnet, fnet.FNET),
      (mlp_mixer.MlpMixer, mlp_mixer.MLP_MIXER),
      (gmlp.Gmlp, gmlp.GMLP),
      (convmixer.ConvMixer, convmixer.CONVMIXER),
      (resnet.ResNet, resnet.RESNET),
      (lra_transformer.LraTransformer, lra_transformer.LRA_TRANSFORMER),
      (s5.S5, s5.S5_MODELS),
      (lru.Lru, lru.LRU_MODELS),
    )
    for name, preset in presets.items()
  },
}


def names() -> list[str]:
  """All model names, sorted."""
  return sorted(REGISTRY)


def fields(name: str) -> set[str]:
  """What of a model's constructor can be overridden in `create`."""
  arguments = set(inspect.signature(REGISTRY[name][0].__init__).parameters)
  return arguments - {"self", "input_shape", "num_classes", "vocab_size", "rngs"}


def reads_shorter(name: str) -> bool:
  """Whether the model reads sequences shorter than it was made for, and takes padding for nothing at any length.

  So a batch may be cut to its longest sequence. Not of models that mix over a fixed length (MLP-Mixer, gMLP), whose
  landmarks divide the length (Nyströmformer), or for whom padding counts (FNet).
  """
  return getattr(REGISTRY[name][0], "READS_SHORTER", False)


def create(
  name: str,
  *,
  input_shape: tuple[int, ...],
  num_classes: int,
  rngs: nnx.Rngs,
  vocab_size: int | None = None,
  init: str = "paper",
  **overrides,
) -> nnx.Module:
  """Builds a model.

  Args:
    name: one of `names()`.
    input_shape: of one example; (H, W, C) of an image, (L, C) of a sequence, (L,) of integer tokens, (2, L) of two
      sequences of these, which one encoder reads; see `dual.DualEncoder`.
    num_classes: number of logits.
    rngs: `nnx.Rngs(seed)`; stream `params` initialises.
    vocab_size: number of different integer tokens, padding included; None for the others.
    init: "paper" (its own initialisation), "xavier" or "he"; see `layers.reinitialize`.
    **overrides: arguments of the model's constructor that shall differ from the preset's.

  Returns:
    A module: `model(x, *, train=False, rngs=None)` gives float32 logits (B, S). `x` is (B, *input_shape), float32, or
    int32 for tokens. Models of sequences also take `mask_BL`, False where a token is padding.

  Raises:
    UserError: an unknown name, override or scheme (near misses are named), an input that the model cannot read, or
      values that do not fit.
  """
  errors.check_known("model", name, REGISTRY)
  constructor, preset = REGISTRY[name]
  if vocab_size is not None and len(input_shape) == 2:
    arguments = dict(num_classes=num_classes, rngs=rngs, vocab_size=vocab_size, init=init, **overrides)
    return dual.DualEncoder(create(name, input_shape=input_shape[1:], **arguments), num_classes, rngs=rngs)
  view = {3: "image", 2: "sequence", 1: "tokens"}[len(input_shape)]
  if view not in constructor.INPUTS:
    raise errors.UserError(
      f"model {name} reads {' or '.join(constructor.INPUTS)} input, the task gives {view} of shape "
      f"{tuple(input_shape)}: its convolutions or rows and columns need a picture; take an image task or another model"
    )
  known = fields(name)
  for key in overrides:
    errors.check_known(f"config.model of {name}: field", key, known | {"name", "init"})
  arguments = dict(input_shape=tuple(input_shape), num_classes=num_classes, rngs=rngs, **preset | overrides)
  if "tokens" in constructor.INPUTS:
    arguments["vocab_size"] = vocab_size
  model = constructor(**arguments)
  layers.reinitialize(model, init, rngs)
  return model


def count_params(model: nnx.Module) -> int:
  """Number of trainable parameters; also of an abstract model, as `nnx.eval_shape` makes."""
  return sum(math.prod(p.shape) for p in jax.tree.leaves(nnx.state(model, nnx.Param)))
