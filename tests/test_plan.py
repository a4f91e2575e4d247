import json

import pytest
from pydantic import ValidationError

from qpruner.errors import BudgetError, PlanError
from qpruner.plan import DENSE, INT8, NF4, Budget, Plan, QuantSpec, Recovery


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


def test_a_plan_of_three_fields_per_spec_reads_as_it_was():
    fields = json.loads(plan().to_json())
    fields["specs"] = {n: {k: s[k] for k in ("bits", "grid", "group_size")} for n, s in fields["specs"].items()}
    assert Plan.from_json(json.dumps(fields)) == plan()


@pytest.mark.parametrize(
    "fields, text",
    [
        (dict(bits=3, grid="integer", group_size=32, symmetric=False), "int3 g32 asymmetric"),
        (dict(bits=4, grid="normal-float", group_size=64), "nf4 g64"),
        (dict(bits=1, grid="binary", group_size=128, salient=16), "binary g128 + 16 channels int8"),
        (dict(bits=4, grid="integer", scale_bits=6, activation_bits=8), "int4 scales of 6 bits inputs int8"),
        (dict(bits=16, grid="none"), "16 bits"),
    ],
)
def test_a_spec_reads_short(fields, text):
    spec = QuantSpec(**fields)
    assert str(spec) == text and QuantSpec.model_validate_json(spec.model_dump_json()) == spec


@pytest.mark.parametrize(
    "fields, reason",
    [
        (dict(bits=8, grid="normal-float"), "no 8-bit normal-float grid; normal-float has 2, 3, 4"),
        (dict(bits=1, grid="integer"), "no 1-bit integer grid"),
        (dict(bits=4, grid="none"), "no 4-bit none grid"),
        (dict(bits=4, grid="integer", group_size=0), "group_size is 0"),
        (dict(bits=4, grid="normal-float", symmetric=False), "the normal-float grid has no zero points"),
        (dict(bits=4, grid="integer", salient=3, salient_bits=4), "not above the 4 of the others"),
        (dict(bits=16, grid="none", group_size=32), "a weight of 16 bits has no groups"),
        (dict(bits=16, grid="none", activation_bits=8), "a weight of 16 bits has no groups"),
    ],
)
def test_a_spec_that_does_not_exist_is_refused(fields, reason):
    with pytest.raises(ValidationError, match=reason):
        QuantSpec(**fields)
    broken = plan().to_json().replace('"specs": {', '"specs": {"x": ' + json.dumps(fields) + ",")
    with pytest.raises(PlanError, match=reason):
        Plan.from_json(broken)


def test_named_specs_mean_what_they_meant():
    assert [(s.bits, s.grid, s.group_size) for s in (NF4, INT8, DENSE)] == [
        (4, "normal-float", 64), (8, "integer", None), (16, "none", None),
    ]  # fmt: skip


def test_equal_plans_have_equal_text():
    assert plan(kept={"a": (1,), "b": (0,)}).to_json() == plan(kept={"b": (0,), "a": (1,)}).to_json()


def test_a_plan_with_an_unknown_key_is_refused():
    with pytest.raises(PlanError, match="not a plan.*Extra.*'colour'"):
        Plan.from_json(plan().to_json().replace('"seed"', '"colour": 1, "seed"'))


def test_a_missing_plan_is_named(tmp_path):
    with pytest.raises(PlanError, match="no plan at"):
        Plan.read(tmp_path / "plan.json")
