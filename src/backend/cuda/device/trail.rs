//! Which kernels may be at fault: a GPU reports a fault when somebody waits, long after the launch.

use std::collections::VecDeque;

/// Names kept: a training step launches some hundreds of kernels between two waits.
const KEPT: usize = 64;

/// What was launched since the last time that all was known to be well.
#[derive(Debug, Default)]
pub(super) struct Trail {
    /// The last launch that is known to have succeeded.
    done: Option<&'static str>,
    since: VecDeque<&'static str>,
    /// Launches in all.
    launched: usize,
}

impl Trail {
    pub(crate) fn launch(&mut self, name: &'static str) {
        if self.since.len() == KEPT {
            self.since.pop_front();
        }
        self.since.push_back(name);
        self.launched += 1;
    }

    /// For [`Trail::reached`].
    pub(crate) fn mark(&self) -> usize {
        self.launched
    }

    /// Everything up to `mark` succeeded.
    pub(crate) fn reached(&mut self, mark: usize) {
        let later = self.launched - mark.min(self.launched);
        while self.since.len() > later {
            self.done = self.since.pop_front();
        }
    }

    /// `norm_forward succeeded last; since then rows, gather x3 were launched`
    pub(crate) fn describe(&self) -> String {
        let done = self.done.map_or("no kernel is known to have succeeded".into(), |n| format!("{n} succeeded last"));
        if self.since.is_empty() {
            return format!("{done}; none was launched since then");
        }
        let mut runs: Vec<(&str, usize)> = Vec::new();
        for &name in &self.since {
            match runs.last_mut() {
                Some((last, count)) if *last == name => *count += 1,
                _ => runs.push((name, 1)),
            }
        }
        let run = |(name, count): (&str, usize)| if count == 1 { name.to_string() } else { format!("{name} x{count}") };
        let names: Vec<String> = runs.into_iter().map(run).collect();
        // What fell out at the front was launched after `done` as well.
        let more = if self.since.len() == KEPT { "among others " } else { "" };
        format!("{done}; since then {more}{} were launched", names.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_trail_begins_where_all_was_well_and_does_not_grow() {
        let mut trail = Trail::default();
        assert_eq!(trail.describe(), "no kernel is known to have succeeded; none was launched since then");
        ["embed", "norm"].into_iter().for_each(|name| trail.launch(name));
        let mark = trail.mark();
        ["gather", "gather", "qkv"].into_iter().for_each(|name| trail.launch(name));
        assert!(trail.describe().ends_with("since then embed, norm, gather x2, qkv were launched"));
        for _ in 0..2 {
            trail.reached(mark);
            assert_eq!(trail.describe(), "norm succeeded last; since then gather x2, qkv were launched");
        }
        trail.reached(trail.mark());
        assert_eq!(trail.describe(), "qkv succeeded last; none was launched since then");
        (0..10 * KEPT).for_each(|_| trail.launch("a"));
        assert_eq!(trail.since.len(), KEPT);
        assert!(trail.describe().contains("among others a x64"));
        trail.reached(trail.mark() - 1);
        assert!(trail.describe().ends_with("since then a were launched"), "{}", trail.describe());
    }
}
