"""What the tasks beside this file make of a document {"clip": a file, "question": text, "answer": text}."""

from __future__ import annotations


def visual(document: dict) -> list[str]:
    return [document["clip"]]


def text(document: dict) -> str:
    return document["question"]


def judge(document: dict, results: list[str]) -> dict[str, float]:
    return {"right": float(results[0] == document["answer"])}


def round_text(
    document: dict, lmms_eval_specific_kwargs=None, previous_output=None, round_idx=None, previous_round_info=None
):
    """The question; then, with the clip again, the answer to it; then the end."""
    if not round_idx:
        return document["question"]
    info = (previous_round_info or 0) + 1
    return visual(document), f"{previous_output[-1]} what ?", round_idx > 1, previous_output, info


def judge_rounds(document: dict, results: list) -> dict[str, float]:
    (answers,) = results
    return {"rounds": float(len(answers))}
