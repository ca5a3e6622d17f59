//! `report.html` from a synthetic run directory: what is drawn is what the run measured, every foreign text is escaped,
//! missing parts are left out. The run stays in the build's scratch folder, for a look at its page in a browser.

mod sample;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use ares::report;
use sample::*;
use serde_json::{Value, json};

#[test]
fn the_report_holds_every_part_and_escapes_every_text() {
    let html = page(&sample("report-sample"));
    for part in [
        "Methods at equal steps",
        "no evidence about real models",
        "Verdicts",
        "What the reward model says",
        "Search archive",
        "Held-out prompts, CFR per topic and tactic",
        "Training",
        "Worst remaining failures",
        "benign nll growth",
        "weights.npo</dt><dd>0.03",
        "2026-11-21 20:15 UTC",
        "cannot show the absence of goal misgeneralisation",
        "displacement",
    ] {
        assert!(html.contains(part), "{part:?} is missing");
    }
    assert!(html.contains("&lt;script&gt;alert(1)&lt;&#x2f;script&gt;"), "the hostile prompt must be shown as text");
    for foreign in ["<script", "<img", "http:", "https:", "@import", "url(", "NaN", "undefined"] {
        assert!(!html.contains(foreign), "{foreign:?} must not be in a self-contained page");
    }
    assert_eq!(html, page(&sample("report-sample")), "the same run gives the same bytes");
}

#[test]
fn rates_stand_where_the_axis_says() {
    let (html, summary) = (page(&sample("report-rates")), summary());
    let chart = section(&html, "Methods at equal steps");
    let dots = chart.split("</svg>").next().unwrap();
    let panels: Vec<&str> = dots.split("<text class=\"title\"").skip(1).collect();
    let rates = [("cfr", "ci95"), ("", ""), ("harmful_rate", "harmful_ci95"), ("reward_error", "reward_error_ci95")];
    assert_eq!(panels.len(), rates.len());
    for (panel, (rate, interval)) in panels.iter().zip(rates).filter(|(_, (rate, _))| !rate.is_empty()) {
        let value = axis(panel, "x");
        let (dots, whiskers) = (elements(panel, "circle"), elements(panel, "line class=\"whisker"));
        let states = [&summary["before"], &summary["methods"][0], &summary["methods"][1]];
        assert_eq!((dots.len(), whiskers.len()), (3, 3));
        for ((state, (dot, _)), (whisker, _)) in states.iter().zip(dots).zip(whiskers) {
            close(value(number(dot["cx"])), 100.0 * state[rate].as_f64().unwrap(), 0.1);
            close(value(number(whisker["x1"])), 100.0 * state[interval][0].as_f64().unwrap(), 0.1);
            close(value(number(whisker["x2"])), 100.0 * state[interval][1].as_f64().unwrap(), 0.1);
        }
    }
    let trade = chart.split("class=\"trade\"").nth(1).unwrap().split("</svg>").next().unwrap();
    let (cost, left, arms) = (axis(trade, "x"), axis(trade, "y"), elements(trade, "circle"));
    assert_eq!(arms.len(), 3);
    for (state, (arm, _)) in [&summary["before"], &summary["methods"][0], &summary["methods"][1]].iter().zip(arms) {
        close(cost(number(arm["cx"])), 100.0 * state["over_refusal"].as_f64().unwrap(), 0.1);
        close(left(number(arm["cy"])), 100.0 * state["harmful_rate"].as_f64().unwrap(), 0.2);
    }
    for shown in ["13.9 [11.8, 16.1]", "13.9</span><span class=\"arrow\">→</span><span class=\"is-good\">1.8</span>"]
    {
        assert!(html.contains(shown), "{shown}");
    }
}

#[test]
fn areas_and_transitions_are_the_counts() {
    let html = page(&sample("report-verdicts"));
    let verdicts = section(&html, "Verdicts");
    let mosaics: Vec<&str> = verdicts.split("<figure>").skip(1).collect();
    for (mosaic, cells) in mosaics.iter().zip([[620, 75, 173, 140], [920, 46, 24, 18]]) {
        let n: f64 = cells.iter().sum::<i32>().into();
        for (verdict, count) in ["sound", "reward", "policy", "coupled"].iter().zip(cells) {
            let (tile, _) = &elements(mosaic, &format!("rect class=\"v-{verdict}\""))[0];
            // The gap between tiles takes a little from each side.
            let area = (number(tile["width"]) + 2.0) * (number(tile["height"]) + 2.0) / (430.0 * 230.0);
            close(area, f64::from(count) / n, 0.002);
        }
    }
    let shown: Vec<f64> = elements(verdicts, "td").iter().map(|(_, text)| number(text)).collect();
    let matrix = summary()["methods"][1]["transitions"].clone();
    for (row, shown) in matrix.as_array().unwrap().iter().zip(shown.chunks(5)) {
        let counts: Vec<f64> = row.as_array().unwrap().iter().map(|n| n.as_f64().unwrap()).collect();
        assert_eq!((&shown[..4], shown[4]), (&counts[..], counts.iter().sum()));
    }
}

#[test]
fn reward_distributions_hold_every_score() {
    let html = page(&sample("report-rewards"));
    let histograms: Vec<&str> = section(&html, "What the reward model says").split("<figure>").skip(1).collect();
    assert_eq!(histograms.len(), 2);
    for (figure, method) in histograms.iter().zip(["before", "joint"]) {
        let threshold = number(elements(figure, "line class=\"threshold\"")[0].0["x1"]);
        close(axis(figure, "x")(threshold), 0.35, 0.02);
        let series = [("safe reference y⁺", "reward_safe"), ("harmful reference y⁻", "reward_harmful")];
        for ((path, _), (name, field)) in elements(figure, "path class=\"area").iter().zip(series) {
            let scores: Vec<f64> = of(method).map(|row| row[field].as_f64().unwrap()).collect();
            let share = scores.iter().filter(|score| **score >= 0.35).count() as f64 / scores.len() as f64;
            let expected = format!("{name}, n = {}, approved {:.1} %", scores.len(), 100.0 * share);
            assert!(figure.contains(&expected), "{expected}");
            // Bins as pairs of corners: the mass right of the threshold over all of it.
            let corners: Vec<f64> =
                path["d"].split(['M', 'L', 'Z', ' ']).filter(|n| !n.is_empty()).map(number).collect();
            let (base, bins) = (corners[1], corners[2..corners.len() - 2].chunks(4));
            let mass = |from: f64| bins.clone().filter(|c| c[0] >= from).map(|c| base - c[1]).sum::<f64>();
            close(mass(threshold) / mass(0.0), share, 0.01);
        }
    }
}

#[test]
fn heat_is_the_share_of_failures() {
    let html = page(&sample("report-heat"));
    let held_out = &html[html.find("Held-out prompts, CFR per").unwrap()..];
    for (figure, method) in held_out.split("<figure>").skip(1).zip(["before", "joint"]) {
        let mut cells: BTreeMap<String, Vec<bool>> = BTreeMap::new();
        for row in of(method) {
            let place = format!("{} × {}", row["domain"].as_str().unwrap(), row["tactic"].as_str().unwrap());
            cells.entry(place).or_default().push(row["verdict"] == "coupled");
        }
        for (place, hits) in cells {
            let rate = hits.iter().filter(|hit| **hit).count() as f64 / hits.len() as f64;
            let hint = format!("<title>{place}: {rate:.2} (n = {})</title>", hits.len());
            let cell = figure.split("<g>").find(|cell| cell.contains(&hint)).unwrap_or_else(|| panic!("{hint}"));
            let heat =
                elements(cell, "rect class=\"hot\"").first().map_or(0.0, |(rect, _)| number(rect["fill-opacity"]));
            close(heat, rate / 0.5, 0.001); // the hottest cell of both maps has a rate of one half
        }
    }
    let archive = &html[html.find("Search archive").unwrap()..];
    assert!(archive.contains("<title>forge × plain: 2.00 (n = 3)</title>"), "uniform queries are not the archive's");
}

#[test]
fn authors_stand_beside_the_grammar() {
    let html = page(&sample("authors"));
    let search = section(&html, "The search, and where the failures lie");
    for (what, value) in
        [("calls of the attacker", "800"), ("texts kept %", "62.5"), ("refused", "290 known, 10 off topic")]
    {
        assert!(search.contains(&format!("<dt>{what}</dt><dd>{value}</dd>")), "{what}");
    }
    let table = &search[search.find("By author").unwrap()..search.find("Who made the probe").unwrap()];
    let cells: Vec<&str> = elements(table, "td").into_iter().map(|(_, text)| text.trim()).collect();
    assert_eq!(cells, ["grammar", "500", "311", "102", "204.0", "retarget", "500", "200", "100", "200.0"]);
}

#[test]
fn curves_run_through_the_measured_losses() {
    let html = page(&sample("report-curves"));
    let training = section(&html, "Training");
    let panel = training.split("<figure>").find(|figure| figure.contains("reward loss terms")).unwrap();
    let step = axis(panel, "x");
    let loss = axis(panel, "y");
    let points = elements(panel, "polyline class=\"raw c2\"")[0].0["points"];
    let found = points.split(' ').map(|point| point.split_once(',').unwrap());
    let expected = metrics().into_iter().filter_map(|m| Some((m["step"].as_f64()?, m["terms"]["bt"].as_f64()?)));
    assert_eq!((found.clone().count(), expected.clone().count()), (16, 16), "null is no point");
    for ((x, y), (at, value)) in found.zip(expected) {
        close(step(number(x)), at, 0.05);
        close(loss(number(y)), value, 0.01);
    }
}

#[test]
fn the_worst_failures_come_first() {
    let html = page(&sample("report-worst"));
    let failures: Vec<&str> = section(&html, "Worst remaining failures").split("<article").skip(1).collect();
    assert_eq!(failures.len(), 10);
    let kinds: Vec<bool> = failures.iter().map(|failure| failure.contains("<b>coupled</b>")).collect();
    assert!(kinds.is_sorted_by(|a, b| a >= b) && kinds[0], "{kinds:?}");
    let worst = of("joint").filter(|row| row["verdict"] == "coupled").max_by(|a, b| {
        a["reward"].as_f64().unwrap().total_cmp(&b["reward"].as_f64().unwrap()) // all with one p_harm
    });
    let expected = worst.unwrap()["response"].as_str().unwrap().lines().next().unwrap().to_string();
    assert!(failures[0].contains(&expected), "{expected}: {}", failures[0]);
}

#[test]
fn missing_parts_are_left_out() {
    let run = sample("report-bare");
    for file in ["outcomes.jsonl", "metrics.jsonl", "probes.jsonl", "run.toml"] {
        fs::remove_file(run.join(file)).unwrap();
    }
    let html = page(&run);
    for part in ["What the reward model says", "Held-out prompts, CFR per", "Training", "Worst remaining", "Receipt"] {
        assert!(!html.contains(part), "{part:?} has nothing to show");
    }
    assert!(html.contains("Methods at equal steps") && html.contains("Gates"));
    let mut summary = summary();
    for (field, nothing) in [("methods", json!([])), ("probe", Value::Null), ("before", json!({}))] {
        summary[field] = nothing;
    }
    fs::write(run.join("summary.json"), summary.to_string()).unwrap();
    let html = page(&run);
    assert!(html.contains("before") && !html.contains("NaN"), "nothing found and nothing repaired is a report too");
}

/// A loop of three rounds, of which the second was refused, as `ares run` leaves it.
fn loop_of_three(name: &str) -> (PathBuf, Value) {
    let run = sample(name);
    let mut whole = summary();
    let methods = whole["methods"].clone();
    let round = |n: u64, repair: &Value, why_not: Value| {
        let mut repair = repair.clone();
        (repair["seed"], repair["accepted"]) = (json!(n), json!(why_not.is_null()));
        json!({
            "round": n, "search": {"queries": 1000, "coupled": 400 / n, "per_1000": 400 / n}, "failures": 240, "repair": repair,
            "before": whole["before"], "why_not": why_not, "reprobe": {"queries": 1000, "coupled": 7 * n, "per_1000": 7 * n},
        })
    };
    let refused = json!(format!("reward_drift is 0.1200, limit 0.0800 {HOSTILE}"));
    let rounds =
        [round(1, &methods[1], Value::Null), round(2, &methods[0], refused), round(3, &methods[1], Value::Null)];
    whole["rounds"] = json!(rounds);
    let mut last = methods[1].clone();
    last["name"] = json!("run");
    whole["methods"] = json!([last]);
    let rows = outcomes().into_iter().filter(|row| row["method"] == "joint");
    let named = |row: &Value, method: &str, seed: u64| {
        let mut row = row.clone();
        (row["method"], row["seed"]) = (json!(method), json!(seed));
        format!("{row}\n")
    };
    let rows = rows
        .flat_map(|row| [("run", 1), ("round-1", 1), ("round-2", 2)].map(|(method, seed)| named(&row, method, seed)));
    fs::write(run.join("outcomes.jsonl"), rows.collect::<String>()).unwrap();
    let asked = [(1, false, 3), (1, true, 2), (2, true, 1)].into_iter().flat_map(|(round, after, hits)| {
        let row = json!({"domain": "forge", "topic": "x", "tactic": HOSTILE, "verdict": "coupled", "after": after, "round": round});
        vec![format!("{row}\n"); hits]
    });
    fs::write(run.join("probes.jsonl"), asked.collect::<String>()).unwrap();
    fs::write(run.join("summary.json"), whole.to_string()).unwrap();
    (run, whole)
}

#[test]
fn a_loop_shows_its_rounds_and_the_rows_behind_them() {
    let (run, summary) = loop_of_three("report-loop");
    let html = page(&run);
    let rounds = section(&html, "Rounds");
    let rows: Vec<&str> = rounds.split("<tr>").skip(2).collect();
    let cells = |row: &str| elements(row, "td").iter().map(|(_, text)| text.to_string()).collect::<Vec<_>>();
    assert_eq!(rows.len(), 3);
    // The first cell is a link, so its text lies deeper.
    assert_eq!(cells(rows[0])[1..4], ["400.0", "240", "13.9 → 1.8"]);
    assert_eq!(cells(rows[1])[1..4], ["200.0", "240", "13.9 → 2.9"]);
    assert!(rows[1].contains("class=\"right bad\">no<") && rows[2].contains("class=\"right good\">accepted<"));
    assert!(
        rounds.contains("round 2 was refused and rolled back: reward_drift is 0.1200, limit 0.0800 &lt;script&gt;")
    );
    // After a refused round the curve shows what it was rolled back to.
    let chart = rounds.split("<figure>").nth(1).unwrap();
    let value = axis(chart, "y");
    let curve = |n: usize| {
        let points = elements(chart, &format!("polyline class=\"raw c{n}\""))[0].0["points"];
        points.split(' ').map(|point| value(number(point.split_once(',').unwrap().1))).collect::<Vec<_>>()
    };
    for (n, expected) in [(0, [13.89, 1.79, 13.89, 1.79]), (3, [40.0, 0.7, 1.4, 2.1])] {
        let found = curve(n);
        assert_eq!(found.len(), 4);
        found.into_iter().zip(expected).for_each(|(found, expected)| close(found, expected, 0.2));
    }
    // Every link leads to rows: of round 1 all failures, the worst first.
    for anchor in ["round-1", "round-2", "round-3", "worst"] {
        assert!(
            html.contains(&format!("href=\"#{anchor}\"")) && html.contains(&format!("id=\"{anchor}\"")),
            "{anchor}"
        );
    }
    let behind: Vec<&str> = rounds.split("<details").skip(1).collect();
    let failures = of("joint").filter(|row| row["verdict"] != "sound").count();
    assert_eq!((behind.len(), behind[0].matches("<article").count()), (3, failures));
    assert!(behind[0].split("<article").nth(1).unwrap().contains("<b>coupled</b>"));
    assert!(behind[2].contains("no failure is left"), "no row of round 3 is there");
    let archive = &html[html.find("Search archive").unwrap()..];
    for (title, hits) in [("before", 3), ("after round 1", 2), ("after round 2", 1)] {
        let figure =
            archive.split("<figure>").find(|figure| figure.contains(&format!(">{title}</figcaption>"))).unwrap();
        assert!(figure.contains(&format!("{hits}.00 (n = {hits})")), "{title}");
    }
    assert!(!html.contains("<script") && !html.contains("unfinished"));
    assert_eq!(summary["rounds"].as_array().unwrap().len(), 3);
}

#[test]
fn an_unfinished_run_is_reported_as_far_as_it_is() {
    let (run, mut summary) = loop_of_three("report-unfinished");
    summary["unfinished"] = json!("round 2 of at most 3 is done <b>");
    summary["methods"] = json!([]);
    summary["rounds"].as_array_mut().unwrap().pop();
    fs::write(run.join("summary.json"), summary.to_string()).unwrap();
    // The file was growing when the run was stopped.
    let mut probes = fs::read_to_string(run.join("probes.jsonl")).unwrap();
    probes.push_str("{\"domain\": \"for");
    fs::write(run.join("probes.jsonl"), &probes).unwrap();
    let html = page(&run);
    for part in
        ["This run is unfinished", "round 2 of at most 3 is done &lt;b&gt;", "ares demo --resume", "Search archive"]
    {
        assert!(html.contains(part), "{part}");
    }
    assert!(!html.contains("<h3>Cost</h3>") && !html.contains("NaN"), "what is not there is left out");
    // The same line is damage where nothing grows any more.
    summary["unfinished"] = Value::Null;
    fs::write(run.join("summary.json"), summary.to_string()).unwrap();
    let error = report::write(&run, &[]).unwrap_err().to_string();
    assert!(error.contains("probes.jsonl") && error.contains("line 7"), "{error}");
}

#[test]
fn damaged_and_foreign_runs_are_refused_with_a_remedy() {
    let message = |run: &Path, others: &[PathBuf]| report::write(run, others).unwrap_err().to_string();
    let (run, other) = (sample("report-damaged"), sample("report-other"));
    let mut summary = summary();
    summary["benchmark_id"] = json!("another");
    fs::write(other.join("summary.json"), summary.to_string()).unwrap();
    let text = message(&run, &[other]);
    assert!(text.contains("one benchmark") && text.contains("another"), "{text}");
    fs::write(run.join("metrics.jsonl"), "{}\n{oops\n").unwrap();
    let text = message(&run, &[]);
    assert!(text.contains("metrics.jsonl") && text.contains("line 2"), "{text}");
    fs::write(run.join("summary.json"), "{\"schema\": 7}").unwrap();
    let text = message(&run, &[]);
    assert!(text.contains("expected schema 1, found schema 7"), "{text}");
    let text = message(Path::new("/nowhere/run"), &[]);
    assert!(text.contains("found no summary.json"), "{text}");
}

fn page(run: &Path) -> String {
    fs::read_to_string(report::write(run, &[]).unwrap()).unwrap()
}

/// What stands under a heading.
fn section<'a>(html: &'a str, heading: &str) -> &'a str {
    let begin = html.find(&format!("<h2>{heading}</h2>")).unwrap_or_else(|| panic!("no {heading}"));
    html[begin..].split("</section>").next().unwrap()
}

/// The elements that begin with `<name`: their further attributes, and the text up to the next tag.
fn elements<'a>(html: &'a str, name: &str) -> Vec<(BTreeMap<&'a str, &'a str>, &'a str)> {
    let open = format!("<{name}");
    let found = html.split(&open).skip(1).map(|rest| rest.split_once('>').unwrap());
    let attributes = |tag: &'a str| tag.split_inclusive("\" ").filter_map(|pair| pair.split_once("=\""));
    let clean = |(name, value): (&'a str, &'a str)| (name.trim(), value.trim_end_matches(['"', ' ', '/']));
    found.map(|(tag, rest)| (attributes(tag).map(clean).collect(), rest.split('<').next().unwrap())).collect()
}

fn number(text: &str) -> f64 {
    text.replace('−', "-").parse().unwrap_or_else(|_| panic!("no number: {text:?}"))
}

#[track_caller]
fn close(found: f64, expected: f64, tolerance: f64) {
    assert!((found - expected).abs() <= tolerance, "found {found}, expected {expected}");
}

/// From pixels to what the labels of a chart's axis say: those below each other on `y`, those beside each other on `x`.
fn axis(svg: &str, along: &str) -> impl Fn(f64) -> f64 {
    let labels = elements(svg, if along == "y" { "text class=\"tick end\"" } else { "text class=\"tick\"" });
    let known = labels.iter().filter(|(_, text)| text.replace('−', "-").parse::<f64>().is_ok());
    let ticks: Vec<(f64, f64)> = known.map(|(label, text)| (number(label[along]), number(text))).collect();
    let ((from, low), (to, high)) = (ticks[0], *ticks.last().unwrap());
    // The template sets the labels of the vertical axis four pixels below their lines.
    let shift = if along == "y" { 4.0 } else { 0.0 };
    move |at| low + (at + shift - from) / (to - from) * (high - low)
}
