"""Functions fit a screen, constructors name their arguments, annotations say what a value is."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "jaxft").rglob("*.py"))
TREES = {str(file.relative_to(ROOT)): ast.parse(file.read_text()) for file in FILES}
CLASSES = {
  node.name for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)
}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
MAX_LINES = 100
MAX_LOCALS = 25
MAX_POSITIONAL = 3
MAX_ANY = 100


def functions(tree):
  return [node for node in ast.walk(tree) if isinstance(node, FUNCTIONS)]


def local_names(function):
  """Arguments and what is bound in the function itself, not in functions inside of it."""
  names = {node.arg for node in ast.walk(function.args) if isinstance(node, ast.arg)}

  def visit(node):
    for child in ast.iter_child_nodes(node):
      if isinstance(child, (*FUNCTIONS, ast.ClassDef)):
        names.add(child.name)
      elif isinstance(child, ast.Lambda | ast.ListComp | ast.SetComp | ast.DictComp):
        continue
      elif not isinstance(child, ast.GeneratorExp):
        if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
          names.add(child.id)
        elif isinstance(child, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and child.name:
          names.add(child.name)
        elif isinstance(child, ast.alias):
          names.add((child.asname or child.name).split(".")[0])
        visit(child)

  visit(function)
  return names


def positional_constructors(tree):
  for node in ast.walk(tree):
    if isinstance(node, ast.Call):
      called, args = node.func, node.args
      if getattr(called, "attr", getattr(called, "id", "")) == "partial" and args:
        called, args = args[0], args[1:]
      name = getattr(called, "id", getattr(called, "attr", ""))
      is_splat = any(isinstance(arg, ast.Starred) for arg in args)
      if name in CLASSES | {"cls"} and (len(args) > MAX_POSITIONAL or is_splat):
        yield f"{name}, line {node.lineno}"


def uses_of_any(tree):
  return sum(isinstance(node, ast.Name) and node.id == "Any" for node in ast.walk(tree))


def found_in(search):
  """What `search` finds in each module, with the file's name."""
  return [f"{file}: {found}" for file, tree in TREES.items() for found in search(tree)]


def long_functions(tree):
  for node in functions(tree):
    if (lines := node.end_lineno - node.lineno + 1) > MAX_LINES:
      yield f"{node.name} has {lines} lines"


def crowded_functions(tree):
  for node in functions(tree):
    if (names := len(local_names(node))) > MAX_LOCALS:
      yield f"{node.name} has {names} locals"


def test_functions_fit_a_screen():
  assert not found_in(long_functions)


def test_functions_have_few_locals():
  assert not found_in(crowded_functions)


def test_constructors_name_their_arguments():
  assert not found_in(positional_constructors)


def test_annotations_seldom_say_any():
  """`jaxft/utils/types.py` has names for trees, parameters and JSON."""
  assert sum(map(uses_of_any, TREES.values())) < MAX_ANY


def test_limits_are_noticed():
  """Each of the counts above finds what it is for."""
  long = ast.parse("def f():\n" + "  x = 0\n" * MAX_LINES)
  assert [*long_functions(long)] and local_names(long.body[0]) == {"x"}
  crowded = ast.parse("def f(a, *, b):\n" + "".join(f"  c{i}, d = a\n" for i in range(MAX_LOCALS)))
  assert [*crowded_functions(crowded)]
  inside = ast.parse("def f(a):\n  for g in [h for h in a]: pass\n  def i(j): k = 0")
  assert local_names(inside.body[0]) == {"a", "g", "i"}
  bound = ast.parse(
    "def f(*a, **b):\n  try: import os.path\n  except OSError as c: pass\n"
    "  match a:\n    case [d, *e]: pass"
  )
  assert local_names(bound.body[0]) == {"a", "b", "c", "d", "e", "os"}
  assert [*positional_constructors(ast.parse("kv_cache.KVCache(1, 2, 3, 4)"))]
  assert [*positional_constructors(ast.parse("cls(1, 2, 3, 4)"))]
  assert [*positional_constructors(ast.parse("functools.partial(KVCache, 1, 2, 3, 4)"))]
  assert [*positional_constructors(ast.parse("KVCache(*arrays)"))]
  assert not [*positional_constructors(ast.parse("KVCache(1, 2, 3)"))]
  assert uses_of_any(ast.parse("x: dict[str, Any] | Any = 0")) == 2
