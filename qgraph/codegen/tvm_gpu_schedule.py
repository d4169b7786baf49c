"""Default schedules for GPUs: TVM's own rules, each of which may fail without the others.

TVM's rule for products stops the compilation with an error where what follows the sum in the same function is larger
than it (a gate [n, c, 1, 1] that an image [n, c, h, w] is multiplied with). The next rule then has its turn.
"""

from __future__ import annotations

from typing import Any

__all__ = ["default_rules"]


def default_rules() -> list[Any]:
    """Return the rules in the order in which they are tried."""
    from tvm.s_tir.dlight import gpu

    rules = (gpu.Matmul(), gpu.GEMV(), gpu.Reduction(), gpu.GeneralReduction())
    return [*map(_guarded, rules), gpu.Fallback()]


def _guarded(rule: Any) -> Any:
    """Return a rule that says of a function for which `rule` fails that it does not fit."""
    from tvm.s_tir.dlight import ScheduleRule

    def apply(func: Any, target: Any, tunable: bool) -> Any:
        try:
            return rule.apply(func, target, tunable)
        except Exception:  # noqa: BLE001 - assertions, and errors of every kind
            return None

    return ScheduleRule.from_callable(type(rule).__name__)(apply)
