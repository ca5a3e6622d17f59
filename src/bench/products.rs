//! The matrix products of a model's layer, each by every tile that a device has, beside what the model of each predicts.

use half::bf16;
use rayon::prelude::*;
use serde::Serialize;

use super::timing::Spread;
use super::{Workload, ops::seconds_of_runs};
use crate::backend::cuda::driver::DeviceInfo;
use crate::backend::{Cuda, Tensor};
use crate::error::Result;
use crate::model::ModelConfig;
use crate::ops::product::cuda::{Extension, Layout, Operand, Output, Product, Way};

/// A multiprocessor's clock while its tensor cores are busy within the board's power, Hz; and what a launch costs, seconds. Of an H200, as
/// others measured it.
const CLOCK: f64 = 1.56e9;
const LAUNCH: f64 = 3e-6;

/// One product by one tile.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct ProductTiming {
    pub(crate) product: &'static str,
    pub(crate) shape: [usize; 3], // m, n, k
    pub(crate) way: String,
    /// Whether its architecture's plan takes it.
    pub(crate) planned: bool,
    pub(crate) flops: u64,
    /// On sm_90a alone: the other tiles' model ranks them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) predicted_seconds: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) seconds: Option<Spread>,
}

/// A product of a layer, forward or into its input.
struct Shape {
    name: &'static str,
    layout: Layout,
    /// n and k.
    inner: [usize; 2],
    /// Of the adapter that rides along: its parts.
    parts: usize,
    bias: bool,
    residual: bool,
}

fn shapes(config: &ModelConfig) -> [Shape; 8] {
    let ModelConfig { hidden_size: c, intermediate_size: f, heads, kv_heads, head_dim, .. } = *config;
    let (q, qkv) = (heads * head_dim, (heads + 2 * kv_heads) * head_dim);
    let forward = |name, n, k, parts, residual| {
        let bias = parts == 3; // of all a layer's products qkv alone has one, where there is any
        Shape { name, layout: Layout::Along, inner: [n, k], parts, bias, residual }
    };
    let backward =
        |name, n, k, parts| Shape { name, layout: Layout::Across, inner: [n, k], parts, bias: false, residual: false };
    [
        forward("qkv", qkv, c, 3, false),
        forward("o", c, q, 1, true),
        forward("gate_up", 2 * f, c, 2, false),
        forward("down", c, f, 1, true),
        backward("qkv, backward", c, qkv, 3),
        backward("o, backward", q, c, 1),
        backward("gate_up, backward", c, 2 * f, 2),
        backward("down, backward", f, c, 1),
    ]
}

impl Shape {
    /// Terms that an adapter of `rank` adds to each sum: forward those of one part, into the input those of all.
    fn rank(&self, rank: usize) -> usize {
        if self.layout == Layout::Across { self.parts * rank } else { rank }
    }
}

/// What the tiles' models say, without a device.
pub(crate) fn predict(info: &DeviceInfo, config: &ModelConfig, load: &Workload) -> Vec<ProductTiming> {
    let all = shapes(config);
    let ways = Way::all(info.arch);
    let carried = |shape: &Shape, way: &&Way| way.carries(shape.layout, shape.rank(load.rank));
    let of = |shape| ways.iter().filter(move |way| carried(shape, way)).map(move |way| timing(info, shape, *way, load));
    all.iter().flat_map(of).collect()
}

fn timing(info: &DeviceInfo, shape: &Shape, way: Way, load: &Workload) -> ProductTiming {
    let ([n, k], rank) = (shape.inner, shape.rank(load.rank));
    let whole = [load.tokens, n, k];
    ProductTiming {
        product: shape.name,
        shape: whole,
        way: way.name(),
        planned: way.is_planned(whole, info),
        flops: 2 * (load.tokens * n * (k + rank)) as u64,
        predicted_seconds: way.cycles(whole, rank, info).map(|cycles| cycles / CLOCK + LAUNCH),
        seconds: None,
    }
}

/// Times all of them; `say` hears each product's name.
pub(crate) fn time(
    cuda: &Cuda,
    config: &ModelConfig,
    load: &Workload,
    mut say: impl FnMut(&str),
) -> Result<Vec<ProductTiming>> {
    let (mut found, last) = (Vec::new(), Tensor::<Cuda, f32>::zeros(cuda, 1, 1)?);
    for shape in &shapes(config) {
        say(shape.name);
        let (m, [n, k], rank) = (load.tokens, shape.inner, shape.rank(load.rank));
        let across = shape.layout == Layout::Across;
        let (w, b) = if across { ((k, n), (rank, n)) } else { ((n, k), (n, rank)) };
        let (x, xa) = (matrix(cuda, 1, m, k)?, matrix(cuda, 2, m, shape.parts * load.rank)?);
        let (w, b, bias) = (matrix(cuda, 3, w.0, w.1)?, matrix(cuda, 4, b.0, b.1)?, matrix(cuda, 5, 1, n)?);
        let (mut y, residual) = (matrix(cuda, 6, m, n)?, matrix(cuda, 7, m, n)?);
        let parts = if across { 1 } else { shape.parts };
        let ends = [if parts > 1 { n / parts } else { n }, if parts > 2 { 2 * n / parts } else { n }];
        let product = Product {
            extension: Some(Extension { xa: &xa, b: &b, rank, ends }),
            bias: shape.bias.then_some(&bias),
            residual: shape.residual.then_some(&residual),
            ..Product::new(shape.layout, [m, n, k], Operand::of(&x), Operand::of(&w))
        };
        for way in Way::all(cuda.info().arch) {
            if !way.serves(&product, &Output::of(&mut y)) {
                continue;
            }
            let seconds = seconds_of_runs(cuda, load, &last, || way.run(&product, cuda, Output::of(&mut y)))?;
            found.push(ProductTiming { seconds: Some(Spread::of(seconds)), ..timing(cuda.info(), shape, way, load) });
        }
    }
    Ok(found)
}

/// Numbers in no order, about a normal weight's size: what a tensor core's power depends on.
fn matrix(cuda: &Cuda, seed: u32, rows: usize, cols: usize) -> Result<Tensor<Cuda>> {
    let value = |i: u32| (i.wrapping_add(seed << 20).wrapping_mul(0x9e37_79b1) >> 8) as f32 / (1 << 24) as f32 - 0.5;
    let values: Vec<bf16> = (0..rows * cols).into_par_iter().map(|i| bf16::from_f32(value(i as u32))).collect();
    Tensor::from_host(cuda, rows, cols, &values)
}
