//! Stages as an attached profiler sees them. The profiler is a library of a few lines, made here by the C++ compiler, that speaks
//! NVTX 3 as NVIDIA's headers do (`nvtxDetail/nvtxTypes.h`): it asks for every table, and fills the slots of push and pop.

use super::bench::MODELS;
use super::support::{Folder, command, finish};
use crate::compiler::shared_library;

const PROFILER: &str = r#"
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
typedef void (*Function)(void);
struct Callbacks { size_t size; int (*table)(int, Function***, unsigned*); };
struct Version { size_t size; uint32_t version, reserved; void (*set)(uint32_t); };
static FILE* out;
static int push(const char* name) { fprintf(out, "> %s\n", name); fflush(out); return 0; }
static int pop() { fprintf(out, "<\n"); fflush(out); return 0; }
static void other() {}
extern "C" int InitializeInjectionNvtx2(const void* (*table)(uint32_t)) {
    out = fopen(getenv("ARES_TEST_RANGES"), "w");
    auto* callbacks = static_cast<const Callbacks*>(table(1));
    auto* version = static_cast<const Version*>(table(3));
    if (!out || !callbacks || callbacks->size < sizeof(Callbacks) || !version || version->version != 3 || table(99)) return 0;
    version->set(3);
    const unsigned sizes[7] = {0, 16, 9, 15, 7, 16, 7};
    for (int module = 0; module < 9; module++) {
        Function** slots = nullptr;
        unsigned size = 0;
        int known = callbacks->table(module, &slots, &size);
        if (known != (module > 0 && module < 7)) return 0;
        if (known && size != sizes[module]) return 0;
        for (unsigned i = 1; i < size; i++) {
            if (!slots[i]) return 0;
            *slots[i] = other;
        }
        if (module == 1) {
            *slots[9] = reinterpret_cast<Function>(push);
            *slots[11] = reinterpret_cast<Function>(pop);
        }
    }
    fprintf(out, "attached\n");
    return 1;
}
"#;

#[test]
fn a_profiler_sees_every_stage_begin_and_end() {
    let folder = Folder::new();
    folder.write("profiler.cpp", PROFILER);
    let library = folder.at("libprofiler.so");
    if !shared_library(&folder.at("profiler.cpp"), &library) {
        return;
    }
    let little =
        "--tokens 24 --length 8 --rank 4 --sequences 2 --new-tokens 2 --batch-tokens 32 --warmup 0 --repeats 1";
    let bench = |library: &std::path::Path| {
        let mut command = command(&format!("bench generate step --device cpu {MODELS} {little}"));
        command.env("NVTX_INJECTION64_PATH", library).env("ARES_TEST_RANGES", folder.at("ranges"));
        finish(command.spawn().unwrap()).expect(0, &[]);
    };
    // Without one all goes on.
    bench(&folder.at("nowhere.so"));
    bench(&library);
    let seen = folder.read("ranges");
    let mut lines = seen.lines();
    assert_eq!(lines.next(), Some("attached"));
    let (mut open, mut stages) = (Vec::new(), Vec::new());
    for line in lines {
        match line.strip_prefix("> ") {
            Some(name) => {
                open.push(name);
                stages.push(name);
            }
            None => assert!(open.pop().is_some(), "more ends than begins: {seen}"),
        }
    }
    assert!(open.is_empty(), "{open:?} never ended");
    // One repeat and one more, in which kernels are timed where there are any, of each task.
    let joint = ["reward forward", "reward backward", "policy forward", "policy backward", "optimiser", "optimiser"];
    assert_eq!(stages, [&["generate"; 2][..], &joint, &joint].concat());
}
