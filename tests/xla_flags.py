"""XLA's flags for tests whose programs are compiled for one run of a few steps; prints them.

Most of a test's time goes into compiling tiny programs: without LLVM's optimizations and the fusion
emitters a training step takes 1.5 CPU seconds instead of 9.5.
"""

from importlib import metadata

FAST = '--xla_backend_optimization_level=0'
# Later versions have no other emitters, and XLA ends a process over a flag that it does not know.
if tuple(map(int, metadata.version('jaxlib').split('.')[:2])) < (0, 11):
  FAST += ' --xla_cpu_use_fusion_emitters=false'

if __name__ == '__main__':
  print(FAST)
