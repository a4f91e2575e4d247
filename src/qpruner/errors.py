"""What can be wrong with a request. Every message says what was found, where, what is accepted, and what to do.

All of these mean that the request or its input cannot be served (exit status 2); whatever else is raised is our fault.
"""


class QPrunerError(Exception):
    """The request, or something it names, cannot be served."""


class ModelError(QPrunerError):
    """The model is absent, damaged, unsafe to read, or not a decoder language model."""


class CorpusError(QPrunerError):
    """A text is absent, unreadable, too short, or used for two purposes."""


class BudgetError(QPrunerError):
    """The budget cannot be read, or no plan meets it."""


class MemoryLimitError(QPrunerError):
    """A stage cannot do with the memory that is allowed."""


class PlanError(QPrunerError):
    """The plan is not for this model, or asks for what cannot be done."""


class RecipeError(QPrunerError):
    """The recipe does not exist, or a key or value of it is unknown."""


class StudyError(QPrunerError):
    """The study's file or options contradict each other, or hold an unknown key or value."""


class OutputError(QPrunerError):
    """The output folder holds something else, or there is no room for it."""


class WorkersError(QPrunerError):
    """No worker process can be had for what was asked, or no cluster."""


class MissingExtraError(QPrunerError):
    """An optional dependency is needed for what was asked."""


def listed(names, limit: int = 3) -> str:
    """'a', 'b', 'c' and 2 more"""
    names = list(names)
    shown = ", ".join(repr(str(n)) for n in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
