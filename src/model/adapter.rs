//! A model's LoRA adapters on the device: f32 masters, the operands that products read, gradients and moments.

use std::collections::BTreeMap;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::adapter_file::{AdapterFile, HostTensor, HostTensors};
use super::config::ModelConfig;
use super::projection::{Projection, Turning};
use crate::backend::Tensor;
use crate::error::{Error, Result};
use crate::ops::{AdamWSpec, Lora, LoraGrad, Ops, Parameter};

/// One thing for each fused product of a block that carries an adapter.
pub struct Products<T> {
    pub qkv: T,
    pub o: T,
    pub gate_up: T,
    pub down: T,
}

/// One block's operands.
pub type BlockLora<B> = Products<Lora<B>>;
/// One block's gradients.
pub type BlockGrad<B> = Products<LoraGrad<B>>;

impl<T> Products<T> {
    pub(super) fn each(&self) -> [&T; 4] {
        [&self.qkv, &self.o, &self.gate_up, &self.down]
    }

    pub(super) fn each_mut(&mut self) -> [&mut T; 4] {
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
    /// The adapted classifier's head; the original's unless it is trained. None where that is more than transformers' `score`.
    pub(crate) score: Option<Tensor<B, f32>>, // (labels, C)
    masters: Vec<Masters<B>>, // A and B of each product, block after block
    /// What PEFT's config says of it, without tensors.
    settings: AdapterFile,
    turning: Turning,
}

impl<B: Ops> Adapter<B> {
    /// A fresh adapter; `score` is the original head of a classifier (labels, C).
    pub(super) fn new(
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
        let mut file = AdapterFile::new(config, rank, lora_alpha);
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
        Self::load(ops, config, &file, score)
    }

    /// From PEFT's file. Projections that it leaves alone get zeros; a classifier's head comes from the file or, where that has
    /// none, is the original's, `score`.
    pub fn load(ops: &B, config: &ModelConfig, file: &AdapterFile, score: Option<&[f32]>) -> Result<Self> {
        let (mut blocks, mut masters) = (Vec::new(), Vec::new());
        for layer in 0..config.layers {
            let mut lora = |parts| {
                let (lora, master) = product(ops, config, file, layer, parts)?;
                masters.push(master);
                Ok(lora)
            };
            let [qkv, o, gate_up, down] = Projection::FUSED;
            blocks.push(Products { qkv: lora(qkv)?, o: lora(o)?, gate_up: lora(gate_up)?, down: lora(down)? });
        }
        let score = file.score().map(|s| s.data.as_slice()).or(score).filter(|_| config.has_plain_head());
        let score = score.map(|data| Tensor::from_host(ops, config.labels(), config.hidden_size, data)).transpose()?;
        let settings = AdapterFile { tensors: BTreeMap::new(), ..file.clone() };
        Ok(Adapter { blocks, score, masters, settings, turning: Turning::of(config) })
    }

    /// As PEFT saves it, score head included. Waits for queued work; fails where the device does.
    pub fn to_file(&self, ops: &B) -> Result<AdapterFile> {
        self.file_of(ops, self.masters.iter().map(|[a, b]| [a, b]), self.score.as_ref())
    }

    /// Gradients under PEFT's names, in the adapter's own layout. Waits for queued work; fails where the device does.
    pub fn gradients_to_file(&self, ops: &B, grad: &AdapterGrad<B>) -> Result<AdapterFile> {
        let products = grad.blocks.iter().flat_map(Products::each);
        self.file_of(ops, products.map(|g| [&g.da, &g.db]), grad.score.as_ref())
    }

    /// Cuts fused (A, B) values of every product into projections.
    fn file_of<'a>(
        &self,
        ops: &B,
        values: impl Iterator<Item = [&'a Tensor<B, f32>; 2]>,
        score: Option<&Tensor<B, f32>>,
    ) -> Result<AdapterFile>
    where
        B: 'a,
    {
        let (mut file, rank, wide) = (self.settings.clone(), self.settings.rank, self.rank());
        let loras = self.blocks.iter().flat_map(Products::each);
        for (index, (lora, [a, b])) in loras.zip(values).enumerate() {
            let (k, a, b) = (a.cols(), a.read(ops)?, b.read(ops)?);
            let mut rows = 0;
            for ((&projection, n), a) in
                Projection::FUSED[index % 4].iter().zip(&lora.parts).zip(a.chunks_exact(wide * k))
            {
                let b = b[rows * wide..][..n * wide].chunks_exact(wide).map(|row| &row[..rank]);
                let mut b = b.collect::<Vec<_>>().concat();
                projection.order_channels(self.turning, &mut b, rank, true);
                file.set_lora(index / 4, projection, a[..rank * k].to_vec(), b);
                rows += n;
            }
        }
        if let Some(score) = score {
            file.set_score(score.rows(), score.read(ops)?);
        }
        Ok(file)
    }

    /// Of its tensors.
    pub fn rank(&self) -> usize {
        padded(self.settings.rank)
    }
}

/// A rank as it lies on the device: in chunks of 16 bytes, without which every product of the model would be read element by element.
/// What is added is zeros, whose gradients are zeros, too.
fn padded(rank: usize) -> usize {
    rank.next_multiple_of(8)
}

/// Operands and masters of one fused product.
fn product<B: Ops>(
    ops: &B,
    config: &ModelConfig,
    file: &AdapterFile,
    layer: usize,
    parts: &[Projection],
) -> Result<(Lora<B>, Masters<B>)> {
    let (own, rank) = (file.rank, padded(file.rank));
    let (mut a, mut b, mut rows) = (Vec::new(), Vec::new(), Vec::new());
    let k = parts[0].shape(config).1;
    for &projection in parts {
        let n = projection.shape(config).0;
        let zeros = || [vec![0.0; own * k], vec![0.0; n * own]];
        let [of_a, mut of_b] = file.lora(layer, projection).map_or_else(zeros, |lora| lora.map(|m| m.data.clone()));
        projection.order_channels(Turning::of(config), &mut of_b, own, false);
        a.extend(of_a);
        a.resize(a.len() + (rank - own) * k, 0.0);
        for row in of_b.chunks_exact(own) {
            b.extend(row);
            b.resize(b.len() + rank - own, 0.0);
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
            let zeros = |t: &Tensor<B>| Tensor::zeros(ops, t.rows(), t.cols());
            Ok(LoraGrad { da: zeros(&lora.a)?, db: zeros(&lora.b)? })
        };
        let block = |b: &BlockLora<B>| -> Result<BlockGrad<B>> {
            Ok(BlockGrad { qkv: like(&b.qkv)?, o: like(&b.o)?, gate_up: like(&b.gate_up)?, down: like(&b.down)? })
        };
        let score = adapter.score.as_ref().filter(|_| train_head);
        let score = score.map(|score| Tensor::zeros(ops, score.rows(), score.cols())).transpose()?;
        Ok(AdapterGrad { blocks: adapter.blocks.iter().map(block).collect::<Result<_>>()?, score })
    }

    /// Back to zero: before the first backward of a step.
    pub fn clear(&mut self, ops: &B) -> Result<()> {
        for product in self.blocks.iter_mut().flat_map(Products::each_mut) {
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

    /// All of them, on the host, each under its place. Waits for queued work; fails where the device does.
    pub(crate) fn to_host(&self, ops: &B) -> Result<HostTensors> {
        let mut out = HostTensors::new();
        for (i, pair) in self.pairs.iter().enumerate() {
            for (name, tensor) in ["m", "v"].into_iter().zip(pair) {
                let shape = vec![tensor.rows(), tensor.cols()];
                out.insert(format!("{name}.{i}"), HostTensor { shape, data: tensor.read(ops)? });
            }
        }
        Ok(out)
    }

    /// Takes over what [`Moments::to_host`] gave. Fails unless all of it is there, in the same shapes.
    pub(crate) fn load(&mut self, ops: &B, from: &HostTensors) -> Result<()> {
        for (i, pair) in self.pairs.iter_mut().enumerate() {
            for (name, tensor) in ["m", "v"].into_iter().zip(pair) {
                let (name, shape) = (format!("{name}.{i}"), [tensor.rows(), tensor.cols()]);
                let Some(found) = from.get(&name).filter(|found| found.shape == shape) else {
                    let (expected, found) = (format!("{name} of {shape:?}"), "none such".to_string());
                    return Err(Error::Shape { op: "moments", expected, found });
                };
                tensor.write(ops, &found.data)?;
            }
        }
        Ok(())
    }

    /// One AdamW step on all of the adapter; returns the gradients' norm before clipping. Not finite: nothing was updated.
    pub fn step(&mut self, ops: &B, adapter: &mut Adapter<B>, grad: &AdapterGrad<B>, spec: AdamWSpec) -> Result<f32> {
        let _stage = crate::backend::stage(c"optimiser");
        let loras = adapter.blocks.iter_mut().flat_map(Products::each_mut);
        let grads = grad.blocks.iter().flat_map(Products::each);
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
