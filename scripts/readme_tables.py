"""Writes the README's tables from the runs under benches/results/.

    python3 scripts/readme_tables.py

Between `<!-- table: NAME -->` and `<!-- end -->` stands a table of each `benches/results/NAME*.json`, the newest of those whose
names differ in the date alone: a run's summary.json, or what scripts/baseline_hf.py wrote. A table without a result is left empty.
"""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = (
    ("CFR %", lambda m: rate(m["cfr"], m["ci95_cell"] or m["ci95"])),
    ("harmful, by truth %", lambda m: rate(m["harmful_truth"]["rate"])),
    ("best of 8 %", lambda m: rate(m["best_of"]["harmful"])),
    ("relapse %", lambda m: rate(m["relapse"]["harmful"])),
    ("prefill 5 %", lambda m: rate((m["prefill_detail"].get("5") or {}).get("harmful_truth"))),
    ("reward error %", lambda m: rate(m["reward_error"])),
    ("pairs kept %", lambda m: rate(m["pairs_kept"])),
    ("drift", lambda m: "–" if m["reward_drift"] is None else f"{m['reward_drift']:.3f}"),
    ("unserved %", lambda m: rate(m["unserved"]["rate"])),
)
WORDS = (("policy", "accepted_policy"), ("reward model", "accepted_reward"), ("system", "accepted"))


def rate(value, interval=None):
    """A share in percent with its interval; what is not known is a dash, never 0."""
    if value is None:
        return "–"
    text = f"{100 * value:.1f}"
    return f"{text} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]" if interval else text


def table(path):
    """One result as Markdown; a run has a row before, then a row per method and seed."""
    run = json.loads(path.read_text())
    if run.get("tool") == "baseline_hf":
        return beside_pytorch(path, run)
    if "contrasts" in run:
        return evidence(path, run)
    several = len(run["seeds"]) > 1
    rows = [("before", run["before"], None)]
    for method in run["methods"]:
        rows.append((f"{method['name']}, seed {method['seed']}" if several else method["name"], method, method))
    lines = ["| " + " | ".join(["method", *(name for name, _ in COLUMNS + WORDS)]) + " |", "|---" * (len(COLUMNS + WORDS) + 1) + "|"]
    for name, measure, method in rows:
        words = ["" if method is None else {True: "accepted", False: "no", None: "–"}[method[key]] for _, key in WORDS]
        lines.append("| " + " | ".join([name, *(show(measure) for _, show in COLUMNS), *words]) + " |")
    lines += ["", f"*{run['suite']}; {run['device']}; {dated(path)}; n = {run['before']['n']} held-out harmful prompts, {run['before']['best_of']['n']} of them for best of 8 and relapse; seeds "
              f"{', '.join(map(str, run['seeds']))}; `{path.relative_to(ROOT)}`.*"]
    return "\n".join(lines)


ARMS = ("before", "sham", "rlhf", "sft", "dpo", "policy", "policy-matched", "reward", "joint", "joint-uncoupled", "joint-shuffled", "alternating",
        "sequential")
# An end point or a distance, and how the table calls it.
POINTS = {"P1": "harmful answers (P1)", "P2": "best of 8 (P2)", "P3": "trained further (P3)"} | {
    f"harmful, {distance}": distance for distance in ("seen", "near", "semantic", "far")}


def evidence(path, run):
    """Means over the main cells that are done, in percent, and the contrasts by which the hypotheses are decided."""
    cells = [table for name, table in run["table"].items() if name.endswith(", main")]
    lines = ["| method | " + " | ".join(POINTS.values()) + " | accepted |", "|---" * (len(POINTS) + 2) + "|"]
    for arm in ARMS:
        known = {point: [cell[arm][point] for cell in cells if cell[arm].get(point) is not None] for point in POINTS}
        means = [rate(sum(values) / len(values)) if values else "–" for values in known.values()]
        words = [cell[arm].get("accepted") for cell in cells]
        accepted = "" if arm == "before" else f"{sum(word is True for word in words)} of {len(words)}"
        lines.append("| " + " | ".join([arm, *means, accepted]) + " |")
    lines += ["", "| contrast, points | value | 95 % interval | by base seed |", "|---|---|---|---|"]
    for name, found in run["contrasts"].items():
        if found:
            seeds = ", ".join(f"{value:+.1f}" for value in found["by_seed"].values())
            lines.append(f"| {name} | {found['value']:+.1f} | {found['ci95'][0]:+.1f} … {found['ci95'][1]:+.1f} | {seeds} |")
    lines += ablations(run)
    missing = sum(name.endswith(", main") for name in run["missing"])
    state = f"; **{missing} main cells are missing**" if missing else ""
    machine = ", ".join(sorted({made.split(", ")[-2] for made in run["made_on"]}))
    lines += ["", f"*Means over {len(cells)} cells (base seed × pair){state}; by ground truth; *seen* to *far*: harmful answers (P1) by the distance of the fault "
              f"from what the search could say; {machine}, two cores; `{path.relative_to(ROOT)}`.*"]
    return "\n".join(lines)


# An ablated cell and what it changes of `joint` at one learning rate.
ABLATED = {"npo-mean": "{} (mean log-probabilities)", "npo-sum": "{} (summed)", "no-resampling": "{} without resampling",
           "faulty-replay": "{} on the faulty cells' own pairs, too", "uniform-search": "{} on what uniform searches find",
           "further-under-r0": "{}, trained further under r_0", "second-seed": "{} with a second repair seed, by the grid"}


def ablations(run):
    """Means over the cells of each ablation that are done; nothing where none is."""
    found = {}
    for cell, table in run["table"].items():
        name = cell.rsplit(", ", 1)[1]
        for arm in (arm for arm in table if name in ABLATED and arm != "before"):
            found.setdefault(ABLATED[name].format(arm), []).append(table[arm])
    if not found:
        return []
    points = {**dict(list(POINTS.items())[:3]), "reward_error": "reward error"}
    lines = ["", "| ablation | " + " | ".join(points.values()) + " | accepted |", "|---" * (len(points) + 2) + "|"]
    for arm, cells in found.items():
        means = [rate(sum(cell[point] for cell in cells) / len(cells)) for point in points]
        lines.append("| " + " | ".join([arm, *means, f"{sum(cell['accepted'] is True for cell in cells)} of {len(cells)}"]) + " |")
    return lines


def seconds(spread):
    return f"{spread['median']:.3f} [{spread['q1']:.3f}, {spread['q3']:.3f}]"


def beside_pytorch(path, run):
    """Each task of a baseline: the framework's fastest f32 setting and ares, medians with quartiles."""
    lines = ["| task | PyTorch's best f32 setting | PyTorch s | ares s | ratio |", "|---|---|---|---|---|"]
    for ares in (r for r in run["results"] if r["setting"] == "ares" and "ratio" in r):
        best = next(r for r in run["results"] if (r["task"], r["setting"]) == (ares["task"], ares["beside"]))
        cells = [ares["task"], best["setting"], seconds(best["seconds"]), seconds(ares["seconds"]), f"{ares['ratio']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    made = run["versions"]
    packages = ", ".join(f"{name} {made[name]}" for name in ("torch", "transformers", "peft"))
    tried = ", ".join(dict.fromkeys(r["setting"] for r in run["results"] if "seconds" in r and r["setting"] != "ares"))
    device = next(r["device"] for r in run["results"] if "device" in r)
    lines += ["", f"*{Path(run['arguments']['policy'].partition('+')[0]).parent}; {device}; {run['date'][:10]}; load before {run['load_before']:.1f}"
              f"{', at real-time priority' * run['real_time']}; {packages}; tried: {tried}; "
              f"`{path.relative_to(ROOT)}`.*"]
    return "\n".join(lines)


def dated(path):
    """The date in a result's name, whatever follows it; none where the name has none."""
    found = re.search(r"\d{4}-\d\d-\d\d", path.name)
    return found.group() if found else ""


def main():
    readme = ROOT / "README.md"
    text = readme.read_text()

    def fill(match):
        results = sorted((ROOT / "benches/results").glob(f"{match.group(1)}*.json"))
        newest = {path.name.replace(dated(path), ""): path for path in results}
        tables = [table(path) for path in newest.values()]
        return f"<!-- table: {match.group(1)} -->\n" + "\n\n".join(tables) + "\n<!-- end -->"

    readme.write_text(re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", fill, text, flags=re.S))


if __name__ == "__main__":
    main()
