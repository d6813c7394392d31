"""Every table of docs/benchmarks.md and docs/reference/architectures.md, from the JSON in results/.

`make tables` writes them, a test compares.

    python -m tests.benchmarks.tables            # writes the pages anew
    python -m tests.benchmarks.tables --check    # exit status 1 if that would change it

The pages hold the text; a table stands between `<!-- table: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from tests.benchmarks import auto_tables, evidence_tables, gpu_tables
from tests.benchmarks.markdown import ATTACKS, RESULTS, arrow, percent, read, source, table, with_interval

__all__ = ["RESULTS", "read"]

DOCS = Path(__file__).parents[2] / "docs"
PAGES = (DOCS / "benchmarks.md", DOCS / "reference" / "architectures.md")
PLACE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
MODELS = {"resnet": "ResNet", "convnext": "ConvNeXt", "vit": "ViT", "convnextv2": "ConvNeXt V2", "vit-mean": "ViT"}
SEVEN = ("badnets-0.1", "blended-0.1", "wanet-0.1", "lf-0.1", "inputaware-0.1", "sig-0.1", "ssba-0.1")
HELDOUT = tuple(f"{name}-to-3-0.1-s1" for name in ("grid", "noise", "wanet", "lf", "inputaware", "sig", "ssba"))
BLENDED_ALL, BLENDED_SAM = "noise-all-to-all-0.1-s1", "noise-adaptive-to-3-0.1-sam_rho=1-s1"
RATES = ("accuracy", "attack_success", "robust_accuracy", "der", "worst_class", "spread")


def runs(name: str) -> pd.DataFrame:
    """Return the runs of a bench that `summarize.py` kept."""
    document = read(name)
    return pd.DataFrame(document["rows"], columns=document["columns"])


def whole_seeds(frame: pd.DataFrame, attacks: Sequence[str]) -> pd.DataFrame:
    """Return the runs of the seeds that met all of the attacks."""
    met = frame.groupby("seed")["attack"].nunique()
    return frame[frame["seed"].isin(met[met == len(attacks)].index)]


def title(attack: str) -> str:
    """Return a column's heading: the attack, and what is unusual of it."""
    if attack in (BLENDED_ALL, BLENDED_SAM):
        return "Blended, all to all" if attack == BLENDED_ALL else "Blended, SAM"
    few = " at 1 %" if "-0.01" in attack else ""
    return ATTACKS[attack.split("-")[0]] + few


def comparison(
    frame: pd.DataFrame,
    attacks: Sequence[str],
    *,
    names: Callable[[str], str] = lambda name: name,
    columns: Sequence[str] = ("accuracy", "attack_success", "highest", "robust_accuracy", "der"),
    extra: Sequence[Sequence[str]] = (),
) -> list[str]:
    """Return defenses compared on attacks: ASR on each, and means over the attacks, in the order of DER.

    Every number is a mean over the seeds that a defense met all of the attacks with; a defense without such a seed is
    left out.

    Args:
        frame: the runs of one model with one number of clean images.
        names: from a defense's name in the suite to that in the table.
        columns: what stands after the attacks.
        extra: further rows below the first.
    """
    frame = frame[frame["attack"].isin(attacks)]
    rates = [key for key in (*RATES, "largest_share") if key in frame]
    columns = [*columns, *rates[len(RATES) :]]
    headings = {"accuracy": "ACC", "attack_success": "ASR", "robust_accuracy": "RA", "der": "DER",
                "worst_class": "worst class", "spread": "spread", "cost": "× FT", "highest": "highest ASR",
                "largest_share": "largest class"}  # fmt: skip
    first = frame.drop_duplicates("attack").set_index("attack").loc[list(attacks)]
    before = [percent(first.at[attack, "attack_success_before"]) for attack in attacks]
    known = [key for key in rates if key != "der"]
    before += [percent(first[f"{key}_before"].mean()) if key in known else "–" for key in columns]
    found = []
    for defense, group in frame.groupby("defense", sort=False):
        group = whole_seeds(group, attacks)
        if group.empty:
            continue
        seeds = group.groupby("seed")[rates].mean()
        each = group.groupby("attack")["attack_success"].mean()
        cells = [percent(each[attack]) for attack in attacks]
        for key in columns:
            if key == "highest":
                cells.append(percent(group["attack_success"].max()))
            elif key == "cost":
                cells.append(f"{cost(group, frame):.1f}")
            elif key in ("attack_success", "der"):
                cells.append(with_interval(list(seeds[key])))
            else:
                cells.append(percent(seeds[key].mean()))
        found.append((-seeds["der"].mean(), [f"`{names(str(defense))}`", str(len(seeds)), *cells]))
    header = ["defense", "seeds", *map(title, attacks), *(headings[key] for key in columns)]
    return table(header, [["before", "–", *before], *extra, *(cells for _, cells in sorted(found))])


def cost(group: pd.DataFrame, frame: pd.DataFrame) -> float:
    """Return the seconds of a defense over those of plain fine-tuning on the same model: the median over models."""
    tuned = frame[frame["defense"] == "ft"].groupby("attack")["seconds"].mean()
    return float((group.groupby("attack")["seconds"].mean() / tuned).median())


def demo() -> list[str]:
    """Return the demo's table over seeds."""
    found = read("demo_seeds")["runs"]
    keys = {"accuracy": "ACC", "attack_success_rate": "ASR", "robust_accuracy": "RA", "largest_class": "largest class"}
    keys = {key: heading for key, heading in keys.items() if all(key in run for run in found)}
    rows = [[str(run["seed"]), *(arrow(*run[key].values()) for key in keys), f"{run['ratio']:.1f}"] for run in found]
    return [*table(["seed", *keys.values(), "× bare steps"], rows), *source("demo_seeds")]


def zoo() -> list[str]:
    """Return the models of the zoo; a star marks an attack that did not succeed."""
    models, triggers = list(MODELS), list(ATTACKS)
    cells = sorted(
        read("zoo")["cells"],
        key=lambda c: (models.index(c["model"]), -(c["ratio"] or 1), c["target"] or "", triggers.index(c["trigger"])),
    )
    rows = []
    for cell in cells:
        attack = ATTACKS[cell["trigger"]] + (", all to all" if cell["target"] == "all-to-all" else "")
        ratio = "–" if cell["ratio"] is None else f"{100 * cell['ratio']:.0f} %"
        rates = ["–"] * 4
        for trigger in cell["triggers"].values():
            keys = ("attack_success_rate", "robust_accuracy", "cross_accuracy")
            rates = [percent(trigger[key] and trigger[key]["value"]) for key in keys] + [f"{trigger['psnr']:.1f}"]
            rates[0] += "" if cell["status"] == "done" else "*"
        accuracy, seconds = percent(cell["accuracy"]["value"]), f"{cell['seconds']:.0f}"
        rows.append([MODELS[cell["model"]], attack, ratio, accuracy, *rates, seconds])
    header = ["model", "attack", "poisoned", "ACC", "ASR", "RA", "cross", "PSNR, dB", "seconds"]
    return [*table(header, rows, text_columns=2), *source("zoo")]


def seven() -> list[str]:
    """Return D3 with one strong setting on the seven attacks."""
    found = {row["trigger"]: row for row in read("defend_zoo")["rows"] if row["setting"] == "strong"}
    keys = ("accuracy", "attack_success_rate", "robust_accuracy")
    lines, values, ratings = [], [], []
    for name in (attack.removesuffix("-0.1") for attack in SEVEN):
        row = found[name]
        values.append([[row[when][key]["value"] for when in ("before", "after")] for key in keys])
        ratings.append(row["der"]["value"])
        lines.append([ATTACKS[name], *(arrow(*pair) for pair in values[-1]), percent(ratings[-1])])
    lines.append(["mean", *(arrow(*pair) for pair in np.mean(values, axis=0)), percent(float(np.mean(ratings)))])
    return [*table(["backdoor", "ACC", "ASR", "RA", "DER"], lines), *source("defend_zoo")]


def line_up(model: str, attacks: Sequence[str]) -> list[str]:
    """Return the line-up of all defenses on one network."""
    frame = runs("line_up")
    columns = ("accuracy", "attack_success", "robust_accuracy", "der")
    if len(attacks) == 2:
        columns += ("worst_class", "cost")
    return [*comparison(frame[frame["model"] == model], attacks, columns=columns), *source("line_up")]


def reweighting() -> list[str]:
    """Return what re-weighting does to the worst class, seed 0."""
    frame = runs("line_up")
    frame = frame[(frame["model"] == "resnet") & (frame["seed"] == 0)].set_index(["attack", "defense"])
    rows = []
    before = ("accuracy_before", "attack_success_before", "worst_class_before", "spread_before")
    for attack in ("badnets-0.1", "blended-0.1"):
        first = frame.loc[(attack, "d3")]
        rows.append([ATTACKS[attack.split("-")[0]], "before", *(percent(first[key]) for key in before)])
        for name in ("d3", "d3-class", "d3-wasserstein", "ft", "ft-class"):
            one = frame.loc[(attack, name)]
            rows.append(["", f"`{name}`", *(percent(one[key.removesuffix("_before")]) for key in before)])
    header = ["backdoor", "defense", "ACC", "ASR", "worst class", "spread"]
    return [*table(header, rows, text_columns=2), *source("line_up")]


def heldout(name: str, model: str, attacks: Sequence[str], *, images: int = 2500, clean: bool = False) -> list[str]:
    """Return `d3:auto-1` beside other presets on models that it was not made on."""
    frame = runs(name)
    frame = frame[(frame["model"] == model) & (frame["clean_images"] == images)].assign(
        defense=lambda f: f["defense"].str.replace("-n0.01", "")
    )
    extra = [never_backdoored()] if clean else []
    names = {"d3-auto": "d3:auto-1", "d3": "d3:paper", "d3-code": "d3:code"}
    lines = comparison(frame, attacks, names=lambda key: names.get(key, key), extra=extra)
    return [*lines, *source(name, *(["heldout_clean"] if clean else []))]


def never_backdoored() -> list[str]:
    """Return what a model that was never backdoored says to the same triggers."""
    measured = read("heldout_clean")
    found = {result["kind"]: result for result in measured["triggers"].values()}
    kinds = ("badnets", "blended", "wanet", "lf", "inputaware", "sig", "ssba")
    success = [found[kind]["attack_success_rate"]["value"] for kind in kinds]
    robust = [found[kind]["robust_accuracy"]["value"] for kind in kinds]
    means = (measured["accuracy"]["value"], np.mean(success), max(success), np.mean(robust))
    return ["never backdoored", "–", *map(percent, success), *map(percent, means), "–"]


PARTS = {
    "d3-auto": "`d3:auto-1`", "d3": "`d3:paper`, 20 epochs", "lambda-10": "… with λ = 10 throughout",
    "cosine-07": "… turned to −0.7, not −0.4", "epsilon-01": "… with ε = 0.1",
    "crops": "… with crops, which the model does not take well", "no-mixup": "… without mixup",
    "rate-001": "… learning rate 0.01", "shift": "… with the rows' mean", "long": "… 36 epochs",
    "block": "… last stage and head", "adamw": "… AdamW for the features", "sgd": "… SGD for the features",
    "class": "… classes re-weighted",
}  # fmt: skip


def parts(name: str, model: str, attack: str) -> list[str]:
    """Return what each part of `d3:auto-1` gives: it with one part replaced."""
    frame = runs(name)
    frame = frame[(frame["model"] == model) & (frame["attack"] == attack)].set_index("defense")
    first = frame.iloc[0]
    rows = [["before", percent(first["accuracy_before"]), percent(first["attack_success_before"]), "–"]]
    rows += [
        [text, *(percent(frame.at[key, c]) for c in ("accuracy", "attack_success", "der"))]
        for key, text in PARTS.items()
        if key in frame.index
    ]
    return [*table(["defense", "ACC", "ASR", "DER"], rows), *source(name)]


def ideas() -> list[str]:
    """Return the ideas for `d3:auto-1` that were dropped."""
    found = read("d3_ideas")["rows"]
    cells = {"resnet-lf-0.1-s0": "LF", "resnet-blended-0.1-s0": "Blended"}
    by = {(row["cell"], row["idea"]): row for row in found}
    rows = [
        [
            "before",
            *(
                percent(by[cell, "d3:auto"]["before"][key]) if key else "–"
                for cell in cells
                for key in ("accuracy", "attack_success_rate", "")
            ),
        ]
    ]
    for idea in dict.fromkeys(row["idea"] for row in found):
        numbers = []
        for cell in cells:
            one = by[cell, idea]
            numbers += [
                percent(one["after"]["accuracy"]),
                percent(one["after"]["attack_success_rate"]),
                percent(one["der"]),
            ]
        rows.append(["nothing more" if idea == "d3:auto" else idea, *numbers])
    header = ["`d3:auto-1` and …", *(f"{text} {key}" for text in cells.values() for key in ("ACC", "ASR", "DER"))]
    return [*table(header, rows), *source("d3_ideas")]


def recount() -> list[str]:
    """Return the counts of hfdetox and of a script without it."""
    rows = [
        [ATTACKS[row["cell"].split("-")[1]], *(f"{a:,} and {b:,}" for a, b in (row["correct"], row["attacked"]))]
        for row in read("recount")["rows"]
    ]
    return [*table(["backdoor", "right of 10,000 clean", "target of 9,000 triggered"], rows), *source("recount")]


def speed() -> list[str]:
    """Return the ratios of speed."""
    found = read("speed_cpu")
    times = found["times_faster"]
    rows = [
        ["D3 as research code writes it (PIL transforms an image, float32): training only",
         f"{times['training']:.1f} times faster"],
        ["… the whole job with the same evaluations", f"{times['same_evaluations']:.1f} times faster"],
        ["… with that code's habit of evaluating both test sets after every epoch",
         f"{times['research_habit']:.1f} times faster"],
        ["the bare step (forward, backward, SGD on a ready tensor, same precision)",
         f"{100 * found['engine_share_of_bare']:.0f} % of its images a second"],
        ["model, optimizer and cached images: memory beyond them", f"{found['memory']['rest_mb'] / 1000:.2f} GB"],
    ]  # fmt: skip
    return [*table(["against", "hfdetox"], rows), *source("speed_cpu")]


def architectures(library: str) -> list[str]:
    """Return the sweep over every architecture of a library (architectures.py)."""
    rows = []
    for row in read("architectures")["rows"]:
        kind, _, name = row["case"].partition("/")
        variant = f" ({row['architecture']})" if kind == "timm" and "architecture" in row else ""
        layers = [", ".join(f"`{layer}`" for layer in row.get(part, ())) or "–" for part in ("head", "norms")]
        worst = [row[part] for part in ("own", "wrapper", "pipeline") if part in row]
        size = "×".join(map(str, row.get("input_size", ["–"])[-2:]))
        again = "yes" if row["in_order"] else "no"
        cells = [f"`{name}`{variant}", *layers, again, size, f"{max(worst):.0e}" if worst else "–"]
        rows += [cells] if kind == library else []
    header = ["architecture", "head", "norms before it", "in order", "pixels", "largest difference"]
    return [*table(header, rows, text_columns=4), *source("architectures")]


def thousand() -> list[str]:
    """Return what the job on 1,000 classes takes."""
    found = read("thousand_classes")
    rows = [
        [f"the whole job (threads: {found['threads']})", f"{found['seconds'] / 60:.1f} minutes"],
        ["of it the fine-tuning on 1,000 images", f"{found['train_seconds'] / 60:.1f} minutes"],
        ["weights, gradients, momentum and 2,000 cached images", f"{found['needed_mb']:,} MB"],
        [f"memory beyond them, the libraries' own included (goal {found['limit_mb']:,})", f"{found['above_mb']:,} MB"],
        ["accuracy before and after, %", arrow(*found["accuracy"])],
        ["the card", f"{found['card_lines']} lines"],
        ["`detox_report.json`, and all plots", f"{found['report_kb']} KB, {found['plots_kb']} KB"],
    ]
    return [*table(["", "measured"], rows), *source("thousand_classes")]


TABLES: dict[str, Callable[[], list[str]]] = {
    "demo": demo,
    "zoo": zoo,
    "seven": seven,
    "line_up_two": lambda: line_up("resnet", SEVEN[:2]),
    "line_up_seven": lambda: line_up("resnet", SEVEN),
    "line_up_vit": lambda: line_up("vit", SEVEN[:2]),
    "reweighting": reweighting,
    "heldout_seven": lambda: heldout("heldout", "resnet", HELDOUT, clean=True),
    "heldout_hard": lambda: heldout(
        "heldout", "resnet", ("grid-to-3-0.01-s1", "noise-to-3-0.01-s1", BLENDED_ALL, BLENDED_SAM)
    ),
    "heldout_few": lambda: heldout("heldout", "resnet", HELDOUT[:2], images=500),
    "heldout_convnext": lambda: heldout("heldout_first", "convnextv2", HELDOUT[:2]),
    "heldout_vit": lambda: heldout("heldout_first", "vit-mean", HELDOUT[:2]),
    "parts_lf": lambda: parts("d3_auto", "resnet", "lf-0.1"),
    "parts_blended": lambda: parts("d3_auto_second", "resnet", "blended-0.1"),
    "parts_convnext": lambda: parts("d3_auto", "convnext", "blended-0.1"),
    "ideas": ideas,
    "recount": recount,
    "speed": speed,
    "architectures_transformers": lambda: architectures("transformers"),
    "architectures_timm": lambda: architectures("timm"),
    **evidence_tables.TABLES,
    **auto_tables.TABLES,
    **gpu_tables.TABLES,
    "thousand": thousand,
}


def render(page: str) -> str:
    """Return the page with every table made anew; KeyError for a place whose table is not known."""
    return PLACE.sub(lambda found: f"{found[1]}\n" + "\n".join(TABLES[found[2]]()) + f"\n\n{found[3]}", page)


def main() -> None:
    """Write the pages, or tell whether they are what they should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if the page would change")
    arguments = parser.parse_args()
    for path in PAGES:
        page = path.read_text(encoding="utf-8")
        made = render(page)
        if arguments.check and made != page:
            sys.exit(1)
        path.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
