"""inspect: what a config's model is made of and what a device needs for it; nothing is run."""

from demix.verbs.flags import Verb

SUMMARY = "a config's parameters and the memory it needs; nothing is run"


def run(argv: list[str]) -> int:
  """Parses flags and prints the tables asked for; both without a flag."""
  from demix.config import Config
  verb = Verb('inspect', SUMMARY)
  verb.boolean('parameters', 'print leaves, totals and where each lies on the mesh')
  verb.boolean('memory', 'print what a device needs, predicted without compiling')
  verb.boolean('compile', 'beside it, what XLA says of the compiled step; needs the devices')
  verb.integer('devices', 0, 'devices to plan for; 0: those that are there', low=0)
  verb.integer('vocab_size', 50257, 'ids of the tokenizer, where config.data.path names no store',
               low=1)
  verb.integer('experts', 8, 'domains, where neither a store nor config.data.domains names them',
               low=1)
  verb.config(Config, 'configs/papers/demix/demix.py:350m')
  given, config = verb.parse(argv)
  from demix.analysis import needs
  both = not (given.parameters or given.memory or given.compile)
  needs.show(config, vocab_size=given.vocab_size, experts=given.experts, devices=given.devices,
             parameters=given.parameters or both,
             memory_too=given.memory or given.compile or both, compiled=given.compile)
  return 0
