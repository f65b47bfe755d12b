"""Priors over members: fixed, moving with the blocks that were read, or estimated and stored.

The moving prior is an exponential mean of posteriors at the last position of full blocks (papers
§3: λ = 0.3; released code: `ensemble_eval_lm.py`): the first value is taken as it is, each later
one has weight α, and the mean is the prior of the blocks that follow. After some blocks of a
domain's development text it is that domain's *cached* prior. Kept as logarithms, so that a member
that was hopeless for one block can come back.
"""

import dataclasses
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import orjson

from demix.errors import BadInput, Refused
from demix.runtime.workdir import write_atomic
from demix.settings import nearest

VERSION = 1


def moving(log_posterior, last_EB, full_B, state, *, alpha: float, group: int):
  """The prior of each block, and the state after them.

  Args:
    log_posterior: scores [E, n] (log prior + evidence) → log weights [E, n].
    last_EB: evidence at the last position of each block; B a multiple of `group`.
    full_B: bool; other blocks leave the mean alone.
    state: (log prior [E], int count of updates so far). The first value replaces the prior.
    alpha: weight of a new value.
    group: blocks that are read with one prior before it moves (the released code: 2).

  Returns:
    log_prior_EB: the prior that each block is read with; the new state.
  """
  E, B = last_EB.shape
  def update(state, blocks):
    log_prior, count = state
    last_En, full_n = blocks
    each = jnp.where(full_n, log_posterior(log_prior[:, None] + last_En), -jnp.inf)
    new = jax.nn.logsumexp(each, 1) - jnp.log(jnp.maximum(full_n.sum(), 1))
    mean = jnp.logaddexp(math.log(alpha) + new, math.log1p(-alpha) + log_prior
                         ) if alpha < 1 else new
    mean = jnp.where(count == 0, new, mean)
    moved = full_n.any()
    return (jnp.where(moved, mean, log_prior), count + moved), log_prior
  groups = (last_EB.reshape(E, B // group, group).transpose(1, 0, 2),
            full_B.reshape(B // group, group))
  state, priors = jax.lax.scan(update, state, groups)
  return jnp.repeat(priors.T, group, axis=1), state


def uniform(count: int) -> np.ndarray:
  """log 1/E, [E]."""
  return np.full(count, -math.log(count), np.float32)


def from_weights(weights, names) -> np.ndarray:
  """log prior [E] of a dict {name: weight} (missing: 0) or a sequence in the order of `names`.

  Raises:
    BadInput: an unknown name, a wrong length, a negative weight, or a sum that is not 1.
  """
  if isinstance(weights, dict):
    for name in weights:
      if name not in names:
        raise BadInput(f'prior: no expert {name!r}{nearest(name, names)}')
    weights = [weights.get(name, 0.0) for name in names]
  weights = list(weights)
  if len(weights) != len(names):
    raise BadInput(f'prior of {len(weights)} weights for {len(names)} experts '
                   f'({", ".join(names)}): give one for each, in this order')
  if any(not isinstance(w, (int, float, np.number)) or not 0 <= w < math.inf for w in weights):
    raise BadInput(f'prior {weights}: weights are numbers of at least 0')
  if abs(sum(weights) - 1) > 1e-4:
    raise BadInput(f'prior {weights} sums to {sum(weights):g}, not to 1: divide by that')
  with np.errstate(divide='ignore'):
    return np.log(np.asarray(weights, np.float64) / sum(weights)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Prior:
  """A cached prior and how it was estimated.

  Attributes:
    experts: names. digests: content digest of each as a whole LM, so that another set of experts
      is refused even under the same names.
    log_weights: in the order of `experts`.
    posterior: the evidence it was estimated with (and its options: decay, window, gate).
    alpha, blocks_per_update: of the moving mean. blocks: how many full blocks were read, in file
      order; block_length: tokens of each.
    domain, split, text: whose text; its fingerprint.
    nll: nats per token of each expert alone on that text.
    packing: how it was cut, as in data.packing.
  """
  experts: tuple
  digests: tuple
  log_weights: tuple
  posterior: str
  options: dict
  alpha: float
  blocks: int
  blocks_per_update: int
  block_length: int
  domain: str
  split: str
  text: str
  nll: tuple
  packing: str = 'continuous'

  @property
  def weights(self) -> dict:
    """{expert: weight}, summing to 1."""
    return {name: math.exp(w) for name, w in zip(self.experts, self.log_weights)}

  def log_prior(self, names, digests) -> np.ndarray:
    """log prior [E], in the order of `names`. Refused: it was estimated for other experts."""
    if set(self.experts) != set(names):
      raise Refused(f'prior of {self.domain} is for the experts {", ".join(self.experts)}; this '
                    f'model mixes {", ".join(names)}: estimate it again')
    known = dict(zip(self.experts, self.digests))
    for name, now in zip(names, digests):
      if (was := known[name]) != now:
        raise Refused(f'prior of {self.domain} was estimated when expert {name} had content digest '
                      f'{was}; it has {now}: estimate it again')
    weights = dict(zip(self.experts, self.log_weights))
    return np.asarray([weights[n] for n in names], np.float32)

  def fits(self, names, digests) -> bool:
    """Whether it was estimated for these experts, by name and content."""
    return dict(zip(self.experts, self.digests)) == dict(zip(names, digests))


def entry(stored: Prior) -> dict:
  """A prior as it stands in files: all its fields, and `weights` by name for people."""
  return dataclasses.asdict(stored) | {'weights': stored.weights}


def save(path, priors):
  """Writes priors to one JSON file, whole or not at all. BadInput: it cannot be written."""
  content = orjson.dumps({'version': VERSION, 'priors': [entry(p) for p in priors]},
                         option=orjson.OPT_INDENT_2)
  try:
    write_atomic(path, content + b'\n')
  except OSError as e:
    raise BadInput(f'{path}: cannot be written ({e.strerror}); name another file') from None


def load(path) -> list[Prior]:
  """What `save` wrote. BadInput: no such file, not JSON, another version, an entry amiss."""
  try:
    with open(path, 'rb') as f:
      content = orjson.loads(f.read())
    if content['version'] != VERSION:
      raise BadInput(f'{path}: priors of version {content["version"]}, this demix reads {VERSION}')
    return [Prior(**{k: tuple(v) if isinstance(v, list) else v
                     for k, v in entry.items() if k != 'weights'}) for entry in content['priors']]
  except OSError as e:
    raise BadInput(f'{path}: cannot be read ({e.strerror})') from None
  except (ValueError, KeyError, TypeError, AttributeError) as e:
    raise BadInput(f'{path}: not a file of priors ({e})') from None


def split_reference(text: str) -> tuple[str, str]:
  """FILE or FILE:DOMAIN → (file, domain); what exists is a file, whatever is in its name."""
  file, colon, domain = text.rpartition(':')
  return (file, domain) if colon and not os.path.isfile(text) else (text, '')


def of_experts(path, priors, names, digests) -> list[Prior]:
  """Those of the priors in a file that were estimated for these experts, by name and content.

  Raises:
    Refused: there are none; what differs is said.
  """
  found = [p for p in priors if p.fits(names, digests)]
  if not found:
    alike = [p for p in priors if set(p.experts) == set(names)]
    try:
      (alike or priors)[0].log_prior(names, digests)
    except (Refused, IndexError) as e:
      raise Refused(f'{path}: {e if priors else "no priors in it"}') from None
  return found


def find(path, names, digests, domain: str = '', posterior: str = '') -> Prior:
  """The stored prior of a domain for these experts.

  Raises:
    BadInput: there is none, or several fit; all are named. Refused: see `of_experts`.
  """
  there = of_experts(path, load(path), names, digests)
  found = [p for p in there if (not domain or p.domain == domain)
           and (not posterior or p.posterior == posterior)]
  if len(found) != 1:
    known = ', '.join(f'{p.domain} ({p.posterior})' for p in found or there)
    raise BadInput(f'{path}: {len(found)} priors of domain {domain or "any"}, posterior '
                   f'{posterior or "any"} (there: {known}): name one as FILE:DOMAIN')
  return found[0]
