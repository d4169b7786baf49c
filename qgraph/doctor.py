"""What this machine and this environment can do: processor, memory, runtimes, devices, and the targets they serve."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from typing import Any

import qgraph
from qgraph import registry
from qgraph.catalog import Entry, catalog
from qgraph.errors import UserError
from qgraph.runtime.benchmark import machine
from qgraph.runtime.processor import processor_flags

__all__ = ["Readiness", "Runtime", "Survey", "survey"]

DISTRIBUTION = "qgraph-compiler"
_NVIDIA_SMI_SECONDS = 10
_MEND_DRIVER = "restart the machine, or install the driver anew, so that kernel module and library are of one version"
_OF_DEVICES = ("apple", "cuda", "tvm")
"""The extras whose runtimes may be here without the device that a target is for."""


@dataclasses.dataclass(frozen=True)
class Runtime:
    """A runtime or framework that some target or script uses.

    Attributes:
        name: of the runtime.
        version: installed, or '' when it is not.
        offers: its execution providers or back ends.
        install: how to get it.
        fault: why it is installed but cannot be used, or ''.
    """

    name: str
    version: str = ""
    offers: tuple[str, ...] = ()
    install: str = ""
    fault: str = ""


@dataclasses.dataclass(frozen=True)
class Readiness:
    """Whether a target's artifacts run here.

    Attributes:
        target: its name.
        usable: whether they do.
        missing: what is not there and what to install, or ''.
        builds: whether its runtime is here and only the device is not, so that they are built, and verified elsewhere.
    """

    target: str
    usable: bool
    missing: str = ""
    builds: bool = False


@dataclasses.dataclass(frozen=True)
class Survey:
    """Everything `qgraph doctor` tells.

    Attributes:
        versions: of qgraph, Python and the core dependencies.
        system: operating system and architecture.
        cpu: the processor's name.
        cores: number that this process may use.
        memory: bytes of RAM, or None where the system does not tell.
        flags: those of FLAGS that the processor has; empty where the system does not tell.
        devices: graphics cards.
        device_fault: why the driver of cards that may be there does not tell of them, and what to do; '' otherwise.
        runtimes: installed or not.
        targets: usable here or not.
    """

    versions: dict[str, str]
    system: str
    cpu: str
    cores: int
    memory: int | None
    flags: tuple[str, ...]
    devices: tuple[str, ...]
    runtimes: tuple[Runtime, ...]
    targets: tuple[Readiness, ...]
    device_fault: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return dataclasses.asdict(self)


def survey() -> Survey:
    """Look at this machine and this environment; nothing that is missing or broken raises."""
    runtimes = (_onnxruntime(), *(_installed(*facts) for facts in _OTHERS))
    here = machine()
    devices, fault = _nvidia_devices()
    return Survey(
        versions=_versions(),
        system=here.system,
        cpu=here.cpu,
        cores=here.cores,
        memory=_memory(),
        flags=processor_flags(),
        devices=devices,
        device_fault=fault,
        runtimes=runtimes,
        targets=tuple(_readiness(target, runtimes) for target in catalog("target")),
    )


_OTHERS = (
    ("TVM", "tvm", ("apache-tvm",), f"pip install '{DISTRIBUTION}[tvm]'"),
    ("PyTorch", "torch", ("torch",), f"pip install '{DISTRIBUTION}[train]' (only to train the reference models)"),
    ("Core ML Tools", "coremltools", ("coremltools",), f"pip install '{DISTRIBUTION}[apple]'"),
)


def _versions() -> dict[str, str]:
    found = {"qgraph": qgraph.__version__, "python": platform.python_version()}
    for name in ("onnx", "onnx-ir", "onnxscript", "numpy"):
        found[name] = _version((name,))
    return found


def _version(distributions: Sequence[str]) -> str:
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def _onnxruntime() -> Runtime:
    install = f"pip install '{DISTRIBUTION}[cpu]' (or [cuda] for NVIDIA cards)"
    if importlib.util.find_spec("onnxruntime") is None:
        return Runtime("ONNX Runtime", install=install)
    try:
        import onnxruntime
    except (ImportError, OSError) as error:
        version = _version(("onnxruntime", "onnxruntime-gpu"))
        return Runtime("ONNX Runtime", version, install=install, fault=f"it does not import: {error}")
    return Runtime("ONNX Runtime", onnxruntime.__version__, tuple(onnxruntime.get_available_providers()), install)


def _installed(name: str, module: str, distributions: Sequence[str], install: str) -> Runtime:
    """Look a runtime up without importing it: some take seconds."""
    if importlib.util.find_spec(module) is None:
        return Runtime(name, install=install)
    return Runtime(name, _version(distributions) or "unknown version", install=install)


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _nvidia_devices() -> tuple[tuple[str, ...], str]:
    """Return the cards that the driver tells of, and why it does not."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return (), ""
    query = [tool, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=_NVIDIA_SMI_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return (), f"nvidia-smi does not answer within {_NVIDIA_SMI_SECONDS} s: {_MEND_DRIVER}"
    except OSError as error:
        return (), f"{tool} cannot be run ({error.strerror}): {_MEND_DRIVER}"
    if done.returncode:
        told = (done.stdout + done.stderr).strip().partition("\n")[0].rstrip(".")
        return (), f"nvidia-smi says '{told or done.returncode}': {_MEND_DRIVER}"
    return tuple(line.strip() for line in done.stdout.splitlines() if line.strip()), ""


def _readiness(target: Entry, runtimes: Sequence[Runtime]) -> Readiness:
    missing = target.fault or _missing(target.facts["extra"], runtimes)
    if missing:
        return Readiness(target.name, usable=False, missing=missing)
    one = registry.find("target", target.name)()
    missing = one.lacks()  # a provider may be there and not start
    if missing or target.facts["extra"] not in _OF_DEVICES:
        return Readiness(target.name, usable=not missing, missing=missing, builds=bool(missing))
    try:
        elsewhere = one.stand_in()
    except UserError as error:
        return Readiness(target.name, usable=False, missing=str(error))
    why = f"its device: artifacts are built here, and run on {elsewhere}" if elsewhere else ""
    return Readiness(target.name, usable=not why, missing=why, builds=bool(why))


def _missing(extra: str, runtimes: Sequence[Runtime]) -> str:
    """Return what the runtime of an extra lacks here, and how to get it."""
    ort = runtimes[0]
    if extra in ("cpu", "cuda"):
        if not ort.version or ort.fault:
            return f"ONNX Runtime {ort.fault or 'is not installed'}: pip install '{DISTRIBUTION}[{extra}]'"
        return ""
    absent = [name for name in _required(extra) if not _version((name,))]
    return f"{', '.join(absent)} is not installed: pip install '{DISTRIBUTION}[{extra}]'" if absent else ""


def _required(extra: str) -> list[str]:
    """Return the distributions that an extra of this package brings."""
    marked = re.compile(rf"""extra\s*==\s*["']{re.escape(extra)}["']""")
    try:
        lines = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    named = (re.match(r"[\w.-]+", line) for line in lines if marked.search(line))
    return [match[0] for match in named if match and match[0] != DISTRIBUTION]
