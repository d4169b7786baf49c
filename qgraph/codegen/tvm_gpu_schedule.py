"""Default schedules for GPUs: TVM's own rules, each of which may fail without the others.

    sum -> a -> b(a, c(a))    =>    sum -> b        where a rule wants one reader behind the sum

TVM's rule for products stops with an error where what follows the sum reads it in several places (x * clip(x + 3), as
in HardSwish). What is computed for each element is then put into the last of it, and the rule asked again; where it
still fails, the next rule has its turn.
"""

from __future__ import annotations

from typing import Any

__all__ = ["default_rules", "guarded"]


def default_rules() -> list[Any]:
    """Return the rules in the order in which they are tried."""
    from tvm.s_tir.dlight import gpu

    return [guarded(one) for one in (gpu.Matmul(), gpu.GEMV(), gpu.Reduction(), gpu.GeneralReduction(), gpu.Fallback())]


def guarded(rule: Any) -> Any:
    """Return a rule that says of a function for which `rule` fails that it does not fit."""
    from tvm.s_tir.dlight import ScheduleRule

    class Guarded(ScheduleRule):
        def apply(self, func: Any, target: Any, tunable: bool) -> Any:
            for one in (func, _inlined(func)):
                try:
                    return rule.apply(one, target, tunable)
                except Exception:  # noqa: BLE001 - assertions, and errors of every kind
                    continue
            return None

    return Guarded()


def _inlined(func: Any) -> Any:
    """Return the function with what is computed for each element put into its readers."""
    import tvm
    from tvm import s_tir

    schedule = s_tir.Schedule(tvm.IRModule({"main": func}))
    for block in schedule.get_child_blocks(schedule.get_sblock("root"))[:-1]:
        try:
            schedule.compute_inline(block)
        except s_tir.schedule.ScheduleError:
            continue
    return schedule.mod["main"]
