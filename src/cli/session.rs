//! What every command shares: the global flags, and where results, tables and progress go.

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

use super::device::{Device, DeviceSpec};
use crate::backend::cuda::compiler::KernelOptions;
use crate::error::{Error, Result, visible};
use crate::repair::LARGEST_SEED;
use crate::report::{Style, Table};
use crate::run::args;

/// Where none is given.
pub(crate) const SEED: u32 = 1;

// The frame in which a command runs; as a doc comment this would take the place of the program's own help.
#[derive(Debug, Args)]
#[command(next_help_heading = "Everywhere")]
pub(crate) struct Session {
    /// Where to compute: auto (the first usable GPU, else the CPU), cpu, cuda[:N], sim[:ARCH]
    #[arg(long, global = true, default_value = "auto", value_name = "DEVICE")]
    pub(super) device: DeviceSpec,
    /// Seeds everything random: the same inputs and the same seed give the same result [default: 1]
    #[arg(long = "seed", global = true, value_name = "N", value_parser = args::whole::<u64>(0, LARGEST_SEED))]
    pub(super) given_seed: Option<u64>,
    /// Print the result as one JSON object on stdout; tables go to stderr
    #[arg(long, global = true)]
    pub(super) json: bool,
    /// Compiled kernels: a file of `ares kernels --pack`, or a folder of sources [environment: ARES_KERNELS]
    #[arg(long, global = true, value_name = "PATH")]
    kernels: Option<PathBuf>,
    /// The CUDA compiler library libnvrtc, or its folder [environment: ARES_NVRTC]
    #[arg(long, global = true, value_name = "PATH")]
    nvrtc: Option<PathBuf>,
    /// Kernels of a later architecture where there are such: sm_80, or sm_90a on Hopper [default: sm_80] [environment: ARES_TIER]
    #[arg(long, global = true, value_name = "ARCH", value_parser = ["sm_80", "sm_90a"])]
    tier: Option<String>,
    /// Wait after each GPU kernel, so that a fault names it [environment: ARES_SYNC=1]
    #[arg(long, global = true)]
    sync: bool,
    /// Say nothing but results and errors
    #[arg(long, short, global = true, conflicts_with = "verbose")]
    quiet: bool,
    /// Say more
    #[arg(long, short, global = true)]
    verbose: bool,
}

impl Session {
    pub(crate) fn seed(&self) -> u64 {
        self.given_seed.unwrap_or(SEED.into())
    }

    /// Where kernels come from.
    pub(crate) fn kernels(&self) -> KernelOptions {
        let Session { kernels, nvrtc, sync, tier, .. } = self;
        KernelOptions { nvrtc: nvrtc.clone(), kernels: kernels.clone(), sync: *sync, tier: tier.clone() }
            .or_environment()
    }

    /// The device, usable. `auto` says which one it chose.
    pub(crate) fn device(&self) -> Result<Device> {
        let (device, why) = self.device.resolve(self.kernels())?;
        if self.device == DeviceSpec::Auto {
            self.say(&format!("device: {device} ({why})"));
        }
        if let Device::Cuda(cuda) = &device {
            self.detail(&format!("kernels: {}", cuda.served_by()));
        }
        Ok(device)
    }

    /// A line for the person at the terminal, unless `--quiet`.
    pub(crate) fn say(&self, line: &str) {
        if !self.quiet {
            let _ = writeln!(std::io::stderr(), "{}", visible(line));
        }
    }

    /// A line only with `--verbose`.
    pub(crate) fn detail(&self, line: &str) {
        if self.verbose {
            self.say(line);
        }
    }

    /// A table beside the result, on stderr.
    pub(crate) fn table(&self, table: &Table) {
        if !self.quiet {
            let _ = write!(std::io::stderr(), "{}", table.render(Style::of(&console::Term::stderr())));
        }
    }

    /// The result of a command that informs: a table on stdout, or with `--json` the same as one object.
    pub(crate) fn inform(&self, table: &Table, result: &impl Serialize) -> Result<()> {
        self.inform_all(std::slice::from_ref(table), result)
    }

    /// The same of several tables.
    pub(crate) fn inform_all(&self, tables: &[Table], result: &impl Serialize) -> Result<()> {
        if self.json {
            return self.result(result);
        }
        tables.iter().try_for_each(|table| print(&table.render(Style::of(&console::Term::stdout()))))
    }

    /// The result of a command that writes files: with `--json` one object on stdout, else nothing.
    pub(crate) fn result(&self, result: &impl Serialize) -> Result<()> {
        if !self.json {
            return Ok(());
        }
        let text = serde_json::to_string(result).map_err(|error| Error::write(Path::new("stdout"))(error.into()))?;
        print(&format!("{text}\n"))
    }

    /// A bar over `length` units, or a spinner if that is 0; without a terminal it stays unseen.
    pub(crate) fn progress(&self, label: &str, length: u64) -> ProgressBar {
        match length {
            0 => self.bar(label, 0, "{prefix:28} {spinner} {elapsed}"),
            _ => self.bar(label, length, "{prefix:28} {bar:24} {pos}/{len}  {eta} left  {msg}"),
        }
    }

    /// A bar over so many bytes of input, or a spinner where nobody knows how many there are.
    pub(crate) fn progress_of_bytes(&self, label: &str, length: Option<u64>) -> ProgressBar {
        match length {
            None => self.bar(label, 0, "{prefix:28} {spinner} {elapsed}  {msg}"),
            Some(length) => self.bar(label, length, "{prefix:28} {bar:24} {eta} left  {msg}"),
        }
    }

    fn bar(&self, label: &str, length: u64, template: &str) -> ProgressBar {
        if self.quiet || !std::io::stderr().is_terminal() {
            return ProgressBar::hidden();
        }
        let bar = ProgressBar::with_draw_target(Some(length), ProgressDrawTarget::stderr_with_hz(8));
        // A fixed template: if it were wrong, the plain bar is still a bar.
        let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
        bar.set_style(style.progress_chars("━╸─"));
        bar.set_prefix(label.to_string());
        bar.enable_steady_tick(Duration::from_millis(250));
        bar
    }
}

/// Writes to stdout; a closed pipe is an error that ends the program quietly.
pub(crate) fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(Error::write(Path::new("stdout")))
}
