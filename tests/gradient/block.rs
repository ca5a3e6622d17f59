//! One whole block: its input's gradient and those of all four adapters, with every feature that a family may have.

use ares::backend::{Cpu, Tensor};
use ares::model::adapter::{BlockGrad, BlockLora};
use ares::model::block::{Block, BlockSpec, Saved, Scratch, Widths};
use ares::ops::*;

use super::common::*;
use super::{added, assert_gradient, functional};

const GROUPS: &[Group] = &[(4, &[3, 2]), (0, &[5])];
const ROWS: usize = 14;
const W: Widths = Widths { hidden: 10, qkv: 32, heads: 4, head_dim: 4, raw: 24, feed_forward: 9, rank: 2 };

/// Masters of q∣k∣v, o, gate∣up and down.
fn masters() -> [Masters; 4] {
    let (q, kv) = (W.heads * W.head_dim, 2 * W.head_dim);
    [
        Masters::noise(1, &[q, kv, kv], W.hidden, W.rank),
        Masters::noise(3, &[W.hidden], q, W.rank),
        Masters::noise(5, &[W.feed_forward; 2], W.hidden, W.rank),
        Masters::noise(7, &[W.hidden], W.feed_forward, W.rank),
    ]
}

struct Case {
    block: Block<Cpu>,
    rope: Rope<Cpu>,
    packing: Packing<Cpu>,
    masters: [Masters; 4],
}

impl Case {
    fn new(bias: bool, qk_norm: bool, window: Option<usize>) -> Case {
        let (heads, kv_heads, head_dim) = (W.heads, 2, W.head_dim);
        let norm = NormSpec { eps: 1e-2, unit_offset: false };
        let gain = |seed, cols| tensor(cols, &noise(seed, cols).iter().map(|g| 1.0 + g / 2.0).collect::<Vec<_>>());
        let frozen = |seed, rows: usize, cols: usize| weight(rows, &noise(seed, rows * cols));
        let spec = BlockSpec {
            norm,
            qkv: QkvSpec { heads, kv_heads, head_dim, norm },
            attention: AttentionSpec { heads, kv_heads, head_dim, scale: 0.5, window, softcap: None, causal: true },
            gate_up: GateUpSpec { activation: Activation::Silu, gated: true },
        };
        let block = Block {
            input_norm: gain(20, W.hidden),
            qkv: QkvWeights {
                w: frozen(21, W.qkv, W.hidden),
                bias: bias.then(|| tensor(W.qkv, &noise(22, W.qkv))),
                qk_norm: qk_norm.then(|| (gain(23, W.head_dim), gain(24, W.head_dim))),
            },
            o: frozen(25, W.hidden, heads * head_dim),
            post_norm: gain(26, W.hidden),
            gate_up: frozen(27, 2 * W.feed_forward, W.hidden),
            down: frozen(28, W.hidden, W.feed_forward),
            spec,
        };
        let rope = Rope::new(&Cpu::new(), &[1.0, 0.2], 16).unwrap();
        Case { block, rope, packing: packing(GROUPS), masters: masters() }
    }

    /// The block's output and all that backward needs, from x and the masters' (A, B).
    fn forward(&self, x: &[f32], values: &[[Vec<f32>; 2]; 4]) -> (Vec<f32>, Saved<Cpu>, Scratch<Cpu>) {
        let cpu = Cpu::new();
        let mut saved = Saved::with_capacity(&cpu, ROWS, &W).unwrap();
        let mut scratch = Scratch::with_capacity(&cpu, ROWS, &W, true).unwrap();
        let mut out = nans(ROWS, W.hidden);
        saved.x.write(&cpu, x).unwrap();
        let lora = self.lora(values);
        self.block.forward(&cpu, &mut out, &mut saved, &mut scratch, Some(&lora), &self.rope, &self.packing).unwrap();
        (self::values(&out), saved, scratch)
    }

    fn lora(&self, values: &[[Vec<f32>; 2]; 4]) -> BlockLora<Cpu> {
        let lora = |p: usize| self.masters[p].lora_of(&values[p][0], &values[p][1]);
        BlockLora { qkv: lora(0), o: lora(1), gate_up: lora(2), down: lora(3) }
    }
}

#[test]
fn block() {
    for (bias, qk_norm, window) in [(false, false, None), (true, false, Some(3)), (false, true, None)] {
        let (cpu, case) = (Cpu::new(), Case::new(bias, qk_norm, window));
        let (x, c) = (noise(30, ROWS * W.hidden), noise(31, ROWS * W.hidden));
        let values = case.masters.each_ref().map(|m| [m.a.clone(), m.b.clone()]);
        let (_, mut saved, mut scratch) = case.forward(&x, &values);
        let grad = |p: usize| case.masters[p].grad(40 + 10 * p as u64);
        let mut grad = BlockGrad { qkv: grad(0), o: grad(1), gate_up: grad(2), down: grad(3) };
        let (mut dx, lora): (Tensor<Cpu>, _) = (tensor(W.hidden, &c), case.lora(&values));
        #[rustfmt::skip] // outputs, inputs, weights
        case.block.backward(
            &cpu, &mut dx, Some(&mut grad),
            &mut saved, &mut scratch,
            Some(&lora), &case.rope, &case.packing,
        ).unwrap();

        let kind = format!("block (bias {bias}, q/k norm {qk_norm}, window {window:?})");
        let f = |x: &[f32], values: &[[Vec<f32>; 2]; 4]| functional(&c, &case.forward(x, values).0);
        assert_gradient(&format!("{kind}: dx"), &self::values(&dx), &x, |x| f(x, &values));
        for (p, grad) in [grad.qkv, grad.o, grad.gate_up, grad.down].iter().enumerate() {
            for (which, found) in [&grad.da, &grad.db].into_iter().enumerate() {
                let found = added(&found.buffer, 40 + 10 * p as u64 + which as u64);
                let mut changed = values.clone();
                let what = format!("{kind}: product {p}, {}", ["dA", "dB"][which]);
                assert_gradient(&what, &found, &values[p][which], |v| {
                    changed[p][which].copy_from_slice(v);
                    f(&x, &changed)
                });
            }
        }
    }
}
