"""Perplexity and bits per byte per domain (docs/method.md), of text cut as the model was trained:
blocks of the packed stream, every token predicted exactly once; documents by themselves; or strided
windows, where each token sees more context.
"""

import dataclasses
import functools
import math

import jax
import numpy as np

from demix.data.sampling.batches import domain_row, stack
from demix.data.tokens.packing import empty_row
from demix.data.tokens.store import TokenStore
from demix.errors import BadInput
from demix.eval.sequences import Protocol
from demix.model import loss
from demix.model.params import Model
from demix.runtime import processes


@dataclasses.dataclass
class Score:
  """What was scored of one domain. Sums first; one division at the end.

  Attributes:
    nll: summed negative log-likelihood in nats.
    tokens: scored tokens, end-of-document included.
    bytes: bytes of the scored tokens; an end-of-document has none.
    each: (nats, tokens) of every sequence, in order.
  """
  nll: float = 0.0
  tokens: int = 0
  bytes: int = 0
  each: list = dataclasses.field(default_factory=list)

  def add(self, nll_BL, weights_BL, bytes_BL):
    """Adds sequences: nats, weights and bytes of their targets."""
    nats, tokens = (nll_BL * weights_BL).sum(1), weights_BL.sum(1).astype(int)
    self.nll += float(nats.sum())
    self.tokens += int(tokens.sum())
    self.bytes += int((bytes_BL * weights_BL).sum())
    self.each += zip(nats.tolist(), tokens.tolist())

  @property
  def mean_nll(self) -> float | None:
    """Nats per token; None where nothing was scored, which is no perplexity of 1."""
    return self.nll / self.tokens if self.tokens else None

  @property
  def perplexity(self) -> float | None:
    """exp(nats per token); None where nothing was scored."""
    return math.exp(min(self.mean_nll, 700.0)) if self.tokens else None

  @property
  def bits_per_byte(self) -> float | None:
    """Bits per byte of the scored text: comparable across tokenizers. None for no bytes."""
    return self.nll / math.log(2) / self.bytes if self.bytes else None


@functools.partial(jax.jit, static_argnums=(0, 3))
def token_nll(model: Model, params, batch, balanced: bool = False) -> jax.Array:
  """-log p of each target, [B, L] float32, rows of any domains (the general path)."""
  hidden, _, _ = model.apply(
      params, batch['tokens_BL'], batch['domain_B'], balanced=balanced,
      segments_BL=batch.get('segments_BL'), positions_BL=batch.get('positions_BL'))
  return loss.nll(hidden, model.output_table(params), batch['targets_BL'],
                  model.config.vocab_size, model.execution.loss_block)


@dataclasses.dataclass(frozen=True)
class Part:
  """A domain and split to score, and the expert or <domain> symbol that is given for it.

  Attributes:
    route: its number; None for a model that has neither. A DEMix LM is never routed by default.
  """
  domain: str
  split: str
  route: int | None = None


def evaluate(model: Model, params, store: TokenStore, parts, *, protocol: Protocol,
             batch_size: int = 32, symbols=None, progress=None, place=lambda batch: batch,
             balanced: bool = False) -> list[Score]:
  """Scores all `parts` in one pass: rows of all of them share batches.

  Args:
    model, params: what is evaluated; its vocabulary must be the store's.
    store: an open token store.
    parts: sequence of Part.
    protocol: how text is cut and how much is scored.
    batch_size: rows per forward pass.
    symbols: ids of the <domain> symbols by route, or None.
    progress: called with the number of sequences done, or None.
    place: puts a batch where the parameters are; all processes of a run have the whole batch.
    balanced: a DEMix LM's rows are laid out expert by expert, equally many each, as in training:
      no expert's parameters leave their devices. `batch_size` is a multiple of the experts.

  Returns:
    One Score per part.

  Raises:
    BadInput: a part without text, or a DEMix LM without an expert for a part.
  """
  routed = model.config.ffn == 'demix' or symbols is not None
  todo = []
  for i, part in enumerate(parts):
    if routed and part.route is None:
      raise BadInput(f'{part.domain}: no expert is given for it, and none is taken by default')
    source, places = protocol.sequences(store, part.domain, part.split, symbol=symbols is not None)
    todo += [(i, source, w) for w in places]
  scores = [Score() for _ in parts]
  chunks = _by_expert(todo, parts, len(model.config.experts), batch_size) if balanced else [
      todo[at:at + batch_size] for at in range(0, len(todo), batch_size)]
  padding = empty_row(protocol.length)

  def row_of(place, item):
    if item is None:
      return {**padding, 'domain': np.int32(place // (batch_size // max(
          1, len(model.config.experts))) if balanced else 0)}
    i, source, w = item
    route = parts[i].route or 0
    return domain_row(source[w], route, symbols[route] if symbols is not None else None)

  def collect(chunk, result, batch):
    nll_BL = processes.whole(result).astype(np.float64)
    size = store.token_bytes_V[np.minimum(batch['targets_BL'], store.vocab_size - 1)]
    for row, item in enumerate(chunk):
      if item is not None:
        one = slice(row, row + 1)
        scores[item[0]].add(nll_BL[one], batch['weights_BL'][one], size[one])

  pending, done = None, 0
  for chunk in chunks:
    chunk = chunk + [None] * (batch_size - len(chunk))
    batch = stack([row_of(place, item) for place, item in enumerate(chunk)])
    used = {n: batch[n] for n in (*protocol.names, 'domain_B')}
    result = token_nll(model, params, place(used), balanced)  # dispatched; read after the next is
    if pending:
      collect(*pending)
    pending = chunk, result, batch
    done += sum(item is not None for item in chunk)
    if progress:
      progress(done)
  collect(*pending)
  return scores


def _by_expert(todo, parts, experts: int, batch_size: int) -> list:
  """Batches of items, None for padding, with batch_size / experts rows of each expert in turn."""
  each = batch_size // experts
  mine = [[item for item in todo if parts[item[0]].route == e] for e in range(experts)]
  return [[item for items in mine for item in (
      items[at:at + each] + [None] * (each - len(items[at:at + each])))]
          for at in range(0, max(map(len, mine)), each)]


def count(store: TokenStore, parts, protocol: Protocol, symbol: bool = False) -> int:
  """How many sequences `evaluate` will score."""
  return sum(protocol.count(store, p.domain, p.split, symbol=symbol) for p in parts)
