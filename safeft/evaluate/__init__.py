"""Measuring: answers, their classes, rates with intervals, and task accuracy."""

from safeft.evaluate.accuracy import (
    TaskAccuracy,
    TeacherForced,
    measure_accuracy,
    teacher_forced,
)
from safeft.evaluate.generate import generate_greedy
from safeft.evaluate.judge import JUDGE, JUDGE_VERSION, AnswerClass, classify_answer
from safeft.evaluate.rates import Rate, differ
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
]
