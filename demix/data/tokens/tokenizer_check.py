"""What a tokenizer.json must be, before any text is read with it."""

from demix.errors import BadInput

MOST_IDS = 1 << 24
_PROBES = (''.join(map(chr, range(256))), '\u0378\U0010fffd', 'Ω夜')  # most lack some of them


def check_ids(spec: dict, engine, path):
  """Raises BadInput unless each token has one id of its own, the one that the file says, and there
  is an id for whatever a text may hold.

  Args:
    spec, engine: of a tokenizer.json, as it stands and as the library reads it. path: for messages.
  """
  ids = {}
  for token, i in engine.get_vocab(with_added_tokens=True).items():
    if i >= MOST_IDS:
      raise BadInput(f'{path}: token {token!r} has id {i}: ids are below {MOST_IDS}')
    if ids.setdefault(i, token) != token:
      raise BadInput(f'{path}: tokens {ids[i]!r} and {token!r} both have id {i}: an id stands for '
                     'one token')
  for token in spec.get('added_tokens') or ():
    # The library numbers what its model lacks from the end of the vocabulary, whatever is said.
    if (found := engine.token_to_id(token['content'])) != token['id']:
      raise BadInput(f'{path}: added token {token["content"]!r} has id {token["id"]}, but is read '
                     f'as {found}: ids of added tokens follow the vocabulary without a gap')
  model = spec['model']
  if (model['type'] == 'Unigram' and model.get('unk_id') is None) or (
      model['type'] in ('WordLevel', 'WordPiece') and model['unk_token'] not in model['vocab']):
    raise BadInput(f'{path}: its {model["type"]} vocabulary lacks its unknown token '
                   f'{model.get("unk_token")!r}: text that it cannot spell has no id; add it')
  try:
    engine.encode_batch_fast(list(_PROBES), add_special_tokens=False)
  except Exception as e:  # the library raises nothing narrower
    raise BadInput(f'{path}: it cannot encode every text ({e})') from None
