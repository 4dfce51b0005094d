// Shared memory, with the checks for races in it.
//
// Accesses of different warps between the same two barriers must not conflict. Every two bytes
// know the last store and the warps that read them in the current epoch (barriers so far).
#pragma once
#include "machine.h"

static string half_word(u32 g) { return format("byte %u", g * 2); }

static void note_read(Warp &w, const Ins &I, int lane, u32 at, u32 bytes) {
  Cta &c = M->ctas[w.cta];
  u32 epoch = c.epoch & 0xFFFF, me = 1u << w.index, pc = u32(pc_of(I));
  for (u32 g = at / 2; g < (at + bytes + 1) / 2; g++) {
    u32 s = c.write[g];
    if (!s)
      M->find("initcheck: shared read of what nobody wrote", w, I, lane, half_word(g));
    else if (s >= c.first_store_of_epoch && c.stores[s].warp != w.index)
      M->find("racecheck: shared RAW, no barrier between", w, I, lane, half_word(g),
              &M->P.code[c.stores[s].pc]);
    u32 &r = c.read[g];
    r = r >> 16 == epoch ? r | me : epoch << 16 | me;
    c.read_pc[g] = pc;
  }
}

static u32 new_store(Warp &w, const Ins &I) {
  Cta &c = M->ctas[w.cta];
  c.stores.push_back({c.epoch, u32(pc_of(I)), u16(w.index), 0, u32(w.proxy_fences.size())});
  return u32(c.stores.size() - 1);
}

static void check_store(Warp &w, const Ins &I, int lane, u32 serial, u32 g, bool same) {
  Cta &c = M->ctas[w.cta];
  u32 s = c.write[g], r = c.read[g], me = 1u << w.index;
  if (s == serial && !same)
    M->find("racecheck: lanes store different values to one address", w, I, lane, half_word(g));
  else if (s >= c.first_store_of_epoch && c.stores[s].warp != w.index)
    M->find(same ? "note: shared WAW of equal values" : "racecheck: shared WAW, no barrier", w, I,
            lane, half_word(g), &M->P.code[c.stores[s].pc]);
  if (r >> 16 == (c.epoch & 0xFFFF) && (r & 0xFFFF & ~me))
    M->find("racecheck: shared WAR, no barrier between", w, I, lane, half_word(g),
            &M->P.code[c.read_pc[g]]);
  if (c.async_reads[g / 8])
    M->find("racecheck: store to what a wgmma under way reads", w, I, lane, half_word(g),
            &M->P.code[c.read_pc[g]]);
}

static void store_shared(Warp &w, const Ins &I, int lane, u32 serial, u32 at, const u8 *data,
                         u32 bytes) {
  Cta &c = M->ctas[w.cta];
  for (u32 g = at / 2; g < (at + bytes + 1) / 2; g++) {
    bool same = !memcmp(&c.shared[g * 2], data + (g * 2 - at), std::min(2u, bytes));
    check_store(w, I, lane, serial, g, same);
    c.write[g] = serial;
  }
  memcpy(&c.shared[at], data, bytes);
}

static bool check_shared(Warp &w, const Ins &I, int lane, u32 &a, u32 bytes) {
  if (a % bytes) {
    M->find("memcheck: misaligned shared access", w, I, lane, format("address %u", a));
    return false;
  }
  if (a < SHARED_BASE || a + bytes > SHARED_BASE + M->C.shared_bytes) {
    M->find("memcheck: shared access out of bounds", w, I, lane,
            format("byte %d of %u", int(a - SHARED_BASE), M->C.shared_bytes));
    return false;
  }
  a -= SHARED_BASE;
  return true;
}
