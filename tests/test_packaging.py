"""The tree and what is shipped of it: the direction of imports, public names, a quick command line, wheel and sdist."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch, fnmatchcase
from pathlib import Path

import pytest
import torch
from torch import Tensor

from portmanteau import compositions, merge

ROOT = Path(__file__).parents[1]
SHIPPED = [*sorted(ROOT.glob("merge/**/*.py")), *sorted(ROOT.glob("compositions/**/*.py")), ROOT / "cli.py"]
AT_ROOT = "merge compositions cli.py tests examples pyproject.toml README.md LICENSE CHANGELOG.md constraints.txt .*"
SET_UP = (
    "pip install -c constraints.txt . && portmanteau build examples/layer_swap.yaml merged",
    'pip install -c constraints.txt ".[test]" && pytest',
)
LAYERS = (  # a file imports only from layers above its own
    ("merge.cards", "merge.differences", "merge.results"),  # they only say what they are
    ("merge.files", "merge.adapters", "merge.sparse", "merge.compiled", "merge.plugins"),
    ("compositions.mergekit", "compositions.recipe", "compositions.vocabulary"),
    ("compositions.one_off", "compositions.reference", "compositions.reports", "compositions.terminal"),
    ("merge.on_demand",),
    ("merge.compiled.arena", "merge.compiled.build_hook", "merge.compiled.library", "merge.shown"),
    ("merge.palette", "merge.progress", "merge.results.exclusive", "merge.differences.sums"),
    ("merge.compiled.runs",),
    ("merge.errors", "merge.form", "merge.names", "merge.kernels", "merge.files.storage", "merge.units"),
    ("merge.files.digests", "merge.results.journal", "merge.cards.card_changes"),
    ("merge.dtypes", "merge.operator", "merge.adapters.bottleneck_config", "merge.adapters.module_pattern"),
    ("merge.files.json_file", "merge.files.places", "merge.files.pickled", "merge.files.upload", "merge.device"),
    (
        "merge.tensor_spec",
        "merge.files.torch_values",
        "merge.differences.spectra",
        "merge.differences.changes",
        "merge.inner_products",
    ),
    ("merge.surveys", "merge.differences.task_vectors", "merge.differences.delta_ranks"),
    ("merge.thinning", "merge.compiled.measures", "merge.describe.tensors"),
    ("merge.files.safetensors_header", "merge.files.torch_archive", "merge.files.weight_file"),
    ("merge.compiled.forms", "merge.files.remote_file"),
    ("merge.operators.linear",),
    ("merge.companions", "merge.files.safetensors_file", "merge.files.torch_file", "merge.writer", "merge.operators.*"),
    ("merge.operators", "merge.files.hub", "merge.plugins.discovery", "merge.plugins.kernel"),
    ("merge.plugins.mergekit_method", "merge.plugins.source_files", "merge.sparse.pytorch_diff"),
    ("merge.registry",),
    ("merge.node",),
    ("merge.non_finite",),
    ("merge.origins", "merge.evaluate", "merge.cards.parent_cards"),
    ("merge.notebook",),
    ("merge.checkpoint",),
    ("merge.compiled.making", "merge.byte_copies"),
    ("merge.compiled.surveying",),
    ("merge.stored", "merge.composed", "merge.in_memory", "merge.sparse.selection"),
    ("merge.adapters.folder",),
    ("merge.adapters.adapter", "merge.adapters.bottleneck", "merge.surveyed"),
    (
        "merge.sparse.compiled_selection",
        "merge.sparse.entries",
        "merge.sparse.file",
        "merge.sparse.fingerprint",
        "merge.rows",
    ),
    ("merge.plan",),
    ("merge.adapters.low_rank", "merge.adapters.decomposition"),
    (
        "merge.results.identity",
        "merge.limits",
        "merge.page_cache",
        "merge.describe.bottleneck",
        "merge.describe.sparse",
    ),
    ("merge.receipt",),
    ("merge.describe.checkpoints",),
    ("merge.describe.plans", "merge.cards.model_card", "merge.results.output", "merge.results.verify"),
    ("merge.describe", "merge.results.up_to_date"),
    ("merge.execute",),
    ("merge.building", "merge.results.remade"),
    ("merge",),
    (
        "compositions.composition",
        "compositions.components",
        "compositions.recipe.lines",
        "compositions.mergekit.methods",
    ),
    ("compositions.recipe.lined", "compositions.recipe.reference", "compositions.restacked_config"),
    (
        "compositions.matching",
        "compositions.mergekit.parameters",
        "compositions.mergekit.plugin_methods",
        "compositions.random_order",
        "compositions.same_model",
        "compositions.zones",
    ),
    ("compositions.automatic_layers", "compositions.sparse_fine_tune"),
    ("compositions.reports.rows",),
    ("compositions.reports.comparison", "compositions.reports.maps"),
    ("compositions.reports.built", "compositions.reports.svg", "compositions.reports.tables"),
    ("compositions.reports.*",),
    ("compositions.training.masks", "compositions.training.sparse_result", "compositions.training.freezing"),
    ("compositions.training.*",),
    ("compositions.training",),
    ("compositions.lora_folder", "compositions.mergekit.references", "compositions.tensorwise"),
    ("compositions.vocabulary.words", "compositions.vocabulary.tables", "compositions.vocabulary.*_*"),
    ("compositions.vocabulary.target",),
    ("compositions.vocabulary.row_maps",),
    ("compositions.vocabulary.shared",),
    (
        "compositions.combine_lora",
        "compositions.mergekit.merge",
        "compositions.mergekit.tokenizer",
        "compositions.recipe.operator_body",
        "compositions.recipe.tokenizer",
    ),
    ("compositions.*",),
    ("compositions.recipe.reading", "compositions.reference_page"),
    ("compositions.compose", "compositions.reference.commands", "compositions.reference.json_schema"),
    ("compositions.preflight",),
    ("compositions.greedy_soup", "compositions.lock_file", "compositions.publish", "compositions.rebuilt"),
    ("compositions.one_off.options", "compositions.reference.markdown"),
    ("compositions.build_recipe", "compositions.one_off.commands", "compositions.one_off.written"),
    ("compositions.one_off.starter",),
    ("compositions.terminal.options", "compositions.terminal.pictures", "compositions.terminal.tables"),
    ("compositions.terminal.printing",),
    ("compositions.terminal.asking", "compositions.terminal.bars", "compositions.terminal.results"),
    ("compositions",),
    ("cli",),
)


# -------------------------------------------------------------------------------------------------------------- imports


@dataclass(frozen=True)
class Import:
    """One import as it is written: `from ..kernels import weighted_sum` has level 2 and module `kernels`."""

    level: int
    module: str
    names: tuple[str, ...]


def written_imports(path: Path, *, type_checking: bool) -> Iterator[Import]:
    """Go through a file's imports, in functions too; with or without those made only for type checkers."""
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not type_checking:
            waiting += node.orelse
            continue
        if isinstance(node, ast.Import):
            yield from (Import(0, alias.name, ()) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            yield Import(node.level, node.module or "", tuple(alias.name for alias in node.names))
        waiting += ast.iter_child_nodes(node)


def dotted(path: Path) -> str:
    """Give a file's module name below `portmanteau`; for an `__init__.py`, the package's."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path, one: Import) -> list[str]:
    """Give the modules of this project that an import runs, by their names below `portmanteau`."""
    modules = {dotted(file) for file in SHIPPED}
    if one.level:
        home = path.relative_to(ROOT).parts[: -one.level]
        start = ".".join([*home, *filter(None, [one.module])])
    elif one.module.partition(".")[0] == "portmanteau":
        start = one.module.partition(".")[2]
    else:
        return []
    below = [f"{start}.{name}".lstrip(".") for name in one.names]
    found = [name if name in modules else start for name in below] or [start]
    assert modules.issuperset(found), f"{path}: {one} imports none of our modules"
    return list(dict.fromkeys(found))


def place(module: str) -> int:
    """Give the layer of a module: the one that names it, else the one whose pattern fits."""
    for fits in (str.__eq__, fnmatchcase):
        for i, layer in enumerate(LAYERS):
            if any(fits(module, name) for name in layer):
                return i
    raise AssertionError(f"{module} stands in no layer: give it the one below everything that it imports")


def test_imports_go_one_way_so_there_is_no_cycle() -> None:
    backwards = [
        f"{dotted(path)} imports {target}"
        for path in SHIPPED
        for one in written_imports(path, type_checking=False)
        for target in imported(path, one)
        if place(target) >= place(dotted(path))
    ]
    assert backwards == []


def test_every_layer_names_files_that_exist() -> None:
    modules = {dotted(path) for path in SHIPPED}
    assert [n for layer in LAYERS for n in layer if not any(fnmatchcase(module, n) for module in modules)] == []


def is_misspelt(path: Path, one: Import) -> bool:
    """Tell whether an import is absolute within its own package, or reaches out of it by other than `portmanteau.*`."""
    inside = path.relative_to(ROOT).parts
    if one.level:
        return one.level >= len(inside)  # relative, and out of its package
    first, _, rest = one.module.partition(".")
    if first == "portmanteau":
        return inside[0] in (rest.partition(".")[0], *(one.names if not rest else ()))  # absolute, and into its own
    return first in {"merge", "compositions", "cli"}


def test_imports_are_relative_inside_a_package_and_full_across_packages() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}: {one}"
        for path in SHIPPED
        for one in written_imports(path, type_checking=True)
        if is_misspelt(path, one)
    ]
    assert wrong == []


@pytest.mark.parametrize(("package", "unknown"), [("merge", ("compositions", "cli")), ("compositions", ("cli",))])
def test_a_lower_package_does_not_know_a_higher_one_even_for_types(package: str, unknown: tuple[str, ...]) -> None:
    known = {
        target.partition(".")[0]
        for path in SHIPPED
        if path.is_relative_to(ROOT / package)
        for one in written_imports(path, type_checking=True)
        for target in imported(path, one)
    }
    assert known.isdisjoint(unknown)


# ------------------------------------------------------------------------------------------------- names, files, README


def test_merge_has_exactly_these_public_names() -> None:
    assert merge.__all__ == [
        "Adapter",
        "Bottleneck",
        "Checkpoint",
        "CheckpointError",
        "Composed",
        "InMemory",
        "MergeError",
        "Operator",
        "OutputError",
        "Plan",
        "PortmanteauError",
        "Progress",
        "Receipt",
        "RecipeError",
        "Source",
        "SparseFineTune",
        "Step",
        "StoredCheckpoint",
        "Survey",
        "Surveyed",
        "TensorSpec",
        "Verified",
        "build",
        "make_plan",
        "open",
        "open_adapter",
        "open_bottleneck",
        "open_sparse",
        "operator",
        "operators",
        "verify",
    ]
    assert all(hasattr(merge, name) for name in merge.__all__)


def test_compositions_has_exactly_these_public_names() -> None:
    assert compositions.__all__ == [
        "Changes",
        "Comparison",
        "Composition",
        "Ends",
        "Exponential",
        "Meetings",
        "Overlap",
        "Preflight",
        "Recipe",
        "RowOf",
        "Rule",
        "Slice",
        "Soup",
        "Term",
        "TokenRule",
        "Try",
        "Zone",
        "accumulative_averages",
        "assemble",
        "average",
        "average_adapters",
        "changes",
        "compare",
        "compose",
        "composition",
        "emr_task",
        "extract_lora",
        "extract_sparse",
        "fisher",
        "greedy_soup",
        "layer_swap",
        "load",
        "lora",
        "measured_by",
        "overlaps",
        "preflight",
        "rebuilt",
        "revert_sparse",
        "slices",
        "sparse_fine_tune",
        "stack_adapters",
        "swap_lora",
        "tensorwise",
        "training",
        "with_vocabulary",
    ]
    assert all(hasattr(compositions, name) for name in compositions.__all__)


def test_every_python_file_says_what_it_is() -> None:
    files = [*SHIPPED, *ROOT.glob("tests/**/*.py"), *ROOT.glob("examples/**/*.py")]
    silent = [str(path) for path in files if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))]
    assert silent == []


def test_nothing_else_stands_at_the_root() -> None:
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text(encoding="utf-8").split()]
    found = [path.name for path in ROOT.iterdir()]
    assert [name for name in found if not any(fnmatch(name, p) for p in [*AT_ROOT.split(), *ignored])] == []


def test_the_readme_has_the_two_lines_that_set_everything_up() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith("pip install")] == list(SET_UP)


# ------------------------------------------------------------------------------------------------ a quick command line


@pytest.fixture
def swap(tmp_path: Path, save_tensors: Callable[[str, Mapping[str, Tensor]], Path]) -> Path:
    """Write two models of four layers and one entry a layer, and a recipe that swaps layers of them."""
    for name, value in (("math", 1.0), ("swahili", 2.0)):
        layers = {f"model.layers.{i}.mlp.up_proj.weight": torch.full((1, 1), value) for i in range(4)}
        save_tensors(name, {**layers, "model.norm.weight": torch.full((1,), value)})
    recipe = tmp_path / "swap.yaml"
    recipe.write_text("merge: {layer_swap: {task: ./math, language: ./swahili, bottom: 1, top: 1, transition: 0}}\n")
    return recipe


ADAPTER = ROOT / "tests" / "oracles" / "fixtures" / "adapters_1_3_0" / "second"
COMMANDS = (
    *(
        "--help",
        "plan swap.yaml",
        "check swap.yaml",
        "show",
        "show ties",
        "show layer_swap",
        "inspect math",
        "plan swap.yaml --picture",
    ),
    f"inspect {ADAPTER}",
)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_that_read_no_weights_import_neither_torch_nor_transformers(command: str, swap: Path) -> None:
    code = (
        "import sys, portmanteau.cli\n"
        "try: portmanteau.cli.main()\n"
        "except SystemExit as end: status = end.code\n"
        "print('status', status or 0, *{'torch', 'transformers'}.intersection(sys.modules))"
    )
    assert run([sys.executable, "-c", code, *command.split()], swap.parent).splitlines()[-1] == "status 0"


def test_a_build_that_nobody_watches_imports_nothing_that_it_does_not_need(swap: Path) -> None:
    code = (
        "import sys, portmanteau.cli\n"
        "try: portmanteau.cli.main()\n"
        "except SystemExit as end: status = end.code\n"
        "unneeded = {'torch', 'transformers', 'huggingface_hub', 'rich', 'portmanteau.compositions.training'}\n"
        "print('status', status or 0, *unneeded.intersection(sys.modules))"
    )
    printed = run([sys.executable, "-c", code, "build", str(swap), "out"], swap.parent)
    assert printed.splitlines()[-1] == "status 0"


def run(command: list[str | Path], folder: Path) -> str:
    """Run a command in a folder and give its stdout; its environment names no other Python's modules."""
    outside = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=folder, env=outside, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
    )
    assert done.returncode == 0, done.stderr or done.stdout
    return done.stdout


# ------------------------------------------------------------------------------------------------------ wheel and sdist


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build sdist and wheel from the checkout into one folder."""
    folder = tmp_path_factory.mktemp("dist")
    run([sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-t", "wheel", "-d", folder], ROOT)
    return folder


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """Make a virtual environment that sees what is installed in the running one, except this project."""
    home = tmp_path / "environment"
    venv.create(home, with_pip=False)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(home), "platbase": str(home)}))
    seen = tmp_path / "seen"
    seen.mkdir()
    for installed in Path(sysconfig.get_path("purelib")).iterdir():
        if "portmanteau" not in installed.name:
            (seen / installed.name).symlink_to(installed)
    (site / "seen.pth").write_text(f"{seen}\n", encoding="utf-8")
    return home / "bin"


def install(environment: Path, *what: str | Path) -> None:
    pip: list[str | Path] = [sys.executable, "-m", "pip", "--python", environment / "python", "install", "--quiet"]
    run([*pip, "--no-deps", "--no-build-isolation", "--no-index", *what], environment)


def contents(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


@pytest.mark.wheel
def test_the_wheel_holds_the_package_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    shipped = {f"portmanteau/{path.relative_to(ROOT).as_posix()}" for path in SHIPPED}
    typed = {"portmanteau/merge/py.typed", "portmanteau/compositions/py.typed"}
    sources = ("kernels.c", "selection.c", "stored.h", "kernels.native")
    compiled = {f"portmanteau/merge/compiled/{name}" for name in sources}
    page = {f"portmanteau/compositions/reports/page.{kind}" for kind in ("css", "html", "js")}
    about = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE"}
    version = wheel.name.split("-")[1]
    assert contents(wheel) == shipped | typed | compiled | page | {
        f"portmanteau-{version}.dist-info/{name}" for name in about
    }


@pytest.mark.wheel
def test_the_sdist_makes_the_same_wheel(built: Path, tmp_path: Path) -> None:
    (sdist,), (wheel,) = built.glob("*.tar.gz"), built.glob("*.whl")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path / "again"], unpacked)
    assert (tmp_path / "again" / wheel.name).read_bytes() == wheel.read_bytes()


@pytest.mark.wheel
def test_without_a_compiler_the_wheel_is_one_for_any_machine(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    monkeypatch.setenv("CC", "false")
    run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path / "pure"], unpacked)
    (wheel,) = (tmp_path / "pure").iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in contents(wheel) if name.endswith("kernels.native")]


@pytest.mark.wheel
def test_an_installed_wheel_builds_a_model_away_from_the_checkout(built: Path, environment: Path, swap: Path) -> None:
    install(environment, *built.glob("*.whl"))
    where = "import portmanteau.cli, portmanteau.merge; print(portmanteau.cli.__file__, portmanteau.merge.__file__)"
    files = run([environment / "python", "-c", where], swap.parent).split()
    assert all(Path(file).is_relative_to(environment.parent) for file in files)
    assert {"layer_swap", "linear", "ties"} <= shown(environment, swap.parent)
    run([environment / "portmanteau", "build", "swap.yaml", "out"], swap.parent)
    made = {name: tensor.item() for name, tensor in tensors_in(swap.parent / "out").items()}
    assert made == {f"model.layers.{i}.mlp.up_proj.weight": (2, 1, 1, 2)[i] for i in range(4)} | {
        "model.norm.weight": 2
    }


def shown(environment: Path, folder: Path) -> set[str]:
    """Give the names that `portmanteau show` lists."""
    return {line.split()[0] for line in run([environment / "portmanteau", "show"], folder).splitlines() if line.strip()}


def tensors_in(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


USER = """\
from portmanteau import compositions, merge

math, swahili = merge.open("models/math"), merge.open("models/swahili")
merged = compositions.layer_swap(task=math, language=swahili, bottom=5, top=2)
total: int = merged["model.norm.weight"].numel() + merged.nbytes
plan: merge.Plan = merge.make_plan(merged, "BF16")
receipt: merge.Receipt = merge.build(merged, "out", dtype="bfloat16")
digests: dict[str, str] = dict(receipt.outputs)
wrong: int = merge.build(merged, "out")
"""


@pytest.mark.wheel
def test_a_users_script_is_checked_against_the_types_of_the_wheel(
    built: Path, environment: Path, tmp_path: Path
) -> None:
    install(environment, *built.glob("*.whl"))
    (tmp_path / "user.py").write_text(USER, encoding="utf-8")
    settings = ["--strict", "--cache-dir", str(tmp_path / "mypy"), "--python-executable", str(environment / "python")]
    command = [sys.executable, "-m", "mypy", *settings, "user.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    errors = [line for line in done.stdout.splitlines() if ": error: " in line]
    assert errors == [
        'user.py:9: error: Incompatible types in assignment (expression has type "Receipt", variable has type "int")'
        "  [assignment]"
    ], done.stdout + done.stderr


@pytest.mark.wheel
def test_an_editable_install_sees_an_edit(environment: Path, tmp_path: Path, swap: Path) -> None:
    checkout = tmp_path / "checkout"
    for name in ("merge", "compositions", "tests/editable"):
        shutil.copytree(ROOT / name, checkout / name)
    for name in ("cli.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, checkout / name)
    install(environment, "--editable", checkout)
    assert {"layer_swap", "linear", "ties"} <= shown(environment, swap.parent)
    ties = checkout / "merge" / "operators" / "ties.py"
    ties.rename(ties.with_name("knots.py"))
    edited = ties.with_name("knots.py").read_text(encoding="utf-8").replace("def ties(", "def knots(")
    ties.with_name("knots.py").write_text(edited, encoding="utf-8")
    assert {"knots", "linear"} <= shown(environment, swap.parent)
    assert "ties" not in shown(environment, swap.parent)
