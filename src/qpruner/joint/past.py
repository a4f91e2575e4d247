"""A search as a folder: what it was asked, and its plan for any budget."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qpruner import __version__
from qpruner.decide import joint
from qpruner.drafting import Drafted, at_once
from qpruner.errors import OutputError, RecipeError
from qpruner.files import file_digest, write_text
from qpruner.job import Job
from qpruner.joint.facts import joint_facts
from qpruner.joint.stages import CONTROLS, Searched, searched
from qpruner.plan import Value
from qpruner.prepare import Prepared
from qpruner.recipe import Recipe
from qpruner.report.joint import JointFacts
from qpruner.report.joint_page import joint_page
from qpruner.run import Run

REQUEST, FACTS, FRONT = "search.json", "facts.json", "front.json"  # the last one to be written ends a search


class Request(Value):
    """What a search was asked. calibration, search_text: files, absolute; None for what stands in for them.

    weights: digest of the model's. texts: digests of what was read of them, by purpose. budgets, limits: as they were
    written, and in bytes, ascending.
    """

    version: str = __version__
    model: str
    weights: str
    texts: dict[str, str]
    recipe: Recipe
    budgets: tuple[str, ...]
    limits: tuple[int, ...]
    controls: tuple[str, ...] = ()
    calibration: str | None
    search_text: str | None
    seed: int
    trust_remote_code: bool

    def check(self, folder: Path) -> None:
        """Raises OutputError where the folder holds something else."""
        if (folder / REQUEST).is_file():
            if (stored := Request.read(folder)) != self:
                fields = [name for name in Request.model_fields if getattr(stored, name) != getattr(self, name)]
                raise OutputError(
                    f"{folder} holds a search with another {' and '.join(fields)}. Name another folder, or remove it."
                )
        elif folder.exists() and any(folder.iterdir()):
            raise OutputError(f"{folder} holds something that is no search. Name another folder.")

    def write(self, folder: Path) -> None:
        write_text(folder / REQUEST, self.model_dump_json(indent=1) + "\n")

    def command(self, folder: Path) -> str:
        """What a person types to repeat the search."""
        words = ["qpruner", "search", self.model, "--budgets", ",".join(self.budgets), "-o", str(folder)]
        words += ["--recipe", self.recipe.name, "--trials", str(self.recipe.trials), "--target", self.recipe.target]
        for name, value in (("calibration", self.calibration), ("search-text", self.search_text)):
            words += [f"--{name}", value] if value else []
        words += ["--controls", ",".join(self.controls)] if self.controls else []
        words += ["--trust-remote-code"] if self.trust_remote_code else []
        return shlex.join([*words, "--seed", str(self.seed)])

    @classmethod
    def read(cls, folder: Path) -> "Request":
        path = folder / REQUEST
        if not path.is_file():
            raise OutputError(f"there is no search in {folder}. Accepted: the folder that `qpruner search` wrote.")
        try:
            return cls.model_validate_json(path.read_text())
        except ValidationError as error:
            raise OutputError(
                f"{path} is not what this version of qpruner writes: {error.errors()[0]['msg']}."
            ) from None


@dataclass(frozen=True)
class Front:
    """What a finished `search` leaves: its folder, the report, and the report's facts."""

    folder: Path
    report: Path
    facts: JointFacts

    def to_json(self) -> dict:
        return {"folder": str(self.folder), "report": str(self.report), "facts": self.facts.model_dump(mode="json")}


def finish(job: Job, request: Request, found: Searched) -> Front:
    """Write the front and the page."""
    folder = job.run.folder
    facts = joint_facts(job, found, request.budgets, command=request.command(folder), folder=str(folder))
    report = folder / "report.html"
    write_text(report, joint_page(facts))
    write_text(folder / FACTS, facts.to_json())
    points = [trial for trial in joint.pareto(found.trials)]
    write_text(folder / FRONT, json.dumps([json.loads(trial.to_json()) for trial in points], indent=1) + "\n")
    job.run.event("done")
    return Front(folder, report, facts)


@dataclass(frozen=True)
class Past:
    """A finished search."""

    folder: Path
    request: Request

    @classmethod
    def open(cls, folder: Path) -> "Past":
        request = Request.read(folder)
        if not (folder / FRONT).is_file():
            raise OutputError(f"the search in {folder} is not finished. Give its command again; it continues.")
        if request.version != __version__:
            raise OutputError(
                f"the search in {folder} was made by qpruner {request.version}, and this is {__version__}: its trials "
                "may not be what would be found now. Search anew, or use that version."
            )
        return cls(folder, request)

    @property
    def digest(self) -> str:
        return file_digest(self.folder / FRONT)

    @property
    def asked(self) -> tuple[tuple[str, ...], str, str]:
        """Budgets, the command, and the folder, for a page."""
        return self.request.budgets, self.request.command(self.folder), str(self.folder)

    def check_same(self, given: Mapping[str, Any]) -> None:
        """Refuse what was given beside the search and says something else.

        Raises:
            OutputError: for instance another seed, or a recipe.
        """
        for name, value in given.items():
            if value is not None:
                raise OutputError(
                    f"--from {self.folder} brings its own {name.replace('_', ' ')}. Leave that out, or search anew."
                )

    def check_model(self, prepared: Prepared) -> None:
        """Refuse another model than the one that was searched, and texts that are not what they were: all that is read
        back would be computed anew."""
        if prepared.weights_digest != self.request.weights:
            raise OutputError(
                f"the search in {self.folder} was of other weights than {prepared.shape.source.name!r} has: of "
                f"{self.request.model!r}. Name the model that was searched."
            )
        changed = [name for name, digest in texts_of(prepared).items() if digest != self.request.texts[name]]
        if changed:
            raise OutputError(
                f"the {changed[0]} text of the search in {self.folder} has changed since. Put it back, or search anew."
            )

    def drafted(self, job: Job) -> Drafted:
        """Its plan for the job's budget."""
        return at_once(job, self.found(job))

    def found(self, job: Job) -> Searched:
        """Read back. job: of the same model, recipe, texts and seed."""
        with Run(self.folder) as run:
            return searched(replace(job, run=run), self.request.limits, self.request.controls)


def texts_of(prepared: Prepared) -> dict[str, str]:
    """Digests of the texts that a search looks at, by purpose."""
    return {name: digest for name, digest in prepared.texts.digests().items() if name != "evaluation"}


def require_joint(recipe: Recipe, controls: Sequence[str]) -> None:
    if recipe.allocation != "joint":
        raise RecipeError(
            f"recipe {recipe.name!r} has allocation {recipe.allocation!r}; a search needs joint. Accepted: auto, or "
            "another recipe with [allocation=joint]."
        )
    if unknown := [name for name in controls if name not in CONTROLS]:
        raise RecipeError(f"there is no control {unknown[0]!r}. Accepted: {', '.join(CONTROLS)}.")
