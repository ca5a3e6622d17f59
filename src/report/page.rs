//! What the report shows, in the order in which it shows it. The template (`page.html`) escapes every text.

use std::collections::BTreeMap;

use minijinja::{Environment, context};
use serde::Serialize;

use crate::detect::measure::{Interval, Measure, MethodResult, Summary};
use crate::error::{Error, Result};
use crate::judge::Verdict;
use crate::run::Manifest;

use super::data::{BEFORE, Outcome, RunData};
use super::figures;
use super::numbers::{number, percent};
use super::table::{Align, Cell, Table};
use super::tables::{self, label, prefill};

/// The whole report as one HTML text: no script, nothing loaded from elsewhere.
pub(crate) fn render(data: &RunData) -> Result<String> {
    let fault = |error: minijinja::Error| Error::File {
        file: super::NAME.into(),
        expected: "a template that fits the data".into(),
        found: error.to_string(),
        remedy: "please report it: a fault in ares".into(),
    };
    let mut environment = Environment::new();
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    // The name's ending is what turns escaping on.
    environment.add_template("page.html", include_str!("page.html")).map_err(fault)?;
    let summary = &data.summary;
    let after = data
        .headline()
        .and_then(|(name, seed)| summary.methods.iter().find(|method| method.name == name && method.seed == seed));
    let page = context! {
        css => include_str!("page.css"),
        summary => summary,
        tau_r => number(Some(summary.thresholds.tau_r), 3),
        benchmark => summary.benchmark_id.chars().take(16).collect::<String>(),
        after => after.map(|method| label(method, summary)),
        figures => headline(summary, after),
        dots => figures::dots(summary),
        methods => html(&tables::methods(summary)),
        reductions => html(&tables::reductions(summary)),
        side_effects => html(&tables::side_effects(summary)),
        attribution => tables::attribution(summary).map(|table| html(&table)),
        costs => html(&tables::costs(summary)),
        probe => summary.probe.as_ref().map(|probe| html(&tables::search(probe))),
        mosaics => figures::mosaics(summary, after),
        transitions => after.and_then(transitions),
        rewards => figures::rewards(data, after),
        training => figures::training(data),
        heats => [figures::archive(data), figures::outcomes_by_tactic(data, after)],
        worst => worst(data, after),
        gates => tables::gates(summary).map(|table| html(&table)),
        warnings => tables::warnings(summary),
        receipt => data.manifest.as_ref().map(receipt),
    };
    environment.get_template("page.html").and_then(|template| template.render(page)).map_err(fault)
}

/// A table as the template draws it.
#[derive(Serialize)]
struct HtmlTable {
    columns: Vec<(String, &'static str)>,
    rows: Vec<Vec<(Cell, &'static str)>>,
}

fn html(table: &Table) -> HtmlTable {
    let class = |align: Align| if align == Align::Left { "left" } else { "right" };
    let classes: Vec<_> = table.columns.iter().map(|(_, align)| class(*align)).collect();
    HtmlTable {
        columns: table.columns.iter().map(|(name, align)| (name.clone(), class(*align))).collect(),
        rows: table.rows.iter().map(|row| row.iter().cloned().zip(classes.iter().copied()).collect()).collect(),
    }
}

/// One figure of the headline, before → after.
#[derive(Serialize)]
struct Figure {
    name: &'static str,
    gloss: &'static str,
    before: String,
    after: Option<String>,
    before_ci: Option<String>,
    after_ci: Option<String>,
    lower: bool,
}

fn headline(summary: &Summary, after: Option<&MethodResult>) -> Vec<Figure> {
    type Pick = fn(&Measure) -> (Option<f64>, Option<Interval>);
    let figures: [(&str, &str, Pick); 4] = [
        ("CFR", "policy and reward model fail together", |m| (m.cfr, m.ci95)),
        ("Harmful answers", "the policy's own answer is harmful", |m| (m.harmful_rate, m.harmful_ci95)),
        ("CFR under prefill", "when the first 5 tokens are forced", |m| {
            (prefill(m, 5), m.prefill_detail.get(&5).and_then(|detail| detail.ci95))
        }),
        ("Reward error", "the harmful reference scores at least as high", |m| (m.reward_error, m.reward_error_ci95)),
    ];
    let interval = |ci: Option<Interval>| ci.map(|[l, h]| format!("[{}, {}]", percent(Some(l)), percent(Some(h))));
    let known = figures.into_iter().filter(|(_, _, pick)| pick(&summary.before).0.is_some());
    let figure = |(name, gloss, pick): (&'static str, &'static str, Pick)| {
        let (before, before_ci) = pick(&summary.before);
        let (value, after_ci) = after.map_or((None, None), |method| pick(&method.measure));
        Figure {
            name,
            gloss,
            before: percent(before),
            after: value.map(|value| percent(Some(value))),
            before_ci: interval(before_ci),
            after_ci: interval(after_ci),
            lower: matches!((before, value), (Some(b), Some(a)) if a < b),
        }
    };
    known.map(figure).collect()
}

/// One row of the verdict transitions: what became of the prompts with this verdict before.
#[derive(Serialize)]
struct Transition {
    verdict: &'static str,
    counts: Vec<(u64, f64)>,
    total: u64,
}

fn transitions(method: &MethodResult) -> Option<Vec<Transition>> {
    let matrix = method.measure.transitions?;
    let row = |(verdict, counts): (&'static str, [u64; 4])| {
        let total = counts.iter().sum::<u64>();
        let shade = |n: u64| (n, n as f64 / total.max(1) as f64);
        Transition { verdict, counts: counts.map(shade).to_vec(), total }
    };
    Some(["sound", "reward", "policy", "coupled"].into_iter().zip(matrix).map(row).collect())
}

/// A failure that is still there after the repair.
#[derive(Serialize)]
struct Remaining {
    verdict: Verdict,
    prompt: String,
    response: String,
    p_harm: String,
    reward: String,
    place: String,
}

/// The ten worst: coupled first, then by how sure the judge is and how high the reward.
fn worst(data: &RunData, after: Option<&MethodResult>) -> Vec<Remaining> {
    let thresholds = data.summary.thresholds;
    let (name, seed) = after.map_or((BEFORE, 0), |method| (method.name.as_str(), method.seed));
    let mut failures: Vec<(&Outcome, Verdict)> = data
        .outcomes_of(name, seed)
        .into_iter()
        .filter_map(|o| Some((o, o.verdict.filter(|verdict| *verdict != Verdict::Sound)?)))
        .collect();
    let badness = |o: &Outcome| {
        let approval = o.reward.map_or(0.5, |r| 1.0 / (1.0 + (-(r - thresholds.tau_r) / thresholds.s).exp()));
        o.p_harm.unwrap_or(0.0) * approval
    };
    failures.sort_by(|(a, va), (b, vb)| vb.cmp(va).then(badness(b).total_cmp(&badness(a))));
    let show = |(o, verdict): (&Outcome, Verdict)| Remaining {
        verdict,
        prompt: shortened(&o.prompt),
        response: shortened(o.response.as_deref().unwrap_or_default()),
        p_harm: number(o.p_harm, 2),
        reward: number(o.reward, 2),
        place: [&o.domain, &o.tactic, &o.family].into_iter().flatten().cloned().collect::<Vec<_>>().join(" · "),
    };
    failures.into_iter().take(10).map(show).collect()
}

/// A report is read by people: 600 characters say enough.
fn shortened(text: &str) -> String {
    match text.char_indices().nth(600) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_string(),
    }
}

/// The main lines of `run.toml`.
#[derive(Serialize)]
struct Receipt {
    lines: Vec<(String, String)>,
    settings: Vec<(String, String)>,
    inputs: BTreeMap<String, String>,
}

fn receipt(manifest: &Manifest) -> Receipt {
    let list = |items: Vec<String>| items.join(", ");
    let versions = manifest.versions.iter().map(|(name, version)| format!("{name} {version}")).collect();
    let mut settings = Vec::new();
    flatten(&mut settings, "", &toml::Value::Table(manifest.settings.clone()));
    Receipt {
        lines: vec![
            ("command".into(), format!("ares {}", manifest.command)),
            ("started".into(), date(manifest.started)),
            ("device".into(), manifest.device.clone()),
            ("seeds".into(), list(manifest.seeds.iter().map(u64::to_string).collect())),
            ("versions".into(), list(versions)),
        ],
        settings,
        inputs: manifest.inputs.iter().map(|(path, hash)| (path.clone(), hash.chars().take(16).collect())).collect(),
    }
}

/// Nested settings as `a.b` and value.
fn flatten(out: &mut Vec<(String, String)>, name: &str, value: &toml::Value) {
    match value {
        toml::Value::Table(table) => {
            for (key, value) in table {
                let name = if name.is_empty() { key.clone() } else { format!("{name}.{key}") };
                flatten(out, &name, value);
            }
        }
        other => out.push((name.to_string(), other.to_string())),
    }
}

/// Seconds since 1970 as `2026-11-21 20:15 UTC` (days to civil date after Howard Hinnant).
fn date(seconds: u64) -> String {
    let (days, rest) = ((seconds / 86_400) as i64, seconds % 86_400);
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    format!("{year}-{month:02}-{day:02} {:02}:{:02} UTC", rest / 3600, rest % 3600 / 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        assert_eq!(date(0), "1970-01-01 00:00 UTC");
        assert_eq!(date(951_782_400), "2000-02-29 00:00 UTC");
        assert_eq!(date(1_795_292_100), "2026-11-21 20:15 UTC");
    }
}
