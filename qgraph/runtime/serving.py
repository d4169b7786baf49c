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
from qgraph.runtime.session import CPU_PROVIDER, TensorSpec, installed_providers, open_session

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
_LOADS_CODE = re.compile(r"lib|path|plugin|dir|file", re.IGNORECASE)


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
        return Served(folder, manifest, open_with(providers, folder, threads=threads))
    return Served(folder, manifest, _by_target(folder, manifest, threads))


def session_facts(providers: Providers | None) -> dict[str, Any]:
    """Return what the manifest says of how an artifact is run; nothing where its target's own code has to."""
    if providers is None:
        return {}
    return {"session": {"runtime": ONNX_RUNTIME, "providers": [[name, dict(options)] for name, options in providers]}}


def open_with(providers: Providers, folder: Path, *, threads: int = 0) -> Session:
    """Open model.onnx with those of the providers that are installed, and at last with the CPU's.

    Raises:
        UserError: ONNX Runtime is not installed, or refuses the model.
    """
    installed = installed_providers()
    wanted = [(name, options) for name, options in providers if name in installed or not installed]
    if CPU_PROVIDER not in [name for name, _ in wanted]:
        wanted.append((CPU_PROVIDER, {}))
    plain = [(name, options) if options else name for name, options in wanted]
    session: Session = open_session(folder / MODEL, threads=threads, providers=plain)
    return session


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
