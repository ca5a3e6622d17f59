//! What an attacker writes, and what becomes of it before anything is asked of the policy.

use super::genotype::Genotype;
use super::operators::{Child, Operator, Parent, author, name};
use super::plausible::Plausible;
use super::record::ProbeRecord;
use super::search::Search;
use crate::attacker::{Attack, Draft, Flaw, Task, Told, Way, Written, asks_for};
use crate::error::Result;
use crate::judge::{AMBIGUITY_BAND as BAND, Judge};
use crate::model::Subject;
use crate::model::subject::ask_some;
use crate::text::Prompt;
use crate::text::ngrams::{Seen, grams};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Texts that an attacker may write for one proposal before the grammar makes it.
const TRIES: usize = 3;
/// Prompts of a cell that it is shown at most.
const SHOWN: usize = 3;

/// What became of an attacker's texts. Its calls are no queries: those are the policy's.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Writing {
    /// Texts that it was asked for.
    pub calls: usize,
    /// Those that the policy was asked.
    pub kept: usize,
    pub refused: BTreeMap<Flaw, usize>,
    /// The grammar, and what the attacker did.
    pub authors: BTreeMap<String, Yield>,
}

/// What was found by one author.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Yield {
    pub queries: usize,
    /// Coupled failures.
    pub coupled: usize,
    /// Those of which none is a near-duplicate of an earlier one, whoever found that.
    pub distinct: usize,
}

impl Writing {
    /// Sums of several searches.
    pub(super) fn add(mut self, other: Writing) -> Writing {
        self.calls += other.calls;
        self.kept += other.kept;
        other.refused.iter().for_each(|(flaw, n)| *self.refused.entry(*flaw).or_default() += n);
        for (author, found) in &other.authors {
            let sum = self.authors.entry(author.clone()).or_default();
            sum.queries += found.queries;
            sum.coupled += found.coupled;
            sum.distinct += found.distinct;
        }
        self
    }

    /// Why texts were refused, the most frequent reason first.
    pub(crate) fn reasons(&self) -> String {
        let mut reasons: Vec<_> = self.refused.iter().collect();
        reasons.sort_by_key(|(_, n)| std::cmp::Reverse(**n));
        let reason = |(flaw, n): (&Flaw, &usize)| format!("{n} {}", flaw.name());
        if reasons.is_empty() { "none".into() } else { reasons.into_iter().map(reason).collect::<Vec<_>>().join(", ") }
    }

    pub(super) fn count(&mut self, record: &ProbeRecord, coupled: bool, distinct: bool) {
        let author = author(&record.operators);
        let found = self.authors.entry(name(author).to_string()).or_default();
        found.queries += 1;
        found.coupled += usize::from(coupled);
        found.distinct += usize::from(distinct);
        self.kept += usize::from(author.is_some());
    }
}

/// What is to be written: the child that the text will make, and whom it is bred from.
struct Order {
    child: Child,
    task: Task,
}

impl Search<'_, '_> {
    /// Lets each of the batch's `n` proposals be drawn to an author, and returns those that an attacker could write: none a near-duplicate of
    /// an elite, a found failure or another of `company`. Each try is a unit of the journal.
    pub(super) fn write(&mut self, n: usize, company: &mut Seen) -> Result<Vec<Child>> {
        let Some(attack) = &self.world.attack else { return Ok(Vec::new()) };
        let ways = attack.attacker.ways().to_vec();
        let authors: Vec<_> = (0..n).map(|_| self.sampler.author(&ways, &mut self.rng)).collect();
        let mut open: Vec<Order> = authors.into_iter().flatten().filter_map(|way| self.order(way, &ways)).collect();
        let mut out = Vec::new();
        for _ in 0..TRIES {
            if open.is_empty() {
                break;
            }
            for order in &mut open {
                (order.task.number, self.writing.calls) = (self.writing.calls as u64, self.writing.calls + 1);
            }
            let drafts = self.drafts(&open)?;
            let mut refused = Vec::new();
            for (order, draft) in open.into_iter().zip(drafts) {
                match draft.and_then(|draft| self.fresh(draft, company)) {
                    Ok(draft) => {
                        self.aims.propose(self.world.grammar, &order.child.genotype);
                        out.push(Child { written: Some(draft), ..order.child });
                    }
                    Err(flaw) => {
                        *self.writing.refused.entry(flaw).or_default() += 1;
                        refused.push(order);
                    }
                }
            }
            open = refused;
        }
        open.iter().for_each(|order| self.sampler.credit(Some(order.task.way), false));
        Ok(out)
    }

    /// A cell, and the prompts that are needed. With no elite there is only writing from nothing, and with an attacker that cannot, `None`.
    fn order(&mut self, way: Way, ways: &[Way]) -> Option<Order> {
        let grammar = self.world.grammar;
        let target = self.aims.draw(grammar, None, &mut self.rng);
        let domain = grammar.domain_of[target.topic];
        let mut shown: Vec<Parent> = Vec::new();
        for _ in 0..SHOWN {
            let elite = self.archive.parent(grammar, domain, target.tactic, &mut self.rng);
            shown.extend(elite.filter(|elite| shown.iter().all(|known| known.0 != elite.0)));
        }
        let (parent, mate) = (shown.first().copied(), shown.last().copied());
        let (way, genotype, parents) = match (way, parent, mate) {
            (Way::Rephrase, Some(parent), _) => (way, parent.1, vec![parent]),
            (Way::Retarget, Some(parent), _) => {
                let genotype = Genotype { topic: target.topic, form: target.form, ..parent.1 };
                (way, genotype, vec![parent])
            }
            (Way::Cross, Some(parent), Some(mate)) if parent.0 != mate.0 => {
                let genotype = Genotype { topic: parent.1.topic, form: parent.1.form, ..mate.1 };
                (way, genotype, vec![parent, mate])
            }
            _ if ways.contains(&Way::Write) => (Way::Write, target, Vec::new()),
            _ => return None,
        };
        let tau_r = self.world.thresholds.tau_r;
        let told = |parent: &Parent| {
            let record = &self.records[parent.0];
            let judged = record.judged();
            let (p_harm, margin) = judged.map_or((0.0, 0.0), |judged| (judged.p_harm, judged.reward - tau_r));
            Told { prompt: record.prompt.clone(), p_harm, margin }
        };
        let task = Task {
            way,
            goal: grammar.topics[genotype.topic].goal.clone(),
            request: grammar.forms[genotype.form].template.replace("{goal}", &grammar.topics[genotype.topic].goal),
            persona: grammar.personas[genotype.persona].text.clone(),
            tactic: grammar.tactics[genotype.tactic].id.clone(),
            example: grammar.compose(&genotype),
            parent: parents.first().map(told),
            mate: parents.get(1).map(told),
            elites: shown.iter().map(|parent| self.records[parent.0].prompt.clone()).collect(),
            number: 0,
        };
        let parents = parents.into_iter().map(|parent| parent.0).collect();
        Some(Order { child: Child { genotype, written: None, parents, operators: vec![Operator::Written(way)] }, task })
    }

    /// One text per order, or what is wrong with it in itself. One unit.
    fn drafts(&mut self, orders: &[Order]) -> Result<Vec<Result<Draft, Flaw>>> {
        let Search { world, settings, plausible, .. } = self;
        let Some(attack) = &mut world.attack else { return Ok(Vec::new()) };
        let tau_h = world.thresholds.tau_h;
        let (subject, judge, refusal) = (&mut *world.subject, &mut world.judge, &mut world.refusal);
        world.journal.unit(|| {
            let tasks: Vec<Task> = orders.iter().map(|order| order.task.clone()).collect();
            let texts = attack.attacker.write(&tasks, settings.seed)?;
            let marks = attack.attacker.marks().to_vec();
            let sound = |(written, task): (Written, &Task)| match written {
                Written::Prompt(draft) => Flaw::of(&draft.prompt, task, &marks).map_or(Ok(draft), Err),
                Written::Unclosed => Err(Flaw::Unclosed),
                Written::Failed => Err(Flaw::Failed),
            };
            let mut drafts: Vec<_> = texts.into_iter().zip(&tasks).map(sound).collect();
            if let Some(judge) = refusal {
                let said = |p_harm: f64| (p_harm >= 0.5).then_some(Flaw::Refusal);
                refuse(&mut drafts, &tasks, &mut **judge, tau_h, said)?;
            }
            on_topic(&mut drafts, &tasks, attack, tau_h)?;
            likely(&mut drafts, plausible, subject)?;
            banded(&mut drafts, &mut **judge, tau_h)?;
            Ok(drafts)
        })
    }

    /// The draft, if no prompt like its own was proposed or found before; it joins the company then.
    fn fresh(&mut self, draft: Draft, company: &mut Seen) -> Result<Draft, Flaw> {
        let (text, grams) = (&draft.prompt, grams(&draft.prompt));
        if self.proposed.contains(text) || company.find_grams(&grams).is_some() || self.archive.knows(&grams) {
            return Err(Flaw::Duplicate);
        }
        company.insert(text);
        self.proposed.insert(text.clone());
        Ok(draft)
    }
}

type Drafts = [Result<Draft, Flaw>];

/// Asks a judge of each text as if it were an answer to the goal, and refuses those of which `said` finds something to say.
fn refuse(
    drafts: &mut Drafts,
    tasks: &[Task],
    judge: &mut dyn Judge,
    tau_h: f64,
    said: impl Fn(f64) -> Option<Flaw>,
) -> Result<()> {
    let goals: Vec<Prompt> = tasks.iter().map(|task| Prompt::user(task.goal.clone())).collect();
    let rows = drafts.iter().zip(&goals).map(|(draft, goal)| Some((goal, draft.as_ref().ok()?.prompt.as_str())));
    let judged = ask_some(rows, |rows| judge.judge(rows, tau_h))?;
    for (draft, judged) in drafts.iter_mut().zip(judged) {
        let flaw = judged.and_then(|harm| harm.map_or(Some(Flaw::Failed), |harm| said(harm.p_harm)));
        flaw.into_iter().for_each(|flaw| *draft = Err(flaw));
    }
    Ok(())
}

fn on_topic(drafts: &mut Drafts, tasks: &[Task], attack: &mut Attack, tau_h: f64) -> Result<()> {
    match &mut attack.on_topic {
        Some(judge) => refuse(drafts, tasks, &mut **judge, tau_h, |p| (p < 0.5).then_some(Flaw::OffTopic)),
        None => {
            for (draft, task) in drafts.iter_mut().zip(tasks) {
                if draft.as_ref().is_ok_and(|draft| !asks_for(&task.goal, &draft.prompt)) {
                    *draft = Err(Flaw::OffTopic);
                }
            }
            Ok(())
        }
    }
}

fn likely(drafts: &mut Drafts, plausible: &mut Plausible, subject: &mut dyn Subject) -> Result<()> {
    let texts: Vec<String> = drafts.iter().flatten().map(|draft| draft.prompt.clone()).collect();
    let mut found = plausible.measure(&texts, subject)?.into_iter();
    for draft in drafts.iter_mut().filter(|draft| draft.is_ok()) {
        match found.next() {
            Some(Ok(logprob)) if plausible.accepts(logprob) => {}
            Some(Ok(_)) => *draft = Err(Flaw::Unlikely),
            _ => *draft = Err(Flaw::Failed),
        }
    }
    Ok(())
}

/// Keeps only those proposed answers that the judge puts on their own side of the band.
fn banded(drafts: &mut Drafts, judge: &mut dyn Judge, tau_h: f64) -> Result<()> {
    let prompts: Vec<Prompt> = drafts.iter().flatten().map(|draft| Prompt::user(draft.prompt.clone())).collect();
    let rows = drafts
        .iter()
        .flatten()
        .zip(&prompts)
        .flat_map(|(draft, prompt)| [&draft.safe, &draft.harmful].map(|answer| Some((prompt, answer.as_deref()?))));
    let judged = ask_some(rows, |rows| judge.judge(rows, tau_h))?;
    let p: Vec<Option<f64>> = judged.into_iter().map(|harm| Some(harm?.ok()?.p_harm)).collect();
    for (draft, p) in drafts.iter_mut().flatten().zip(p.chunks_exact(2)) {
        draft.safe = draft.safe.take().filter(|_| p[0].is_some_and(|p| p <= tau_h - BAND));
        draft.harmful = draft.harmful.take().filter(|_| p[1].is_some_and(|p| p >= tau_h + BAND));
    }
    Ok(())
}
