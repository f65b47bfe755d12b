"""demix/config.py and demix/verbs/flags.py: from what people type to a complete Config."""

import dataclasses
import shutil

import corpus
import orjson
import pytest
from ml_collections import ConfigDict

from demix import settings
from demix.config import (
  Config,
  TrainConfig,
  complete,
  config_dict,
  data_fingerprint,
  digest,
  domain_symbols,
  identity,
)
from demix.data.sampling.batches import DataConfig
from demix.data.tokens.store import TokenStore
from demix.errors import BadInput
from demix.mix.mixture import MixConfig
from demix.model.transformer import ModelConfig
from demix.optim.optimizer import OptimizerConfig
from demix.verbs.flags import Help, Verb

FILE = '''
from demix.config import Config, config_dict
from demix.data.sampling.batches import DataConfig

def get_config(arg='small'):
  weights = {'legal': 1.0, 'code': 1.0}
  return config_dict(Config(seed=7, data=DataConfig(
      batch_size={'small': 4, 'big': 64}[arg], sampling='weights', weights=weights)))
'''


@pytest.fixture
def file(tmp_path):
  (tmp_path / 'own.py').write_text(FILE)
  return tmp_path / 'own.py'


def parse(*argv, cls=Config):
  verb = Verb('train', 'to train')
  verb.string('workdir', '', 'where')
  verb.config(cls, 'FILE')
  return verb.parse(list(argv))[1]


def refused(*argv) -> str:
  with pytest.raises(BadInput) as e:
    parse(*argv)
  assert '\n' not in str(e.value) and '\\n' not in str(e.value)
  return str(e.value)


def test_without_flags_the_defaults():
  assert parse() == Config()


@pytest.mark.parametrize(('flag', 'path', 'value'), [
    ('--config.seed=3', 'seed', 3),
    ('-config.seed=3', 'seed', 3),
    ('--config.model.d_model=512', 'model.d_model', 512),
    ('--config.optimizer.learning_rate=1', 'optimizer.learning_rate', 1.0),
    ('--config.optimizer.learning_rate=3e-3', 'optimizer.learning_rate', 3e-3),
    ('--config.train.tensorboard=false', 'train.tensorboard', False),
    ('--config.train.compute_dtype=bfloat16', 'train.compute_dtype', 'bfloat16'),
    ('--config.data.domains=legal', 'data.domains', ['legal']),
    ('--config.data.domains=legal,code', 'data.domains', ['legal', 'code']),
    ("--config.data.domains=('legal','code')", 'data.domains', ['legal', 'code']),
    ('--config.data.domains=', 'data.domains', []),
    ('--config.data.domains=None', 'data.domains', ['None']),
    ('--config.data.domains=1,1e3,web-text', 'data.domains', ['1', '1e3', 'web-text']),
    ('--config.data.domains=["a","b-c"]', 'data.domains', ['a', 'b-c']),
    ('--config.data.weights.legal=2', 'data.weights', {'legal': 2}),
    ('--config.data.weights.legal=0.25', 'data.weights', {'legal': 0.25}),
    ('--config.data.schedule=8 a=4 b=1, 9 a=.5', 'data.schedule', '8 a=4 b=1, 9 a=.5'),
])
def test_an_override_by_dotted_path(flag, path, value):
  # weights and schedule are read with this way of sampling only
  more = {'data.sampling': 'weights'} if path in ('data.weights', 'data.schedule') else {}
  changed = settings.flatten(parse(flag, *(f'--config.{k}={v}' for k, v in more.items())))
  assert changed == settings.flatten(Config()) | {path: value} | more
  assert type(changed[path]) is type(value)


def test_overrides_of_a_dict_add_up():
  assert parse('--config.data.weights.legal=2', '--config.data.weights.code=1',
               '--config.data.sampling=weights').data.weights == {'legal': 2, 'code': 1}


NAMES = ['alpha-cipher', 'alpha', 'alpha-', '1b', '007', '1e3', 'a_b', '_a', '-a', 'a--b', 'None',
         'if', 'member/expert']


def test_a_key_of_a_dict_is_any_name_of_a_domain(file):
  """Names have dashes, digits in front, and begin alike; what a file gives stays."""
  shares = {name: i + 0.5 for i, name in enumerate(NAMES)}
  flags = [f'--config.data.weights.{name}={share}' for name, share in shares.items()]
  assert parse(*flags, '--config.data.sampling=weights').data.weights == shares
  spaced = [part for flag in flags for part in flag.split('=')]
  assert parse(*spaced, f'--config={file}').data.weights == shares | {'legal': 1.0, 'code': 1.0}
  mixed = parse(*(f.replace('config.data', 'config') for f in flags), '--config.prior=fixed',
                cls=MixConfig)
  assert mixed.weights == shares


@pytest.mark.parametrize('form', [lambda f: [f'--config={f}'], lambda f: ['--config', str(f)]])
@pytest.mark.parametrize('last', [False, True])
def test_a_file_its_argument_and_overrides_in_any_order(file, form, last):
  flags = ['--config.seed=9', '--config.data.weights.code=3', '--config.data.weights.verse=4']
  for arg, size in (('', 4), (':big', 64)):
    given = form(f'{file}{arg}')
    config = parse(*(flags + given if last else given + flags))
    assert (config.seed, config.data.batch_size) == (9, size)
    assert config.data.weights == {'legal': 1.0, 'code': 3.0, 'verse': 4}


@pytest.mark.parametrize(('flag', 'text'), [
    ('--config.model.d_modle=3', "config.model.d_modle: no such key (did you mean 'd_model'?)"),
    ('--config.modle.d_model=3', "config.modle: no such key (did you mean 'model'?)"),
    ('--config.leraning_rate=3', 'config.leraning_rate: no such key (known: data, execution'),
    ('--config.model=3', 'config.model: a group of keys'),
    ('--config.seed.x=3', 'config.seed: has no keys'),
    ('--config.seed=abc', "'abc'"), ('--config.seed=1.5', "'1.5'"), ('--config.seed', '.seed'),
    ('--config.train.tensorboard=maybe', "'maybe'"),
    ('--config.optimizer.learning_rate=fast', "'fast'"),
    ('--config.data.weights=3', 'data.weights'),
    ('--config.data.domains=(1,2)', 'config.data.domains: expected names, got int 1'),
    ('--config.data.domains=(a', "'(' was never closed"),
    ('--config.data.weights.=2', 'config.data.weights.: no name'),
    ('--config.data.weights.a-b', 'config.data.weights.a-b: no value given'),
    ('--wrkdir=W', "'wrkdir'. Did you mean: workdir"),
    ('extra', "unexpected argument 'extra'"),
    ('--config=missing.py', "no such file 'missing.py'"), ('--config', "no such file ''"),
])
def test_what_cannot_be_meant_is_refused_in_one_line(flag, text):
  assert text in refused(flag)


@pytest.mark.parametrize(('source', 'text'), [
    ('def get_config(: pass', 'SyntaxError'),
    ('import no_such_module', "No module named 'no_such_module'"),
    ('get = 1', "no attribute 'get_config'"),
    ('def get_config():\n  return 1 / 0', 'ZeroDivisionError'),
    ('def get_config():\n  return {}', 'get_config() returned dict'),
    ('from demix.model.transformer import preset\ndef get_config():\n  preset("gpt-125")',
     "did you mean 'gpt-125m'"),
    ('from ml_collections import ConfigDict\ndef get_config():\n'
     '  return ConfigDict({"modle": {}})', "config.modle: no such key (did you mean 'model'?)"),
    ('from ml_collections import ConfigDict\ndef get_config():\n'
     '  return ConfigDict({"seed": "x"})', "config.seed: expected int like 0, got str 'x'"),
])
def test_a_config_file_that_fails_is_named_with_its_error(tmp_path, source, text):
  (tmp_path / 'own.py').write_text(source)
  message = refused(f'--config={tmp_path / "own.py"}')
  assert text in message
  assert str(tmp_path / 'own.py') in message or text.startswith('config.')


def test_an_argument_that_a_file_does_not_take_is_refused(tmp_path, file):
  (tmp_path / 'none.py').write_text('def get_config():\n  return 1')
  assert 'takes 0 positional arguments' in refused(f'--config={tmp_path / "none.py"}:arg')
  assert "KeyError: 'huge'" in refused(f'--config={file}:huge')


def test_help_lists_every_key():
  with pytest.raises(Help) as e:
    parse('--help', '--config=missing.py')
  for name in settings.flatten(Config()):
    assert f'--config.{name}=' in str(e.value)


# ---- complete ---------------------------------------------------------------------------------


@pytest.fixture
def store(stores):
  return TokenStore.open(stores.bytes)


def make(model=(), data=(), optimizer=(), train=(), **rest) -> Config:
  return Config(
      model=ModelConfig(**{'layers': 2, 'd_model': 16, 'heads': 2, **dict(model)}),
      data=DataConfig(**{'batch_size': 8, 'sequence_length': 32, **dict(data)}),
      optimizer=OptimizerConfig(**dict(optimizer)), train=TrainConfig(**dict(train)), **rest)


def test_complete_fills_in_what_comes_from_the_data(store):
  full = complete(make(), store)
  assert full.data.domains == corpus.DOMAINS  # the novel one is not trained on
  assert (full.model.vocab_size, full.model.max_length, full.model.experts) == (257, 32, ())
  assert full.optimizer.schedule_steps == full.train.steps == 1000
  assert full.data.path == str(store.path)
  assert domain_symbols(full) is None
  demix = complete(make(model={'ffn': 'demix'}, data={'domains': ('mixed', 'code')}), store)
  assert demix.model.experts == demix.data.domains == ('mixed', 'code')  # named, in their order
  token = complete(make(data={'domain_token': True}), store)
  assert token.model.vocab_size == 261 and list(domain_symbols(token)) == [257, 258, 259, 260]


def test_a_schedule_keeps_the_length_of_the_first_start(store):
  saved = {'optimizer.schedule_steps': 1000}
  longer = make(train={'steps': 5000})
  assert complete(longer, store, saved).optimizer.schedule_steps == 1000
  assert complete(longer, store).optimizer.schedule_steps == 5000
  own = make(optimizer={'schedule_steps': 70})
  assert complete(own, store, saved).optimizer.schedule_steps == 70


@pytest.mark.parametrize(('changes', 'text'), [
    ({'data': {'domains': ('legal', 'cod')}}, r"no domain 'cod' \(did you mean 'code'\?\)"),
    ({'data': {'batch_size': 6}}, r'batch_size=6 is not a multiple of 4 domains.*try 4 or 8'),
    ({'train': {'accumulation': 4}}, r'accumulation=4 does not divide 2 sequences per domain'),
    ({'train': {'accumulation': 3}, 'data': {'sampling': 'proportional'}},
     r'accumulation=3 does not divide 8 sequences of'),
    ({'train': {'steps': 0}}, r'train\.steps=0'), ({'train': {'keep_every': -1}}, 'keep_every=-1'),
    ({'train': {'log_every': 0}}, 'log_every=0'), ({'train': {'max_to_keep': -1}}, 'max_to_keep'),
    ({'train': {'compute_dtype': 'float16'}}, "compute_dtype='float16': no such choice"),
    ({'model': {'vocab_size': 9}}, 'come from the data'),
    ({'model': {'max_length': 9}}, 'come from the data'),
    ({'model': {'ffn': 'demix', 'experts': ('a', 'b')}}, 'come from the data'),
    ({'model': {'heads': 3}}, r'd_model=16 is not a multiple of heads=3'),
    ({'model': {'ffn': 'demx'}}, r"ffn='demx'.*did you mean 'demix'"),
    ({'optimizer': {'schedule': 'linaer'}}, r"'linaer'.*did you mean 'linear'"),
    ({'optimizer': {'warmup_share': 2.0}}, r'warmup_share=2\.0'),
    ({'seed': -1}, 'seed=-1'), ({'seed': 1 << 31}, f'seed={1 << 31}'),
    ({'data': {'weights': {'legal': 1}}}, r"no effect with data\.sampling='balanced'"),
])
def test_complete_refuses_what_cannot_be(store, changes, text):
  with pytest.raises(BadInput, match=text):
    complete(make(**changes), store)


def test_a_store_with_novel_domains_only_is_refused(store, tmp_path):
  copy = shutil.copytree(store.path, tmp_path / 'store')
  card = orjson.loads((copy / 'card.json').read_bytes())
  for domain in card['domains'].values():
    domain['role'] = 'novel'
  (copy / 'card.json').write_bytes(orjson.dumps(card))
  with pytest.raises(BadInput, match=r'no domain to train on.*data\.domains'):
    complete(make(), TokenStore.open(copy))


# ---- identity ---------------------------------------------------------------------------------


def test_identity_is_what_defines_the_experiment(store, tmp_path):
  full = complete(make(), store)
  flat = identity(full, store)
  expected = {k for k in settings.flatten(full) if k not in {
      'data.path', 'train.steps', 'train.log_every', 'train.eval_every', 'train.eval_sequences',
      'train.checkpoint_every', 'train.max_to_keep', 'train.keep_every', 'train.tensorboard',
          'train.lift', 'optimizer.restart'}
      and not k.startswith(('execution.', 'mesh.', 'init.', 'data.schedule'))}  # docs/contracts.md
  assert flat.keys() == expected | {'data.fingerprint', 'tokenizer.fingerprint'}
  assert orjson.loads(orjson.dumps(flat)) == flat
  moved = TokenStore.open(shutil.copytree(store.path, tmp_path / 'elsewhere'))
  again = complete(make(train={'log_every': 3, 'keep_every': 9}), moved)
  assert identity(again, moved) == flat and digest(identity(again, moved)) == digest(flat)
  for change in ({'seed': 1}, {'model': {'d_model': 32}}, {'train': {'accumulation': 2}},
                 {'data': {'domains': corpus.DOMAINS[::-1]}}, {'optimizer': {'clip': 0.5}},
                 {'data': {'sampling': 'weights', 'weights': dict.fromkeys(corpus.DOMAINS, 1),
                           'schedule': '5 legal=2'}}):
    other = identity(complete(make(**change), store), store)
    assert other != flat and digest(other) != digest(flat)


def test_the_data_fingerprint_is_of_content_and_order_not_of_names(stores, store, tmp_path):
  names = {'legal': 'zzz', 'code': 'aaa'}
  renamed = TokenStore.open(corpus.store(
      corpus.write(tmp_path / 'text', names), tmp_path / 'store', names, tokenizer='bytes'))
  assert data_fingerprint(store, ('legal', 'code')) == data_fingerprint(renamed, ('zzz', 'aaa'))
  others = [data_fingerprint(store, d) for d in (('code', 'legal'), ('legal',), ('legal', 'verse'))]
  others.append(data_fingerprint(TokenStore.open(stores.bpe), ('legal', 'code')))
  assert len({data_fingerprint(store, ('legal', 'code')), *others}) == 5


def test_a_saved_config_comes_back(store):
  full = complete(make(model={'ffn': 'demix'}, data={
      'sampling': 'weights', 'weights': dict.fromkeys(corpus.DOMAINS, 0.3)}), store)
  saved = orjson.loads(orjson.dumps(settings.to_dict(full)))
  assert settings.from_dict(Config, saved) == full
  assert isinstance(config_dict(full), ConfigDict)
  assert settings.from_dict(Config, config_dict(full).to_dict()) == full
  assert dataclasses.replace(full, seed=1) != full
