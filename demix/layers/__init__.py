"""The layers of the decoder: Flax NNX modules that know no mesh and no domain names."""
