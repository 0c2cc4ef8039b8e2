"""msda says what is live and why; environment variables choose it, and misspelt ones fail."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

import msda
from msda import _remedy
from tests.helpers.processes import run_python

PACKAGE = Path(msda.__file__).parent
ROOT = PACKAGE.parent

# Prints the sum of the outputs at the centre of a map of ones, and the live backend.
CALL = """
import torch, msda
value, locations = torch.ones(1, 6, 1, 4), torch.full((1, 1, 1, 1, 1, 2), 0.5)
output = msda.ms_deform_attn(value, [(2, 3)], None, locations, torch.ones(1, 1, 1, 1, 1))
print(output.sum().item(), msda.info()["backend"], msda.info()["cpu_capability"])
"""


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


# ---- what this build lacks, and the command that mends it ----------------------------------------


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A function that lets the package have been installed by pip from an address."""
    package = tmp_path / "site" / "msda"
    record = tmp_path / "site" / "any_name-0.1.0.dist-info"
    record.mkdir(parents=True)
    (record / "RECORD").write_text("msda/__init__.py,sha256=0,1\n")
    monkeypatch.setattr(_remedy, "PACKAGE", package)
    monkeypatch.setattr(sys, "executable", "/a python/bin/python")

    def come_from(**record_of_pip):
        (record / "direct_url.json").write_text(json.dumps(record_of_pip))

    return come_from


PIP = "'/a python/bin/python' -m pip install --force-reinstall --no-deps"


@pytest.mark.parametrize(
    ("url", "vcs", "command"),
    [
        ("file:///home/me/my%20msda", {}, f"{PIP} file:///home/me/my%20msda"),
        (
            "https://example.org/msda.git",
            dict(vcs="git", commit_id="1234abc"),
            f"{PIP} --no-cache-dir git+https://example.org/msda.git@1234abc",
        ),
        ("file:///home/me/msda-0.1.0-py3-none-any.whl", {}, f"cd a_checkout_of_msda && {PIP} ."),
    ],
)
def test_the_command_that_builds_anew_names_where_the_package_came_from(
    installed, url, vcs, command
):
    installed(url=url, vcs_info=vcs)
    assert _remedy.build_command("") == command


def test_the_command_that_builds_a_checkout_anew_names_its_folder(tmp_path, installed, monkeypatch):
    (tmp_path / "my msda").mkdir()
    (tmp_path / "my msda" / "setup.py").touch()
    monkeypatch.setattr(_remedy, "PACKAGE", tmp_path / "my msda" / "msda")
    expected = f"MSDA_CUDA=1 {PIP} -e '{tmp_path}/my msda'"
    assert _remedy.build_command("MSDA_CUDA=1 ") == expected


@pytest.mark.parametrize(
    ("cuda", "torch_version", "library", "kernels", "says"),
    [
        (None, "2.13.0", True, False, None),
        ("13.0", "2.13.0", True, True, None),
        ("13.0", "2.13.0", True, False, "to compile the CUDA kernels: MSDA_CUDA=1 "),
        ("13.0", "2.13.0", False, False, "to compile the CUDA kernels: MSDA_CUDA=1 "),
        (
            "12.8",
            "2.13.0",
            True,
            False,
            "to compile the CUDA kernels, once NVIDIA's toolkit for CUDA 12.8 is installed: MSDA",
        ),
        (None, "2.13.0", False, False, "to compile the library: '/a python/bin/python' -m pip "),
        ("12.8", "2.9.1+cu128", False, False, "for torch >= 2.10: '/a python/bin/python' -m pip "),
    ],
)
def test_a_build_that_lacks_something_names_the_command_for_this_torch(
    installed, monkeypatch, cuda, torch_version, library, kernels, says
):
    installed(url="file:///home/me/msda")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch, "__version__", torch_version)
    monkeypatch.setattr(_remedy.shutil, "which", lambda program: None)
    text = _remedy.remedy(library, kernels)
    assert text is None if says is None else text.startswith(says)


def test_info_ends_with_the_command_that_mends(pure_python):
    process = run_python("-m", "msda.info", path=pure_python)
    last = process.stdout.splitlines()[-1]
    assert last.startswith("what this build lacks  to compile the "), process.stderr
    assert "-m pip install --force-reinstall --no-deps" in last


class OnCuda(torch.Tensor):
    """A tensor that says it is on a GPU; it has no memory."""

    @staticmethod
    def __new__(cls, *shape):
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.float32, device="cuda")

    @classmethod
    def __torch_dispatch__(cls, *call):
        raise NotImplementedError


@pytest.mark.skipif(bool(msda.info()["cuda_architectures"]), reason="msda has CUDA kernels")
def test_the_error_for_a_cuda_tensor_ends_with_the_command_that_mends():
    value, points, weights = OnCuda(1, 6, 1, 4), OnCuda(1, 1, 1, 1, 1, 2), OnCuda(1, 1, 1, 1, 1)
    python_keys = torch._C.DispatchKeySet(torch._C.DispatchKey.Python)
    python_keys |= torch._C.DispatchKeySet(torch._C.DispatchKey.PythonTLSSnapshot)
    message = (
        "^value must be on the CPU, got a tensor on cuda.*: this build of msda has no CUDA "
        "kernels. MSDA_BACKEND=reference does without, slowly; to mend it: type this$"
    )
    msda.ops.LIBRARY.msda_set_cuda_remedy(b"to mend it: type this")
    with (
        torch._C._AutoDispatchBelowAutograd(),
        torch._C._ExcludeDispatchKeyGuard(python_keys),
        pytest.raises(RuntimeError, match=message),
    ):
        torch.ops.msda.ms_deform_attn(
            value, [2, 3], None, None, points, weights, None, nearest=False
        )


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
