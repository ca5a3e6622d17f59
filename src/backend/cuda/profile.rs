//! How long each kernel takes: events around every launch, read when the recording ends.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use super::driver::{Driver, Event};
use super::lock;
use crate::backend::cost::{Cost, KernelRun};
use crate::error::Result;

/// Off it costs one load per launch.
#[derive(Default)]
pub(crate) struct Profile {
    on: AtomicBool,
    record: Mutex<Record>,
}

#[derive(Default)]
struct Record {
    cost: Cost,
    begin: Option<Event>,
    runs: Vec<(&'static str, Cost, Event, Event)>,
}

impl Profile {
    pub(crate) fn is_on(&self) -> bool {
        self.on.load(Ordering::Relaxed)
    }

    /// What was recorded before is forgotten.
    pub(crate) fn begin(&self, driver: &dyn Driver) -> Result<()> {
        let next = Record { begin: Some(driver.event()?), ..Record::default() };
        let Record { begin, runs, .. } = std::mem::replace(&mut *lock(&self.record), next);
        let events = runs.into_iter().flat_map(|(_, _, before, after)| [before, after]);
        begin.into_iter().chain(events).for_each(|event| driver.event_free(event));
        self.on.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// What the next launch must at least do.
    pub(super) fn charge(&self, cost: impl FnOnce() -> Cost) {
        if self.is_on() {
            lock(&self.record).cost = cost();
        }
    }

    /// Runs `launch` between two events.
    pub(super) fn around(
        &self,
        driver: &dyn Driver,
        kernel: &'static str,
        launch: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let before = driver.event()?;
        launch()?;
        let after = driver.event()?;
        let mut record = lock(&self.record);
        let cost = std::mem::take(&mut record.cost);
        record.runs.push((kernel, cost, before, after));
        Ok(())
    }

    /// Waits; returns what ran since `begin`, in order.
    pub(crate) fn end(&self, driver: &dyn Driver) -> Result<Vec<KernelRun>> {
        self.on.store(false, Ordering::Relaxed);
        let Record { begin, runs, .. } = std::mem::take(&mut *lock(&self.record));
        let Some(begin) = begin else { return Ok(Vec::new()) };
        let mut out = Vec::with_capacity(runs.len());
        for (kernel, cost, before, after) in runs {
            let (at, milliseconds) = (driver.elapsed(&begin, &before)?, driver.elapsed(&before, &after)?);
            out.push(KernelRun { kernel, begin: at, milliseconds, cost });
            driver.event_free(before);
            driver.event_free(after);
        }
        driver.event_free(begin);
        Ok(out)
    }
}
