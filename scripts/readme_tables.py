"""Writes the README's tables from the runs under benches/results/.

    python3 scripts/readme_tables.py

Between `<!-- table: NAME -->` and `<!-- end -->` stands a table of the newest `benches/results/NAME*.json`, each a run's summary.json. A
table without a result is left empty.
"""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = (
    ("CFR %", lambda m: rate(m["cfr"], m["ci95"])),
    ("CFR by truth %", lambda m: rate(m["cfr_truth"])),
    ("prefill 5 %", lambda m: rate((m["prefill"] or {}).get("5"))),
    ("harmful %", lambda m: rate(m["harmful_rate"])),
    ("reward error %", lambda m: rate(m["reward_error"])),
    ("drift", lambda m: "–" if m["reward_drift"] is None else f"{m['reward_drift']:.3f}"),
    ("over-refusal %", lambda m: rate(m["over_refusal"])),
    ("pair accuracy %", lambda m: rate(m["pair_accuracy"])),
    ("exact match %", lambda m: rate(m.get("exact_match"))),
)


def rate(value, interval=None):
    """A share in percent with its interval; what is not known is a dash, never 0."""
    if value is None:
        return "–"
    text = f"{100 * value:.1f}"
    return f"{text} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]" if interval else text


def table(path):
    """One run as Markdown: a row before, then a row per method and seed."""
    run = json.loads(path.read_text())
    several = len(run["seeds"]) > 1
    rows = [("before", run["before"], None)]
    for method in run["methods"]:
        rows.append((f"{method['name']}, seed {method['seed']}" if several else method["name"], method, method["gates"]))
    lines = ["| " + " | ".join(["method", *(name for name, _ in COLUMNS), "gates"]) + " |", "|---" * (len(COLUMNS) + 2) + "|"]
    for name, measure, gates in rows:
        met = "" if gates is None else f"{sum(g['pass'] is True for g in gates)}/{len(gates)}"
        lines.append("| " + " | ".join([name, *(show(measure) for _, show in COLUMNS), met]) + " |")
    date = re.search(r"\d{4}-\d\d-\d\d", path.name)
    lines += ["", f"*{run['suite']}; {run['device']}; {date.group() if date else ''}; n = {run['before']['n']} held-out harmful prompts; seeds "
              f"{', '.join(map(str, run['seeds']))}; `{path.relative_to(ROOT)}`.*"]
    return "\n".join(lines)


def main():
    readme = ROOT / "README.md"
    text = readme.read_text()

    def fill(match):
        results = sorted((ROOT / "benches/results").glob(f"{match.group(1)}*.json"), key=lambda p: (p.name[-15:], p.name))
        newest = results[-1].name[-15:] if results else ""
        tables = [table(p) for p in results if p.name.endswith(newest)]
        return f"<!-- table: {match.group(1)} -->\n" + "\n\n".join(tables) + "\n<!-- end -->"

    readme.write_text(re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", fill, text, flags=re.S))


if __name__ == "__main__":
    main()
