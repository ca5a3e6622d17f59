//! One whole block: its input's gradient and those of all four adapters, with every feature that a family may have.

use ares::backend::{Backend, Cpu};
use ares::model::adapter::{BlockGrad, BlockLora};
use ares::model::block::{Block, BlockScratch, BlockSpec, Saved, Widths};
use ares::ops::*;

use crate::toolkit::*;

const GROUPS: &[Group] = &[(4, &[3, 2]), (0, &[5])];
const ROWS: usize = 14;
const W: Widths = Widths { hidden: 10, qkv: 32, heads: 4, head_dim: 4, raw: 24, feed_forward: 9, rank: 2 };

/// Of q∣k∣v, o, gate∣up and down.
fn masters() -> [Masters; 4] {
    let (q, kv) = (W.heads * W.head_dim, 2 * W.head_dim);
    [
        Masters::new(1, &[q, kv, kv], W.hidden, W.rank),
        Masters::new(3, &[W.hidden], q, W.rank),
        Masters::new(5, &[W.feed_forward; 2], W.hidden, W.rank),
        Masters::new(7, &[W.hidden], W.feed_forward, W.rank),
    ]
}

struct Case {
    block: Block<Cpu>,
    rope: Rope<Cpu>,
    packing: Packing<Cpu>,
}

impl Case {
    fn new(bias: bool, qk_norm: bool, window: Option<usize>) -> Case {
        let (heads, kv_heads, head_dim) = (W.heads, 2, W.head_dim);
        let norm = NormSpec { eps: 1e-2, unit_offset: false };
        let cpu = Cpu::new();
        let gain = |seed, cols| act(&cpu, cols, &noise(seed, cols).iter().map(|g| 1.0 + g / 2.0).collect::<Vec<_>>());
        let frozen = |seed, rows: usize, cols: usize| cpu.weight(rows, cols, noise(seed, rows * cols)).unwrap();
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
                bias: bias.then(|| act(&cpu, W.qkv, &noise(22, W.qkv))),
                qk_norm: qk_norm.then(|| (gain(23, W.head_dim), gain(24, W.head_dim))),
            },
            o: frozen(25, W.hidden, heads * head_dim),
            post_norm: gain(26, W.hidden),
            gate_up: frozen(27, 2 * W.feed_forward, W.hidden),
            down: frozen(28, W.hidden, W.feed_forward),
            spec,
        };
        let rope = Rope::new(&cpu, &[1.0, 0.2], 16).unwrap();
        Case { block, rope, packing: Pack::new(GROUPS).on(&cpu) }
    }

    /// The block's output and all that backward needs.
    fn forward(&self, x: &[f32], masters: &[Masters; 4]) -> (Vec<f32>, Saved<Cpu>, BlockScratch<Cpu>) {
        let cpu = Cpu::new();
        let mut saved = Saved::new(&cpu, ROWS, &W).unwrap();
        let mut scratch = BlockScratch::new(&cpu, ROWS, ROWS, &W).unwrap();
        let mut out = unwritten(&cpu, ROWS, W.hidden);
        saved.x.write(&cpu, x).unwrap();
        let lora = lora(masters);
        self.block.forward(&cpu, &mut out, &mut saved, &mut scratch, Some(&lora), &self.rope, &self.packing).unwrap();
        (read(&cpu, out), saved, scratch)
    }
}

fn lora(masters: &[Masters; 4]) -> BlockLora<Cpu> {
    let [qkv, o, gate_up, down] = masters.each_ref().map(|masters| masters.lora(&Cpu::new()));
    BlockLora { qkv, o, gate_up, down }
}

#[test]
fn block() {
    for (bias, qk_norm, window) in [(false, false, None), (true, false, Some(3)), (false, true, None)] {
        let (cpu, case, masters) = (Cpu::new(), Case::new(bias, qk_norm, window), masters());
        let (x, c) = (noise(30, ROWS * W.hidden), noise(31, ROWS * W.hidden));
        let (_, mut saved, mut scratch) = case.forward(&x, &masters);
        let [qkv, o, gate_up, down] = masters.each_ref().map(|masters| masters.grad(&cpu));
        let mut grad = BlockGrad { qkv, o, gate_up, down };
        let (mut dx, lora) = (act(&cpu, W.hidden, &c), lora(&masters));
        #[rustfmt::skip] // outputs, inputs, weights
        case.block.backward(
            &cpu, &mut dx, &mut grad,
            &mut saved, &mut scratch,
            &lora, &case.rope, &case.packing,
        ).unwrap();

        let kind = format!("block (bias {bias}, q/k norm {qk_norm}, window {window:?})");
        let f = |x: &[f32], masters: &[Masters; 4]| functional(&c, &case.forward(x, masters).0);
        assert_gradient(&format!("{kind}: dx"), &read(&cpu, dx), &x, |x| f(x, &masters));
        for (p, grad) in [grad.qkv, grad.o, grad.gate_up, grad.down].into_iter().enumerate() {
            let mut changed = masters.clone();
            let da = less(&read(&cpu, grad.da), &masters[p].da);
            assert_gradient(&format!("{kind}: product {p}, dA"), &da, &masters[p].a, |a| {
                changed[p].a.copy_from_slice(a);
                f(&x, &changed)
            });
            let mut changed = masters.clone();
            let db = less(&read(&cpu, grad.db), &masters[p].db);
            assert_gradient(&format!("{kind}: product {p}, dB"), &db, &masters[p].b, |b| {
                changed[p].b.copy_from_slice(b);
                f(&x, &changed)
            });
        }
    }
}
