"""Several devices: the mesh, the rules by which arrays lie on it, and putting a model there."""

from lotaqaf_jax.parallel.mesh import make_mesh, mesh_shape
from lotaqaf_jax.parallel.place import put_rows, shard, whole
from lotaqaf_jax.parallel.rules import decoder_sharding, linear_sharding

__all__ = ["decoder_sharding", "linear_sharding", "make_mesh", "mesh_shape", "put_rows", "shard", "whole"]
