//! A model's LoRA adapters on the device: f32 masters, the operands that products read, gradients and moments.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::adapter_file::{AdapterFile, Projection};
use super::config::{Head, ModelConfig};
use crate::backend::Tensor;
use crate::error::{Error, Result};
use crate::ops::{AdamWSpec, Lora, LoraGrad, Ops, Parameter};

/// How many products of a block carry an adapter.
const PRODUCTS: usize = 4;

/// The projections that each fused product of a block is made of.
const PARTS: [&[Projection]; PRODUCTS] = [
    &[Projection::Q, Projection::K, Projection::V],
    &[Projection::O],
    &[Projection::Gate, Projection::Up],
    &[Projection::Down],
];

/// One block's operands.
pub struct BlockLora<B: Ops> {
    pub qkv: Lora<B>,
    pub o: Lora<B>,
    pub gate_up: Lora<B>,
    pub down: Lora<B>,
}

/// One block's gradients.
pub struct BlockGrad<B: Ops> {
    pub qkv: LoraGrad<B>,
    pub o: LoraGrad<B>,
    pub gate_up: LoraGrad<B>,
    pub down: LoraGrad<B>,
}

impl<B: Ops> BlockLora<B> {
    fn products_mut(&mut self) -> [&mut Lora<B>; PRODUCTS] {
        [&mut self.qkv, &mut self.o, &mut self.gate_up, &mut self.down]
    }
}

impl<B: Ops> BlockGrad<B> {
    fn products(&self) -> [&LoraGrad<B>; PRODUCTS] {
        [&self.qkv, &self.o, &self.gate_up, &self.down]
    }

    fn products_mut(&mut self) -> [&mut LoraGrad<B>; PRODUCTS] {
        [&mut self.qkv, &mut self.o, &mut self.gate_up, &mut self.down]
    }
}

/// A and B of one fused product, f32.
type Masters<B> = [Tensor<B, f32>; 2];

/// How a new adapter begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AdapterInit {
    /// A Kaiming-uniform, B zero: the adapted model is the original.
    Zero { seed: u64 },
    /// A and B random: every gradient is non-zero, as a gradient test needs it.
    Random { seed: u64 },
}

/// Operands, masters and, for a classifier, the score head that goes with them.
pub struct Adapter<B: Ops> {
    pub(crate) blocks: Vec<BlockLora<B>>,
    /// The adapted classifier's head; the original's unless it is trained.
    pub(crate) score: Option<Tensor<B, f32>>, // (labels, C)
    masters: Vec<Masters<B>>, // A and B of each product, block after block
    rank: usize,
    lora_alpha: f64,
    use_rslora: bool,
}

impl<B: Ops> Adapter<B> {
    /// A fresh adapter; `score` is the original head of a classifier (labels, C).
    pub fn new(
        ops: &B,
        config: &ModelConfig,
        rank: usize,
        lora_alpha: f64,
        init: AdapterInit,
        score: Option<&[f32]>,
    ) -> Result<Self> {
        let (AdapterInit::Zero { seed } | AdapterInit::Random { seed }) = init;
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut uniform =
            |len: usize, bound: f32| -> Vec<f32> { (0..len).map(|_| rng.random_range(-bound..bound)).collect() };
        let mut file = AdapterFile::new(config, rank, lora_alpha, None);
        for layer in 0..config.layers {
            for projection in Projection::ALL {
                let (n, k) = projection.shape(config);
                let a = uniform(rank * k, (k as f32).powf(-0.5));
                let b = match init {
                    AdapterInit::Zero { .. } => vec![0.0; n * rank],
                    AdapterInit::Random { .. } => uniform(n * rank, 0.5 * (rank as f32).powf(-0.5)),
                };
                file.set_lora(layer, projection, a, b);
            }
        }
        if let (Head::Classification { labels }, Some(score)) = (config.head, score) {
            file.set_score(labels, score.to_vec());
        }
        Self::load(ops, config, &file, score)
    }

    /// From PEFT's file. Projections that it leaves alone get zeros; a classifier's head comes from the file or, where that has
    /// none, is the original's.
    pub fn load(ops: &B, config: &ModelConfig, file: &AdapterFile, score: Option<&[f32]>) -> Result<Self> {
        let (mut blocks, mut masters) = (Vec::new(), Vec::new());
        for layer in 0..config.layers {
            let mut loras = PARTS.map(|parts| product(ops, config, file, layer, parts)).into_iter();
            let mut next = || -> Result<Lora<B>> {
                let (lora, master) = loras.next().unwrap_or_else(|| Err(missing()))?;
                masters.push(master);
                Ok(lora)
            };
            blocks.push(BlockLora { qkv: next()?, o: next()?, gate_up: next()?, down: next()? });
        }
        let score = match (file.score().map(|s| s.data.as_slice()).or(score), config.head) {
            (Some(data), Head::Classification { labels }) => {
                Some(Tensor::from_host(ops, labels, config.hidden_size, data)?)
            }
            _ => None,
        };
        let (rank, lora_alpha, use_rslora) = (file.rank, file.lora_alpha, file.use_rslora);
        Ok(Adapter { blocks, score, masters, rank, lora_alpha, use_rslora })
    }

    /// As PEFT saves it, score head included. Waits for queued work.
    pub fn to_file(&self, ops: &B, config: &ModelConfig) -> Result<AdapterFile> {
        let values = self.masters.iter().map(|[a, b]| Ok((a.read(ops)?, b.read(ops)?)));
        let mut file = self.file_of(config, &values.collect::<Result<Vec<_>>>()?);
        if let Some(score) = &self.score {
            file.set_score(score.rows(), score.read(ops)?);
        }
        Ok(file)
    }

    /// Gradients under PEFT's names, in the adapter's own layout. Waits for queued work.
    pub fn gradients_to_file(&self, ops: &B, config: &ModelConfig, grad: &AdapterGrad<B>) -> Result<AdapterFile> {
        let products = grad.blocks.iter().flat_map(BlockGrad::products);
        let values = products.map(|g| Ok((g.da.read(ops)?, g.db.read(ops)?))).collect::<Result<Vec<_>>>()?;
        let mut file = self.file_of(config, &values);
        if let Some(score) = &grad.score {
            file.set_score(score.rows(), score.read(ops)?);
        }
        Ok(file)
    }

    /// Cuts fused (A, B) values of every product into projections.
    fn file_of(&self, config: &ModelConfig, values: &[(Vec<f32>, Vec<f32>)]) -> AdapterFile {
        let mut file = AdapterFile::new(config, self.rank, self.lora_alpha, None);
        file.use_rslora = self.use_rslora;
        for (index, (a, b)) in values.iter().enumerate() {
            let mut rows = 0;
            for (p, &projection) in PARTS[index % PRODUCTS].iter().enumerate() {
                let (n, k) = projection.shape(config);
                let a = a[p * self.rank * k..][..self.rank * k].to_vec();
                let b = b[rows * self.rank..][..n * self.rank].to_vec();
                file.set_lora(index / PRODUCTS, projection, a, b);
                rows += n;
            }
        }
        file
    }

    pub fn rank(&self) -> usize {
        self.rank
    }
}

fn missing() -> Error {
    Error::Shape { op: "adapter", expected: format!("{PRODUCTS} products"), found: "fewer".into() }
}

/// Operands and masters of one fused product.
fn product<B: Ops>(
    ops: &B,
    config: &ModelConfig,
    file: &AdapterFile,
    layer: usize,
    parts: &[Projection],
) -> Result<(Lora<B>, Masters<B>)> {
    let rank = file.rank;
    let (mut a, mut b, mut rows) = (Vec::new(), Vec::new(), Vec::new());
    let k = parts[0].shape(config).1;
    for &projection in parts {
        let n = projection.shape(config).0;
        match file.lora(layer, projection) {
            Some(lora) => {
                a.extend_from_slice(&lora.a.data);
                b.extend_from_slice(&lora.b.data);
            }
            None => {
                a.resize(a.len() + rank * k, 0.0);
                b.resize(b.len() + n * rank, 0.0);
            }
        }
        rows.push(n);
    }
    let (width, n) = (parts.len() * rank, rows.iter().sum());
    let masters = [Tensor::from_host(ops, width, k, &a)?, Tensor::from_host(ops, n, rank, &b)?];
    let scale = file.scale();
    let (mut a, mut b) = (Tensor::zeros(ops, width, k)?, Tensor::zeros(ops, n, rank)?);
    ops.write_operand(&mut a, &masters[0], 1.0)?;
    ops.write_operand(&mut b, &masters[1], scale)?;
    Ok((Lora { parts: rows, rank, scale, a, b }, masters))
}

/// Gradients of one adapter; they accumulate until cleared.
pub struct AdapterGrad<B: Ops> {
    pub(crate) blocks: Vec<BlockGrad<B>>,
    /// Of the score head, where it is trained.
    pub(crate) score: Option<Tensor<B, f32>>,
}

impl<B: Ops> AdapterGrad<B> {
    /// Zeros in the adapter's shapes.
    pub fn new(ops: &B, adapter: &Adapter<B>, train_head: bool) -> Result<Self> {
        let like = |lora: &Lora<B>| -> Result<LoraGrad<B>> {
            Ok(LoraGrad {
                da: Tensor::zeros(ops, lora.a.rows(), lora.a.cols())?,
                db: Tensor::zeros(ops, lora.b.rows(), lora.b.cols())?,
            })
        };
        let block = |b: &BlockLora<B>| -> Result<BlockGrad<B>> {
            Ok(BlockGrad { qkv: like(&b.qkv)?, o: like(&b.o)?, gate_up: like(&b.gate_up)?, down: like(&b.down)? })
        };
        let score = match &adapter.score {
            Some(score) if train_head => Some(Tensor::zeros(ops, score.rows(), score.cols())?),
            _ => None,
        };
        Ok(AdapterGrad { blocks: adapter.blocks.iter().map(block).collect::<Result<_>>()?, score })
    }

    /// Back to zero: before the first backward of a step.
    pub fn clear(&mut self, ops: &B) -> Result<()> {
        for product in self.blocks.iter_mut().flat_map(BlockGrad::products_mut) {
            product.da.clear(ops)?;
            product.db.clear(ops)?;
        }
        self.score.as_mut().map_or(Ok(()), |score| score.clear(ops))
    }
}

/// AdamW's moments of one adapter, in the order of its masters, the score head's last.
pub struct Moments<B: Ops> {
    pairs: Vec<[Tensor<B, f32>; 2]>, // m and v
    norm: Tensor<B, f32>,            // (1, 1)
}

impl<B: Ops> Moments<B> {
    /// Zeros in the adapter's shapes.
    pub fn new(ops: &B, adapter: &Adapter<B>) -> Result<Self> {
        let zeros = |t: &Tensor<B, f32>| Tensor::zeros(ops, t.rows(), t.cols());
        let tensors = adapter.masters.iter().flatten().chain(&adapter.score);
        let pairs = tensors.map(|t| Ok([zeros(t)?, zeros(t)?])).collect::<Result<_>>()?;
        Ok(Moments { pairs, norm: Tensor::zeros(ops, 1, 1)? })
    }

    /// One AdamW step on all of the adapter; returns the gradients' norm before clipping. Not finite: nothing was updated.
    pub fn step(&mut self, ops: &B, adapter: &mut Adapter<B>, grad: &AdapterGrad<B>, spec: AdamWSpec) -> Result<f32> {
        let _stage = crate::backend::stage(c"optimiser");
        let loras = adapter.blocks.iter_mut().flat_map(BlockLora::products_mut);
        let grads = grad.blocks.iter().flat_map(BlockGrad::products);
        let mut moments = self.pairs.iter_mut();
        let mut parameters = Vec::new();
        for (([a, b], lora), grad) in adapter.masters.iter_mut().zip(loras).zip(grads) {
            let scale = lora.scale;
            let pairs = [(a, &grad.da, (&mut lora.a, 1.0)), (b, &grad.db, (&mut lora.b, scale))];
            for ((master, grad, operand), [m, v]) in pairs.into_iter().zip(&mut moments) {
                parameters.push(Parameter { master, m, v, grad, operand: Some(operand) });
            }
        }
        if let (Some(master), Some(grad), Some([m, v])) = (&mut adapter.score, &grad.score, moments.next()) {
            parameters.push(Parameter { master, m, v, grad, operand: None });
        }
        ops.adamw(&mut self.norm, &mut parameters, spec)?;
        Ok(self.norm.read(ops)?[0])
    }
}
