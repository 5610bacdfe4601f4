"""pyproject.toml, requirements.lock and environment.yml say the same; what is built from them is whole."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from tiny import in_a_new_process

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
LOCK_LINES = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
LOCK = {canonicalize_name(line.split("==")[0]): line.split("==")[-1] for line in LOCK_LINES}


def test_the_lock_pins_exactly_what_is_declared_and_installed() -> None:
    wrong = [line for line in LOCK_LINES if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line)]
    assert not wrong, f"no hashes, local versions, options or ranges: {wrong}"
    assert len(LOCK) == len(LOCK_LINES), "a package is named twice"
    assert not [name for name in LOCK if name.startswith(("nvidia-", "cuda-")) or name in {"triton", "rlhf-kit", "pip"}]
    extras = (text for texts in PROJECT["optional-dependencies"].values() for text in texts)
    for requirement in map(Requirement, [*PROJECT["dependencies"], *extras, *PYPROJECT["build-system"]["requires"]]):
        pin = LOCK.get(canonicalize_name(requirement.name))
        assert pin is not None and pin in requirement.specifier, f"{requirement} against {pin} in the lock: make lock"
    here = {name: metadata.version(name).split("+")[0] for name in LOCK}
    assert here == LOCK, "this environment is not requirements.lock: make setup"


@pytest.mark.parametrize("python", ["3.11.0", "3.12.0", "3.13.0"])
def test_the_lock_is_complete_on_every_python(python: str) -> None:
    """Each pinned package takes this Python, and what it needs there is pinned too, at a version it takes."""
    on_linux = {"python_version": python.rpartition(".")[0], "python_full_version": python, "extra": ""}
    on_linux |= {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix"}
    assert python in SpecifierSet(PROJECT["requires-python"])
    for name in LOCK:
        wheel = metadata.metadata(name)
        assert python in SpecifierSet(wheel["Requires-Python"] or ""), f"{name} does not take Python {python}"
        if name == "torch":  # its requirements are its build's: the CUDA one brings what the lock leaves to pip
            continue
        for requirement in map(Requirement, wheel.get_all("Requires-Dist") or []):
            if requirement.marker is None or requirement.marker.evaluate(on_linux):
                pin = LOCK.get(canonicalize_name(requirement.name))
                fits = pin is not None and requirement.specifier.contains(pin, prereleases=True)
                assert fits, f"{name} needs {requirement}; pinned is {pin}"


def test_what_the_kit_imports_is_declared() -> None:
    extras = PROJECT["optional-dependencies"]
    texts = [*PROJECT["dependencies"], *extras["notebooks"], *extras["endpoint"]]
    declared = {canonicalize_name(Requirement(text).name) for text in texts}
    distributions = metadata.packages_distributions()
    for path in sorted((ROOT / "rlhf_kit").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(), str(path))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            for module in {module.split(".")[0] for module in modules} - sys.stdlib_module_names - {"rlhf_kit"}:
                names = {canonicalize_name(name) for name in distributions.get(module, [module])}
                assert names & declared, f"{path.name} imports {module}, which pyproject.toml does not declare"
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                safe = isinstance(node.value, ast.Constant) and node.value.value is False
                assert safe, f"{path.name}: a model directory must not bring code that runs"


QUIET = """
import sys, warnings
import datasets, huggingface_hub.constants, transformers, trl
warnings.simplefilter("error", FutureWarning)
warnings.simplefilter("error", UserWarning)
import rlhf_kit as rk
assert huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY
rows = datasets.Dataset.from_dict({"prompt": ["why ?"] * 2, "completion": [" yes ."] * 2})
sft = rk.train.sft(rk.tasks.Pocket.base_model, rows, sys.argv[1][1:-1], lora={"r": 2}, max_steps=1, max_length=60)
args = rk.PPOConfig("unused", max_steps=1, per_device_train_batch_size=2, max_completion_length=4)
rk.PPOTrainer(sft, lambda prompts, completions: [0.5, 1.0], args, rows.select_columns(["prompt"])).train()
print("ANSWERS", "true")
"""


@pytest.mark.slow
def test_imported_last_the_kit_sends_nothing_and_no_library_warns(tmp_path: Path) -> None:
    assert in_a_new_process(QUIET, str(tmp_path / "sft"), HF_HUB_DISABLE_TELEMETRY="0")


@pytest.mark.slow
def test_the_wheel_has_the_command_the_code_and_the_base_model(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(ROOT / "rlhf_kit", source / "rlhf_kit", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip_wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    built = subprocess.run([*pip_wheel, "-w", tmp_path, source], cwd=source, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if not name.split("/")[0].endswith(".dist-info")}
        [entry_points] = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        assert "rlhf-kit = rlhf_kit.cli:main" in archive.read(entry_points).decode()
    assert packed == {str(path.relative_to(source)) for path in (source / "rlhf_kit").rglob("*") if path.is_file()}
    assert "rlhf_kit/tasks/pocket/base/model.safetensors" in packed
