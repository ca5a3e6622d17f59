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

impl Projection {
    pub const ALL: [Projection; 7] = [Q, K, V, O, Gate, Up, Down];

    /// What each fused product of a block is made of: q∣k∣v, o, gate∣up, down.
    pub(super) const FUSED: [&[Projection]; 4] = [&[Q, K, V], &[O], &[Gate, Up], &[Down]];

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
}
