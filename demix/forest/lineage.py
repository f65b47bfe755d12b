"""Where a checkpoint comes from, by what its meta.json says: content digests, not paths."""


def ancestors(meta: dict) -> set:
  """Content digests that a checkpoint goes back to: its own, those of what its run started from,
  and for an average those that all its parents go back to.

  Args:
    meta: of a checkpoint.
  """
  out, init = {meta['content_digest']}, meta.get('init')
  if init:
    out |= {init['content_digest'], *init.get('ancestors', ())}
  for record in meta.get('lifecycle', ()):
    out |= set(record.get('ancestors', ()))
  return out


def parents(meta: dict) -> dict:
  """{content digest: weight} of what a checkpoint was made of directly: the parents of an average,
  or the one that its run started from; {} for a run from fresh parameters."""
  averages = [r for r in meta.get('lifecycle', ()) if r['operation'] == 'average']
  if averages:
    out = {}
    for parent in averages[-1]['parents']:
      if parent['weight']:
        digest = parent['content_digest']
        out[digest] = out.get(digest, 0.0) + parent['weight']
    return out
  init = meta.get('init')
  return {init['content_digest']: 1.0} if init else {}
