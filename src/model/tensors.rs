//! A struct of tensors, each listed once: `name: element = [rows, columns]`.

/// Fields, `new(ops, …)`, `fit(ops, …)` and `set_rows` of one list. Tensors without memory (of a pass that was not asked for)
/// keep no rows.
macro_rules! tensors {
    ($(#[$doc:meta])* $vis:vis struct $name:ident($($arg:ident: $of:ty),*) {
        $($(#[$what:meta])* $field:ident: $T:ty = [$rows:expr, $cols:expr],)*
    }) => {
        $(#[$doc])*
        $vis struct $name<B: Ops> {
            $($(#[$what])* $vis $field: Tensor<B, $T>,)*
        }

        impl<B: Ops> $name<B> {
            /// Allocates all of them; fails where the device's memory does not suffice.
            $vis fn new(ops: &B, $($arg: $of),*) -> Result<Self> {
                Ok($name { $($field: Tensor::zeros(ops, $rows, $cols)?,)* })
            }

            /// Gives all of them the sizes that `new` would; what has memory enough stays where it is, its values are unspecified.
            $vis fn fit(&mut self, ops: &B, $($arg: $of),*) -> Result<()> {
                $(self.$field.fit(ops, $rows, $cols)?;)*
                Ok(())
            }

            $vis fn set_rows(&mut self, rows: usize) -> Result<()> {
                $(if self.$field.capacity() > 0 {
                    self.$field.set_rows(rows)?;
                })*
                Ok(())
            }
        }
    };
}

pub(super) use tensors;
