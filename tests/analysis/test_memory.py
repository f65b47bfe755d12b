"""inspect: memory that is predicted without compiling is what the compiled step then needs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import memory_cases
import pytest

from demix.__main__ import main
from demix.analysis import memory, needs
from demix.analysis.liveness import Program, nbytes, peak
from demix.errors import BadInput

ROOT = Path(__file__).parents[2]


# ---- the walk

def peak_of(f, *args, **more) -> int:
  jaxpr = jax.make_jaxpr(f)(*args).jaxpr
  return peak(Program(jaxpr, lambda aval, _: ('all', nbytes(aval)), **more)).total()


def test_a_buffer_lives_from_its_making_to_its_last_use():
  x = jnp.ones((100, 100))  # 40,000 bytes
  assert peak_of(lambda x: x @ x, x) == 40_000  # arguments are not counted
  assert peak_of(lambda x: x @ x @ x @ x, x) == 80_000  # one is read while the next is made
  assert peak_of(lambda x: jnp.exp(jnp.exp(x @ x) + 1) @ x, x) == 80_000  # fused, in one place
  assert peak_of(lambda x: (x @ x).sum(), x) == 40_000 + 4
  assert peak_of(lambda x: jnp.exp(x).sum(), x) == 4  # fused into the sum
  assert peak_of(lambda x: x + 1, x) == 40_000
  assert peak_of(lambda x: x + 1, x, given=[0]) == 0  # donated
  def kept(x):
    a = x @ x
    return jnp.sin(a @ x) @ x + a
  assert peak_of(kept, x) == 120_000


def test_a_loop_holds_its_stack_and_a_checkpoint_does_not():
  x = jnp.ones((100, 100))
  def loop(x, wrap):
    body = wrap(lambda x: (jnp.tanh(x @ x) @ x, None))
    return jax.lax.scan(lambda c, _: body(c), x, None, length=10)[0].sum()
  plain, remat = (peak_of(jax.grad(lambda x, w=w: loop(x, w)), x)
                  for w in (lambda f: f, jax.checkpoint))
  # Without it tanh(x @ x) of each turn is kept, and its derivative; with it x of each turn alone.
  assert plain - remat == 21 * 40_000
  assert 10 * 40_000 < remat <= 16 * 40_000


# ---- against the compiler

def near(predicted, compiled):
  assert abs(predicted / compiled - 1) < 0.15, (predicted, compiled)


@pytest.mark.parametrize('name', memory_cases.QUICK)
def test_what_is_predicted_is_what_the_compiled_step_needs(name):
  near(*memory_cases.measure(name))


@pytest.mark.long
@pytest.mark.parametrize('name', memory_cases.ONE)
def test_at_10m_too(name):
  near(*memory_cases.measure(name))


@pytest.mark.long
def test_on_a_mesh_it_is_that_of_each_device():
  done = subprocess.run(
      [sys.executable, str(ROOT / 'tests/analysis/memory_cases.py'), *memory_cases.EIGHT],
      capture_output=True, text=True, env=os.environ | {
          'XLA_FLAGS': '--xla_force_host_platform_device_count=8', 'JAX_PLATFORMS': 'cpu',
          'PYTHONPATH': str(ROOT)})
  assert done.returncode == 0, done.stderr[-2000:]
  for name, (predicted, compiled) in json.loads(done.stdout.splitlines()[-1]).items():
    assert abs(predicted / compiled - 1) < 0.15, (name, predicted, compiled)


# ---- without the devices, and the verb

def test_what_each_policy_saves_shows_in_the_prediction():
  def total(**execution):
    config = memory_cases.case('125m', L=1024, **execution)
    return memory.predict(memory.plan(needs.completed(config, 50257, 8), 1))
  none, dots, full, blocks = (total(**e) for e in (
      {}, dict(remat='dots'), dict(remat='full'), dict(remat='full', loss_block=1024)))
  activations = [p['activations'] for p in (none, dots, full)]
  assert activations == sorted(activations, reverse=True) and activations[2] < activations[0] / 4
  assert blocks['logits'] < full['logits'] / 4
  assert none['optimizer'] == 2 * none['parameters'] + 4


def test_a_mesh_that_is_not_there_is_planned_for():
  config = memory_cases.case('125m', B=64, model=dict(ffn='demix'),
                             mesh=dict(data=-1, expert=8, fsdp=2))
  config = needs.completed(config, 50257, 8)
  plan = memory.plan(config, 64)
  assert plan.sizes == {'expert': 8, 'data': 4, 'fsdp': 2, 'model': 1}
  parts = {n: parts for n, (_, _, parts) in memory.leaves(plan, plan.model.abstract).items()}
  assert parts['block_0/ffn/experts/up'] == 16 and parts['embed/tokens'] == 2
  with pytest.raises(BadInput, match='does not fit 12 devices'):
    memory.plan(config, 12)
  with pytest.raises(BadInput, match='64 sequences of a micro-batch over 128 devices'):
    memory.plan(config, 128)


def test_inspect_prints_leaves_and_memory(capsys, monkeypatch):
  monkeypatch.chdir(ROOT)
  config = ['inspect', '--config=configs/papers/demix/demix.py:125m']
  assert main([*config, '--devices=8', '--config.mesh.expert=8', '--parameters']) == 0
  out = capsys.readouterr().out
  assert 'block_0/ffn/experts/up' in out and '-, expert, fsdp, model' in out
  assert 'active per token' in out and 'predicted' not in out
  assert main([*config, '--memory', '--devices=8', '--config.mesh.expert=8',
               '--vocab_size=1000']) == 0
  out = capsys.readouterr().out
  assert 'predicted' in out and 'logits' in out and 'V 1024' in out and 'compiled' not in out


@pytest.mark.parametrize('flags,named', [
    (['--devices=8', '--compile'], '--compile for --devices=8, but 1 are there'),
    (['--config.mesh.expert=3'], 'does not fit 1 devices'),
    (['--config.init.model=W'], 'init.model'),
    (['--vocab_size=0'], '--vocab_size=0')])
def test_inspect_refuses_in_one_line(flags, named, capsys, monkeypatch):
  monkeypatch.chdir(ROOT)
  assert main(['inspect', '--config=configs/papers/demix/demix.py:125m', *flags]) == 2
  err = capsys.readouterr().err
  assert named in err and err.startswith('error: ') and err.count('\n') == 1
