"""`python -m demix VERB …`: dispatch, one-line errors, exit codes. Nothing heavy is imported
before the verb is known."""

import importlib
import os
import sys

VERBS = {
    'prepare': 'a corpus into a tokenizer and a token store',
    'train': 'anything that moves weights; the same workdir again resumes',
    'evaluate': 'perplexity and bits per byte per domain, for one or more models',
    'generate': 'text from a model, one expert or a mixture of experts',
    'merge': 'parameters of several LMs averaged into one LM',
    'inspect': "a config's parameters, and the memory it needs on each device",
    'forest': 'the experts of a DEMix LM: list, add, remove',
}


def _usage() -> str:
  lines = ['usage: python -m demix VERB [flags]', '', 'verbs:']
  lines += [f'  {name:<10} {text}' for name, text in VERBS.items()]
  return '\n'.join([*lines, '', 'python -m demix VERB --help shows the flags of a verb.'])


def main(argv: list[str]) -> int:
  """Runs one verb and returns its exit code (docs/contracts.md §exit codes)."""
  if hasattr(sys.stdout, 'reconfigure'):  # names of files may be no text; standard error does so
    sys.stdout.reconfigure(errors='backslashreplace')
  try:
    code = _run(argv)
    sys.stdout.flush()
    if 'demix.runtime.processes' in sys.modules:
      sys.modules['demix.runtime.processes'].leave(code)
    return code
  except BrokenPipeError:  # `… | head`
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def _is_text(text):
  try:
    text.encode()
  except UnicodeEncodeError:
    return False
  return True


def _run(argv):
  from demix.errors import DemixError
  if not argv or argv[0] in ('--help', '-h', 'help'):
    print(_usage())
    return 0 if argv else 2
  from demix.verbs.flags import Help
  try:
    from demix.errors import BadInput
    here = os.getcwd() if os.path.isdir('.') else ''
    for text, what in [(here, 'the working folder'), *((a, 'argument') for a in argv)]:
      if not _is_text(text):  # names go into JSON, which has no such thing
        raise BadInput(f'{what} {text!r} is not UTF-8: write it so, or rename what it names')
    if argv[0] not in VERBS:
      from demix.settings import nearest
      raise BadInput(f'no such verb {argv[0]!r}{nearest(argv[0], VERBS)}')
    return importlib.import_module(f'demix.verbs.{argv[0]}').run(argv[1:]) or 0
  except Help as e:
    print(e)
    return 0
  except DemixError as e:
    print(f'error: {" ".join(str(e).split())}', file=sys.stderr)
    return e.code
  except KeyboardInterrupt:
    print('error: interrupted', file=sys.stderr)
    return 130
  except BrokenPipeError:
    raise
  except Exception as e:
    if os.environ.get('DEMIX_TRACEBACK'):
      raise
    print(f'error: {type(e).__name__}: {" ".join(str(e).split())} '
          '(DEMIX_TRACEBACK=1 shows where)', file=sys.stderr)
    return 1


def run():
  """The console script `demix`."""
  sys.exit(main(sys.argv[1:]))


if __name__ == '__main__':
  run()
