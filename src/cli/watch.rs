//! Long work as a person sees it: a bar while it goes on, one line when it is done.

use std::ffi::CString;
use std::time::Instant;

use indicatif::ProgressBar;

use super::Session;
use crate::backend;
use crate::run::Watch;

/// Shows the stages of a run on stderr.
pub(crate) struct Stages<'a> {
    session: &'a Session,
    stage: String,
    bar: ProgressBar,
    begin: Instant,
    /// The same stage, where a profiler is attached.
    mark: Option<backend::Stage>,
}

impl<'a> Stages<'a> {
    pub(crate) fn new(session: &'a Session) -> Stages<'a> {
        Stages { session, stage: String::new(), bar: ProgressBar::hidden(), begin: Instant::now(), mark: None }
    }
}

impl Watch for Stages<'_> {
    fn begin(&mut self, stage: &str, total: usize) {
        self.bar.finish_and_clear();
        self.bar = self.session.progress(stage, total as u64);
        (self.stage, self.begin) = (stage.to_string(), Instant::now());
        // The earlier one ends before the next begins.
        self.mark = None;
        self.mark = CString::new(stage).ok().map(|name| backend::stage(&name));
    }

    fn at(&mut self, done: usize, note: &str) {
        self.bar.set_position(done as u64);
        self.bar.set_message(note.to_string());
    }

    fn end(&mut self, result: &str) {
        self.bar.finish_and_clear();
        self.mark = None;
        let seconds = self.begin.elapsed().as_secs_f64();
        self.session.say(&format!("{:28} {seconds:6.1} s   {result}", self.stage));
    }

    fn note(&mut self, line: &str) {
        self.session.say(line);
    }
}

impl Drop for Stages<'_> {
    fn drop(&mut self) {
        // A bar that an error leaves there would stand over the message.
        self.bar.finish_and_clear();
    }
}
