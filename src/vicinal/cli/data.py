"""`vicinal data`: where a data set is looked for, what was found, and what to do when nothing is there."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
from typing import Any, get_args

from rich import box
from rich.table import Table

from vicinal.cli.terminal import console
from vicinal.data.dataset import DataMissing, Dataset, Source, Split
from vicinal.data.sources import SOURCES
from vicinal.training.written import override


def run(options: argparse.Namespace) -> None:
    """Answer the command; a data set that is not there is an answer too."""
    if options.name is None:
        answers = [describe(source, name) for name, source in SOURCES.items()]
    else:
        answers = [describe(override(source_named(options.name), options.changes), options.name, options.check)]
    if options.json:
        print(json.dumps(answers if options.name is None else answers[0], indent=2))
        return
    for answer in answers:
        _print(answer)


def source_named(name: str) -> Source:
    """The source of a name."""
    if name not in SOURCES:
        near = difflib.get_close_matches(name, SOURCES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(SOURCES)}"
        raise ValueError(f"there is no data set {name!r}; {hint}")
    return SOURCES[name]


def describe(source: Source, name: str, check: bool = False) -> dict[str, Any]:
    """Where a source looks and what its splits hold; with `check` every sample is read once."""
    answer: dict[str, Any] = {
        "name": name,
        "places": [dataclasses.asdict(look) for look in source.look()],
        "splits": {},
    }
    try:
        for split in get_args(Split):
            dataset = source.open(split)
            answer["splits"][split] = {"samples": len(dataset), "classes": len(dataset.info.classes)}
            if check:
                answer["splits"][split]["unreadable"] = unreadable(dataset)
    except DataMissing as error:
        answer["problem"], answer["advice"] = str(error), source.advice()
    return answer


def unreadable(dataset: Dataset) -> list[str]:
    """What is wrong with the samples that cannot be read."""
    found = []
    for index in range(len(dataset)):
        try:
            dataset.read(index)
        except DataMissing as error:
            found.append(str(error))
    return found


def _print(answer: dict[str, Any]) -> None:
    out = console()
    table = Table(answer["name"], "looked because of", "found", box=box.SIMPLE_HEAD)
    for look in answer["places"]:
        table.add_row(look["place"], look["reason"], ("yes: " if look["found"] else "no: ") + look["detail"])
    out.print(table)
    for split, facts in answer["splits"].items():
        out.print(f"{split}: {facts['samples']} samples, {facts['classes']} classes")
        for words in facts.get("unreadable", ()):
            out.print(f"  {words}", soft_wrap=True)
    if "problem" in answer:
        out.print(answer["problem"], soft_wrap=True)
        out.print(f"what to do: {answer['advice']}", soft_wrap=True)
