"""Names of transformers' NystromformerForSequenceClassification and FNetForSequenceClassification."""

from lra_jax import errors
from lra_jax.interop.layout import Entries


def _embeddings(e: Entries, model, prefix: str) -> None:
  if type(model.tokenizer.embed).__name__ != "Embed" or model.types is None:
    raise errors.UserError(
      "the public weights are those of a text model: integer tokens and a table of segment types (config.model.types)"
    )
  e.same(("tokenizer", "embed", "embedding"), f"{prefix}.word_embeddings.weight")
  e.same(("position",), f"{prefix}.position_embeddings.weight")
  e.same(("types",), f"{prefix}.token_type_embeddings.weight")
  e.norm(("embed_norm",), f"{prefix}.LayerNorm")


def nystromformer(model) -> Entries:
  """Layout of `nystromformer.Nystromformer` in its BERT form."""
  if model.form != "bert":
    raise errors.UserError("config.model.form='lra': there are no public weights of this form; take 'bert'")
  e = Entries()
  _embeddings(e, model, "nystromformer.embeddings")
  for i, block in enumerate(model.blocks):
    path, name = ("blocks", i), f"nystromformer.encoder.layer.{i}"
    own = f"{name}.attention.self"
    e.joined_dense((*path, "attention", "attention", "qkv"), [f"{own}.{part}" for part in ("query", "key", "value")])
    if block.attention.skip is not None:  # (heads, 1, taps, 1)
      e.add(
        (*path, "attention", "skip"),
        [f"{own}.conv.weight"],
        lambda ts: ts[0][:, 0, :, 0].T,
        lambda a: [a.T[:, None, :, None]],
      )
    e.dense((*path, "attention", "attention", "out"), f"{name}.attention.output.dense")
    e.norm((*path, "norm1"), f"{name}.attention.output.LayerNorm")
    e.dense((*path, "mlp", "fc1"), f"{name}.intermediate.dense")
    e.dense((*path, "mlp", "fc2"), f"{name}.output.dense")
    e.norm((*path, "norm2"), f"{name}.output.LayerNorm")
  e.dense(("head_hidden",), "classifier.dense")
  e.dense(("head",), "classifier.out_proj")
  return e


def fnet(model) -> Entries:
  """Layout of `fnet.Fnet`."""
  e = Entries()
  _embeddings(e, model, "fnet.embeddings")
  e.dense(("project",), "fnet.embeddings.projection")
  for i in range(len(model.blocks)):
    path, name = ("blocks", i), f"fnet.encoder.layer.{i}"
    e.norm((*path, "norm1"), f"{name}.fourier.output.LayerNorm")
    e.dense((*path, "mlp", "fc1"), f"{name}.intermediate.dense")
    e.dense((*path, "mlp", "fc2"), f"{name}.output.dense")
    e.norm((*path, "norm2"), f"{name}.output.LayerNorm")
  e.dense(("pooler",), "fnet.pooler.dense")
  e.dense(("head",), "classifier")
  return e
