//! What a search found, and the rounds of a loop.

use std::collections::BTreeMap;

use super::{accepted, gate_count, thousandths};
use crate::detect::measure::{Measure, MethodResult};
use crate::judge::Verdict;
use crate::probe::{ProbeResult, Writing, Yield};
use crate::report::data::Query;
use crate::report::numbers::{UNKNOWN, number, percent};
use crate::report::table::Align::{Left, Right};
use crate::report::table::{Cell, Column, Table};
use crate::run::summary::{Hits, Round, Summary};

/// Shows the rounds of a loop side by side, each measured on the gate split; none where there were none.
pub(crate) fn rounds(summary: &Summary) -> Option<Table> {
    fn change(round: &Round, of: fn(&Measure) -> Option<f64>) -> String {
        let after = round.repair.as_ref().map(|repair| format!(" → {}", percent(of(&repair.measure))));
        format!("{}{}", percent(of(&round.before)), after.unwrap_or_default())
    }
    let found = |hits: Option<Hits>| number(hits.and_then(|hits| hits.per_1000), 1);
    let repair = |round: &Round, show: fn(&MethodResult) -> Cell| round.repair.as_ref().map_or(UNKNOWN.into(), show);
    let columns: [Column<&Round>; 13] = [
        ("round", Left, &|round| round.round.to_string().into()),
        ("found per 1000", Right, &|round| found(Some(round.search)).into()),
        ("repaired", Right, &|round| round.failures.to_string().into()),
        ("CFR %", Right, &|round| change(round, |m| m.cfr).into()),
        ("harmful %", Right, &|round| change(round, |m| m.harmful_rate).into()),
        ("reward error %", Right, &|round| change(round, |m| m.reward_error).into()),
        ("over-refusal %", Right, &|round| change(round, |m| m.over_refusal).into()),
        ("drift", Right, &|round| repair(round, |r| thousandths(r.measure.reward_drift).into())),
        ("found after", Right, &|round| found(Some(round.reprobe)).into()),
        ("held out", Right, &|round| match (round.search_held_out, round.reprobe_held_out) {
            (None, None) => UNKNOWN.into(),
            (before, after) => format!("{} → {}", found(before), found(after)).into(),
        }),
        ("lr", Right, &|round| repair(round, |r| r.lr.map_or(UNKNOWN.to_string(), |lr| format!("{lr:e}")).into())),
        ("gates", Right, &|round| repair(round, gate_count)),
        ("accepted", Right, &|round| repair(round, |r| accepted(r.accepted))),
    ];
    (!summary.rounds.is_empty()).then(|| Table::of(&summary.rounds, &columns).without_empty_columns())
}

/// Says of each refused round why.
pub(crate) fn refusals(summary: &Summary) -> Vec<String> {
    let why =
        |round: &Round| Some(format!("round {} was refused and rolled back: {}", round.round, round.why_not.as_ref()?));
    summary.rounds.iter().filter_map(why).collect()
}

/// Shows what the search found, beside the same number of uniform queries.
pub(crate) fn search(probe: &ProbeResult) -> Table {
    let lift = match (probe.lift, probe.lift_ci95) {
        (Some(lift), Some([low, high])) => format!("{lift:.2} [{low:.2}, {high:.2}]"),
        (lift, _) => number(lift, 2),
    };
    let writing = probe.writing.as_ref();
    let rows = [
        ("queries", probe.queries.to_string()),
        ("coupled failures", probe.coupled_found.to_string()),
        ("distinct among them", probe.distinct.to_string()),
        ("distinct per 1000 queries", number(probe.per_1000, 1)),
        ("uniform, per 1000 queries", number(probe.uniform_per_1000, 1)),
        ("lift over uniform [95 %]", lift),
        ("archive coverage %", percent(probe.diversity.coverage)),
        ("evenness over tactics", number(probe.diversity.evenness, 2)),
        ("self-BLEU", number(probe.diversity.self_bleu, 2)),
        ("ms per failure", number(probe.diversity.seconds_per_failure.map(|s| 1e3 * s), 1)),
        ("after repair, per 1000 queries", number(probe.reprobe_per_1000, 1)),
        ("calls of the attacker", writing.map_or(UNKNOWN.to_string(), |writing| writing.calls.to_string())),
        ("texts kept %", percent(writing.map(|writing| writing.kept as f64 / writing.calls.max(1) as f64))),
        ("refused", writing.map_or(UNKNOWN.to_string(), Writing::reasons)),
    ];
    let known = rows.into_iter().filter(|(_, value)| value != UNKNOWN);
    Table::of(known, &[("search", Left, &|(name, _)| (*name).into()), ("", Right, &|(_, value)| value.clone().into())])
}

/// Shows what was found by whom, where an attacker wrote beside the grammar.
pub(crate) fn authors(probe: &ProbeResult) -> Option<Table> {
    let per_1000 = |found: &Yield| 1000.0 * found.distinct as f64 / found.queries as f64;
    let columns: [Column<(&String, &Yield)>; 5] = [
        ("author", Left, &|(author, _)| author.as_str().into()),
        ("queries", Right, &|(_, found)| found.queries.to_string().into()),
        ("coupled", Right, &|(_, found)| found.coupled.to_string().into()),
        ("distinct", Right, &|(_, found)| found.distinct.to_string().into()),
        ("distinct per 1000", Right, &|(_, found)| number(Some(per_1000(found)), 1).into()),
    ];
    probe.writing.as_ref().map(|writing| Table::of(&writing.authors, &columns))
}

/// Shows what the search found by tactic, where tactics have names elsewhere, too.
pub(crate) fn tactics(queries: &[Query]) -> Option<Table> {
    #[derive(Default)]
    struct Found {
        known_as: String,
        asked: u64,
        coupled: u64,
    }
    let mut found = BTreeMap::<&str, Found>::new();
    for query in queries.iter().filter(|query| !query.after && !query.uniform) {
        let tactic = found.entry(&query.tactic).or_default();
        tactic.known_as = query.tags.join(", ");
        tactic.asked += 1;
        tactic.coupled += u64::from(query.verdict == Some(Verdict::Coupled));
    }
    let per_1000 = |found: &Found| 1000.0 * found.coupled as f64 / found.asked as f64;
    let columns: [Column<(&str, Found)>; 5] = [
        ("tactic", Left, &|(tactic, _)| (*tactic).into()),
        ("known as", Left, &|(_, found)| found.known_as.as_str().into()),
        ("queries", Right, &|(_, found)| found.asked.to_string().into()),
        ("coupled", Right, &|(_, found)| found.coupled.to_string().into()),
        ("per 1000", Right, &|(_, found)| number(Some(per_1000(found)), 1).into()),
    ];
    let tagged = found.values().any(|found| !found.known_as.is_empty());
    tagged.then(|| Table::of(found, &columns))
}
