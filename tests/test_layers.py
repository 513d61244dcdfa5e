"""The package's shape: who may import whom, and what importing costs."""

import ast
import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from types import ModuleType

import pytest

import diffsal

PACKAGE = Path(diffsal.__file__).parent

FLOORS = (
    ("errors",),
    ("system",),
    ("maps",),
    ("faithfulness", "data"),
    ("models",),
    ("training",),
    ("fooling", "explaining"),
    ("auditing", "demo"),
    ("protocol", "serving"),
    ("cli",),
    ("__main__",),
)
UPWARDS = {  # methods that show and keep maps, for those who hold some; imported when called
    ("maps.salience_maps", "explaining.regions"),
    ("maps.salience_maps", "explaining.shown"),
    ("maps.salience_maps", "explaining.stored"),
}
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
LONGEST = 450  # lines of a file


def module_of(path: Path) -> str:
    """The dotted name below the package: ``maps.salience``; a folder's own file is the folder."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


PATHS = {module_of(path): path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"}
MODULES = sorted(PATHS)
LIBRARY = [module for module in MODULES if module != "__main__"]


def room(module: str) -> str:
    return module.partition(".")[0]


def imports(module: str) -> Iterator[str]:
    """Every module that ``module`` imports anywhere, in functions and for typing too."""
    for node in ast.walk(ast.parse(PATHS[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            if node.module == "diffsal":
                yield from (f"diffsal.{alias.name}" for alias in node.names)
            elif node.module:
                yield node.module


def own_imports(module: str) -> set[str]:
    """What a module imports of the package, named below it."""
    names = {name for name in imports(module) if name.startswith("diffsal.")}
    own = {name.removeprefix("diffsal.") for name in names - {"diffsal.__version__"}}
    return {name for name in own if (module, name) not in UPWARDS}


def imported(module: str) -> ModuleType:
    return importlib.import_module(f"diffsal.{module}")


def public(home: ModuleType) -> Iterator[tuple[str, object]]:
    """The classes and functions that are a module's own and have no underscore."""
    for name, value in vars(home).items():
        is_own = getattr(value, "__module__", None) == home.__name__
        if not name.startswith("_") and is_own:
            yield name, value


def loaded_by(code: str) -> set[str]:
    """Top-level names in ``sys.modules`` after ``code`` ran in a fresh interpreter."""
    script = f"import sys\n{code}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return set(result.stdout.split())


def test_every_room_has_a_floor() -> None:
    assert {room(module) for module in MODULES} == set(FLOOR)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down_the_floors_or_stay_in_the_room(module: str) -> None:
    elsewhere = {name for name in own_imports(module) if room(name) != room(module)}
    assert not {name for name in elsewhere if FLOOR[room(name)] >= FLOOR[room(module)]}


def test_no_circles() -> None:
    TopologicalSorter({module: own_imports(module) for module in MODULES}).prepare()


@pytest.mark.parametrize("module", MODULES)
def test_files_stay_short(module: str) -> None:
    assert len(PATHS[module].read_text(encoding="utf-8").splitlines()) <= LONGEST


@pytest.mark.parametrize(
    ("library", "allowed"),
    [
        ("pytorch_grad_cam", {"maps.difference_cam", "faithfulness.perturbation"}),
        ("matplotlib", {"explaining", "auditing.report", "protocol.plots"}),
        (
            "cv2",
            {
                "maps.difference_cam",
                "explaining.overlays",
                "explaining.regions",
                "explaining.workers",
            },
        ),
    ],
)
def test_heavy_libraries_have_one_home(library: str, allowed: set[str]) -> None:
    users = {
        module
        for module in MODULES
        if any(name.partition(".")[0] == library for name in imports(module))
    }
    assert {user for user in users if user not in allowed and room(user) not in allowed} == set()


@pytest.mark.parametrize(
    "module", [module for module in MODULES if room(module) == "maps" and "cam" not in module]
)
def test_the_mechanism_needs_torch_alone(module: str) -> None:
    needed = {name.partition(".")[0] for name in imports(module)} - set(sys.stdlib_module_names)
    assert needed <= {"torch", "diffsal"}


def test_importing_the_package_or_its_command_line_loads_no_torch() -> None:
    heavy = {"torch", "torchvision", "numpy", "matplotlib", "cv2", "PIL", "sklearn", "scipy"}
    heavy |= {"starlette", "uvicorn"}
    assert not heavy & loaded_by("import diffsal.cli.main")


def test_training_loads_no_grad_cam_and_no_drawing() -> None:
    loaded = loaded_by("import diffsal.training.losses, diffsal.training.run")
    assert "torch" in loaded
    assert not {"pytorch_grad_cam", "cv2", "matplotlib"} & loaded


def test_processes_that_draw_load_no_models() -> None:
    loaded = loaded_by("import diffsal.explaining.one_image, diffsal.explaining.workers")
    assert not {"pytorch_grad_cam", "torchvision", "sklearn", "scipy"} & loaded


@pytest.mark.parametrize("module", LIBRARY)
def test_what_other_modules_may_import_is_documented(module: str) -> None:
    home = imported(module)
    assert home.__doc__
    for name, value in public(home):
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), f"{module}.{name} has no docstring"


def test_what_has_an_underscore_is_imported_by_nobody() -> None:
    for module in MODULES:
        for node in ast.walk(ast.parse(PATHS[module].read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("diffsal"):
                hidden = [alias.name for alias in node.names if alias.name.startswith("_")]
                assert hidden in ([], ["__version__"]), f"{module} imports {hidden}"


def test_every_public_name_of_the_package_is_what_it_says() -> None:
    for module in LIBRARY:  # a name that is a module, too, would become that module here
        imported(module)
    assert not set(diffsal.__all__) & set(FLOOR)
    for name in diffsal.__all__:
        value = getattr(diffsal, name)
        assert not isinstance(value, ModuleType)
        assert name in dict(public(sys.modules[value.__module__]))


def test_dir_shows_the_public_names_alone() -> None:
    assert dir(diffsal) == sorted([*diffsal.__all__, "__version__"])


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'capturing'"):
        _ = diffsal.capturing
