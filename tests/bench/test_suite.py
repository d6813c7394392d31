"""Suite files: what they say, the cells they mean, and one clear line for each way to get them wrong."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hfdetox.bench.suite import DatasetEntry, DefenseEntry, ModelEntry, SuiteError, TriggerEntry
from hfdetox.bench.tasks import bench_runs, folder_part, load_suite, zoo_tasks
from hfdetox.defenses import DEFENSES, parse_defense
from tests.conftest import REPOSITORY

SMALLEST = "models: {m: org/model}\ngrids: [{models: [m], triggers: [badnets]}]\n"


@pytest.fixture
def suite(tmp_path):
    """A function that reads the suite of a text."""

    def read(text):
        file = tmp_path / "suite.yaml"
        file.write_text(text, encoding="utf-8")
        return load_suite(file)

    return read


def names(suite):
    return [cell.name for cell in zoo_tasks(suite)]


def test_everything_a_suite_can_say(suite):
    found = suite("""
        dataset: {id: org/pictures, image_column: img, eval_samples: 100}
        training: {epochs: 10, batch-size: 64}
        models:
          a: {model: "timm-arch:vit_tiny_patch16_224", model_args: {layers: [1, 1], stem_type: ""}, input_size: 32,
              settings: {learning_rate: 1.0e-3}}
          b: {model: org/model, init: random}
        triggers:
          both: {spec: ["badnets:target=0", "blended:target=1"], settings: {epochs: 4}}
        grids:
          - {models: [a], triggers: [none, both], ratios: [0.1], seeds: [3], targets: [2], adaptive: ["sam:rho=2"]}
        defenses: {code: d3:code, far: {defense: d3, settings: {lambda: 2, batch_size: 32}}}
    """)
    assert found.dataset == DatasetEntry(id="org/pictures", image_column="img", eval_samples=100)
    assert found.training == {"epochs": "10", "batch_size": "64"}
    assert found.models["a"] == ModelEntry(
        model="timm-arch:vit_tiny_patch16_224",
        model_args={"layers": [1, 1], "stem_type": ""},
        input_size=32,
        settings={"learning_rate": "0.001"},
    )
    assert found.models["b"] == ModelEntry(model="org/model", init="random")
    assert found.triggers == {
        "both": TriggerEntry(spec=("badnets:target=0", "blended:target=1"), settings={"epochs": "4"})
    }
    assert found.defenses == {
        "code": DefenseEntry(defense="d3:code"),
        "far": DefenseEntry(defense="d3", settings={"lambda": "2", "batch_size": "32"}),
    }
    clean, attacked = zoo_tasks(found)
    assert (clean.name, clean.clean, clean.specs, clean.ratio, clean.target, clean.adaptive) == (
        "a-clean-s3", True, (), None, None, None,
    )  # fmt: skip
    assert (attacked.name, attacked.clean, attacked.baseline) == ("a-both-to-2-0.1-sam_rho=2-s3", False, "a-clean-s3")
    assert attacked.specs == ("badnets:target=0", "blended:target=1")
    assert (attacked.ratio, attacked.seed, attacked.target, attacked.adaptive) == (0.1, 3, "index:2", "sam:rho=2")
    # the trigger's settings win over the model's, those over the suite's
    assert attacked.settings == {"epochs": "4", "batch_size": "64", "learning_rate": "0.001"}
    assert clean.settings == {"epochs": "10", "batch_size": "64", "learning_rate": "0.001"}


def test_settings_are_texts_as_the_command_line_takes_them(suite):
    found = suite("training: {a: [1, 2.5, x, null, true], b: null, c: false}\n" + SMALLEST)
    assert found.training == {"a": "1,2.5,x,none,true", "b": "none", "c": "false"}


def test_the_smallest_suite(suite):
    assert names(suite(SMALLEST)) == ["m-badnets-0.1-s0"]
    assert suite(SMALLEST).dataset.id is None
    assert suite("dataset: org/pictures\n" + SMALLEST).dataset == DatasetEntry(id="org/pictures")


def test_cells_are_all_combinations_and_clean_baselines_come_first(suite):
    found = suite("""
        models: {a: org/a, b: org/b}
        grids:
          - {models: [a, b], triggers: [badnets, none, blended], ratios: [0.1, 0.01], seeds: [0, 1, 2]}
          - {models: [b], triggers: [sig], targets: [all-to-all, 1], adaptive: [none, "sam:rho=2"]}
    """)
    cells = zoo_tasks(found)
    # first grid: 2 models × 2 triggers × 2 ratios × 3 seeds = 24 and 2 models × 3 seeds = 6 clean; second: 2 × 2 = 4
    assert len(cells) == 24 + 6 + 4
    assert [cell.clean for cell in cells] == [True] * 6 + [False] * 28
    assert names(found)[:6] == [f"{model}-clean-s{seed}" for model in "ab" for seed in range(3)]
    assert names(found)[6:12] == [f"a-badnets-{ratio}-s{seed}" for ratio in ("0.1", "0.01") for seed in range(3)]
    assert names(found)[-4:] == [
        "b-sig-all-to-all-0.1-s0",
        "b-sig-all-to-all-0.1-sam_rho=2-s0",
        "b-sig-to-1-0.1-s0",
        "b-sig-to-1-0.1-sam_rho=2-s0",
    ]


def test_a_cell_keeps_its_name_in_a_larger_suite(suite):
    larger = suite("models: {m: org/model, z: org/z}\ngrids: [{models: [z, m], triggers: [blended, none, badnets]}]")
    assert set(names(suite(SMALLEST))) <= set(names(larger))


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("badnets", "badnets"),
        ("badnets:size=5,value=0", "badnets_size=5_value=0"),
        # 8 digits of a hash follow: another text with the same letters has another name
        ("../../etc", "etc-"),
        ("zoo/x/badnets.safetensors", "badnets.safetensors-"),
        ("ein Hund & 'Katze'", "ein-Hund-Katze-"),
        ("猫", "x-"),
        (".hidden", "hidden-"),
        ("a" * 41, "a" * 24 + "-"),
    ],
)
def test_any_text_gives_a_safe_part_of_a_name(text, name):
    part = folder_part(text)
    if name.endswith("-"):
        assert part.startswith(name)
        assert len(part) == len(name) + 8
        assert int(part[-8:], 16) >= 0
    else:
        assert part == name
    assert not set(part) & set("/\\:*?\"<>| '$&;\n")
    assert part != folder_part(text + " ")


def test_a_model_may_have_any_name(suite):
    found = suite('models: {"../m odel": org/m}\ngrids: [{models: ["../m odel"], triggers: [badnets]}]')
    (name,) = names(found)
    # printf '../m odel' | sha256sum
    assert name == "m-odel-35b32c1f-badnets-0.1-s0"


GRID = "models: {m: org/model}\ngrids: [{models: [m], triggers: [badnets], %s}]"
BAD = [
    ("", "the suite is empty; it needs models and grids"),
    ("a: [", "is not valid YAML"),
    ("models: {m: a}\nmodels: {n: a}", "is not valid YAML: the key models is there twice"),
    ("models: !!python/object:os.system {}", "is not valid YAML"),
    ("[" * 1500, "is not valid YAML"),
    ("[1, 2]", r"must be a mapping with bench, dataset, .*, got \[1, 2\]"),
    (SMALLEST + "seeds: [1]",
     r"\['seeds'\] for Suite; known: bench, dataset, defenses, grids, models, subjects, training, triggers"),
    ("models: {m: a}", "grids is missing"),
    ("grids: []", "models is missing"),
    ("models: {m: a}\ngrids: []", "grids must be a list with at least one entry"),
    ("models: {m: a}\ngrids: {}", "grids must be a list"),
    ("models: [a]\ngrids: []", r"models must be a mapping, got \['a'\]"),
    ("models: {18: a}\ngrids: []", "models: the name 18 is not text; put it in quotes"),
    ("models: {m: {}}\ngrids: []", r"missing fields \['model'\] for models\.m$"),
    ("models: {m: 3}\ngrids: []", "models.m must be a mapping with .*, got 3"),
    ("models: {m: {model: a, size: 3}}\ngrids: []",
     r"unknown fields \['size'\] for models\.m; known: init, input_size, model,"),
    ("models: {m: {model: a, input_size: 0}}\ngrids: []", "models.m.input_size must be a whole number of at least 1"),
    ("models: {m: {model: a, init: yes}}\ngrids: []", "models.m.init must be one of random, head, got True"),
    ("models: {m: {model: a, model_args: [1]}}\ngrids: []", r"models\.m\.model_args must be a mapping, got \[1\]"),
    ("models: {m: {model: a, model_args: {k: {}}}}\ngrids: []", "models.m.model_args.k must be a number, text"),
    ("models: {m: {model: a, settings: {k: {}}}}\ngrids: []", "models.m.settings.k must be a number, text"),
    # a list that contains itself
    ("training: {k: &all [1, *all]}\n" + SMALLEST, "suite.yaml is not valid YAML: it is nested too deeply"),
    ("training: {k: [[1, 2], 3]}\n" + SMALLEST, "training.k must be a number, text, .* or a list of these"),
    ("training: [1]\n" + SMALLEST, r"training must be a mapping, got \[1\]"),
    ("dataset: 3\n" + SMALLEST, "dataset must be a mapping with config, "),
    ("dataset: {ids: a}\n" + SMALLEST, r"unknown fields \['ids'\] for dataset"),
    ("dataset: {id: a, split: 3}\n" + SMALLEST, "dataset.split must be text, got 3; put it in quotes"),
    ("dataset: {id: a, eval_samples: 1.5}\n" + SMALLEST, "dataset.eval_samples must be a whole number"),
    ("triggers: {t: {spec: nothing}}\n" + SMALLEST, "triggers.t: unknown trigger 'nothing'; known: badnets, "),
    ("triggers: {t: {spec: [badnets, badnets]}}\n" + SMALLEST, "triggers.t.spec: 'badnets' is there twice"),
    ("triggers: {t: {spec: [badnets, 'badnets:size=5']}}\n" + SMALLEST, "triggers.t: two triggers are named 'badnets'"),
    ("triggers: {t: {spec: badnets, ratio: 1}}\n" + SMALLEST,
     r"unknown fields \['ratio'\] for triggers\.t; known: settings, spec"),
    ("triggers: {none: {spec: badnets}}\n" + SMALLEST, "triggers.none: none is the clean baseline's"),
    ("models: {m: a}\ngrids: [{models: [m]}]", r"missing fields \['triggers'\] for grids\[0\]"),
    ("models: {m: a}\ngrids: [{models: [n], triggers: [badnets]}]", r"grids\[0\].models: unknown model 'n'; .* has m"),
    ("models: {m: a}\ngrids: [{models: [m], triggers: []}]", r"grids\[0\].triggers must be a list with at least one"),
    ("models: {m: a}\ngrids: [{models: [m], triggers: badnets}]", r"grids\[0\].triggers must be a list"),
    ("models: {m: a}\ngrids: [{models: [m], triggers: [off]}]", r"grids\[0\].triggers\[0\] must be text, got False"),
    ("models: {m: a}\ngrids: [{models: [m], triggers: ['badnets:size=x']}]", r"triggers: trigger badnets: size .*'x'"),
    ("models: {m: a}\ngrids: [{models: [m], triggers: [gone.safetensors]}]", "gone.safetensors cannot be read"),
    (GRID % "ratio: 1", r"unknown fields \['ratio'\] for grids\[0\]"),
    (GRID % "ratios: [0]", r"grids\[0\].ratios\[0\] must be above 0 and at most 1, such as 0.1, got 0"),
    (GRID % "ratios: [0.1, 1.5]", r"grids\[0\].ratios\[1\] must be above 0 and at most 1"),
    (GRID % "ratios: [.nan]", r"grids\[0\].ratios\[0\] must be above 0"),
    (GRID % "ratios: [true]", r"grids\[0\].ratios\[0\] must be above 0"),
    (GRID % "ratios: ['0.1']", r"grids\[0\].ratios\[0\] must be above 0"),
    (GRID % "ratios: [0.1, 0.10]", r"grids\[0\].ratios: 0.1 is there twice"),
    (GRID % "seeds: [-1]", r"grids\[0\].seeds\[0\] must be a whole number of at least 0, got -1"),
    (GRID % "seeds: [1.0]", r"grids\[0\].seeds\[0\] must be a whole number"),
    (GRID % "seeds: []", r"grids\[0\].seeds must be a list with at least one entry, got \[\]"),
    (GRID % "targets: [true]", r"grids\[0\].targets\[0\] must be text or a whole number of at least 0, got True"),
    (GRID % "targets: [-3]", r"grids\[0\].targets\[0\] must be text or a whole number of at least 0, got -3"),
    (GRID % "adaptive: [3]", r"grids\[0\].adaptive\[0\] must be text"),
    (SMALLEST + "defenses: [d3]", r"defenses must be a mapping, got \['d3'\]"),
    (SMALLEST + "defenses: {x: prayer}", r"defenses\.x: unknown defense 'prayer'; known: .*d3"),
    (SMALLEST + "defenses: {x: {defense: d3, settings: {lamda: 1}}}", r"defenses\.x: d3 has no setting lamda"),
    (SMALLEST + "bench: [{models: [m], triggers: [badnets], defenses: [prayer]}]",
     r"bench\[0\]\.defenses: unknown defense 'prayer'"),
    (SMALLEST + "bench: [{models: [m], triggers: [badnets]}]", r"missing fields \['defenses'\] for bench\[0\]"),
    (SMALLEST + "bench: [{defenses: [d3]}]", r"bench\[0\]: name models and triggers of the zoo, or subjects"),
    (SMALLEST + "bench: [{subjects: [x], defenses: [d3]}]", r"bench\[0\]\.subjects: unknown subject 'x'"),
    (SMALLEST + "bench: [{models: [m], defenses: [d3]}]", r"bench\[0\]: triggers is missing"),
    (SMALLEST + "bench: [{models: [m], triggers: [badnets], defenses: [d3], samples: [2.0]}]",
     r"bench\[0\]\.samples\[0\] must be above 0 and at most 1"),
    (SMALLEST + "subjects: {x: {triggers: [badnets]}}", r"missing fields \['model'\] for subjects\.x"),
    (SMALLEST + "subjects: {x: {model: org/x, triggers: [smile]}}", r"subjects\.x\.triggers: .*smile"),
    ("dataset: {id: org/i, samples: 500}\nsubjects: {x: org/x}\nbench: [{subjects: [x], defenses: [d3]}]",
     r"dataset\.samples is for the attacks of grids, and there are none; .* are `samples` under bench"),
    (SMALLEST + "defenses: {x: {name: d3}}", r"unknown fields \['name'\] for defenses\.x; known: defense, settings"),
    (
        "models: {m: a}\ngrids: [{models: [m], triggers: [badnets]}, {models: [m], triggers: [badnets, sig]}]",
        r"grids\[1\]: cell m-badnets-0.1-s0 is also in grids\[0\]; leave it out of one",
    ),
    (
        "models: {m: a}\ngrids: [{models: [m], triggers: [none]}, {models: [m], triggers: [none, sig]}]",
        r"grids\[1\]: cell m-clean-s0 is also in grids\[0\]",
    ),
    (
        "models: {m: a, M: b}\ngrids: [{models: [m, M], triggers: [badnets]}]",
        r"grids\[0\]: cell M-badnets-0.1-s0 and another cell would share one folder; rename a model or a trigger",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), BAD)
def test_a_bad_suite_is_one_line_that_names_file_and_key(suite, text, message):
    with pytest.raises(SuiteError, match=message) as caught:
        suite(text)
    assert re.search(r"suite\.yaml(: | is )", str(caught.value))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_suite_that_cannot_be_read(tmp_path):
    with pytest.raises(SuiteError, match=r"missing\.yaml cannot be read: No such file"):
        load_suite(tmp_path / "missing.yaml")
    with pytest.raises(SuiteError, match="cannot be read: Is a directory"):
        load_suite(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"# caf\xe9\n")
    with pytest.raises(SuiteError, match=r"latin\.yaml is not valid YAML: byte 5 is not UTF-8 text"):
        load_suite(tmp_path / "latin.yaml")


def test_the_suite_of_the_d3_evaluation():
    found = load_suite(REPOSITORY / "examples" / "d3_evaluation.yaml")
    # the seven attacks and the clean model, two at 1 %, all-to-all, adaptive: 12; ConvNeXt and ViT three each
    assert len(zoo_tasks(found)) == 12 + 2 * 3
    assert names(found)[:3] == ["resnet-clean-s0", "convnext-clean-s0", "vit-clean-s0"]
    assert {"resnet-badnets-0.01-s0", "resnet-blended-all-to-all-0.1-s0", "vit-blended-0.1-s0"} <= set(names(found))
    assert sum(cell.adaptive is not None for cell in zoo_tasks(found)) == 1


def test_the_full_grid_of_the_d3_evaluation():
    found = load_suite(Path(REPOSITORY / "examples" / "d3_evaluation_full.yaml"))
    # 3 clean, 6 attacks × 5 ratios, SIG × 4, 2 all-to-all, 2 attacks × 3 radii
    assert len(zoo_tasks(found)) == 3 + 6 * 5 + 4 + 2 + 2 * 3
    ratios = {cell.ratio for cell in zoo_tasks(found) if cell.trigger == "badnets"}
    assert ratios == {0.005, 0.01, 0.05, 0.1, 0.5}


def test_the_bench_of_the_d3_evaluation_asks_for_every_defense():
    found = load_suite(REPOSITORY / "examples" / "d3_evaluation.yaml")
    tried = {parse_defense(trial.entry.defense)[0].name for trial in bench_runs(found)}
    assert tried == set(DEFENSES)
    cells = {cell.name for cell in zoo_tasks(found)}
    assert {trial.target.name for trial in bench_runs(found)} <= cells, "the zoo of the suite has every model"
    # no method has more than 20 epochs or a fifth of its own count, unless its own count is 20 or less
    budgets = {"anp": 25, "ft": 20, "sau": 20, "fst": 10, "nad": 10, "rnp": 20, "i-bau": 5}
    given = {trial.label: parse_defense(trial.entry.defense, trial.entry.settings)[0] for trial in bench_runs(found)}
    assert {name: given[name].settings()["epochs"] for name in budgets} == budgets
    full = load_suite(REPOSITORY / "examples" / "d3_evaluation_full.yaml")
    assert {trial.target.name for trial in bench_runs(full)} <= {cell.name for cell in zoo_tasks(full)}
    assert {parse_defense(trial.entry.defense)[0].name for trial in bench_runs(full)} == set(DEFENSES)


def test_the_suite_of_d3_auto_replaces_one_part_at_a_time():
    made = load_suite(REPOSITORY / "examples" / "d3_auto.yaml")
    trials = bench_runs(made)
    assert {trial.target.name for trial in trials} == {cell.name for cell in zoo_tasks(made) if not cell.clean}
    given = {trial.label: parse_defense(trial.entry.defense, trial.entry.settings)[0] for trial in trials}
    auto = given.pop("d3-auto")
    presets = [given.pop(name) for name in ("d3", "d3-code")]
    assert all(not preset.automatic for preset in presets)
    for name, config in given.items():
        changed = {key for key, value in auto.settings().items() if config.settings()[key] != value}
        # a number of epochs that is named is meant
        assert len(changed - {"min_steps"}) == 1, name
        assert ("min_steps" in changed) == (name == "long")


def test_the_held_out_suite_shares_no_model_with_that_on_which_d3_auto_was_made():
    held = load_suite(REPOSITORY / "examples" / "d3_heldout.yaml")
    cells, trials = zoo_tasks(held), bench_runs(held)
    made = load_suite(REPOSITORY / "examples" / "d3_auto.yaml")
    assert not {cell.seed for cell in cells} & {cell.seed for cell in zoo_tasks(made)}
    # the clean ResNet; the seven attacks, two at 1 %, all-to-all, adaptive; two on each of the other networks
    assert {trial.target.name for trial in trials} == {cell.name for cell in cells}
    assert len(cells) == 1 + 7 + 2 + 1 + 1 + 2 * 2
    # six methods, three seeds on the ResNet, 1 % of the images for two of its models; three methods on the clean one
    assert len(trials) == 6 * (2 * 2 + 3 * (7 + 2 + 1 + 1 + 2)) + 3 * 3
    auto = {trial.entry.defense for trial in trials if trial.label == "d3-auto"}
    assert auto == {"d3:auto-1"}, "no setting of its own"
