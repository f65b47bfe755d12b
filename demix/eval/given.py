"""Models scored with what each domain is given: its own expert, its <domain> symbol, or nothing.

What gates and guards compare by. A DEMix LM is never routed by default.
"""

import dataclasses

from demix.config import Config, domain_symbols
from demix.data.tokens.store import TokenStore
from demix.errors import BadInput
from demix.eval.mixing import Evaluation
from demix.eval.nearest import Nearest, compare
from demix.eval.perplexity import Part, Score, evaluate
from demix.eval.sequences import DEV, Protocol
from demix.eval.ways import ways
from demix.mix.mixture import MixConfig


def score_given(config: Config, model, params, store: TokenStore, domains, split: str,
                protocol: Protocol, *, at_best: bool = False) -> list[Score]:
  """Scores domains, each with its own expert.

  Args:
    config: what the model was trained with. model, params: a params.Model and its running tree.
    at_best: a domain that has no expert of its own is scored by the one that does best on this very
      text: a bound, for a parent that a new expert is to beat.

  Raises:
    BadInput: a domain without an expert of its own, and not `at_best`.
  """
  known, symbols = config.data.domains, domain_symbols(config)
  routed = model.config.ffn == 'demix' or symbols is not None
  parts = []
  for domain in domains:
    if routed and domain not in known and not at_best:
      raise BadInput(f'{domain}: not one of the domains {", ".join(known)} that this model has '
                     'experts or symbols for, and none is taken by default; name one of them')
    routes = [None] if not routed else [known.index(domain)] if domain in known else range(
        len(known))
    parts += [Part(domain, split, route) for route in routes]
  scores = evaluate(model, params, store, parts, protocol=protocol, symbols=symbols)
  best = {}
  for part, score in zip(parts, scores):
    if part.domain not in best or (score.tokens and score.nll < best[part.domain].nll):
      best[part.domain] = score
  return [best[d] for d in domains]


def find_nearest(loaded, store, domain: str, protocol: Protocol, batch_size: int = 32,
               sequences: int = DEV) -> Nearest:
  """Experts (or <domain> symbols) of a model compared on a domain's valid text.

  Raises:
    BadInput: the domain has no valid text, or nothing of it is scored.
  """
  symbols = domain_symbols(loaded.config)
  if symbols is None:
    only = dataclasses.replace(ways(('best',), (), MixConfig()), blocks=sequences)
    evaluation = Evaluation(loaded.members, loaded.params, loaded.member_digests, store,
                                   only, protocol, batch_size=batch_size)
    return evaluation.estimate(domain).nearest
  parts = [Part(domain, 'valid', route) for route in range(len(loaded.domains))]
  scores = evaluate(
      loaded.model, loaded.params, store, parts, batch_size=batch_size, symbols=symbols,
      protocol=dataclasses.replace(protocol, stride=0, limit=sequences))
  return compare(loaded.domains, [[nats for nats, _ in s.each] for s in scores],
                 [tokens for _, tokens in scores[0].each], domain)
