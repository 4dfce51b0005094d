// Global memory, adversarial: every delay that the memory model allows happens.
//
// The host's copy is L2. A store of a CTA is cut into its elements; each reaches L2 at a random
// later turn, in no order but that of stores to the same two bytes (8.10: coherence). The CTA
// itself sees it at once. A weak load fills, and then hits, a line of its CTA's L1, which only an
// acquire invalidates; strong loads (volatile, relaxed, acquire) read L2. A release first brings
// all that its CTA stored to L2.
#pragma once
#include "machine.h"

static Alloc *allocation(u64 a, u32 bytes) {
  auto inside = [&](Alloc &x) { return a >= x.base && a + bytes <= x.end; };
  if (inside(M->allocs[M->last_alloc])) return &M->allocs[M->last_alloc];
  for (size_t i = 0; i < M->allocs.size(); i++)
    if (inside(M->allocs[i])) return &M->allocs[M->last_alloc = i];
  return nullptr;
}

static string address_text(u64 a) {
  Alloc *best = nullptr;
  for (Alloc &x : M->allocs)
    if (a + 65536 >= x.base && a < x.end + 65536)
      if (!best || llabs(s64(a - x.base)) < llabs(s64(a - best->base))) best = &x;
  if (!best) return format("0x%llx", (unsigned long long)a);
  return format("%s%+lld (of %llu bytes)", best->name.c_str(), (long long)(a - best->base),
                (unsigned long long)(best->end - best->base));
}

static Alloc *check_global(Warp &w, const Ins &I, int lane, u64 a) {
  u32 bytes = u32(I.count * I.bytes);
  if (a % bytes) {
    M->find("memcheck: misaligned global access", w, I, lane, address_text(a));
    return nullptr;
  }
  Alloc *x = allocation(a, bytes);
  if (!x) M->find("memcheck: global access out of bounds", w, I, lane, address_text(a));
  return x;
}

static void overlay_own(Cta &c, u64 a, u32 bytes, u8 *out) {
  if (c.overlay.empty()) return;
  for (u64 word = a & ~3ull; word < a + bytes; word += 4) {
    auto it = c.overlay.find(word);
    if (it == c.overlay.end()) continue;
    for (int k = 0; k < 4; k++)
      if (it->second.mask >> k & 1 && word + k >= a && word + k < a + bytes)
        out[word + k - a] = it->second.b[k];
  }
}

static Line &line_of(Cta &c, u64 a) {
  return c.l1[((a >> 5) * 0x9E3779B97F4A7C15ull >> 40) % LINES];
}

static void check_weak(Warp &w, const Ins &I, int lane, Alloc *x, u64 a, u32 bytes) {
  for (u32 k = 0; k < bytes; k += 2) {
    size_t at = (a - x->base + k) / 2;
    u32 by = x->writer[at];
    if (by && (by - 1) / M->C.threads != u32(w.cta))
      M->find("racecheck: weak load of what another CTA stored", w, I, lane, address_text(a),
              &M->P.code[x->writer_pc[at]]);
  }
}

static void load_through_l1(Cta &c, Alloc *x, u64 a, u32 bytes, u8 *out) {
  u64 sector = a >> 5;
  Line &line = line_of(c, a);
  if (line.tag != sector) {
    line.tag = sector;
    for (u32 k = 0; k < 32; k++) {
      u64 b = (sector << 5) + k;
      line.b[k] = b >= x->base && b < x->end ? x->host[b - x->base] : 0;
    }
  }
  memcpy(out, line.b + (a & 31), bytes);
}

static void load_global(Warp &w, const Ins &I, int lane, Alloc *x, u64 a, u32 bytes, u8 *out) {
  Cta &c = M->ctas[w.cta];
  if (memchr(&x->init[a - x->base], 0, bytes))
    M->find("initcheck: global read of what nobody wrote", w, I, lane, address_text(a));
  if (I.acquire)
    for (Line &line : c.l1) line.tag = ~0ull;
  if (I.strong) {
    memcpy(out, x->host + (a - x->base), bytes);
  } else {
    check_weak(w, I, lane, x, a, bytes);
    load_through_l1(c, x, a, bytes, out);
  }
  overlay_own(c, a, bytes, out);
}

static void commit(const Pending &p) {
  Alloc *x = allocation(p.address, p.bytes);
  memcpy(x->host + (p.address - x->base), &p.value, p.bytes);
  auto &overlay = M->ctas[p.cta].overlay;
  for (u64 word = p.address & ~3ull; word < p.address + p.bytes; word += 4) {
    auto it = overlay.find(word);
    if (it != overlay.end() && --it->second.count == 0) overlay.erase(it);
  }
  M->progress = M->turn, M->in_ring--;
}

// All that this CTA stored reaches L2 now, in the order in which it would have done.
static void release(int cta) {
  for (u64 turn = M->turn; turn < M->turn + RING; turn++) {
    vector<Pending> others;
    for (Pending &p : M->ring[turn % RING])
      if (int(p.cta) == cta)
        commit(p);
      else
        others.push_back(p);
    M->ring[turn % RING].swap(others);
  }
}

static void check_writer(Warp &w, const Ins &I, int lane, Alloc *x, u64 a, u32 bytes) {
  u32 me = u32(w.cta) * M->C.threads + u32(w.index * 32 + lane) + 1;
  for (u32 k = 0; k < bytes; k += 2) {
    size_t at = (a - x->base + k) / 2;
    u32 &by = x->writer[at], &pc = x->writer_pc[at];
    if (by && by != me && (!I.strong || x->once))
      M->find("racecheck: two threads store the same global element", w, I, lane,
              address_text(a + k), &M->P.code[pc]);
    if (by == me && x->once)
      M->find("protocol: an element is stored twice", w, I, lane, address_text(a + k),
              &M->P.code[pc]);
    by = me, pc = u32(pc_of(I));
  }
}

static void check_sentinel(Warp &w, const Ins &I, int lane, Alloc *x, u64 a, const u8 *data) {
  if (!x->sentinel) return;
  for (u32 k = 0; k + x->sentinel <= u32(I.count * I.bytes); k += x->sentinel) {
    bool ones = true;
    for (u32 j = 0; j < x->sentinel; j++) ones &= data[k + j] == 0xFF;
    if (ones) M->find("protocol: the sentinel is stored", w, I, lane, address_text(a + k));
  }
}

// When an element stored now arrives: mostly soon, now and then late, never after delay_max.
static u64 arrival() {
  u64 r = M->rng();
  u64 delay = M->C.delay_mean ? u64(-std::log(((r >> 11) + 1) * 0x1p-53) * M->C.delay_mean) : 0;
  if (!(r & 31)) delay *= 8;
  return M->turn + 1 + std::min<u64>(delay, M->C.delay_max);
}

// The CTA's own view of an element that is on its way; later if one to the same half word is.
static u64 into_overlay(Cta &c, const Pending &p, u64 due) {
  for (u64 word = p.address & ~3ull; word < p.address + p.bytes; word += 4) {
    Overlay &v = c.overlay.emplace(word, Overlay{{0}, 0, 0, {0, 0}}).first->second;
    for (int k = 0; k < 4; k++)
      if (word + k >= p.address && word + k < p.address + p.bytes) {
        v.b[k] = u8(p.value >> 8 * (word + k - p.address)), v.mask |= u8(1 << k);
        due = std::max(due, v.due[k / 2]);
        v.due[k / 2] = due;
      }
    v.count++;
  }
  return due;
}

static void store_global(Warp &w, const Ins &I, int lane, Alloc *x, u64 a, const u8 *data) {
  Cta &c = M->ctas[w.cta];
  u32 bytes = u32(I.count * I.bytes);
  check_writer(w, I, lane, x, a, bytes);
  check_sentinel(w, I, lane, x, a, data);
  memset(&x->init[a - x->base], 2, bytes);
  for (u32 k = 0; x->stored_at && k < bytes; k += 2)
    x->stored_at[(a - x->base + k) / 2] = u32(M->turn);
  for (int e = 0; e < I.count; e++) {
    Pending p{a + u64(e) * I.bytes, 0, u32(w.cta), u8(I.bytes)};
    memcpy(&p.value, data + e * I.bytes, I.bytes);
    Line &line = line_of(c, p.address);
    if (line.tag == p.address >> 5) memcpy(line.b + (p.address & 31), &p.value, I.bytes);
    M->ring[into_overlay(c, p, arrival()) % RING].push_back(p);
    M->in_ring++;
  }
}

// Atomics act on L2 at once. (What else the same thread stores there would have to be in order with
// them; the kernels do no such thing.)
static u32 add_global(Warp &w, const Ins &I, Alloc *x, u64 a, u32 value) {
  if (I.release) release(w.cta);
  u32 before;
  memcpy(&before, x->host + (a - x->base), 4);
  u32 after = before + value;
  memcpy(x->host + (a - x->base), &after, 4);
  M->progress = M->turn;
  return before;
}
