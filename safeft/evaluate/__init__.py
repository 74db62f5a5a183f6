"""Measuring: answers, their classes, rates with intervals, and task accuracy.

Importing this package costs no torch: what runs a model is imported when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from safeft.evaluate.judge import JUDGE, JUDGE_VERSION, AnswerClass, classify_answer
from safeft.evaluate.rates import Rate, differ, wilson
from safeft.lazy import lazily

if TYPE_CHECKING:
    from safeft.evaluate.accuracy import (
        TaskAccuracy,
        TeacherForced,
        measure_accuracy,
        teacher_forced,
    )
    from safeft.evaluate.generate import generate_greedy
    from safeft.evaluate.refusals import RefusalReport, SetRefusals, measure_refusals

__all__ = [
    "JUDGE",
    "JUDGE_VERSION",
    "AnswerClass",
    "Rate",
    "RefusalReport",
    "SetRefusals",
    "TaskAccuracy",
    "TeacherForced",
    "classify_answer",
    "differ",
    "generate_greedy",
    "measure_accuracy",
    "measure_refusals",
    "teacher_forced",
    "wilson",
]

__getattr__ = lazily(
    __name__,
    {
        "RefusalReport": "safeft.evaluate.refusals",
        "SetRefusals": "safeft.evaluate.refusals",
        "TaskAccuracy": "safeft.evaluate.accuracy",
        "TeacherForced": "safeft.evaluate.accuracy",
        "generate_greedy": "safeft.evaluate.generate",
        "measure_accuracy": "safeft.evaluate.accuracy",
        "measure_refusals": "safeft.evaluate.refusals",
        "teacher_forced": "safeft.evaluate.accuracy",
    },
)
