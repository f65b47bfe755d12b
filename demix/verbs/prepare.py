"""`python -m demix prepare`: a corpus into a tokenizer and a token store."""

from demix.verbs.flags import Verb, require

SUMMARY = 'a corpus into a tokenizer and a token store'


def run(argv: list[str]) -> int:
  """Parses flags and prepares a token store."""
  from demix.data import documents
  from demix.data.prepare import LOCAL_TEXT, PrepareConfig, prepare
  verb = Verb('prepare', SUMMARY)
  verb.string('input', '', f'{documents.LAYOUT}; or {LOCAL_TEXT}: text that lies on this machine; '
              'with config.corpus the folder that relative paths start from')
  verb.string('out', '', 'folder of the token store; replaced only when inputs or config changed')
  verb.config(PrepareConfig, 'FILE[:ARG]')
  flags, config = verb.parse(argv)
  input = flags.input if config.corpus else \
      require(flags.input, 'input', f'a folder ({documents.LAYOUT}) or {LOCAL_TEXT}')
  prepare(input, require(flags.out, 'out', 'a folder for the token store'), config)
  return 0
