// Stack switching: a context is a stack on which somebody stopped.

#if defined(__x86_64__) && defined(__ELF__)

struct Context {
    void* sp;
};

// Saves what a callee must keep, swaps stacks, restores, returns there. Sixteen instructions; swapcontext makes two system
// calls instead.
extern "C" void sim_switch(void** from, void* to);
asm(R"(
.text
.p2align 4
.hidden sim_switch
.globl sim_switch
.type sim_switch, @function
sim_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size sim_switch, .-sim_switch
)");

/// `entry` begins at the first switch, on the stack that ends at `top` (aligned to 16); it never returns.
static inline void context_make(Context& context, unsigned char*, unsigned char* top, void (*entry)()) {
    void** sp = reinterpret_cast<void**>(top) - 8;
    for (int i = 0; i < 6; i++) sp[i] = nullptr;  // rbp = 0 ends a debugger's walk
    sp[6] = reinterpret_cast<void*>(entry);
    sp[7] = nullptr;
    context.sp = sp;
}

static inline void context_switch(Context& from, Context& to) { sim_switch(&from.sp, to.sp); }

#else
#include <ucontext.h>

struct Context {
    ucontext_t state;
};

static inline void context_make(Context& context, unsigned char* low, unsigned char* top, void (*entry)()) {
    getcontext(&context.state);
    context.state.uc_stack.ss_sp = low;
    context.state.uc_stack.ss_size = static_cast<size_t>(top - low);
    context.state.uc_link = nullptr;
    makecontext(&context.state, entry, 0);
}

static inline void context_switch(Context& from, Context& to) { swapcontext(&from.state, &to.state); }

#endif
