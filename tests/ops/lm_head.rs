//! The language-model head: log-probabilities and gradient rows in one chunk and in several; KL between two models.

use ares::backend::cuda::driver::DeviceInfo;
use ares::backend::{Cpu, Cuda, Tensor};
use ares::ops::lm_head::naive;
use ares::ops::{HeadRows, LmHeadForward, LmHeadKl, Ops};

use crate::toolkit::{self, *};

#[derive(Clone)]
struct Case {
    cols: usize,
    h: Vec<f32>,
    /// Of two models whose difference is asked for.
    h1: Vec<f32>,
    h0: Vec<f32>,
    w: Vec<f32>,
    targets: Vec<u32>,
    /// Rows of a chunk.
    chunk: usize,
    softcap: Option<f32>,
}

impl Case {
    /// Rows whose logits are a few apart, every third one sure of its target; and those of two models that are `apart`.
    fn new((rows, cols, vocab, chunk): (usize, usize, usize, usize), apart: f32) -> Case {
        let (w, mut h, noise) =
            (random(1, vocab * cols, 0.3), random(2, rows * cols, 1.0), random(3, rows * cols, 1.0));
        let h1 = h.clone();
        let targets: Vec<u32> = (0..rows).map(|r| ((r * 37 + vocab - 1) % vocab) as u32).collect();
        let round = |v: f32| half::bf16::from_f32(v).to_f32();
        for (h, target) in h.chunks_mut(cols).zip(&targets).skip(1).step_by(3) {
            let direction = &w[*target as usize * cols..][..cols];
            let size: f32 = direction.iter().map(|w| w * w).sum();
            h.iter_mut().zip(direction).for_each(|(h, w)| *h = round(18.0 * w / size));
        }
        let h0 = h1.iter().zip(&noise).map(|(h, n)| round(h + apart * n)).collect();
        Case { cols, h, h1, h0, w, targets, chunk, softcap: None }
    }

    fn take(&self, rows: &[usize]) -> Case {
        let take = |values| rows_of(values, self.cols, rows);
        let targets = rows.iter().map(|r| self.targets[*r]).collect();
        Case { h: take(&self.h), h1: take(&self.h1), h0: take(&self.h0), targets, ..self.clone() }
    }
}

fn columns<B: Ops>(ops: &B, rows: usize) -> HeadRows<B> {
    let column = || unwritten(ops, rows, 1);
    HeadRows { logprob: column(), lse: column(), log_rest: column() }
}

impl toolkit::Case for Case {
    fn naive(&self) -> Plain {
        let [mut logprob, mut lse, mut log_rest, mut kl] = [(); 4].map(|()| nans(self.targets.len()));
        let [mut dh, mut dkl] = [(); 2].map(|()| nans(self.h.len()));
        naive::forward(&mut logprob, &mut lse, &mut log_rest, &mut dh, &self.h, &self.targets, &self.w, self.softcap);
        naive::kl(&mut kl, &mut dkl, &self.h1, &self.h0, &self.w, self.softcap);
        Plain::from([("logprob", logprob), ("lse", lse), ("log_rest", log_rest), ("dh", dh), ("kl", kl), ("dkl", dkl)])
    }

    fn run<B: Ops>(&self, ops: &B) -> Outputs {
        let (rows, cols, vocab) = (self.targets.len(), self.cols, self.w.len() / self.cols);
        let [h, h1, h0] = &[&self.h, &self.h1, &self.h0].map(|h| act(ops, cols, h));
        let targets = &Tensor::from_host(ops, self.targets.len(), 1, &self.targets).unwrap();
        let w = &ops.weight(vocab, cols, self.w.clone()).unwrap();
        let [mut chunk, mut chunk0, mut other] = [0, 0, 64].map(|more| unwritten(ops, self.chunk + more, vocab));
        let [mut dh, mut dkl] = [(); 2].map(|()| unwritten(ops, rows, cols));
        let (mut heads, mut without, mut kl) = (columns(ops, rows), columns(ops, rows), unwritten(ops, rows, 1));
        let softcap = self.softcap;
        let (out, to) = (&mut heads, &mut dh);
        ops.lm_head_forward(LmHeadForward { out, dh: Some(to), chunk: &mut chunk, h, targets, w, softcap }).unwrap();
        let (out, chunk1) = (&mut without, &mut other);
        ops.lm_head_forward(LmHeadForward { out, dh: None, chunk: chunk1, h, targets, w, softcap }).unwrap();
        let (out, dh2, chunk0) = (&mut kl, &mut dkl, &mut chunk0);
        ops.lm_head_kl(LmHeadKl { kl: out, dh: dh2, chunk: &mut chunk, chunk0, h: h1, h0, w, softcap }).unwrap();
        let mut out = Outputs::default();
        out.f32(ops, "logprob", heads.logprob, 2e-6, 4e-6);
        out.f32(ops, "lse", heads.lse, 2e-6, 2e-6);
        out.f32(ops, "log_rest", heads.log_rest, 2e-6, 4e-6);
        // p is rounded twice, each time to half an ulp, and multiplied with weights below 1.
        out.act(ops, "dh", dh, 1.0, 2e-3);
        out.f32(ops, "kl", kl, 1e-4, 4e-6);
        // An ulp of the largest differences, however small they are: nothing is lost where the models agree.
        let dkl_values = read(ops, dkl);
        let largest = dkl_values.iter().fold(0.0f32, |max, v| max.max(v.abs()));
        out.act(ops, "dkl", act(ops, cols, &dkl_values), 1.0, largest / 64.0);
        for (name, column) in [("logprob", without.logprob), ("lse", without.lse), ("log_rest", without.log_rest)] {
            assert_eq!(
                bits(&read(ops, column)),
                bits(out.named(name)),
                "{name} in other chunks, without gradient rows"
            );
        }
        out
    }
}

const SHAPES: [(usize, usize, usize, usize); 5] =
    [(1, 24, 100, 128), (7, 40, 256, 128), (70, 36, 301, 64), (200, 64, 131, 128), (13, 11, 41, 5)];

fn cases() -> impl Iterator<Item = Case> {
    let cases = SHAPES.into_iter().flat_map(|shape| [0.01, 0.2, 3.0].map(|apart| Case::new(shape, apart)));
    cases.chain([0, 2].map(|at| Case { softcap: Some(2.5), ..Case::new(SHAPES[at], 0.2) }))
}

/// ∂ log p = g, ∂ log(1 − p) = −p/(1 − p)·g, ∂ lse = s·W[y] − g, s the cap's slope.
#[test]
fn gradient() {
    for softcap in [None, Some(1.5)] {
        slopes(Case { h: random(4, 5 * 7, 0.8), softcap, ..Case::new((5, 7, 11, 8), 1.0) });
    }
}

fn slopes(case: Case) {
    let (plain, c) = (toolkit::Case::naive(&case), random(5, 5, 1.0));
    let scaled = |name: &str, factor: &dyn Fn(usize) -> f32| -> Vec<f32> {
        plain[name].chunks(7).enumerate().flat_map(|(r, row)| row.iter().map(move |v| factor(r) * v)).collect()
    };
    let at = |h: &[f32]| toolkit::Case::naive(&Case { h: h.to_vec(), ..case.clone() });
    assert_gradient("log p", &scaled("dh", &|r| c[r]), &case.h, |h| functional(&c, &at(h)["logprob"]));
    let odds = scaled("dh", &|r| -c[r] * (plain["logprob"][r] - plain["log_rest"][r]).exp());
    assert_gradient("log(1 - p)", &odds, &case.h, |h| functional(&c, &at(h)["log_rest"]));
    let targets =
        case.targets.iter().enumerate().flat_map(|(r, y)| case.w[*y as usize * 7..][..7].iter().map(move |w| (r, w)));
    let slope = |r: usize| {
        let logit = plain["logprob"][r] + plain["lse"][r];
        case.softcap.map_or(1.0, |cap| 1.0 - (logit / cap) * (logit / cap))
    };
    let lse: Vec<f32> = targets.zip(&plain["dh"]).map(|((r, w), g)| c[r] * (w * slope(r) - g)).collect();
    assert_gradient("lse", &lse, &case.h, |h| functional(&c, &at(h)["lse"]));
    let at = |h: &[f32]| toolkit::Case::naive(&Case { h1: h.to_vec(), ..case.clone() });
    assert_gradient("kl", &scaled("dkl", &|r| c[r]), &case.h1, |h| functional(&c, &at(h)["kl"]));
}

#[test]
fn naive() {
    cases().for_each(|case| assert_naive("lm_head", &case, 1e-5, 2e-6));
}

#[test]
fn parity_over_a_real_vocabulary() {
    let Some(device) = device() else { return };
    assert_parity("lm_head", &device, &Case::new((3, 16, 151_936, 128), 0.2));
}

#[test]
fn parity() {
    let Some(device) = device() else { return };
    // The last one's three tiles of columns are Hopper's, where that tier is asked for.
    let aligned = Case::new((140, 72, 600, 130), 0.2);
    cases().chain([aligned]).for_each(|case| assert_parity("lm_head", &device, &case));
    let same = toolkit::Case::run(&Case::new(SHAPES[1], 0.0), &device);
    assert!(same.named("kl").iter().all(|kl| kl.abs() <= 1e-6), "a model does not differ from itself");
    assert!(same.named("dkl").iter().all(|d| *d == 0.0), "nor has its difference a slope");
}

/// The tile of large heads, at sizes that a simulator finishes: where there is one multiprocessor, every plan chooses it
/// (`src/ops/lm_head/cuda.rs`). One chunk each: the rest of two would be few rows.
#[test]
fn parity_of_the_large_tile() {
    let Some(driver) = driver() else { return };
    let info = DeviceInfo { multiprocessors: 1, ..driver.info().clone() };
    let device = Cuda::planned_for(info, driver);
    for shape in [(150, 136, 136, 150), (140, 133, 301, 140)] {
        assert_parity("large lm_head", &device, &Case::new(shape, 0.2));
    }
}

/// Chunks of 48 rows: where one ends depends on the company, too.
#[test]
fn invariance() {
    let case = Case { h: random(4, ROWS * 24, 1.0), ..Case::new((ROWS, 24, 1030, 48), 0.5) };
    assert_alone("lm_head", &|rows: &[usize]| case.take(rows));
    // Hopper's tile serves it, where that tier is asked for.
    let case = Case { h: random(5, ROWS * 64, 1.0), ..Case::new((ROWS, 64, 520, 48), 0.5) };
    assert_alone("lm_head of aligned rows", &|rows: &[usize]| case.take(rows));
}

/// log p and log(1 − p) of the first of the given logits, and its gradient row.
fn head(logits: &[f32]) -> [f32; 3] {
    let case = Case {
        cols: 1,
        h: vec![1.0],
        h1: vec![1.0],
        h0: vec![1.0],
        w: logits.to_vec(),
        targets: vec![0],
        chunk: 1,
        softcap: None,
    };
    let out = toolkit::Case::run(&case, &Cpu::new());
    ["logprob", "log_rest", "dh"].map(|name| out.named(name)[0])
}

#[test]
fn log_probabilities_at_the_ends() {
    // Sure of the target: log(1 − p) is summed, not subtracted from 1.
    let [logprob, log_rest, _] = head(&[40.0, 0.0, 0.0]);
    assert_close("log p", &[logprob], &[0.0], 1e-15);
    assert_close("log(1 - p)", &[log_rest], &[2f64.ln() - 40.0], 1e-5);
    // Sure of another token.
    let [logprob, log_rest, _] = head(&[-60.0, 30.0, -60.0]);
    assert_close("log p", &[logprob], &[-90.0], 1e-5);
    assert_close("log(1 - p)", &[log_rest], &[0.0], 1e-15);
    // Beyond the exponential's range on both sides: finite, and the gradient row too.
    for logits in [[3e4, -3e4, 0.0], [-3e4, 3e4, 0.0], [3e4, 3e4, 3e4], [-3e4, -3e4, -3e4]] {
        let [logprob, log_rest, dh] = head(&logits);
        assert!(logprob.is_finite() && logprob <= 0.0, "{logits:?}: log p {logprob}");
        assert!(log_rest <= 0.0, "{logits:?}: log(1 - p) {log_rest}"); // −∞ where nothing is left
        assert!(dh.is_finite(), "{logits:?}: g {dh}");
    }
    let [logprob, ..] = head(&[3e4, 3e4, 3e4]);
    assert_close("three alike", &[logprob], &[-(3f64.ln())], 4e-3); // lse itself is rounded to 2⁻⁹ up there
    for (at, logits) in [[1.0, f32::NAN, 0.0], [f32::NAN, 1.0, 0.0]].into_iter().enumerate() {
        let found = head(&logits);
        assert!(found[0].is_nan() && (at > 0 || found.iter().all(|v| v.is_nan())), "{logits:?}: {found:?}");
    }
}
