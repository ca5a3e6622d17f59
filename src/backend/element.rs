//! What a tensor may hold.

/// A number as it lies in memory.
pub trait Element: bytemuck::Pod + Default + Send + Sync + std::fmt::Debug + PartialEq {
    /// As messages spell it.
    const NAME: &'static str;
}

impl Element for f32 {
    const NAME: &'static str = "f32";
}

impl Element for half::bf16 {
    const NAME: &'static str = "bf16";
}

impl Element for u32 {
    const NAME: &'static str = "u32";
}

/// A real number as activations are stored.
pub trait Real: Element {
    fn from_f32(value: f32) -> Self;
    fn to_f32(self) -> f32;
}

impl Real for f32 {
    fn from_f32(value: f32) -> f32 {
        value
    }

    fn to_f32(self) -> f32 {
        self
    }
}

impl Real for half::bf16 {
    fn from_f32(value: f32) -> half::bf16 {
        half::bf16::from_f32(value)
    }

    fn to_f32(self) -> f32 {
        half::bf16::to_f32(self)
    }
}
