"""The package's shape: who may import whom, and what importing costs."""

import ast
import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import diffsal

PACKAGE = Path(diffsal.__file__).parent

LAYERS = (
    ("errors",),
    ("files", "contrast", "target_layers", "images", "devices", "pretrained"),
    ("salience", "models"),
    ("cam", "losses", "data", "figures"),
    ("explanations", "faithfulness", "train", "report", "tables", "plots"),
    ("fooling", "findings", "demo"),
    ("audit", "protocol"),
    ("cli",),
    ("__main__",),
)
LEVEL = {module: level for level, modules in enumerate(LAYERS) for module in modules}
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")
LIBRARY = [module for module in MODULES if module != "__main__"]


def imports(module: str) -> Iterator[str]:
    """Every module that ``module`` imports anywhere, in functions and for typing too."""
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            if node.module == "diffsal":
                yield from (f"diffsal.{alias.name}" for alias in node.names)
            elif node.module:
                yield node.module


def imported(module: str) -> ModuleType:
    return importlib.import_module(f"diffsal.{module}")


def loaded_by(code: str) -> set[str]:
    """Top-level names in ``sys.modules`` after ``code`` ran in a fresh interpreter."""
    script = f"import sys\n{code}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return set(result.stdout.split())


@pytest.mark.parametrize("module", MODULES)
def test_imports_only_go_downwards(module: str) -> None:
    own = {name.removeprefix("diffsal.") for name in imports(module) if name.startswith("diffsal.")}
    above = {name for name in own - {"__version__"} if LEVEL[name] >= LEVEL[module]}
    assert not above


@pytest.mark.parametrize(
    ("library", "allowed"),
    [
        ("pytorch_grad_cam", {"cam", "faithfulness"}),
        ("matplotlib", {"figures", "report", "plots"}),
        ("cv2", {"cam"}),
    ],
)
def test_heavy_libraries_have_one_home(library: str, allowed: set[str]) -> None:
    users = {
        module
        for module in MODULES
        if any(name.partition(".")[0] == library for name in imports(module))
    }
    assert users <= allowed


@pytest.mark.parametrize("module", ["salience", "contrast", "target_layers"])
def test_the_mechanism_needs_torch_alone(module: str) -> None:
    needed = {name.partition(".")[0] for name in imports(module)} - set(sys.stdlib_module_names)
    assert needed <= {"torch", "diffsal"}


def test_importing_the_package_or_its_command_line_loads_no_torch() -> None:
    heavy = {"torch", "torchvision", "numpy", "matplotlib", "cv2", "PIL", "sklearn", "scipy"}
    assert not heavy & loaded_by("import diffsal.cli")


@pytest.mark.skipif("train" not in MODULES, reason="no training yet")
def test_training_loads_no_grad_cam_and_no_drawing() -> None:
    loaded = loaded_by("import diffsal.losses, diffsal.train")
    assert "torch" in loaded
    assert not {"pytorch_grad_cam", "cv2", "matplotlib"} & loaded


@pytest.mark.parametrize("module", LIBRARY)
def test_public_names_are_listed_exist_and_are_documented(module: str) -> None:
    home = imported(module)
    assert home.__doc__
    assert len(set(home.__all__)) == len(home.__all__)
    for name in home.__all__:
        value = getattr(home, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), f"{module}.{name} has no docstring"


def test_every_public_name_of_the_package_is_what_it_says() -> None:
    for module in LIBRARY:  # a name that is a module, too, would become that module here
        imported(module)
    assert not set(diffsal.__all__) & set(MODULES)
    assert set(diffsal.__all__) <= set(dir(diffsal))
    for name in diffsal.__all__:
        value = getattr(diffsal, name)
        assert not isinstance(value, ModuleType)
        assert name in sys.modules[value.__module__].__all__


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'capturing'"):
        _ = diffsal.capturing
