from rich.console import Console

from qpruner import api
from qpruner.report.terminal import inspection_table, study_table


def shown(table) -> str:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))
    console.print(table)
    console.file.close()
    return console.export_text()


def test_brackets_of_a_recipe_are_shown():
    assert "qpruner[allocation=uniform]" in shown(study_table(("recipe",), [("qpruner[allocation=uniform]",)]))


def test_alike_groups_are_one_row():
    text = shown(inspection_table(api.inspect("pystdlib-5M", recipe="qpruner", budget="30%")))
    assert "model.layers.*.mlp" in text and "768" in text and "3,147,724 allowed" in text
