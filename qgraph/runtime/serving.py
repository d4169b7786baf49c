"""Running artifacts on a server, where nothing but numpy and ONNX Runtime is installed.

    from qgraph.runtime import open

    model = open("model.cpu-int8")          # checks every file's hash
    scores, = model.run(None, {"image": image})

The manifest says which providers of ONNX Runtime an artifact wants, so that neither its target's own module nor
anything that reads graphs is imported. Artifacts of other runtimes are opened by their targets, which need what the
target's extra installs.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qgraph.errors import UserError
from qgraph.manifest import checked_manifest
from qgraph.runtime.session import CPU_PROVIDER, TensorSpec, installed_providers, open_session, provider_fault

if TYPE_CHECKING:
    from qgraph.targets.base import Session

__all__ = ["ONNX_RUNTIME", "Providers", "Served", "open_artifact", "open_with", "session_facts"]

ONNX_RUNTIME = "onnxruntime"
MODEL = "model.onnx"
Providers = Sequence[tuple[str, Mapping[str, str]]]
"""Providers of ONNX Runtime with their options, the most wanted first."""

_NAME = re.compile(r"[A-Za-z]\w*ExecutionProvider")
_OPTION = re.compile(r"\w+")
_VALUE = re.compile(r"[\w.:,+-]*")
_LOADS_CODE = re.compile(r"lib|path|plugin|(?:^|_)(?:dir|file)", re.IGNORECASE)
_TENSORRT = "TensorrtExecutionProvider"


@dataclasses.dataclass(frozen=True)
class Served:
    """An artifact that is open for running.

    Attributes:
        path: its folder.
        manifest: what it says of itself.
        session: of its runtime.
    """

    path: Path
    manifest: Mapping[str, Any] = dataclasses.field(repr=False)
    session: Session = dataclasses.field(repr=False)

    @property
    def verified(self) -> bool:
        """Whether it was run against its source and met every tolerance that was set."""
        return bool(self.manifest["verified"])

    @property
    def inputs(self) -> list[TensorSpec]:
        """What a feed must hold."""
        return [TensorSpec(**one) for one in self.manifest["inputs"]]

    @property
    def outputs(self) -> list[str]:
        """Names of the outputs, in the order in which `run(None, feeds)` gives them."""
        return list(self.manifest["outputs"])

    def run(self, output_names: Sequence[str] | None, feeds: Mapping[str, Any]) -> list[Any]:
        """Run one feed and return the outputs (all of them when `output_names` is None)."""
        return self.session.run(output_names, feeds)


def open_artifact(path: str | os.PathLike[str], *, threads: int = 0) -> Served:
    """Open an artifact for running, once its files were checked against their hashes.

    Args:
        path: the folder.
        threads: of the runtime; 0 lets it choose.

    Raises:
        UserError: it is no artifact, is damaged or was changed, or its runtime is not installed.
    """
    folder = Path(path)
    manifest = checked_manifest(folder)
    providers = _providers(folder, manifest.get("session"))
    if providers is not None:
        disabled = _disabled(folder, manifest["session"])
        return Served(folder, manifest, open_with(providers, folder, threads=threads, disabled=disabled))
    return Served(folder, manifest, _by_target(folder, manifest, threads))


def session_facts(providers: Providers | None, disabled: Sequence[str]) -> dict[str, Any]:
    """Return what the manifest says of how an artifact is run; nothing where its target's own code has to.

    Args:
        providers: see `open_with`.
        disabled: see `open_with`.
    """
    if providers is None:
        return {}
    facts = {"runtime": ONNX_RUNTIME, "providers": [[name, dict(options)] for name, options in providers]}
    return {"session": {**facts, "disabled_optimizers": list(disabled)} if disabled else facts}


def open_with(providers: Providers, folder: Path, *, threads: int = 0, disabled: Sequence[str] = ()) -> Session:
    """Open model.onnx with those of the providers that are installed and start here, and at last with the CPU's.

    Args:
        providers: the most wanted first.
        folder: of the artifact.
        threads: of the runtime; 0 lets it choose.
        disabled: names of the runtime's optimizers that are not to run.

    Raises:
        UserError: ONNX Runtime is not installed, or refuses the model.
    """
    installed = installed_providers()
    # Without the runtime, opening a session is what says how to install it.
    usable = [(name, options) for name, options in providers if not installed or _starts(name, installed)]
    wanted = [(name, {**options, **_local_options(name)}) for name, options in usable]
    if CPU_PROVIDER not in [name for name, _ in wanted]:
        wanted.append((CPU_PROVIDER, {}))
    plain = [(name, options) if options else name for name, options in wanted]
    session: Session = open_session(folder / MODEL, threads=threads, providers=plain, disabled=disabled)
    return session


def _starts(provider: str, installed: Sequence[str]) -> bool:
    return provider in installed and (provider == CPU_PROVIDER or not provider_fault(provider))


def _local_options(provider: str) -> dict[str, str]:
    """Return options of this machine, which no manifest holds: where TensorRT keeps the engines that it has built."""
    if provider != _TENSORRT:
        return {}
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qgraph" / "tensorrt"
    return {"trt_engine_cache_path": str(cache)}


def _providers(folder: Path, facts: Any) -> Providers | None:
    """Return what the manifest wants, or None where it leaves that to the target.

    Raises:
        UserError: it is damaged, or asks for more than providers and plain options: a path could name code to load.
    """
    if facts is None:
        return None
    try:
        found = [(str(name), dict(options)) for name, options in facts["providers"]]
    except (TypeError, ValueError, KeyError):
        found = []
    if not found or facts.get("runtime") != ONNX_RUNTIME:
        raise UserError(f"{folder / 'manifest.json'} is damaged: 'session' names no providers of ONNX Runtime")
    for name, options in found:
        if not _NAME.fullmatch(name):
            raise UserError(f"{folder / 'manifest.json'} names the provider '{name}', which is none: do not trust it")
        for key, value in options.items():
            if _LOADS_CODE.search(key) or not (_OPTION.fullmatch(key) and _VALUE.fullmatch(str(value))):
                raise UserError(
                    f"{folder / 'manifest.json'} gives {name} the option '{key}', which may lead outside the artifact: "
                    "do not trust it"
                )
    return found


def _disabled(folder: Path, facts: Mapping[str, Any]) -> list[str]:
    names = facts.get("disabled_optimizers", [])
    if not (isinstance(names, list) and all(isinstance(one, str) and _OPTION.fullmatch(one) for one in names)):
        raise UserError(f"{folder / 'manifest.json'} is damaged: 'disabled_optimizers' names no optimizers")
    return names


def _by_target(folder: Path, manifest: Mapping[str, Any], threads: int) -> Session:
    """Open it with its target's module.

    Raises:
        UserError: that module cannot be imported where only numpy and ONNX Runtime are.
    """
    try:
        from qgraph.target_options import target_of

        session: Session = target_of(manifest).session(folder, threads=threads)
    except ImportError as error:
        raise UserError(
            f"{folder} is opened by the module of its target {manifest['target']}, which needs more than ONNX Runtime "
            f"({error}): pip install qgraph-compiler with the extra that `qgraph targets` names for it"
        ) from error
    return session
