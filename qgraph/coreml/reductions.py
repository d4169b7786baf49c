"""Lowering rules: reductions and what normalizes with them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from qgraph.coreml.site import Rule, Site, UnfitError, mil_type

__all__ = ["RULES"]

_REDUCTIONS = {
    "ReduceL1": "reduce_l1_norm", "ReduceL2": "reduce_l2_norm", "ReduceLogSum": "reduce_log_sum",
    "ReduceLogSumExp": "reduce_log_sum_exp", "ReduceMax": "reduce_max", "ReduceMean": "reduce_mean",
    "ReduceMin": "reduce_min", "ReduceProd": "reduce_prod", "ReduceSum": "reduce_sum",
    "ReduceSumSquare": "reduce_sum_square",
}  # fmt: skip


def _reduce(site: Site, kind: str) -> Any:
    axes = [int(axis) for axis in site.array(1)] if site.has(1) else site.integers("axes", [])
    if not axes and site.integer("noop_with_empty_axes", 0):
        return site.emit("identity", x=site[0])
    axes = axes or list(range(len(site.shape(0))))
    return site.emit(kind, x=site[0], axes=axes, keep_dims=bool(site.integer("keepdims", 1)))


def _largest(site: Site, kind: str) -> Any:
    if site.integer("select_last_index", 0):
        raise UnfitError("MIL tells the first of equal elements, not the last")
    return site.emit(kind, x=site[0], axis=site.axis(0), keep_dims=bool(site.integer("keepdims", 1)))


def _top(site: Site) -> Any:
    if not site.integer("sorted", 1):
        raise UnfitError("the order of the elements is left open (sorted=0)")
    count, ascending = int(site.array(1).item()), not site.integer("largest", 1)
    return site.emit("topk", x=site[0], k=count, axis=site.axis(-1), ascending=ascending)


def _running_sum(site: Site) -> Any:
    flags = {name: bool(site.integer(name, 0)) for name in ("exclusive", "reverse")}
    return site.emit("cumsum", x=site[0], axis=int(site.array(1).item()), **flags)


def _softmax(site: Site) -> Any:
    return site.emit("softmax", x=site[0], axis=site.axis(-1))


def _log_softmax(site: Site) -> Any:
    """x - log(sum(exp(x))), which does not take the logarithm of what has become zero."""
    total = site.emit("reduce_log_sum_exp", x=site[0], axes=[site.axis(-1)], keep_dims=True)
    return site.emit("sub", x=site[0], y=total)


def _layer_norm(site: Site) -> Any:
    if any(output.uses() for output in site.node.outputs[1:]):
        raise UnfitError("its mean and deviation are read, which MIL does not give")
    axes = list(range(site.axis(-1), len(site.shape(0))))
    return site.emit(
        "layer_norm", x=site[0], axes=axes, epsilon=site.number(site.floating("epsilon", 1e-5)), **_affine(site, 1, 2)
    )


def _affine(site: Site, gamma: int, beta: int) -> dict[str, Any]:
    return {name: site[index] for name, index in (("gamma", gamma), ("beta", beta)) if site.has(index)}


def _rms_norm(site: Site) -> Any:
    """Plain squares: `to-fp16` keeps in float32 what may overflow."""
    axes = list(range(site.axis(-1), len(site.shape(0))))
    mean = site.emit("reduce_mean", x=site.emit("square", x=site[0]), axes=axes, keep_dims=True)
    scale = site.emit("rsqrt", x=mean, epsilon=site.number(site.floating("epsilon", 1e-5)))
    return site.emit("mul", x=site.emit("mul", x=site[0], y=scale), y=site[1])


def _instance_norm(site: Site) -> Any:
    """Layer by layer over what follows the channels: that of MIL takes images only."""
    rank = len(site.shape(0))
    epsilon = site.number(site.floating("epsilon", 1e-5))
    whole = site.emit("layer_norm", x=site[0], axes=list(range(2, rank)), epsilon=epsilon)
    return _by_channel(site, whole, rank)


def _group_norm(site: Site) -> Any:
    """Of opset 21: one scale and one bias to a channel."""
    shape, groups = site.shape(0), site.integer("num_groups", 1)
    split = site.reshape(site[0], (shape[0], groups, -1))
    whole = site.emit("layer_norm", x=split, axes=[2], epsilon=site.number(site.floating("epsilon", 1e-5)))
    joined = site.reshape(whole, shape)
    return _by_channel(site, joined, len(shape))


def _by_channel(site: Site, value: Any, rank: int) -> Any:
    gamma, beta = (site.reshape(site[index], (-1, *[1] * (rank - 2))) for index in (1, 2))
    return site.emit("add", x=site.emit("mul", x=value, y=gamma), y=beta)


def _batch_norm(site: Site) -> Any:
    if site.integer("training_mode", 0):
        raise UnfitError("it is in training mode")
    rank = len(site.shape(0))
    scale, bias, mean, variance = (np.asarray(site.array(index), np.float64) for index in (1, 2, 3, 4))
    factor = scale / np.sqrt(variance + site.floating("epsilon", 1e-5))
    grid, kind = (-1, *[1] * (rank - 2)), mil_type(site.node.outputs[0]).numpy
    scaled = site.emit("mul", x=site[0], y=site.constant(factor.reshape(grid).astype(kind)))
    return site.emit("add", x=scaled, y=site.constant((bias - mean * factor).reshape(grid).astype(kind)))


def _local_response(site: Site) -> Any:
    parameters = {
        name: site.number(site.floating(given, default))
        for name, given, default in (("alpha", "alpha", 1e-4), ("beta", "beta", 0.75), ("k", "bias", 1.0))
    }
    return site.emit("local_response_norm", x=site[0], size=site.integer("size", 1), **parameters)


def _unit_length(site: Site) -> Any:
    if site.integer("p", 2) not in (1, 2):
        raise UnfitError("there are norms of order 1 and 2")
    kind = "reduce_l1_norm" if site.integer("p", 2) == 1 else "reduce_l2_norm"
    return site.emit("real_div", x=site[0], y=site.emit(kind, x=site[0], axes=[site.axis(-1)], keep_dims=True))


RULES: Mapping[str, Rule] = {
    **{name: functools.partial(_reduce, kind=kind) for name, kind in _REDUCTIONS.items()},
    "ArgMax": functools.partial(_largest, kind="reduce_argmax"),
    "ArgMin": functools.partial(_largest, kind="reduce_argmin"),
    "TopK": _top,
    "CumSum": _running_sum,
    "Softmax": _softmax,
    "LogSoftmax": _log_softmax,
    "LayerNormalization": _layer_norm,
    "RMSNormalization": _rms_norm,
    "InstanceNormalization": _instance_norm,
    "GroupNormalization": _group_norm,
    "BatchNormalization": _batch_norm,
    "LRN": _local_response,
    "LpNormalization": _unit_length,
}
