"""Written answers are read strictly: one label, whole, not negated, outside thoughts and inside wrappers."""

import pytest

from affectlens.tasks import read_answer

LABELS = ("happy", "sad", "angry", "neutral")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>\nsad or happy?\n</think>\n<answer>angry</answer>", "angry"),
        ("he looks sad, or happy\n</think>\n\nangry", "angry"),  # the prompt began the thought
        ("<think>angry, since", None),
        ("[THINK]sad[/THINK]angry", "angry"),
        ("◁think▷sad◁/think▷angry", "angry"),
        ("<|START_THINKING|>sad<|END_THINKING|>angry", "angry"),
        ("<|channel>thought\nsad<channel|>angry", "angry"),
        (
            "<|channel|>analysis<|message|>sad?<|end|><|start|>assistant<|channel|>final<|message|>angry",
            "angry",
        ),
        ("The options are happy and sad.\n<answer> Angry", "angry"),
        ("happy? \\boxed{angry}", "angry"),
        ("happy? \\boxed{\\text{angry}}", "angry"),
        ("<|begin_of_box|>angry<|end_of_box|>", "angry"),
        ("He frowns, so not happy.\nFinal answer: angry", "angry"),
        ("**Answer:** angry", "angry"),
        ("The state is **angry**", "angry"),
        ("Angry😠", "angry"),
        ("angry, sad", None),
        ("not angry", None),
        ("he cannot be angry", None),
        ("angry_face", None),
        ("anger", None),
    ],
)
def test_thoughts_and_wrappers(text: str, expected: str | None) -> None:
    """The thought is left out, and of a wrapped answer only the inside counts."""
    assert expected == read_answer(text, LABELS)


@pytest.mark.parametrize(
    ("text", "labels", "expected"),
    [
        ("情绪是开心。", ("开心", "生气"), "开心"),
        ("这个人很开心", ("开心", "生气"), "开心"),
        ("他非常生气！", ("开心", "生气"), "生气"),
        ("不开心", ("开心", "生气"), None),
        ("不开心", ("开心", "不开心"), "不开心"),
        ("没有生气", ("开心", "生气"), None),
        ("开心或者生气", ("开心", "生气"), None),
        ("怒っています", ("怒", "喜"), "怒"),
        ("怒っていない", ("怒", "喜"), None),
        ("그는 행복해요", ("행복", "슬픔"), "행복"),
        ("행복하지 않아요", ("행복", "슬픔"), None),
        ("เขามีความสุขมาก", ("สุข", "เศร้า"), "สุข"),
        ("Fro\u0308hlich", ("Fröhlich", "traurig"), "Fröhlich"),
        ("FRÖHLICH", ("fröhlich", "traurig"), "fröhlich"),
        ("ไม่มีความสุข", ("สุข", "เศร้า"), None),
        ("슬픔이 아닙니다", ("행복", "슬픔"), None),
        ("ليس سعيدا", ("سعيدا", "حزين"), None),
        ("nicht traurig", ("fröhlich", "traurig"), None),
        ("не грустный", ("весёлый", "грустный"), None),
        ("pas heureux", ("heureux", "triste"), None),
        ("très heureuse", ("heureux", "triste"), None),
    ],
)
def test_other_scripts(text: str, labels: tuple[str, ...], expected: str | None) -> None:
    """In scripts without spaces a label may stand inside a run of letters; a negation still counts."""
    assert expected == read_answer(text, labels)
