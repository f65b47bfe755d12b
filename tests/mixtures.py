"""Mixing once more, in NumPy and float64, a token at a time: what tests of mix/ compare with.

Written from the papers' formulas and docs/method.md, in probabilities, not from demix/mix.
"""

import numpy as np


def gate(scores_E, *, temperature=1.0, top_k=0, order='topk_softmax', renormalise=True):
  """Weights [E] of scores in nats; of equal scores the first are kept."""
  scores = np.float64(scores_E) / temperature
  kept = np.isin(np.arange(len(scores)), np.argsort(-scores, kind='stable')[:top_k or None])
  if order == 'topk_softmax':
    scores = np.where(kept, scores, -np.inf)
  weights = np.exp(scores - scores.max())
  weights = weights / weights.sum() * kept
  return weights / weights.sum() if renormalise else weights


def weights(loglik_EL, prior_E, *, posterior='prefix', decay=1.0, window=0, segments_L=None,
            **gated):
  """Weights [E, L] for each token of one row, from the tokens before it."""
  E, L = loglik_EL.shape
  segments = np.zeros(L) if segments_L is None else segments_L
  out = np.empty((E, L))
  for t in range(L):
    seen = [s for s in range(t) if len(set(segments[s:t + 1])) == 1]
    if posterior == 'last_token' and not seen:
      out[:, t] = gate(np.zeros(E), **gated)  # as released
      continue
    used = {'prefix': seen[-window:], 'last_token': seen[-1:], 'none': []}[posterior]
    fits = sum((decay ** (t - 1 - s) * np.float64(loglik_EL[:, s]) for s in used), np.zeros(E))
    with np.errstate(divide='ignore'):
      out[:, t] = gate(np.log(prior_E) + fits, **gated)
  return out


def moved(loglik_EBL, full_B, *, alpha=0.3, group=2, temperature=1.0, **evidence):
  """(prior [E] of each block, [E, B]; the prior after them), of blocks read in order.

  The mean of a group's weights at the last position of full blocks is the new value; the first
  one is taken as it is.
  """
  E, B, _ = loglik_EBL.shape
  prior, values, priors = np.full(E, 1 / E), 0, np.empty((E, B))
  for at in range(0, B, group):
    blocks = range(at, min(at + group, B))
    priors[:, blocks] = prior[:, None]
    new = [weights(loglik_EBL[:, b], prior, temperature=temperature, **evidence)[:, -1]
           for b in blocks if full_B[b]]
    if new:
      prior = np.mean(new, 0) if not values else alpha * np.mean(new, 0) + (1 - alpha) * prior
      values += 1
  return priors, prior


def mixed(weights_EL, loglik_EL, combine='probabilities'):
  """log p of each target, [L]."""
  if combine == 'pick':
    return np.float64(loglik_EL)[weights_EL.argmax(0), np.arange(loglik_EL.shape[1])]
  with np.errstate(divide='ignore'):
    return np.log((weights_EL * np.exp(np.float64(loglik_EL))).sum(0))
