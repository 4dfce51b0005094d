// Which warp runs next, and a warp's turn.
//
// Threads have their own program counters: a warp is a list of (pc, mask) groups, the lowest pc
// runs first, equal pcs merge (min-PC reconvergence).
#pragma once
#include "instructions.h"

static void insert_group(Warp &w, Group g) {  // keep the groups sorted by pc, merge equal ones
  for (size_t i = 0; i < w.groups.size(); i++) {
    if (w.groups[i].pc == g.pc) return void(w.groups[i].mask |= g.mask);
    if (w.groups[i].pc > g.pc) return void(w.groups.insert(w.groups.begin() + i, g));
  }
  w.groups.push_back(g);
}

static void release_barrier(Cta &c, vector<int> &runnable) {
  if (!c.live || c.arrived < c.live) return;
  Warp *first = &M->warps[size_t(&c - M->ctas.data()) * (M->C.threads / 32)];
  int pc = -1;
  for (u32 i = 0; i < M->C.threads / 32; i++) {
    Warp &w = first[i];
    if (w.waiting < 0) continue;
    if (c.exited) M->find("synccheck: barrier with exited threads", w, M->P.code[w.waiting], 0);
    if (pc >= 0 && pc != w.waiting)
      M->find("synccheck: warps wait at different barrier instructions", w,
              M->P.code[w.waiting], 0, "", &M->P.code[pc]);
    pc = w.waiting, w.waiting = -1;
    w.groups[0].pc++;
    runnable.push_back(int(&w - M->warps.data()));
  }
  c.arrived = 0, c.epoch++, c.first_store_of_epoch = u32(c.stores.size());
  M->progress = M->turn, M->barriers++;
}

static u32 active_lanes(Warp &w, const Ins &I, u32 mask) {
  if (!I.guarded) return mask;
  const u32 *p = lanes<u32>(w, I.guard);
  u32 on = 0;
  for (int l = 0; l < 32; l++) on |= u32(p[l] != 0) << l;
  return mask & (I.negated ? ~on : on);
}

static void report_diverged(Warp &w, const Ins &I, Group g, u32 mask) {
  M->fatal = "diverged warp";
  if (g.mask != w.alive || mask != g.mask)
    M->find("synccheck: warp-wide instruction in a diverged warp", w, I, 0,
            format("active %08x of %08x", mask, w.alive));
  else
    M->find("synccheck: warp-wide instruction after some threads exited", w, I, 0);
}

static void execute(Warp &w, const Ins &I, u32 mask) {
  if (!w.in_flight.empty() && !I.wgmma)
    for (const Opd &o : I.o)
      if (o.cls == REG && w.in_flight.count(o.at))
        M->find("wgmma: register of a wgmma under way is used", w, I, 0, "",
                &M->P.code[w.in_flight[o.at]]);
  I.fn(w, I, mask);
  if (M->P.has_wgmma && !I.wgmma && !I.store && !I.o.empty() && I.o[0].cls == REG)
    for (int i = 0; i < (I.space ? I.count : 1); i++) w.written_at[I.o[i].at] = w.clock;
}

// Some lanes leave the group that runs, for `target` or, at -1, for good.
static void leave(Warp &w, Group g, u32 mask, int target) {
  w.groups.erase(w.groups.begin());
  if (g.mask & ~mask) insert_group(w, {g.pc + 1, g.mask & ~mask});
  if (mask && target >= 0) insert_group(w, {target, mask});
}

static void exit_warp(Warp &w, const Ins &I) {
  if (!w.committed.empty() || !w.issuing.chunks.empty())
    M->find("wgmma: exit with a wgmma under way", w, I, 0);
  Cta &c = M->ctas[w.cta];
  c.live--, c.exited++;
  M->progress = M->turn;
}

static void fall_through(Warp &w) {  // groups reach each other
  for (size_t i = 1; i < w.groups.size(); i++)
    if (w.groups[i].pc <= w.groups[0].pc) {
      Group f = w.groups[0];
      w.groups.erase(w.groups.begin());
      return insert_group(w, f);
    }
}

enum Step { GOES_ON, TURN_ENDS, STOPS };  // STOPS: at a barrier, at its end, or for a fatal finding

static Step step(Warp &w) {
  Machine &m = *M;
  Group g = w.groups[0];
  const Ins &I = m.P.code[g.pc];
  u32 mask = active_lanes(w, I, g.mask);
  m.executed++, w.clock++;
  if (I.warpwide && mask != ~0u) return report_diverged(w, I, g, mask), STOPS;
  switch (I.kind) {
    case NORMAL:
      if (mask) execute(w, I, mask);
      w.groups[0].pc++;
      break;
    case BRA:
      leave(w, g, mask, I.target);
      break;
    case EXIT:
      leave(w, g, mask, -1);
      w.alive &= ~mask;
      if (w.groups.empty()) return exit_warp(w, I), STOPS;
      break;
    case BAR:
      w.waiting = g.pc;
      m.ctas[w.cta].arrived++;
      return STOPS;
    case TRAP:
      if (mask) {
        m.find("trap", w, I, __builtin_ctz(mask), format("lanes %08x", mask));
        return m.fatal = "trap", STOPS;
      }
      w.groups[0].pc++;
  }
  fall_through(w);
  return I.polls && mask ? TURN_ENDS : GOES_ON;
}

// Run one warp for a turn. Returns false when it can't go on.
static bool run_turn(Warp &w, int instructions) {
  while (instructions-- > 0) {
    Step s = step(w);
    if (s == STOPS) return false;
    if (s == TURN_ENDS) {
      w.polls = w.polls_since == M->progress ? w.polls + 1 : 1;
      w.polls_since = M->progress;
      return true;
    }
  }
  return true;
}

static void deliver(u64 turn) {
  vector<Pending> &r = M->ring[turn % RING];
  for (size_t i = 0; i < r.size(); i++) commit(r[i]);
  r.clear();
}

struct Scheduler {
  vector<int> runnable;
  size_t left = 0;  // warps that have not exited
  vector<u8> slow;  // of each CTA
  bool slow_warps = false;
  u64 next_mood = 0, expired = 0;
  vector<u64> begins;  // of each CTA: some begin late, in every third seed

  Scheduler() : slow(M->ctas.size(), 0), begins(M->ctas.size(), 0) {
    for (size_t i = 0; i < M->warps.size(); i++)
      if (M->warps[i].cta != M->C.missing_cta) runnable.push_back(int(i));
    left = runnable.size();
    if (M->C.seed % 3 == 1)
      for (auto &b : begins) b = M->random(4) ? 0 : M->random(200 * M->ctas.size());
  }

  void change_mood() {  // now and then some CTAs, or warps, fall behind
    if (M->turn < next_mood) return;
    next_mood = M->turn + 500 + M->random(4000);
    int mood = int(M->random(4));
    for (auto &s : slow) s = u8(mood == 1 ? M->random(2) : mood == 2 ? M->random(8) == 0 : 0);
    slow_warps = mood == 3;
  }

  size_t choose() {
    size_t at = size_t(M->random(runnable.size()));
    const Warp &w = M->warps[runnable[at]];
    bool behind = slow[w.cta] || (slow_warps && w.index % 2);
    return behind && M->random(16) ? size_t(M->random(runnable.size())) : at;
  }

  void report_deadlock() {
    M->fatal = "deadlock: every warp waits at a barrier or has exited";
    for (Warp &w : M->warps)
      if (w.waiting >= 0) M->find("synccheck: deadlock at a barrier", w, M->P.code[w.waiting], 0);
  }

  // Nothing stored, delivered or released for long, and every warp that can run only polls: the
  // clock jumps, so that a deadline passes; a bound on polls will be reached.
  void check_progress() {
    if (M->turn - M->progress <= 64 * runnable.size() + 1000 || M->in_ring || M->turn % 256) return;
    for (int i : runnable)
      if (M->warps[i].polls_since != M->progress || M->warps[i].polls < 8) return;
    const Warp &w = M->warps[runnable[0]];
    if (!M->timeouts++)
      M->find("no progress: every warp that can run waits for data that never comes", w,
              M->P.code[w.groups[0].pc], 0);
    M->clock_ns += 1000000000000ull;
    M->progress = M->turn;
    if (++expired > 1000) M->fatal = "no progress, and no deadline ends it";
  }

  void turn() {
    M->turn++, M->clock_ns += 10;
    deliver(M->turn);
    change_mood();
    if (runnable.empty()) {
      if (!M->in_ring) report_deadlock();
      return;
    }
    size_t at = choose();
    Warp &w = M->warps[runnable[at]];
    if (M->turn < begins[w.cta]) return;
    bool goes_on = run_turn(w, 1 + int(M->random(M->C.quantum)));
    if (!M->fatal.empty()) return;
    if (!goes_on) {
      runnable[at] = runnable.back(), runnable.pop_back();
      if (w.groups.empty()) left--;
      release_barrier(M->ctas[w.cta], runnable);
    }
    check_progress();
    if (M->executed > M->C.max_instructions) M->fatal = "too many instructions";
  }
};

static void run_grid() {
  Scheduler s;
  while (s.left && M->fatal.empty()) s.turn();
  for (u32 i = 1; i <= RING; i++) deliver(M->turn + i);
}
