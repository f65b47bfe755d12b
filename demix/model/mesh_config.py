"""Devices and processes of a run, as data: read without JAX."""

import dataclasses

from demix.settings import check_values, option


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Sizes of the mesh axes, one of which may be -1 (what is left of the devices); processes."""
  data: int = option(-1, 'copies of the model, each with its share of the batch', low=-1,
                      operational=True)
  fsdp: int = option(1, 'as data, with parameters split over the copies', low=-1,
                      operational=True)
  expert: int = option(1, 'groups of domain experts', low=-1,
                      operational=True)
  model: int = option(1, 'splits of heads and feed-forward width', low=-1,
                      operational=True)
  max_replicated: float = option(0.05, 'share of the parameters that may stay whole where fsdp or '
                                       'model is to split them', low=0, high=1, operational=True)
  processes: int = option(1, 'processes of the run, all on these flags; 0: as SLURM, a TPU pod … '
                             'says. A flag only', low=0, operational=True)
  process: int = option(0, 'number of this process, where the environment does not say it', low=0,
                        operational=True)
  coordinator: str = option('', 'HOST:PORT that process 0 listens on, where the environment does '
                                'not say it', operational=True)
  patience: int = option(100, 'seconds without a sign of life of one process after which the '
                              'others end', low=1, operational=True)

  def check(self):
    """Raises BadInput for values that cannot be."""
    check_values(self, 'mesh.')
