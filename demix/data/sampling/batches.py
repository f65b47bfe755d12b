"""Batches per domain with Grain. Batch t is a function of (seed, t): no loader state is kept.

Each domain is shuffled by a seed of its own and wraps with a new shuffle when it ends, so a small
domain is repeated while a large one is not finished once (the papers' balanced sampling).
"""

import fractions
import itertools
import math

import grain
import numpy as np

from demix.data.sampling import schedule
from demix.data.sampling.data_config import DataConfig
from demix.data.tokens.packing import sequences
from demix.data.tokens.store import TokenStore
from demix.errors import BadInput

_ENDLESS = 1 << 52  # rows; Grain's own endless datasets are too long for its batches of one row


def domain_row(row: dict, domain: int, symbol: int | None) -> dict:
  """A row with its domain index and, for +DomainToken, the symbol id put before the text.

  The symbol is visible to every segment only where there is one segment, so document packing
  gives each row's first segment the symbol.
  """
  if symbol is not None:
    row = {name: np.concatenate([x[:1], x]) for name, x in row.items()}
    row['targets'][0], row['tokens'][0], row['weights'][0] = row['tokens'][1], symbol, 0
    first = row['segments'] == row['segments'][0]
    row['positions'][1:] += first[1:]
  return {**row, 'domain': np.int32(domain)}


class Batches:
  """Random-access batches: `batches[t]` is a dict of arrays named as in docs/contracts.md.

  Args:
    store: an open token store.
    config: a checked DataConfig with `domains` filled in.
    seed: of all shuffles.
    split: which split to draw from.
    symbols: ids of the <domain> symbols, or None.
    rows: ascending rows of every batch to read, those of this process (sharding.py); the
      others are not touched. None: all.
  """

  def __init__(self, store: TokenStore, config: DataConfig, seed: int, *, split: str = 'train',
               symbols=None, rows=None):
    self.config, self.domains = config, config.domains
    sources = [sequences(store, name, split, config.body_length, config.packing)
               for name in self.domains]
    self.lengths = {name: len(s) for name, s in zip(self.domains, sources)}
    self.shares, knots = self._shares(), config.knots()
    self._scheduled = schedule.ScheduledTurns(knots, config.schedule_kind, config.batch_size) \
        if knots else None
    largest = [max(s[n] for _, s in knots) for n in self.domains] if knots else self.shares
    for name, source, part in zip(self.domains, sources, largest):
      needed = max(1, round(part * config.batch_size)) if part else 0
      if len(source) < needed:
        raise BadInput(f'{store.path}/{name}/{split}: {len(source)} sequences of '
                       f'{config.sequence_length} tokens, one batch needs {needed}: add text, or '
                       'lower data.batch_size or data.sequence_length')
    # Seeds go by the place in the list, so that a renamed domain sees the same shuffles.
    datasets = [
        grain.MapDataset.source(source).seed(_seed(seed, place)).shuffle()
        .repeat(None).slice(slice(0, _ENDLESS))
        .map(_Tag(place, symbols[place] if symbols is not None else None))
        for place, source in enumerate(sources)]
    if config.sampling == 'balanced':
      size = config.batch_size // len(datasets)
      each = [share(d, size, _inside(rows, place * size, size)) for place, d in enumerate(datasets)]
      self._batches = grain.experimental.ZipMapDataset(
          [d for d in each if d is not None]).map(_concatenate)
    else:
      turns = self._scheduled or Turns(self._raw_shares())
      mixed = grain.MapDataset.select_from_datasets(datasets, turns)
      self._batches = share(mixed, config.batch_size, rows)

  def _raw_shares(self) -> list:
    kind = self.config.sampling
    return [{'balanced': 1, 'proportional': max(1, self.lengths[n]),
             'weights': self.config.weights.get(n, 0)}[kind] for n in self.domains]

  def _shares(self) -> list[float]:
    raw = self._raw_shares()
    return [r / sum(raw) for r in raw]

  def __getitem__(self, t: int) -> dict:
    return self._batches[t]

  def iterate(self, start: int):
    """Batches start, start + 1, …; one thread reads ahead."""
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    iterator = iter(self._batches.to_iter_dataset(options))
    iterator.set_state({'next_index': start})
    return iterator

  def epochs(self, batches: int) -> dict:
    """{domain: passes over its sequences} after that many batches."""
    if self._scheduled:
      exact = self._scheduled.shares_until(batches)
      return {n: x / self._scheduled.unit / max(1, self.lengths[n])
              for n, x in zip(self.domains, exact)}
    rows = batches * self.config.batch_size
    return {n: rows * s / max(1, self.lengths[n]) for n, s in zip(self.domains, self.shares)}


def share(dataset, size: int, rows=None):
  """Batches of `size` rows in order, or of those `rows` of them only (None when there are none)."""
  if rows is None or len(rows) == size:
    return dataset.batch(size, batch_fn=stack)
  if not len(rows):
    return None
  return grain.MapDataset.source(_Rows(dataset, size, rows)).batch(len(rows), batch_fn=stack)


def _inside(rows, start: int, size: int):
  """Of `rows`, those from `start` on, as rows of that domain's `size`."""
  return None if rows is None else [r - start for r in rows if start <= r < start + size]


class _Rows:
  """The rows of a dataset that are at some places of each batch of `size`."""

  def __init__(self, dataset, size, places):
    self.dataset, self.size, self.places = dataset, size, [int(p) for p in places]

  def __len__(self):
    return len(self.dataset) // self.size * len(self.places)

  def __getitem__(self, k):
    batch, place = divmod(k, len(self.places))
    return self.dataset[batch * self.size + self.places[place]]


class Turns:
  """Whose turn row k is, in exact shares: `turns[k]` → (source, how many rows it had before).

  Sources are split off one at a time, the largest share first, by rounding; so after any number of
  rows each source has had its share to within a row (four sources, 1.3 rows with eight). Grain's
  `mix` cuts shares to whole hundredths of the smallest: after a million rows thousands are amiss.

  Args:
    shares: a number >= 0 per source, taken as they are (a float is a fraction of integers).
  """

  def __init__(self, shares):
    exact = [fractions.Fraction(s) for s in shares]
    unit = math.lcm(*(s.denominator for s in exact))
    shares = [int(s * unit) for s in exact]
    self._order = sorted((i for i, s in enumerate(shares) if s), key=lambda i: -shares[i])
    left = list(itertools.accumulate([shares[i] for i in reversed(self._order)]))[::-1]
    self._splits = list(zip(left[1:], left))  # (share of those behind, share with this one)

  def __len__(self):
    return _ENDLESS

  def __getitem__(self, k: int) -> tuple[int, int]:
    k, following = int(k), int(k) + 1
    for source, (rest, whole) in zip(self._order, self._splits):
      behind, then = ((2 * n * rest + whole) // (2 * whole) for n in (k, following))
      if behind == then:
        return source, k - behind
      k, following = behind, then
    return self._order[-1], k


class _Tag:
  """Adds the domain to a row; a class, because Grain may pickle what it maps."""

  def __init__(self, domain, symbol):
    self.domain, self.symbol = domain, symbol

  def __call__(self, row):
    return domain_row(row, self.domain, self.symbol)


def _seed(seed: int, place: int) -> int:
  return int(np.random.SeedSequence([seed, place]).generate_state(1)[0]) >> 1


def stack(rows) -> dict:
  """Rows (dicts of [L], and domain) as a batch named by the contract: tokens_BL … domain_B."""
  return {f'{name}_B' if name == 'domain' else f'{name}_BL': np.stack([row[name] for row in rows])
          for name in rows[0]}


def _concatenate(parts):
  return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
