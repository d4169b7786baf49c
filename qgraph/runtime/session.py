"""Opening models in ONNX Runtime, what they take and give, and feeds for models that come without data."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qgraph.errors import UserError

if TYPE_CHECKING:
    import onnxruntime

    from qgraph.pipeline import Feeds

__all__ = [
    "CPU_PROVIDER",
    "TensorSpec",
    "first_line",
    "input_signature",
    "installed_providers",
    "open_session",
    "output_signature",
    "provider_fault",
    "random_feeds",
]

CPU_PROVIDER = "CPUExecutionProvider"

_NO_FALLBACK = 0
"""Falling back, it would print to standard output, where --json promises nothing else than a document."""
_FATAL_ONLY = 4  # its errors are raised as exceptions as well
_BATCH = 1
_LENGTH = 16
_LARGEST_INTEGER = 8
_NUMPY_NAMES = {"float": "float32", "double": "float64"}
_PREFIX = re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ")
_MAPPED_ABOVE = 1024
_ONE_RELU = bytes.fromhex(
    "08083a330a0c0a0178120179220452656c751201675a0f0a0178120a0a080"
    "80112040a020801620f0a0179120a0a08080112040a02080142040a00100d"
)
"""A model y = Relu(x) of one element, opset 13, so that serving needs no other package to write it."""


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """An input or output of a model.

    Attributes:
        name: as feeds name it.
        dtype: numpy's name (`float32`, `int64`, `bool`), `string`, or the runtime's own type text (`seq(...)`) of
            what is no tensor.
        shape: an axis is a number, the name of a dynamic one, or None where nothing is known; [] for a scalar.
    """

    name: str
    dtype: str
    shape: list[int | str | None]


def open_session(
    model: Path | bytes,
    *,
    threads: int = 0,
    spinning: bool = False,
    optimise: bool = True,
    optimised_path: Path | None = None,
    profile: Path | None = None,
    providers: Sequence[str | tuple[str, Mapping[str, str]]] = (CPU_PROVIDER,),
    disabled: Sequence[str] = (),
) -> onnxruntime.InferenceSession:
    """Open a model in ONNX Runtime, on the CPU unless said otherwise; the runtime's own log is silenced.

    Args:
        model: a file, or a serialized model without external data.
        threads: for the operators' own loops; 0 lets the runtime choose.
        spinning: let idle threads spin. Several sessions in one process spin against each other, so it is off.
        optimise: apply the runtime's graph optimisations, all or none.
        optimised_path: where the runtime writes the graph that it really runs; larger weights go to
            `optimised_path` + '.data'.
        profile: what the names of the files begin with into which every run is written, node by node.
        providers: of ONNX Runtime, the most wanted first; with options, a name and these.
        disabled: names of the runtime's optimizers that are not to run.

    Raises:
        UserError: ONNX Runtime is not installed, or refuses the model.
    """
    try:
        import onnxruntime as ort
    except ImportError:
        extra = "cpu" if CPU_PROVIDER in providers[:1] else "cuda"
        raise UserError(f"running a model needs ONNX Runtime: pip install 'qgraph-compiler[{extra}]'") from None
    options = ort.SessionOptions()
    options.log_severity_level = _FATAL_ONLY
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spinning else "0")
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if optimised_path is not None:
        _write_optimised(options, optimised_path)
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    name = "the model" if isinstance(model, bytes) else str(model)
    source = model if isinstance(model, bytes) else str(model)
    try:
        return ort.InferenceSession(
            source, options, providers=list(providers), disabled_optimizers=list(disabled), enable_fallback=_NO_FALLBACK
        )
    except MemoryError:
        raise
    except Exception as error:
        raise UserError(f"ONNX Runtime cannot open {name}: {first_line(error)}") from error


def installed_providers() -> list[str]:
    """Return the providers that the installed ONNX Runtime was built with and finds usable; none if there is none."""
    try:
        import onnxruntime as ort
    except ImportError:
        return []
    return list(ort.get_available_providers())


@functools.cache
def provider_fault(provider: str) -> str:
    """Return why a provider that the installed ONNX Runtime was built with cannot be used here; '' where it can.

    ONNX Runtime falls back to the CPU without an exception where a provider's libraries do not load or there is no
    device, so a session of one node is opened and asked which providers it has.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = _FATAL_ONLY
    cause = ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            session = ort.InferenceSession(
                _ONE_RELU, options, providers=[provider, CPU_PROVIDER], enable_fallback=_NO_FALLBACK
            )
        found = session.get_providers()
    except Exception as error:  # noqa: BLE001 - whatever it is, the provider is of no use
        found, cause = [], first_line(error)
    if provider in found:
        return ""
    return (
        f"{provider} is installed but does not start ({cause or _missing_library(provider)}): install the CUDA, cuDNN "
        f"and driver (and TensorRT) that ONNX Runtime {ort.__version__} wants, such as "
        "pip install 'onnxruntime-gpu[cuda,cudnn]'"
    )


def _missing_library(provider: str) -> str:
    """Return what the dynamic linker says of a provider's library, or that there seems to be no device."""
    import onnxruntime as ort

    name = f"libonnxruntime_providers_{provider.removesuffix('ExecutionProvider').lower()}.so"
    path = Path(ort.__file__).parent / "capi" / name
    try:
        ctypes.CDLL(str(path))
    except OSError as error:
        return str(error).partition("\n")[0].rpartition("/")[2]
    return "its libraries load, but there is no device that it can use"


def _write_optimised(options: onnxruntime.SessionOptions, path: Path) -> None:
    options.optimized_model_filepath = str(path)
    # One protobuf holds no more than 2 GB.
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", path.name + ".data")
    options.add_session_config_entry(
        "session.optimized_model_external_initializers_min_size_in_bytes", str(_MAPPED_ABOVE)
    )


def first_line(error: Exception) -> str:
    """Return the first line of a runtime's message, without the runtime's prefix of codes."""
    lines = str(error).strip().splitlines()
    return _PREFIX.sub("", lines[0]).strip() if lines else type(error).__name__


def input_signature(session: onnxruntime.InferenceSession) -> list[TensorSpec]:
    """Return the inputs that a feed must hold; initializers that a caller may override are not among them."""
    return [_spec(argument) for argument in session.get_inputs()]


def output_signature(session: onnxruntime.InferenceSession) -> list[TensorSpec]:
    """Return the outputs, in the order in which `session.run(None, feeds)` gives them."""
    return [_spec(argument) for argument in session.get_outputs()]


def _spec(argument: Any) -> TensorSpec:
    match = re.fullmatch(r"tensor\((\w+)\)", argument.type)
    dtype = _NUMPY_NAMES.get(match[1], match[1]) if match else argument.type
    return TensorSpec(argument.name, dtype, list(argument.shape or []))


def random_feeds(
    signature: Sequence[TensorSpec],
    seed: int,
    shapes: Mapping[str, Sequence[int]] | None = None,
    *,
    count: int = 1,
    limits: Mapping[str, int] | None = None,
) -> list[Feeds]:
    """Return feeds made from nothing but the inputs' types, names and shapes.

    Floats are drawn from the standard normal distribution. Integers are drawn from 0 to 7, small enough for an index
    into almost any table, or from below the limit that is known of them; those whose name says `mask` are ones,
    `position` counts up the last axis, `type` (token types) is zeros. Booleans are true. A dynamic axis is 1 when it is
    the first and 16 otherwise; axes of one name are of one size, and "a + b" is the sum of two axes.

    Args:
        signature: the inputs.
        seed: of the random numbers.
        shapes: whole shapes of some inputs by name; they also settle axes of the same name elsewhere.
        count: number of feeds.
        limits: input -> what its integers must be below, such as the rows of the table that they look up.

    Raises:
        UserError: `shapes` names no input or contradicts one's fixed axes, or an input holds no numbers.
    """
    shapes = {} if shapes is None else shapes
    known = {spec.name: spec for spec in signature}
    for name in shapes:
        if name not in known:
            raise UserError(f"there is no input '{name}' to give a shape to (the model has: {', '.join(known)})")
    axes: dict[str, int] = {}
    for name, shape in shapes.items():
        _settle(known[name], shape, axes)
    random = np.random.default_rng(seed)
    fixed = {spec: _fixed(known[spec], shapes.get(spec), axes) for spec in known}
    below = dict.fromkeys(known, _LARGEST_INTEGER) | dict(limits or {})
    return [
        {name: _random_array(known[name], fixed[name], random, below[name]) for name in known} for _ in range(count)
    ]


def _settle(spec: TensorSpec, shape: Sequence[int], axes: dict[str, int]) -> None:
    fits = len(shape) == len(spec.shape) and all(
        size == axis or (not isinstance(axis, int) and axes.setdefault(axis or f"?{spec.name}{i}", size) == size)
        for i, (axis, size) in enumerate(zip(spec.shape, shape, strict=True))
    )
    if not fits:
        raise UserError(f"input '{spec.name}' has shape {_show(spec.shape)}, which {_show(shape)} does not fit")


def _show(shape: Sequence[int | str | None]) -> str:
    return f"[{', '.join('?' if axis is None else str(axis) for axis in shape)}]"


def _fixed(spec: TensorSpec, shape: Sequence[int] | None, axes: dict[str, int]) -> tuple[int, ...]:
    if shape is not None:
        return tuple(shape)
    return tuple(
        axis if isinstance(axis, int) else _open_size(axis or f"?{spec.name}{i}", _LENGTH if i else _BATCH, axes)
        for i, axis in enumerate(spec.shape)
    )


def _open_size(name: str, size: int, axes: dict[str, int]) -> int:
    """Settle a dynamic axis; "past + sequence", as decoders with a cache name theirs, is the sum of both."""
    return axes[name] if name in axes else sum(axes.setdefault(term, size) for term in name.split(" + "))


def _random_array(spec: TensorSpec, shape: tuple[int, ...], random: np.random.Generator, below: int) -> np.ndarray:
    if spec.dtype == "bool":
        return np.ones(shape, dtype=bool)
    if spec.dtype.startswith(("int", "uint")) and spec.dtype[-1].isdigit():
        return _random_integers(spec.name.lower(), shape, random, below).astype(spec.dtype)
    if spec.dtype in ("float16", "float32", "float64"):
        return random.standard_normal(shape).astype(spec.dtype)
    raise UserError(f"input '{spec.name}' is {spec.dtype}: no random feed can be made for it. Give data.")


def _random_integers(name: str, shape: tuple[int, ...], random: np.random.Generator, below: int) -> np.ndarray:
    if "mask" in name:
        return np.ones(shape, dtype=np.int64)
    if "position" in name and shape:
        return np.broadcast_to(np.arange(shape[-1]), shape)
    if "type" in name:
        return np.zeros(shape, dtype=np.int64)
    return random.integers(0, below, shape)
