//! `ares kernels`: the GPU kernels, compiled without a GPU.

use std::path::PathBuf;

use clap::Args;
use rayon::prelude::*;
use serde::Serialize;
use serde_json::json;

use super::Session;
use crate::backend::cuda::cache::{Cache, Key};
use crate::backend::cuda::compiler::{Compiler, Origin};
use crate::backend::cuda::driver::Arch;
use crate::backend::cuda::kernels::SOURCES;
use crate::backend::cuda::nvrtc::{Cubin, target};
use crate::backend::cuda::usage::{Usage, parse};
use crate::backend::cuda::{Build, pack};
use crate::error::{Error, Result};
use crate::ops::builds;
use crate::report::Align::{Left, Right};
use crate::report::{Column, Table};
use crate::text::output::write_atomic;

/// List the GPU kernels; with --arch compile them, no GPU needed, and report what each takes
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    ares kernels --arch sm_90a --check\n  \
    ares kernels --arch sm_80,sm_90a --pack ares.kernels   then, elsewhere: ares score --kernels ares.kernels …")]
pub(crate) struct Kernels {
    /// Compile for these: sm_80, sm_90a, sm_100, sm_120
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    arch: Vec<Arch>,
    /// Fail if a kernel spills, uses local memory, is changed by the assembler, or fits a multiprocessor less often than its plan relies on
    #[arg(long, requires = "arch")]
    check: bool,
    /// Write all compiled code into one file, for machines without libnvrtc (--kernels FILE)
    #[arg(long, requires = "arch", value_name = "FILE")]
    pack: Option<PathBuf>,
}

/// One kernel, compiled.
#[derive(Debug, Serialize)]
struct Line {
    file: &'static str,
    arch: &'static str,
    constants: String,
    #[serde(flatten)]
    usage: Usage,
    /// Dynamic shared memory of a block, bytes.
    dynamic_shared: u32,
    threads: u32,
    /// That one multiprocessor holds at once.
    blocks: u32,
    blocks_planned: u32,
}

#[derive(Debug, Serialize)]
struct Compilation {
    compiler: String,
    /// Of the compiler, added up over all files; 0 when all of them came from the cache.
    compile_seconds: f64,
    files_compiled: usize,
    kernels: Vec<Line>,
}

impl Kernels {
    pub(crate) fn run(self, session: &Session) -> Result<()> {
        if self.arch.is_empty() {
            return list(session);
        }
        let compiler = Compiler::new(session.kernels(), None, Cache::user()?)?;
        compiler.check()?;
        let builds = builds();
        let work: Vec<(Arch, &Build)> = self
            .arch
            .iter()
            .flat_map(|&arch| builds.iter().filter(move |build| build.serves(arch)).map(move |build| (arch, build)))
            .collect();
        let bar = session.progress("compiling kernels", work.len() as u64);
        let compile = |&(arch, build): &(Arch, &Build)| {
            let compiled = compile(&compiler, build, arch);
            bar.inc(1);
            compiled
        };
        let compiled = work.par_iter().map(compile).collect::<Result<Vec<_>>>();
        bar.finish_and_clear();
        let compiled = compiled?;
        if let Some(path) = &self.pack {
            let cubins: Vec<(Key, Cubin)> =
                compiled.iter().map(|(key, cubin, ..)| (key.clone(), cubin.clone())).collect();
            write_atomic(path, &pack::encode(&cubins))?;
            session.say(&format!("wrote {} ({} files of kernels)", path.display(), cubins.len()));
        }
        let seconds = compiled.iter().filter_map(|(_, _, origin, _)| match origin {
            Origin::Compiled(seconds) => Some(*seconds),
            Origin::Pack | Origin::Cache => None,
        });
        let report = Compilation {
            compiler: compiler.nvrtc().map_or("none: all from the pack".to_string(), ToString::to_string),
            files_compiled: seconds.clone().count(),
            // Not `sum`: of nothing that is -0.
            compile_seconds: seconds.fold(0.0, |a, b| a + b),
            kernels: compiled.into_iter().flat_map(|(.., lines)| lines).collect(),
        };
        let Compilation { compiler, compile_seconds, files_compiled, .. } = &report;
        session.say(&format!("{compiler}: {files_compiled} files compiled anew in {compile_seconds:.1} s"));
        session.inform(&report.table(), &report)?;
        if self.check { report.check() } else { Ok(()) }
    }
}

/// One file, and what its kernels take.
fn compile(compiler: &Compiler, build: &Build, arch: Arch) -> Result<(Key, Cubin, Origin, Vec<Line>)> {
    let (key, cubin, origin) = compiler.compile(build.source, &build.defines, arch)?;
    let constants: Vec<String> = build.defines.iter().map(|(name, value)| format!("{name}={value}")).collect();
    let line = |usage: Usage| {
        let budget =
            build.budgets.iter().find(|budget| budget.kernel == usage.kernel).ok_or_else(|| Error::Kernel {
                file: build.source.file.to_string(),
                target: target(&build.defines, arch),
                log: format!("{} is a kernel of which the program knows nothing", usage.kernel),
            })?;
        Ok(Line {
            file: build.source.file,
            arch: arch.name(),
            constants: constants.join(" "),
            dynamic_shared: budget.shared,
            threads: budget.threads,
            blocks: usage.blocks(budget, arch),
            blocks_planned: budget.blocks,
            usage,
        })
    };
    let lines = parse(&cubin.log).into_iter().map(line).collect::<Result<Vec<_>>>()?;
    Ok((key, cubin, origin, lines))
}

impl Compilation {
    fn table(&self) -> Table {
        let columns: [Column<&Line>; 9] = [
            ("kernel", Left, &|line| line.usage.kernel.clone().into()),
            ("arch", Left, &|line| line.arch.into()),
            ("threads", Right, &|line| line.threads.to_string().into()),
            ("registers", Right, &|line| line.usage.registers.to_string().into()),
            ("shared", Right, &|line| (line.usage.shared + line.dynamic_shared).to_string().into()),
            ("stack", Right, &|line| line.usage.stack.to_string().into()),
            ("spills", Right, &|line| line.usage.spills.to_string().into()),
            ("blocks", Right, &|line| line.blocks.to_string().into()),
            ("constants", Left, &|line| line.constants.clone().into()),
        ];
        Table::of(&self.kernels, &columns)
    }

    fn check(&self) -> Result<()> {
        let faults: Vec<String> = self.kernels.iter().filter_map(fault).collect();
        if faults.is_empty() && !self.kernels.is_empty() {
            return Ok(());
        }
        Err(Error::Data {
            what: "kernels".to_string(),
            expected: "no spills, no local memory, no advice of the assembler, and as many blocks on a multiprocessor as planned"
                .to_string(),
            found: faults.join("; "),
            remedy: "change the kernels named".to_string(),
        })
    }
}

fn fault(line: &Line) -> Option<String> {
    let Line { arch, constants, usage, blocks, blocks_planned, .. } = line;
    let place = format!("{arch} {} ({constants})", usage.kernel);
    if !usage.is_clean() {
        let advice = usage.advice.iter().map(|advice| format!(", {advice}")).collect::<String>();
        return Some(format!("{place}: {} bytes of spills, {} of stack{advice}", usage.spills, usage.stack));
    }
    (blocks < blocks_planned).then(|| format!("{place}: {blocks} blocks, planned {blocks_planned}"))
}

/// What there is, without compiling.
fn list(session: &Session) -> Result<()> {
    let (builds, mut files) = (builds(), Vec::new());
    let mut table = Table::new(&[("file", Left), ("builds", Right), ("kernels", Left)]);
    for source in SOURCES {
        let count = builds.iter().filter(|build| build.source == *source).count();
        table.row(vec![source.file.into(), count.to_string().into(), source.kernels.join(", ").into()]);
        files.push(json!({ "file": source.file, "kernels": source.kernels, "builds": count }));
    }
    session.inform(&table, &files)
}
