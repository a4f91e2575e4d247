"""What the facts of all reports are made of."""

from pydantic import ConfigDict

from qpruner.plan import Value as PlanValue


class Value(PlanValue):
    """As the plan's values, and a number that is not finite (the perplexity of a broken model) survives JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")
