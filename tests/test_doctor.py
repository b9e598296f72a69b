import io
import json
import subprocess
import sys
import warnings

import onnxruntime
import pytest
from rich.console import Console

from vitcli.onnx import providers as onnx_providers
from vitcli.onnx import tensorrt_library
from vitcli.report import doctor, tables
from vitcli.report.doctor import Finding

TENSORRT = """\x1b[1;31m2026-11-23 09:44:58 [E:onnxruntime:Default, provider_bridge_ort.cc:2430 operator()] provider_bridge_ort.cc:2043 onnxruntime::Provider& onnxruntime::ProviderLibrary::Get() [ONNXRuntimeError] : 1 : FAIL : Failed to load library /x/libonnxruntime_providers_tensorrt.so with error: libnvinfer.so.10: cannot open shared object file: No such file or directory
\x1b[m
"""  # noqa: E501
CUDA = TENSORRT.replace("tensorrt", "cuda").replace("libnvinfer.so.10", "{}")


@pytest.mark.parametrize(
    ("noise", "reason", "remedy"),
    [
        (TENSORRT, "libnvinfer.so.10 is missing", 'pip install "tensorrt-cu13>=10.14,<11"'),
        (CUDA.format("libcurand.so.10"), "libcurand.so.10 is missing", 'pip install "nvidia-curand~=10.0"'),
        (CUDA.format("libcublasLt.so.13"), "libcublasLt.so.13 is missing", 'pip install "onnxruntime-gpu[cuda,cudnn]"'),
        (CUDA.format("libcuda.so.1"), "libcuda.so.1 is missing: no NVIDIA driver", "install the NVIDIA driver"),
        (CUDA.format("libfoo.so.3"), "libfoo.so.3 is missing", ""),
        ("\x1b[31mfirst\nRuntimeError: driver too old\n\x1b[m\n", "RuntimeError: driver too old", ""),
        ("", "no reason given", ""),
    ],
)  # fmt: skip
def test_a_complaint_becomes_a_reason_and_a_remedy(noise, reason, remedy):
    assert onnx_providers.explain(noise) == (reason, remedy)


def test_a_crash_is_a_reason():
    assert onnx_providers.explain("", returncode=-11) == ("its process died of signal 11", "")


def test_the_cpu_loads():
    assert onnx_providers.why_not("CPUExecutionProvider") is None


def test_a_provider_that_hangs_is_given_up():
    assert onnx_providers.why_not("CPUExecutionProvider", timeout=0.01) == ("did not load within 0 s", "")


@pytest.mark.skipif(
    "TensorrtExecutionProvider" not in onnxruntime.get_available_providers(),
    reason="this onnxruntime lists no TensorRT",
)
def test_trying_a_provider_prints_nothing(capfd):
    answer = onnx_providers.why_not("TensorrtExecutionProvider")
    assert capfd.readouterr() == ("", "")
    assert answer is None or answer[0]


@pytest.fixture(scope="module")
def findings() -> list[Finding]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return doctor.inspect()


def test_everything_is_looked_at(findings):
    items = {(finding.section, finding.item): finding.value for finding in findings}
    for item in ("vitcli", "Python", "OS", "CPU", "CPU bf16", "memory"):
        assert items["system", item]
    for name in ("torch", "torchvision", "onnx", "pillow"):
        assert items["packages", name][0].isdigit()
    assert {item for section, item in items if section == "torch"} >= {"CPU", "CUDA", "MPS"}
    assert items["onnxruntime", "CPU"] == "loads"
    assert "GiB" in items["system", "memory"]
    assert str(sys.version_info.minor) in items["system", "Python"]
    assert all("\n" not in value for value in items.values())


def test_this_machine_has_no_problem_but_what_it_says(findings):
    for finding in findings:
        if not finding.ok:
            assert any(word in finding.value for word in ("missing", "does not load", "sees no device")), finding


def test_the_findings_in_every_form(findings):
    parsed = json.loads(tables.findings_json(findings))
    assert [Finding(**entry) for entry in parsed["findings"]] == findings
    assert parsed["ok"] == all(finding.ok for finding in findings)
    assert len(list(tables.findings_lines(findings))) == len(findings)
    console = Console(width=200, file=io.StringIO())
    console.print(tables.findings_table([*findings, Finding("torch", "CUDA", "broken \x1b[2J", ok=False)]))
    shown = console.file.getvalue()
    assert "PROBLEM: broken \\x1b[2J" in shown
    assert shown.count("system") == 1


def test_without_torch_and_onnxruntime(monkeypatch):
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    assert [(f.section, f.ok) for f in doctor._torch()] == [("torch", False)]
    assert [(f.section, f.ok) for f in doctor._providers()] == [("onnxruntime", False)]


def test_looking_does_not_need_torch():
    """doctor is what one runs when torch is broken: importing it must not import torch."""
    code = "import sys; sys.modules['torch'] = None; import vitcli.report.doctor, vitcli.report.tables"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_missing_and_doubled_packages(monkeypatch):
    monkeypatch.setattr(doctor, "PACKAGES", ("no-such-package", "onnxruntime-gpu", "onnxruntime"))
    monkeypatch.setattr(doctor, "version", lambda name: (_ for _ in ()).throw(doctor.PackageNotFoundError))
    assert [f.value for f in doctor._packages()] == [
        "missing: pip install no-such-package",
        "missing: pip install onnxruntime",
    ]
    monkeypatch.setattr(doctor, "version", lambda name: "1.0")
    assert [f.ok for f in doctor._packages()] == [True, True, True, False]


def test_a_driver_that_torch_cannot_use_is_a_problem(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "_driver", lambda: "580.1")
    (finding,) = (f for f in doctor._torch() if f.item == "CUDA")
    assert not finding.ok
    assert "driver 580.1 is there" in finding.value
    monkeypatch.setattr(doctor, "_driver", lambda: "")
    (finding,) = (f for f in doctor._torch() if f.item == "CUDA")
    assert finding.ok


def test_nccl_and_its_settings(monkeypatch):
    import torch

    monkeypatch.setattr(torch._C, "_nccl_version", lambda: 23007, raising=False)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 30, 7))
    monkeypatch.setenv("NCCL_IB_DISABLE", "1")
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "3")
    found = {item: value for _, item, value, _ in doctor._nccl()}
    assert found.items() >= {"NCCL": "2.30.7", "NCCL_IB_DISABLE": "1", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3"}.items()
    monkeypatch.delattr(torch._C, "_nccl_version")
    assert list(doctor._nccl()) == [Finding("torch", "NCCL", "not built in")]


def test_tensorrt_that_is_missing_broken_or_without_a_gpu(monkeypatch, tmp_path):
    (tmp_path / "broken_tensorrt.py").write_text("raise OSError('libx.so.1: no such file')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(tensorrt_library, "MODULES", {"TensorRT": "broken_tensorrt", "TensorRT-RTX": "no_such_module"})
    tensorrt_library.load.cache_clear()
    assert list(doctor._tensorrt()) == [
        Finding("tensorrt", "TensorRT", "does not load: libx.so.1: no such file", ok=False),
        Finding("tensorrt", "TensorRT-RTX", "not installed"),
    ]
    usable = tensorrt_library.Library("TensorRT", "11.4", tensorrt_library, None, [])
    monkeypatch.setattr(tensorrt_library, "MODULES", {"TensorRT": "json", "TensorRT-RTX": "json"})
    monkeypatch.setattr(tensorrt_library, "load", lambda name: usable)
    for reason, found in (
        (None, ["11.4, usable"] * 2),
        ("why", ["11.4, builds and runs none here: why", "11.4, builds engines, and runs none here: why"]),
    ):
        monkeypatch.setattr(tensorrt_library, "why_not", lambda library, reason=reason: reason)
        assert [finding.value for finding in doctor._tensorrt()] == found
