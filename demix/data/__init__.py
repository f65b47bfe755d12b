"""The way of the data: documents → tokens → token store → sequences → batches. No JAX in here."""
