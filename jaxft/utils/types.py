"""Type aliases for annotations."""

from typing import Any, TypeAlias

# A tree for jax.tree: dicts, tuples and dataclasses of arrays, shapes or shardings.
PyTree: TypeAlias = Any
# The parameters of a model: dicts in dicts, with arrays (or shapes) as leaves.
Params: TypeAlias = dict[str, Any]
# A JSON object.
Json: TypeAlias = dict[str, Any]
