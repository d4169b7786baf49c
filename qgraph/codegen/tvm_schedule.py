"""From the graph of operators to fused loops."""

from __future__ import annotations

from typing import Any

__all__ = ["scheduled"]


def scheduled(module: Any, target: Any) -> Any:
    """Fuse the operators of a `tvm.IRModule`."""
    import tvm
    from tvm import relax

    passes = [
        relax.transform.LegalizeOps(),
        relax.transform.AnnotateTIROpPattern(),
        relax.transform.FuseOps(),
        relax.transform.FuseTIR(),
    ]
    with target:
        return tvm.transform.Sequential(passes)(module)
