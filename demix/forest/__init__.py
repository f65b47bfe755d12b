"""The ELMforest: plan, manifest, lineage. Records: nothing here trains or needs JAX."""
