"""Perplexity and bits per byte per domain (docs/method.md): non-overlapping blocks over the packed
stream, every token predicted exactly once; or strided windows, where each token sees more context.
"""

import dataclasses
import functools
import math

import jax
import numpy as np

from demix import loss, processes
from demix.data.batches import domain_row, stack
from demix.data.packing import Stream, empty_row
from demix.data.store import TokenStore
from demix.errors import BadInput
from demix.params import Model


@dataclasses.dataclass
class Score:
  """What was scored of one domain. Sums first; one division at the end.

  Attributes:
    nll: summed negative log-likelihood in nats.
    tokens: scored tokens, end-of-document included.
    bytes: bytes of the scored tokens; an end-of-document has none.
  """
  nll: float = 0.0
  tokens: int = 0
  bytes: int = 0

  @property
  def mean_nll(self) -> float:
    """Nats per token."""
    return self.nll / max(1, self.tokens)

  @property
  def perplexity(self) -> float:
    """exp(nats per token)."""
    return math.exp(min(self.mean_nll, 700.0))

  @property
  def bits_per_byte(self) -> float:
    """Bits per byte of the scored text: comparable across tokenizers."""
    return self.nll / math.log(2) / max(1, self.bytes)


@functools.partial(jax.jit, static_argnums=0)
def token_nll(model: Model, params, batch) -> jax.Array:
  """-log p of each target, [B, L] float32, rows of any domains (the general path)."""
  hidden, _, _ = model.apply(params, batch['tokens_BL'], batch['domain_B'])
  return loss.nll(hidden, model.output_table(params), batch['targets_BL'],
                  model.config.vocab_size, model.execution.loss_block)


@dataclasses.dataclass(frozen=True)
class Part:
  """A domain and split to score, and the expert (or <domain> symbol) that is given for it."""
  domain: str
  split: str
  route: int = 0


def windows(store: TokenStore, parts, body: int, stride: int = 0, limit: int = 0) -> int:
  """How many windows `evaluate` will score."""
  counts = [len(Stream(store, p.domain, p.split, body, stride=stride, partial=True)) for p in parts]
  return sum(min(c, limit) if limit else c for c in counts)


def evaluate(model: Model, params, store: TokenStore, parts, *, length: int, batch_size: int = 32,
             stride: int = 0, limit: int = 0, symbols=None, progress=None,
             place=lambda batch: batch) -> list[Score]:
  """Scores all `parts` in one pass: rows of all of them share batches.

  Args:
    model, params: what is evaluated; its vocabulary must be the store's.
    store: an open token store.
    parts: sequence of Part.
    length: L, tokens of a window (with the <domain> symbol where there is one).
    batch_size: rows per forward pass.
    stride: tokens scored per window; 0: all of them (the papers' protocol).
    limit: windows per part, the first ones; 0: all.
    symbols: ids of the <domain> symbols by route, or None.
    progress: called with the number of windows done, or None.
    place: puts a batch where the parameters are; all processes of a run have the whole batch.

  Returns:
    One Score per part.

  Raises:
    BadInput: a part without text.
  """
  body = length - (symbols is not None)
  todo = []
  for i, part in enumerate(parts):
    stream = Stream(store, part.domain, part.split, body, stride=stride, partial=True)
    if not len(stream):
      raise BadInput(f'{store.path}/{part.domain}/{part.split} is empty: nothing to score')
    count = min(len(stream), limit) if limit else len(stream)
    todo += [(i, stream, w) for w in range(count)]
  padding = {**empty_row(length), 'domain': np.int32(0)}
  scores = [Score() for _ in parts]

  def collect(chunk, result, batch):
    nll_BL = processes.whole(result).astype(np.float64)
    weights = batch['weights_BL']
    size = store.token_bytes_V[np.minimum(batch['targets_BL'], store.vocab_size - 1)]
    for row, (i, _, _) in enumerate(chunk):
      scores[i].nll += float((nll_BL[row] * weights[row]).sum())
      scores[i].tokens += int(weights[row].sum())
      scores[i].bytes += int((size[row] * weights[row]).sum())

  pending = None
  for at in range(0, len(todo), batch_size):
    chunk = todo[at:at + batch_size]
    rows = [domain_row(stream[w], parts[i].route,
                       symbols[parts[i].route] if symbols is not None else None)
            for i, stream, w in chunk]
    batch = stack(rows + [padding] * (batch_size - len(rows)))
    used = {n: batch[n] for n in ('tokens_BL', 'targets_BL', 'domain_B')}
    result = token_nll(model, params, place(used))  # dispatched; read after the next one is
    if pending:
      collect(*pending)
    pending = chunk, result, batch
    if progress:
      progress(at + len(chunk))
  collect(*pending)
  return scores


def best_route(model: Model, params, store: TokenStore, domain: str, *, routes: int, length: int,
               limit: int = 0, split: str = 'valid', symbols=None, batch_size: int = 32) -> int:
  """The expert with the lowest NLL on a domain's development text: what a novel domain is given."""
  parts = [Part(domain, split, route) for route in range(routes)]
  scores = evaluate(model, params, store, parts, length=length, limit=limit, symbols=symbols,
                    batch_size=batch_size)
  return int(np.argmin([s.mean_nll for s in scores]))
