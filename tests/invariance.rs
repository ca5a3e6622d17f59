//! A row's or sequence's forward values have the same bits at any batch size, order and company.
//!
//! Every op runs forward over 200 rows once; then over runs of rows taken from them, and over all rows in another order. Then
//! whole models of the suite: rewards, log-probabilities and answers at any `--batch-tokens`, in any order and company.

#[path = "common/mod.rs"]
mod common;

use std::path::Path;

use ares::backend::{Backend, Cpu, Tensor};
use ares::model::pretrained::{ModelSpec, Pretrained};
use ares::model::{Adapter, AdapterInit, Answer, Ask, Decoding, Version};
use ares::ops::*;
use ares::text::Prompt;
use common::*;

/// First row and number of rows of each company that is tried: alone, around one block of the products, more than one.
const RUNS: &[(usize, usize)] = &[(0, 1), (199, 1), (7, 3), (64, 63), (100, 64), (30, 65), (0, 128), (1, 199)];
const ROWS: usize = 200;

/// Where row i of the shuffled batch comes from: a permutation, since 77 and 200 share no factor.
fn shuffled() -> Vec<usize> {
    (0..ROWS).map(|i| (i * 77 + 13) % ROWS).collect()
}

/// `run(rows)` gives, for the named rows of one fixed batch, each row's outputs: they must not depend on the other rows.
fn assert_rows_alone(what: &str, run: impl Fn(&[usize]) -> Vec<Vec<f32>>) {
    let all = run(&(0..ROWS).collect::<Vec<_>>());
    assert!(all.iter().flatten().all(|v| v.is_finite()), "{what}: finite");
    let companies = RUNS.iter().map(|(first, count)| (*first..first + count).collect()).chain([shuffled()]);
    for rows in companies {
        let found = run(&rows);
        assert_eq!(found.len(), rows.len());
        for (found, row) in found.iter().zip(&rows) {
            assert_eq!(bits(found), bits(&all[*row]), "{what}: row {row} among {} rows", rows.len());
        }
    }
}

/// The rows of several outputs, side by side.
fn rows_of(outputs: &[&Tensor<Cpu>]) -> Vec<Vec<f32>> {
    let values: Vec<Vec<f32>> = outputs.iter().map(|t| values(t)).collect();
    let row = |r: usize| {
        let parts = outputs.iter().zip(&values).map(|(t, v)| &v[r * t.cols()..][..t.cols()]);
        parts.flatten().copied().collect()
    };
    (0..outputs[0].rows()).map(row).collect()
}

/// A fixed batch of which `rows` are taken.
struct Source {
    cols: usize,
    values: Vec<f32>,
}

impl Source {
    fn new(seed: u64, cols: usize) -> Source {
        Source { cols, values: noise(seed, ROWS * cols) }
    }

    fn take(&self, rows: &[usize]) -> Tensor<Cpu> {
        let values: Vec<f32> = rows.iter().flat_map(|r| &self.values[r * self.cols..][..self.cols]).copied().collect();
        tensor(self.cols, &values)
    }
}

#[test]
fn norm() {
    for cols in [37, 128] {
        let (x, w) = (Source::new(1, cols), tensor(cols, &noise(2, cols)));
        assert_rows_alone("norm", |rows| {
            let (mut y, mut rstd) = (nans(rows.len(), cols), nans(rows.len(), 1));
            let spec = NormSpec { eps: 1e-5, unit_offset: false };
            Cpu::new().norm_forward(&mut y, &mut rstd, &x.take(rows), &w, spec).unwrap();
            rows_of(&[&y, &rstd])
        });
    }
}

#[test]
fn qkv() {
    for (heads, kv_heads, head_dim, inputs, rank) in [(4, 2, 6, 19, 3), (4, 4, 32, 128, 8)] {
        let spec = QkvSpec { heads, kv_heads, head_dim, norm: NormSpec { eps: 1e-6, unit_offset: false } };
        let masters = Masters::noise(3, &[heads * head_dim, kv_heads * head_dim, kv_heads * head_dim], inputs, rank);
        let freqs: Vec<f32> = (0..head_dim / 2).map(|i| 0.3f32.powi(i as i32)).collect();
        let (x, rope, lora) = (Source::new(5, inputs), Rope::new(&Cpu::new(), &freqs, ROWS).unwrap(), masters.lora());
        for (bias, qk_norm) in [(false, false), (true, true)] {
            let gain = |seed| tensor(head_dim, &noise(seed, head_dim));
            let weights = QkvWeights {
                w: weight(spec.width(), &noise(6, spec.width() * inputs)),
                bias: bias.then(|| tensor(spec.width(), &noise(7, spec.width()))),
                qk_norm: qk_norm.then(|| (gain(8), gain(9))),
            };
            assert_rows_alone("qkv", |rows| {
                let raw_columns = if qk_norm { spec.rotated() } else { 0 };
                let (mut qkv, mut raw) = (nans(rows.len(), spec.width()), nans(rows.len(), raw_columns));
                let mut xa = nans(rows.len(), masters.width());
                let positions = indices(&rows.iter().map(|r| *r as u32).collect::<Vec<_>>());
                let (x, cpu) = (x.take(rows), Cpu::new());
                cpu.qkv_forward(&mut qkv, &mut xa, &mut raw, &x, &weights, Some(&lora), &positions, &rope, spec)
                    .unwrap();
                rows_of(&[&qkv, &xa, &raw])
            });
        }
    }
}

#[test]
fn layer_norm() {
    for cols in [37, 128] {
        let (x, w, bias) = (Source::new(1, cols), tensor(cols, &noise(2, cols)), tensor(cols, &noise(3, cols)));
        assert_rows_alone("layer_norm", |rows| {
            let count = rows.len();
            let (mut y, mut mean, mut rstd) = (nans(count, cols), nans(count, 1), nans(count, 1));
            Cpu::new().layer_norm_forward(&mut y, &mut mean, &mut rstd, &x.take(rows), &w, Some(&bias), 1e-5).unwrap();
            rows_of(&[&y, &mean, &rstd])
        });
    }
}

#[test]
fn project() {
    for (inputs, outputs, rank) in [(19, 23, 3), (352, 128, 8), (1030, 7, 4)] {
        let (x, residual) = (Source::new(10, inputs), Source::new(11, outputs));
        let bias = tensor(outputs, &noise(14, outputs));
        let (w, lora) =
            (weight(outputs, &noise(12, outputs * inputs)), Masters::noise(13, &[outputs], inputs, rank).lora());
        assert_rows_alone("project", |rows| {
            let (mut y, mut xa) = (nans(rows.len(), outputs), nans(rows.len(), rank));
            let (x, residual) = (x.take(rows), residual.take(rows));
            Cpu::new().project_forward(&mut y, &mut xa, &x, &residual, &w, Some(&bias), Some(&lora)).unwrap();
            rows_of(&[&y, &xa])
        });
    }
}

#[test]
fn gate_up() {
    for (inputs, features, rank) in [(19, 9, 3), (128, 352, 8)] {
        for (activation, gated) in [(Activation::Silu, true), (Activation::GeluTanh, true), (Activation::Gelu, false)] {
            let spec = GateUpSpec { activation, gated };
            let width = spec.width(features);
            let (x, w) = (Source::new(15, inputs), weight(width, &noise(16, width * inputs)));
            let bias = (!gated).then(|| tensor(width, &noise(18, width)));
            let masters = Masters::noise(17, &vec![features; width / features], inputs, rank);
            let lora = masters.lora();
            assert_rows_alone("gate_up", |rows| {
                let (mut act, mut both) = (nans(rows.len(), features), nans(rows.len(), width));
                let mut xa = nans(rows.len(), masters.width());
                let (x, cpu) = (x.take(rows), Cpu::new());
                cpu.gate_up_forward(&mut act, &mut both, &mut xa, &x, &w, bias.as_ref(), Some(&lora), spec).unwrap();
                rows_of(&[&act, &both, &xa])
            });
        }
    }
}

#[test]
fn heads() {
    let (cols, vocab) = (24, 1030);
    let (h, h0, w) = (Source::new(20, cols), Source::new(21, cols), weight(vocab, &noise(22, vocab * cols)));
    let score = tensor(cols, &noise(23, 2 * cols));
    assert_rows_alone("heads", |rows| {
        let (cpu, count) = (Cpu::new(), rows.len());
        let column = || nans(count, 1);
        let mut out = HeadRows { logprob: column(), lse: column(), log_rest: column() };
        let (mut dh, mut dkl, mut kl, mut r) = (nans(count, cols), nans(count, cols), column(), nans(count, 2));
        // Chunks of 48 rows: where a chunk ends depends on the company, too.
        let (mut chunk, mut chunk0) = (nans(48, vocab), nans(48, vocab));
        let targets = indices(&rows.iter().map(|r| (r * 31 % vocab) as u32).collect::<Vec<_>>());
        let (h, h0) = (h.take(rows), h0.take(rows));
        cpu.lm_head_forward(&mut out, Some(&mut dh), &mut chunk, &h, &targets, &w).unwrap();
        cpu.lm_head_kl(&mut kl, &mut dkl, &mut chunk, &mut chunk0, &h, &h0, &w).unwrap();
        cpu.score_forward(&mut r, &h, &score).unwrap();
        rows_of(&[&out.logprob, &out.lse, &out.log_rest, &dh, &kl, &dkl, &r])
    });
}

#[test]
fn sample() {
    let (cols, vocab) = (24, 310);
    let (h, w) = (Source::new(25, cols), weight(vocab, &noise(26, vocab * cols)));
    for spec in [
        SampleSpec { temperature: 0.0, top_k: 0, top_p: 1.0, seed: 1 },
        SampleSpec { temperature: 1.0, top_k: 50, top_p: 0.9, seed: 1 },
    ] {
        assert_rows_alone("sample", |rows| {
            let (cpu, count) = (Cpu::new(), rows.len());
            let mut table = SampleTable::with_capacity(&cpu, count).unwrap();
            let ids: Vec<u64> = rows.iter().map(|r| *r as u64).collect();
            table.set(&cpu, &ids, &vec![4; count]).unwrap();
            let mut tokens = indices(&vec![u32::MAX; count]);
            cpu.sample(&mut tokens, &mut nans(count, vocab), &h.take(rows), &table, &w, spec).unwrap();
            tokens.buffer.iter().map(|token| vec![*token as f32]).collect()
        });
    }
}

/// Groups of one batch: prompt length and answer lengths; each group's values are made from its own index.
const GROUPS: &[Group] =
    &[(5, &[3, 7, 1]), (0, &[9]), (56, &[2, 40]), (1, &[2, 2]), (0, &[70]), (64, &[]), (3, &[1]), (17, &[16, 15])];

fn attention_kinds() -> [AttentionSpec; 4] {
    let plain =
        AttentionSpec { heads: 4, kv_heads: 2, head_dim: 32, scale: 0.2, window: None, softcap: None, causal: true };
    [
        plain,
        AttentionSpec { window: Some(6), softcap: Some(2.0), head_dim: 6, ..plain },
        AttentionSpec { causal: false, ..plain },
        AttentionSpec { causal: false, window: Some(9), head_dim: 6, ..plain },
    ]
}

/// o and lse of each named group, run in this order.
fn attend(groups: &[usize], spec: AttentionSpec) -> Vec<Vec<f32>> {
    let rows = |g: &usize| GROUPS[*g].0 + GROUPS[*g].1.iter().sum::<usize>();
    let qkv: Vec<f32> = groups.iter().flat_map(|g| noise(50 + *g as u64, rows(g) * spec.width())).collect();
    let packing = packing(&groups.iter().map(|g| GROUPS[*g]).collect::<Vec<_>>());
    let (mut o, mut lse) = (nans(packing.rows(), spec.heads * spec.head_dim), nans(packing.rows(), spec.heads));
    Cpu::new().attention_forward(&mut o, &mut lse, &tensor(spec.width(), &qkv), &packing, spec).unwrap();
    let mut all = rows_of(&[&o, &lse]).into_iter();
    groups.iter().map(|g| all.by_ref().take(rows(g)).flatten().collect()).collect()
}

#[test]
fn attention_of_a_group_does_not_see_other_groups() {
    for spec in attention_kinds() {
        let all: Vec<usize> = (0..GROUPS.len()).collect();
        let expected = attend(&all, spec);
        let alone = all.iter().map(|g| vec![*g]);
        for company in alone.chain([all.iter().rev().copied().collect(), vec![2, 4], vec![4, 2, 7, 0]]) {
            for (found, g) in attend(&company, spec).iter().zip(&company) {
                assert_eq!(bits(found), bits(&expected[*g]), "group {g} in {company:?}, {spec:?}");
            }
        }
    }
}

/// A sequence in a group: the same bits whichever answers stand beside it.
#[test]
fn attention_of_an_answer_does_not_see_other_answers() {
    let prompt = 21;
    for spec in attention_kinds() {
        let run = |answers: &[usize]| {
            let qkv = noise(70, prompt * spec.width()).into_iter();
            let qkv: Vec<f32> =
                qkv.chain(answers.iter().flat_map(|n| noise(80 + *n as u64, n * spec.width()))).collect();
            let packing = packing(&[(prompt, answers)]);
            let (mut o, mut lse) = (nans(packing.rows(), spec.heads * spec.head_dim), nans(packing.rows(), spec.heads));
            Cpu::new().attention_forward(&mut o, &mut lse, &tensor(spec.width(), &qkv), &packing, spec).unwrap();
            let rows = rows_of(&[&o, &lse]);
            packing.segments.iter().map(|s| rows[s.rows.clone()].concat()).collect::<Vec<_>>()
        };
        let all = run(&[5, 33, 16, 1]);
        for (answers, places) in [(vec![5], vec![1]), (vec![1, 33], vec![4, 2]), (vec![16, 1, 5], vec![3, 4, 1])] {
            let some = run(&answers);
            assert_eq!(bits(&some[0]), bits(&all[0]), "the prompt of {answers:?}");
            for (found, place) in some[1..].iter().zip(places) {
                assert_eq!(bits(found), bits(&all[place]), "answer {place} among {answers:?}");
            }
        }
    }
}

/// Decoding: a slot's attention does not see the other slots, nor which slot it is, nor how long the cache is.
#[test]
fn decode_attention() {
    let cpu = Cpu::new();
    for spec in &attention_kinds()[..2] {
        let length = |row: usize| row * 37 % 90 + 1;
        let run = |rows: &[usize], slots: usize, capacity: usize| {
            let mut cache = cpu.kv_cache(slots, capacity, *spec).unwrap();
            let slot = |i: usize| (slots - 1 - i) as u32;
            for (i, row) in rows.iter().enumerate() {
                let n = length(*row);
                let mut table = SlotTable::with_capacity(&cpu, n).unwrap();
                table.set(&cpu, &vec![slot(i); n], &(0..n as u32).collect::<Vec<_>>()).unwrap();
                let past = tensor(spec.width(), &noise(100 + *row as u64, n * spec.width()));
                cpu.cache_append(&mut cache, &past, &table, *spec).unwrap();
            }
            let slots: Vec<u32> = (0..rows.len()).map(slot).collect();
            let mut table = SlotTable::with_capacity(&cpu, rows.len()).unwrap();
            table.set(&cpu, &slots, &rows.iter().map(|r| length(*r) as u32 - 1).collect::<Vec<_>>()).unwrap();
            let last: Vec<f32> = rows
                .iter()
                .flat_map(|r| {
                    noise(100 + *r as u64, length(*r) * spec.width()).split_off((length(*r) - 1) * spec.width())
                })
                .collect();
            let mut o = nans(rows.len(), spec.heads * spec.head_dim);
            cpu.decode_attention(&mut o, &tensor(spec.width(), &last), &cache, &table, *spec).unwrap();
            rows_of(&[&o])
        };
        let all = run(&(0..20).collect::<Vec<_>>(), 20, 90);
        for (rows, slots, capacity) in
            [(vec![3], 1, 90), (vec![19], 5, 128), (vec![7, 4, 5], 3, 97), ((0..20).rev().collect(), 32, 90)]
        {
            for (found, row) in run(&rows, slots, capacity).iter().zip(&rows) {
                assert_eq!(bits(found), bits(&all[*row]), "sequence {row} in {rows:?}");
            }
        }
    }
}

/// The embedding copies; nothing may touch the copy.
#[test]
fn embed() {
    let (vocab, cols) = (29, 7);
    let table = noise(40, vocab * cols);
    let w: <Cpu as Backend>::Weight = weight(vocab, &table);
    let tokens: Vec<u32> = (0..ROWS as u32).map(|t| t * 13 % vocab as u32).collect();
    let mut x = nans(ROWS, cols);
    Cpu::new().embed(&mut x, &indices(&tokens), &w).unwrap();
    let expected: Vec<f32> = tokens.iter().flat_map(|t| &table[*t as usize * cols..][..cols]).copied().collect();
    assert_eq!(bits(&values(&x)), bits(&expected));
}

/// A model of the suite with a random adapter, so that both halves of every product count.
fn pretrained(name: &str, batch_tokens: usize) -> Pretrained<Cpu> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("models").join(name);
    let mut model =
        Pretrained::open(&Cpu::new(), &ModelSpec { dir, adapter: None }, batch_tokens, Default::default()).unwrap();
    let (ops, config) = (&model.transformer.ops, &model.transformer.config);
    let score = model.transformer.score_weights().unwrap();
    let init = AdapterInit::Random { seed: 3 };
    model.adapter = Some(Adapter::new(ops, config, 4, 1.0, init, score.as_deref()).unwrap());
    model
}

/// Prompts of one to nineteen words; every third stands twice in a row, so that neighbours share it.
fn prompts() -> Vec<Prompt> {
    let words = ["tell", "me", "how", "the", "old", "garden", "gate", "was", "painted", "blue"];
    let text = |i: usize| (0..1 + i * 7 % 19).map(|w| words[(i + w * 3) % words.len()]).collect::<Vec<_>>().join(" ");
    (0..30).flat_map(|i| vec![Prompt::user(text(i)); 1 + usize::from(i % 3 == 0)]).collect()
}

const ANSWERS: [&str; 4] = [
    "no",
    "first open the gate, then walk on",
    "I cannot help with that.",
    "yes, of course: take the old key and turn it twice",
];

/// Orders and companies of `count` rows: all, reversed, some, one.
fn companies(count: usize) -> Vec<Vec<usize>> {
    let all: Vec<usize> = (0..count).collect();
    vec![all.iter().rev().copied().collect(), all.iter().step_by(7).copied().collect(), vec![count - 1], vec![0], all]
}

/// `run` gives one result per named row; it must be the row's own at any number of tokens per batch.
fn assert_alone<T: PartialEq + std::fmt::Debug>(
    name: &str,
    count: usize,
    run: impl Fn(&mut Pretrained<Cpu>, &[usize]) -> Vec<T>,
) {
    let expected = run(&mut pretrained(name, 8192), &(0..count).collect::<Vec<_>>());
    for batch_tokens in [1, 100, 700] {
        let mut model = pretrained(name, batch_tokens);
        for rows in companies(count) {
            for (found, row) in run(&mut model, &rows).iter().zip(&rows) {
                assert_eq!(found, &expected[*row], "{name}: row {row} of {} at {batch_tokens} tokens", rows.len());
            }
        }
    }
}

#[test]
fn rewards_and_log_probabilities() {
    let prompts = prompts();
    let row = |i: &usize| (&prompts[*i], ANSWERS[i % ANSWERS.len()]);
    for version in [Version::Start, Version::Current] {
        assert_alone("framing/reward", prompts.len(), |model, rows| {
            let rewards = model.rewards(version, &rows.iter().map(row).collect::<Vec<_>>()).unwrap();
            rewards.into_iter().map(|r| r.unwrap().to_bits()).collect()
        });
        assert_alone("framing/policy", prompts.len(), |model, rows| {
            let rendered = rows.iter().map(row).map(|(p, a)| model.rendering.with_answer(p, a)).collect();
            let sums = model.logprob_sums(version, rendered).unwrap();
            sums.into_iter().map(|s| s.map(|(sum, n)| (sum.to_bits(), n)).unwrap()).collect()
        });
    }
}

#[test]
fn answers() {
    let prompts = prompts();
    let sampled = Decoding { temperature: 1.0, top_k: 40, top_p: 0.95, seed: 5, ..Decoding::greedy(12) };
    for decoding in [Decoding::greedy(12), sampled] {
        // More sequences than slots, so that finished ones are replaced while others run.
        assert_alone("framing/policy", 2 * prompts.len(), |model, rows| {
            let asks: Vec<Ask> = rows.iter().map(|i| Ask::new(prompts[i % prompts.len()].clone(), *i as u64)).collect();
            let answers = model.generate(Version::Current, &asks, &decoding).unwrap();
            answers.into_iter().map(|a| a.map(|Answer { tokens, finish, .. }| (tokens, finish)).unwrap()).collect()
        });
    }
}
