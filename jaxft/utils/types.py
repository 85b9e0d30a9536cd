"""Names for types that annotations use everywhere."""

from typing import Any, TypeAlias

# A tree as jax.tree takes it: dicts, tuples and dataclasses of arrays, of shapes or of shardings.
PyTree: TypeAlias = Any
# The parameters of a model: dicts in dicts, with arrays (or shapes) as leaves.
Params: TypeAlias = dict[str, Any]
# What json.loads makes of an object.
Json: TypeAlias = dict[str, Any]
