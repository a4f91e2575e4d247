"""Questions in files as `qpruner.judge.task_files` reads them, and the same in the harness's own form."""

import gzip
import json
from pathlib import Path


def write_rows(path: Path, rows: list[dict]) -> Path:
    opened = gzip.open if path.name.endswith(".gz") else open
    path.parent.mkdir(parents=True, exist_ok=True)
    with opened(path, "wt", encoding="utf-8") as file:
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def row(context, choices, label=0, **more) -> dict:
    return {"context": context, "choices": choices, "label": label, **more}


QUESTIONS = [
    row("Question: what is it?\nAnswer:", [" a cat", " a dog or a horse", " nothing"], 2, id="x"),
    row("One plus one is", [" 2", " 11"], 0),
    row("Über den Wolken", [" müßte Größe ähnlich süß sein", " must it be free", " ...", " no"], 1),
    row("ends in blanks  ", [" so", " then"], 1),
    row("", [" began", " ended"], 0),
    row("long " * 60, [" enough", " too long"], 1),
]
CONTEXTS = [
    row(["The cat sat on Anna so Anna", "The cat sat on Anna so the cat"], [" slept."] * 2, 1),
    row(["He met Jon; Jon", "He met Jon; he"], [" was glad to see him again."] * 2, 0),
]
ENDINGS = [row("once upon a", [" time"]), row("the quick brown", [" fox"]), row("so it", [" goes on"])]


# --- documents as the harness's own tasks have them, and the rows that shared files would have for them ---------------


def _piqa(goal, one, two, label):
    doc = {"goal": goal, "sol1": one, "sol2": two, "label": label}
    return doc, row(f"Question: {goal}\nAnswer:", [f" {one}", f" {two}"], label)


def _arc(question, texts, key):
    labels = [*"ABCDE"[: len(texts)]]
    doc = {"question": question, "choices": {"text": texts, "label": labels}, "answerKey": key}
    return doc, row(f"Question: {question}\nAnswer:", [f" {text}" for text in texts], labels.index(key))


def _openbookqa(stem, texts, key):
    labels = [*"ABCD"]
    doc = {"question_stem": stem, "choices": {"text": texts, "label": labels}, "answerKey": key}
    return doc, row(stem, [f" {text}" for text in texts], labels.index(key))


def _boolq(passage, question, label):
    doc = {"passage": passage, "question": question, "label": label}
    return doc, row(f"{passage}\nQuestion: {question}?\nAnswer:", [" no", " yes"], label)


def _hellaswag(activity, a, b, endings, label):
    doc = {"activity_label": activity, "ctx_a": a, "ctx_b": b, "endings": endings, "label": str(label)}
    return doc, row(f"{activity}: {a} {b.capitalize()}", [f" {ending}" for ending in endings], label)


def _winogrande(before, options, after, answer):
    doc = {"sentence": f"{before}_{after}", "option1": options[0], "option2": options[1], "answer": str(answer + 1)}
    return doc, row([before + option for option in options], [f" {after.strip()}"] * 2, answer)


def _lambada(text):
    words = text.split(" ")
    return {"text": text}, row(" ".join(words[:-1]), [f" {words[-1]}"])


TEXTS = ["a long one", "ähnlich größer", "12", "the other of two"]
OWN = {  # task: the harness's file, its split, pairs of document and row
    "piqa": ("piqa/piqa.yaml", "validation", [
        _piqa("open a jar", "turn the lid", "drücke fest auf den süßen Deckel", 0), _piqa("sleep", "lie", "run", 1),
    ]),
    "arc_easy": ("arc/arc_easy.yaml", "test", [
        _arc("Which is hot?", TEXTS, "B"), _arc("Which of three?", TEXTS[:3], "C"), _arc("And now?", TEXTS, "A"),
    ]),
    "arc_challenge": ("arc/arc_challenge.yaml", "test", [_arc("Which?", TEXTS, "D"), _arc("Why?", TEXTS[1:], "A")]),
    "openbookqa": ("openbookqa/openbookqa.yaml", "test", [
        _openbookqa("The sun is", TEXTS, "C"), _openbookqa("Water flows", TEXTS[::-1], "A"),
    ]),
    "boolq": ("super_glue/boolq/default.yaml", "validation", [
        _boolq("Ice floats.", "does ice float", 1), _boolq("It is late.", "is it early", 0),
    ]),
    "hellaswag": ("hellaswag/hellaswag.yaml", "validation", [
        _hellaswag("Cooking", "She cuts.", "then she", TEXTS, 2), _hellaswag("Sport", "He runs.", "he", TEXTS[::-1], 0),
    ]),
    "winogrande": ("winogrande/default.yaml", "validation", [
        _winogrande("Sarah beat Maria so ", ("Sarah", "Maria"), " was glad.", 0),
        _winogrande("The cup did not fit the bag as the ", ("cup", "bag"), " was small.", 1),
    ]),
    "lambada_openai": ("lambada/lambada_openai.yaml", "test", [_lambada("she said no to him"), _lambada("go on")]),
}  # fmt: skip
