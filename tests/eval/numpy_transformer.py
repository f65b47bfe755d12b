"""The decoder-only LM of the tests once more, from canonical leaves, in NumPy and float64.

Written from docs and papers.md §1.1, not from demix/: learned positions, pre-LayerNorm, exact GELU,
biases, tied embeddings scaled by sqrt(D). One sequence at a time, loops where they are clearer.
"""

import json
import math

import numpy as np

ERF = np.vectorize(math.erf)


def layer_norm(x, leaves, name):
  centred = x - x.mean(-1, keepdims=True)
  scaled = centred / np.sqrt((centred ** 2).mean(-1, keepdims=True) + 1e-5)
  return scaled * leaves[f'{name}/scale'] + leaves[f'{name}/bias']


def softmax(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def attention(x, leaves, name, heads):
  project = lambda n: x @ leaves[f'{name}/{n}'] + leaves[f'{name}/{n}_bias']
  q, k, v = project('q'), project('k'), project('v')
  size, out = q.shape[1] // heads, []
  for h in range(heads):
    part = slice(h * size, (h + 1) * size)
    scores = q[:, part] @ k[:, part].T / math.sqrt(size)
    scores[np.triu_indices(len(x), 1)] = -np.inf
    out.append(softmax(scores) @ v[:, part])
  return np.concatenate(out, 1) @ leaves[f'{name}/out'] + leaves[f'{name}/out_bias']


def feed_forward(x, leaves, name):
  h = x @ leaves[f'{name}/up'] + leaves[f'{name}/up_bias']
  h = 0.5 * h * (1 + ERF(h / math.sqrt(2)))
  return h @ leaves[f'{name}/down'] + leaves[f'{name}/down_bias']


def nll(leaves, tokens, targets, *, layers, heads, expert=None, vocab=None):
  """-log p of each target, float64 [L], for one sequence.

  Args:
    leaves: {canonical name: float64 array}. tokens, targets: int [L]. expert: whose FFN is used
      where a layer has experts. vocab: how many rows of the table can be predicted (all).
  """
  table = leaves['embed/tokens'][:vocab]
  x = table[tokens] * math.sqrt(table.shape[1]) + leaves['embed/positions'][:len(tokens)]
  for i in range(layers):
    block = f'blocks/{i}'
    x = x + attention(layer_norm(x, leaves, f'{block}/attention_norm'), leaves,
                      f'{block}/attention', heads)
    ffn = f'{block}/ffn' if f'{block}/ffn/up' in leaves else f'{block}/ffn/experts/{expert}'
    x = x + feed_forward(layer_norm(x, leaves, f'{block}/ffn_norm'), leaves, ffn)
  logits = layer_norm(x, leaves, 'final_norm') @ table.T
  top = logits.max(-1, keepdims=True)
  scores = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
  return -scores[np.arange(len(targets)), targets]


def byte_stream(file):
  """(ids, bytes of each) of a JSON Lines file under the tokenizer of bytes: every document's UTF-8
  and then end-of-document, 256, which stands for no byte."""
  ids = []
  for line in file.read_text(encoding='utf-8').splitlines():
    ids += [*json.loads(line)['text'].encode(), 256]
  return np.array(ids), np.array([int(i != 256) for i in ids])


def blocks(ids, length):
  """(inputs, targets) of blocks that do not overlap: the papers' protocol."""
  inputs = np.concatenate([[256], ids[:-1]])
  return [(inputs[i:i + length], ids[i:i + length]) for i in range(0, len(ids), length)]


def windows(ids, length, stride):
  """(inputs, targets, how many of the last are scored): `stride` new tokens, the rest context."""
  inputs = np.concatenate([[256], ids[:-1]])
  out = []
  for begin in range(0, len(ids), stride):
    end = min(begin + stride, len(ids))
    start = max(0, begin + stride - length)
    out.append((inputs[start:end], ids[start:end], end - begin))
  return out
