// What a thread knows of the others, beyond the barriers of its block: everything that party t did before time seen[t] is ordered
// before what the thread does now. Threads are parties, and behind them the barriers of shared memory, as authors of what the
// copy engine wrote. A clock that somebody holds is never changed: a thread that learns more gets another.

constexpr u32 PARTIES = 1024;
/// The first barrier's number among the parties: a block that has barriers has no more threads than this.
constexpr u32 FIRST_BARRIER = 896;
constexpr u32 MAX_BARRIERS = PARTIES - FIRST_BARRIER;

struct Clock {
    u32 holders = 0;
    u32 seen[PARTIES] = {};

    void learn(const Clock& other) {
        for (u32 i = 0; i < PARTIES; i++) seen[i] = seen[i] < other.seen[i] ? other.seen[i] : seen[i];
    }
    void learn(u32 party, u32 time) {
        if (seen[party] < time) seen[party] = time;
    }
};

/// `slot` holds `clock` (or none) from here on.
static void hold(Clock*& slot, Clock* clock) {
    if (clock) clock->holders++;
    if (slot && --slot->holders == 0) delete slot;
    slot = clock;
}
