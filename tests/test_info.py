"""msda says what is live and why; environment variables choose it, and misspelt ones fail."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import msda

PACKAGE = Path(msda.__file__).parent
ROOT = PACKAGE.parent

# Prints the sum of the outputs at the centre of a map of ones, and the live backend.
CALL = """
import torch, msda
value, locations = torch.ones(1, 6, 1, 4), torch.full((1, 1, 1, 1, 1, 2), 0.5)
output = msda.ms_deform_attn(value, [(2, 3)], None, locations, torch.ones(1, 1, 1, 1, 1))
print(output.sum().item(), msda.info()["backend"], msda.info()["cpu_capability"])
"""


def run_python(*arguments, path=ROOT, **environment):
    """A fresh Python that imports msda from ``path``: its return code, stdout and stderr."""
    variables = {name: text for name, text in os.environ.items() if not name.startswith("MSDA_")}
    variables["PYTHONPATH"] = os.pathsep.join([str(path), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env=variables | environment,
        cwd=path,
        timeout=120,
    )


def test_info_is_a_dict_that_says_what_is_live():
    info = msda.info()
    assert isinstance(info, dict)
    assert info["msda"] == msda.__version__
    assert info["torch"] == torch.__version__
    assert info["backend"] in ("native", "reference")
    assert isinstance(info["backend_reason"], str)
    assert info["backend_reason"]
    assert isinstance(info["cuda_architectures"], list)
    assert info["cpu_threads"] == torch.get_num_threads()


def test_info_of_the_compiled_library_names_its_instruction_sets():
    info = msda.info()
    assert info["backend"] == "native", info["backend_reason"]
    assert Path(info["library"]).exists()
    assert info["cpu_capability"] in info["cpu_capabilities_supported"]
    assert set(info["cpu_capabilities_supported"]) <= set(info["cpu_capabilities_compiled"])
    assert "baseline" in info["cpu_capabilities_supported"]
    assert info["torch_built_with"]


def test_info_prints_as_a_table():
    lines = str(msda.info()).splitlines()
    assert len(lines) == len(msda.info())
    assert any(line.startswith("backend ") and line.endswith("native") for line in lines)
    assert repr(msda.info()) == str(msda.info())


def test_info_stays_a_function_when_its_module_is_imported():
    process = run_python("-c", "import msda.info, msda; print(msda.info()['backend'])")
    assert process.stdout == "native\n", process.stderr


def test_module_info_prints_the_table_without_warnings():
    process = run_python("-W", "error", "-m", "msda.info")
    assert process.returncode == 0
    assert process.stderr == ""
    assert "backend" in process.stdout
    assert msda.__version__ in process.stdout


def test_importing_prints_nothing_and_asks_no_device():
    program = "import msda, torch; assert not torch.cuda.is_initialized()"
    process = run_python("-W", "error", "-c", program)
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")


# ---- MSDA_BACKEND --------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_backend_is_chosen_by_the_environment_without_a_warning(backend):
    process = run_python("-W", "error", "-c", CALL, MSDA_BACKEND=backend)
    assert process.stdout.split()[:2] == ["4.0", backend], process.stderr
    assert process.stderr == ""


def test_unknown_backend_is_refused_at_import():
    process = run_python("-c", "import msda", MSDA_BACKEND="bogus")
    assert process.returncode != 0
    message = "ImportError: MSDA_BACKEND must be 'native' or 'reference', got 'bogus'"
    assert process.stderr.splitlines()[-1] == message


def test_reference_backend_refuses_wrong_input_too():
    program = """
import torch, msda
value, points = torch.ones(1, 8, 1, 4), torch.rand(1, 1, 1, 2, 1, 2)
right = dict(value=value, shapes=[(2, 3), (1, 2)], weights=points[..., 0])
for wrong in (
    dict(shapes=[(2, 3)]),
    dict(shapes=[(2, 3), (1, 1)]),
    dict(value=value.int()),
    dict(weights=points[:, :, :, :1, :, 0]),
):
    value, shapes, weights = (right | wrong).values()
    try:
        msda.ms_deform_attn(value, shapes, None, points, weights)
    except (RuntimeError, ValueError, TypeError) as error:
        print(error)
    else:
        print("accepted", wrong)
"""
    process = run_python("-c", program, MSDA_BACKEND="reference")
    assert process.returncode == 0, process.stderr
    messages = process.stdout.splitlines()
    assert len(messages) == 4
    assert all(" must " in message for message in messages)


# ---- MSDA_CPU_CAPABILITY -------------------------------------------------------------------------


@pytest.mark.parametrize("capability", ["baseline", "avx2", "avx512"])
def test_every_supported_instruction_set_can_be_chosen(capability):
    if capability not in msda.info()["cpu_capabilities_supported"]:
        pytest.skip(f"this machine does not run {capability}")
    process = run_python("-c", CALL, MSDA_CPU_CAPABILITY=capability)
    assert process.stdout.split() == ["4.0", "native", capability], process.stderr


def test_unknown_instruction_set_is_refused_at_the_first_call():
    program = "import msda; print(msda.info()['cpu_capability'])" + CALL
    process = run_python("-c", program, MSDA_CPU_CAPABILITY="bogus")
    assert process.stdout == "None\n"
    supported = " ".join(msda.info()["cpu_capabilities_supported"])
    message = f"RuntimeError: MSDA_CPU_CAPABILITY must be one of: {supported}, got bogus"
    assert process.stderr.splitlines()[-1] == message


# ---- an installation without the compiled library ------------------------------------------------


@pytest.fixture
def pure_python(tmp_path):
    """A folder with a copy of the package that lacks the library."""
    ignored = shutil.ignore_patterns("*.so", "*.dylib", "*.dll", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "msda", ignore=ignored)
    return tmp_path


def test_pure_python_installation_computes_with_one_warning(pure_python):
    process = run_python("-c", CALL + CALL, path=pure_python)
    assert process.stdout == "4.0 reference None\n" * 2, process.stderr
    assert process.stderr.count("Warning: ") == 1
    assert (
        "msda runs its slower PyTorch reference: the compiled library is missing" in process.stderr
    )
    assert "<string>" in process.stderr  # the warning points at the caller


def test_pure_python_installation_runs_the_module_and_its_backward(pure_python):
    program = """
import torch, msda
module = msda.MSDeformAttn(16, 2, 4, 2)
reference, features = torch.rand(1, 3, 2, 2), torch.rand(1, 8, 16)
output = module(torch.rand(1, 3, 16), reference, features, [(2, 3), (1, 2)])
output.sum().backward()
print(tuple(output.shape), module.value_proj.weight.grad.isfinite().all().item())
"""
    process = run_python("-W", "ignore", "-c", program, path=pure_python)
    assert process.stdout == "(1, 3, 16) True\n", process.stderr


def test_pure_python_installation_describes_itself(pure_python):
    process = run_python("-W", "error", "-m", "msda.info", path=pure_python)
    assert process.returncode == 0, process.stderr
    assert "the compiled library is missing" in process.stdout


def test_pure_python_installation_refuses_to_pretend_to_be_native(pure_python):
    process = run_python("-c", "import msda", path=pure_python, MSDA_BACKEND="native")
    assert process.returncode != 0
    message = "ImportError: MSDA_BACKEND=native, but the compiled library is missing: "
    assert process.stderr.splitlines()[-1].startswith(message)


def test_broken_library_is_named_in_the_warning(pure_python):
    (pure_python / "msda" / Path(msda.info()["library"]).name).write_bytes(b"not a library")
    process = run_python("-c", CALL, path=pure_python)
    assert process.stdout == "4.0 reference None\n", process.stderr
    assert "loading it failed" in process.stderr
