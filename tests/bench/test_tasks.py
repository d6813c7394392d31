"""What a bench runs of a suite: models × defenses × images × seeds, each under a name that stays."""

from __future__ import annotations

import pytest

from hfdetox.bench.suite import DefenseEntry, SuiteError, TargetEntry
from hfdetox.bench.tasks import bench_runs, load_suite

ZOO = """
models: {m: org/model, "n: x": org/n}
grids:
  - {models: [m, "n: x"], triggers: [none, badnets], seeds: [0, 1]}
"""


@pytest.fixture
def runs(tmp_path):
    """A function that returns the runs of a suite's text."""

    def read(text):
        file = tmp_path / "suite.yaml"
        file.write_text(text, encoding="utf-8")
        return bench_runs(load_suite(file))

    return read


def names(found):
    return [run.name for run in found]


def test_without_a_bench_every_defense_meets_every_attacked_model(runs):
    found = runs(ZOO.replace(', "n: x"]', "]") + "defenses: {ft: ft, far: {defense: d3, settings: {lambda: 2}}}")
    assert names(found) == [
        "m-badnets-0.1-s0/ft-s0", "m-badnets-0.1-s1/ft-s0", "m-badnets-0.1-s0/far-s0", "m-badnets-0.1-s1/far-s0",
    ]  # fmt: skip
    assert found[2].entry == DefenseEntry(defense="d3", settings={"lambda": "2"})
    assert (found[0].target.model, found[0].target.attack) == ("m", "badnets-0.1")
    # models of the zoo's other seeds are other rows of the tables
    assert found[1].target.attack == "badnets-0.1-s1"


def test_a_bench_is_a_grid_of_its_own(runs):
    found = runs(ZOO + """
subjects: {hub: {model: org/there, triggers: ["badnets:size=2"], target: cat, revision: abc}}
defenses: {far: {defense: d3, settings: {lambda: 2}}}
bench:
  - {models: [m], triggers: [none, badnets], model_seeds: [1], defenses: [far], seeds: [4, 5]}
  - {subjects: [hub], defenses: [ft, far], samples: [0.05, 0.01, 500]}
""")  # fmt: skip
    assert names(found) == [
        "m-clean-s1/far-s4", "m-badnets-0.1-s1/far-s4", "m-clean-s1/far-s5", "m-badnets-0.1-s1/far-s5",
        "hub/ft-s0", "hub/ft-n0.01-s0", "hub/ft-n500-s0", "hub/far-s0", "hub/far-n0.01-s0", "hub/far-n500-s0",
    ]  # fmt: skip
    assert found[4].target.source == TargetEntry(
        model="org/there", triggers=("badnets:size=2",), target="cat", revision="abc"
    )
    assert [run.target.clean for run in found[:2]] == [True, False]
    # a defense that the suite does not name is meant as it is spelt
    assert found[4].entry == DefenseEntry(defense="ft")
    assert [run.samples for run in found[4:7]] == [0.05, 0.01, 500]
    assert [run.label for run in found[4:7]] == ["ft", "ft-n0.01", "ft-n500"]


def test_models_that_are_there_need_no_zoo(runs):
    found = runs("subjects: {a: org/a, b: org/b}\nbench: [{subjects: [a, b], defenses: ['d3:code']}]")
    assert names(found) == ["a/d3_code-s0", "b/d3_code-s0"]


def test_a_run_asked_for_twice_is_one(runs):
    bench = "bench: [{models: [m], triggers: [badnets], defenses: [ft]}, {models: [m], triggers: [badnets], " \
            "defenses: [ft], seeds: [0, 1]}]"  # fmt: skip
    assert names(runs(ZOO + bench)) == ["m-badnets-0.1-s0/ft-s0", "m-badnets-0.1-s0/ft-s1"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ZOO, "asks for no bench: give it `bench`, or defenses and grids"),
        (ZOO + "defenses: {A: ft, a: fst}", "a-s0 and another run would share one folder"),
        ("subjects: {a: org/a}", "asks for no bench"),
        ("subjects: {plots: org/a}\nbench: [{subjects: [plots], defenses: [ft]}]", "subjects.plots: the name is that"),
        (
            'subjects: {"a:b": org/x, a_b: org/y}\nbench: [{subjects: ["a:b"], defenses: [ft]}, {subjects: [a_b], '
            "defenses: [d3]}]",
            r"bench\[1\]: a_b is the folder of two models; rename a model, a trigger or a subject",
        ),
        (
            ZOO + "subjects: {m-badnets-0.1-s0: org/x}\nbench: [{models: [m], triggers: [badnets], defenses: [ft]}, "
            "{subjects: [m-badnets-0.1-s0], defenses: [d3]}]",
            "m-badnets-0.1-s0 is the folder of two models",
        ),
        (ZOO + "subjects: {m: org/a}\nbench: [{subjects: [m], defenses: [ft]}]", "subjects.m: the name is that of a"),
    ],
)
def test_what_is_no_bench_is_refused_in_one_line(runs, text, message):
    with pytest.raises(SuiteError, match=message):
        runs(text)
