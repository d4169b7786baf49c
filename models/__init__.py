"""Reference models: small, trained here, with data that every machine has.

=================  ===========================================================================  ============
name               what                                                                         parameters
=================  ===========================================================================  ============
digits_cnn         residual and depthwise-separable CNN with batch norm and ReLU6               1.3 million
digits_encoder     transformer encoder, patches as tokens                                       1.2 million
digits_mobilenet   MobileNetV3 blocks: squeeze-and-excite, hard swish; hard to quantize         0.15 million
pydoc_decoder      Llama-style decoder over bytes, every dimension a multiple of 256            4.0 million
=================  ===========================================================================  ============

The ONNX graphs are built from the stored parameters without torch. Beside each checkpoint lie its training script
(``train_NAME.py``, which needs torch) and its card (``NAME.md``).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, cast

from qgraph.errors import UserError, nearest
from qgraph.models.data import Dataset

if TYPE_CHECKING:
    from typing import Protocol

    import onnx_ir as ir

    class _ReferenceModel(Protocol):
        """What each model's module offers."""

        def build(self) -> ir.Model: ...

        def dataset(self) -> Dataset: ...


__all__ = ["Dataset", "build", "dataset", "names"]

_NAMES = ("digits_cnn", "digits_encoder", "digits_mobilenet", "pydoc_decoder")


def names() -> tuple[str, ...]:
    """Return the names of the reference models, sorted."""
    return _NAMES


def build(name: str) -> ir.Model:
    """Return the trained model as a float32 ONNX graph (opset 20) with a dynamic batch; equal bytes on every call.

    Raises:
        UserError: there is no model of that name (the nearest is suggested), or its checkpoint cannot be read.
    """
    return _module(name).build()


def dataset(name: str) -> Dataset:
    """Return calibration samples of the training part and the labelled held-out part.

    Raises:
        UserError: there is no model of that name, or the package that the data come from is missing.
    """
    return _module(name).dataset()


def _module(name: str) -> _ReferenceModel:
    if name not in _NAMES:
        raise UserError(
            f"there is no reference model '{name}' (there are: {', '.join(_NAMES)}).{nearest(name, _NAMES)}"
        )
    # Imported on demand: onnx_ir costs half a second, and asking for the names needs none of it.
    return cast("_ReferenceModel", importlib.import_module(f"{__name__}.{name}"))
