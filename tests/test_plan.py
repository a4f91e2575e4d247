import pytest

from qpruner.errors import BudgetError, PlanError
from qpruner.plan import INT8, NF4, Budget, Plan, Recovery


@pytest.mark.parametrize(
    "text, parameters, expected",
    [
        ("50%", 1000, 1000),
        ("100%", 1000, 2000),
        ("4.5bpw", 1000, 562),
        ("3.5GiB", 1, 3758096384),
        ("2 mb", 1, 2_000_000),
        ("1kib", 1, 1024),
    ],
)
def test_budgets_read_as_bytes(text, parameters, expected):
    assert Budget.parse(text).to_bytes(parameters=parameters) == expected


@pytest.mark.parametrize("text", ["", "50", "-5%", "0%", "five GiB", "3.5 quux", "1e3B", "%"])
def test_an_unreadable_budget_says_what_is_accepted(text):
    with pytest.raises(BudgetError, match=r"50%.*3\.5GiB.*4\.5bpw"):
        Budget.parse(text)


def plan(**over) -> Plan:
    fields = dict(
        model_name="m", model_digest="d", kept={"g": (0, 2)}, specs={"a": NF4, "b": INT8}, adapter_ranks={"a": 4},
        recovery=Recovery(steps=3), seed=7,
    )  # fmt: skip
    return Plan(**{**fields, **over})


def test_a_plan_survives_json():
    assert Plan.from_json(plan().to_json()) == plan()


def test_equal_plans_have_equal_text():
    assert plan(kept={"a": (1,), "b": (0,)}).to_json() == plan(kept={"b": (0,), "a": (1,)}).to_json()


def test_a_plan_with_an_unknown_key_is_refused():
    with pytest.raises(PlanError, match="not a plan.*Extra.*'colour'"):
        Plan.from_json(plan().to_json().replace('"seed"', '"colour": 1, "seed"'))


def test_a_missing_plan_is_named(tmp_path):
    with pytest.raises(PlanError, match="no plan at"):
        Plan.read(tmp_path / "plan.json")
