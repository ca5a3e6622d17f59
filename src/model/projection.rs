//! The seven matrices of a layer: their names, their shapes, and the four products that compute them.

use super::config::ModelConfig;

/// A matrix of a layer; an adapter may change each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Projection {
    Q,
    K,
    V,
    O,
    Gate,
    Up,
    Down,
}

use Projection::{Down, Gate, K, O, Q, Up, V};

/// Channels of a head, and how many of them turn.
#[derive(Debug, Clone, Copy)]
pub(super) struct Turning {
    head: usize,
    turning: usize,
}

impl Turning {
    pub(super) fn of(config: &ModelConfig) -> Turning {
        Turning { head: config.head_dim, turning: config.ropes.kinds[0].channels(config.head_dim) }
    }
}

impl Projection {
    pub const ALL: [Projection; 7] = [Q, K, V, O, Gate, Up, Down];

    /// What each fused product of a block is made of: q∣k∣v, o, gate∣up, down.
    pub(super) const FUSED: [&[Projection]; 4] = [&[Q, K, V], &[O], &[Gate, Up], &[Down]];

    /// What files of fused families hold in one matrix, its parts one below the other.
    pub(super) const IN_ONE: [(&str, &[Projection]); 2] =
        [("self_attn.qkv_proj", &[Q, K, V]), ("mlp.gate_up_proj", &[Gate, Up])];

    /// Its name below a layer, without `.weight`; the last part is what PEFT's `target_modules` lists.
    pub(super) fn path(self) -> &'static str {
        match self {
            Q => "self_attn.q_proj",
            K => "self_attn.k_proj",
            V => "self_attn.v_proj",
            O => "self_attn.o_proj",
            Gate => "mlp.gate_proj",
            Up => "mlp.up_proj",
            Down => "mlp.down_proj",
        }
    }

    /// (outputs, inputs) of the matrix.
    pub(super) fn shape(self, config: &ModelConfig) -> (usize, usize) {
        let (c, f) = (config.hidden_size, config.intermediate_size);
        let (q, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
        match self {
            Q => (q, c),
            K | V => (kv, c),
            O => (c, q),
            Gate | Up => (f, c),
            Down => (c, f),
        }
    }

    /// Moves the rows of q's or k's matrix (outputs, `cols`), or of B of its adapter, so that the two channels of every pair that turns lie
    /// half a head apart, where the rotation looks for them; `back` undoes it. Scores of attention do not know the order of channels.
    /// Other matrices stay as they are, and so do q and k where whole heads turn.
    pub(super) fn order_channels(self, Turning { head, turning }: Turning, rows: &mut [f32], cols: usize, back: bool) {
        if turning == head || !matches!(self, Q | K) {
            return;
        }
        let (half, pairs) = (head / 2, turning / 2);
        // Where the file has the channel that is to be at `at`.
        let of = |at: usize| match (at / half, at % half) {
            (side, i) if i < pairs => side * pairs + i,
            (side, i) => turning + side * (half - pairs) + i - pairs,
        };
        for block in rows.chunks_exact_mut(head * cols) {
            let before = block.to_vec();
            for at in 0..head {
                let (to, from) = if back { (of(at), at) } else { (at, of(at)) };
                block[to * cols..][..cols].copy_from_slice(&before[from * cols..][..cols]);
            }
        }
    }
}
