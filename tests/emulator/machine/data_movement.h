// mov, ld, st, atom, ldmatrix, stmatrix.
#pragma once
#include "arithmetic.h"
#include "global_memory.h"
#include "shared_memory.h"

static void do_mov_pack(Warp &w, const Ins &I, u32 m) {  // mov.b32 d, {a, b}; mov.b64 d, {a, b}
  const u32 *a = lanes<u32>(w, I.o[1]), *b = lanes<u32>(w, I.o[2]);
  if (I.bytes == 4)
    put<u32>(w, I, m, [=](int l) { return pair(a[l], b[l]); });
  else
    put<u64>(w, I, m, [=](int l) { return u64(b[l]) << 32 | a[l]; });
}
static void do_mov_unpack(Warp &w, const Ins &I, u32 m) {  // mov.b32 {a, b}, d
  u32 *a = lanes<u32>(w, I.o[0]), *b = lanes<u32>(w, I.o[1]);
  for (int l = 0; l < 32; l++)
    if (m >> l & 1) {
      u64 v = I.bytes == 4 ? lanes<u32>(w, I.o[2])[l] : lanes<u64>(w, I.o[2])[l];
      a[l] = I.bytes == 4 ? u32(v & 0xFFFF) : u32(v);
      if (I.o[1].cls != SINK) b[l] = I.bytes == 4 ? u32(v >> 16) : u32(v >> 32);
    }
}
// The order of Parser::special.
enum {
  TID_X, CTAID_X, CTAID_Y, CTAID_Z, NCTAID_X, NCTAID_Y, NCTAID_Z, GLOBALTIMER, LANEID, WARPID
};
static u64 special_of_warp(const Warp &w, int s) {  // of its first lane
  switch (s) {
    case TID_X: return u64(w.index) * 32;
    case CTAID_X: case CTAID_Y: case CTAID_Z: return M->ctas[w.cta].id[s - CTAID_X];
    case NCTAID_Y: return M->C.count_y ? M->C.count_y : M->C.grid[1];
    case NCTAID_X: case NCTAID_Z: return M->C.grid[s - NCTAID_X];
    case GLOBALTIMER: return M->clock_ns;
    case WARPID: return u64(w.index);
    default: return 0;
  }
}
static void do_mov_special(Warp &w, const Ins &I, u32 m) {
  int s = I.extra[0];
  u64 v = special_of_warp(w, s), step = s == TID_X || s == LANEID ? 1 : 0;
  if (I.o[0].wide)
    put<u64>(w, I, m, [=](int l) { return v + step * u64(l); });
  else
    put<u32>(w, I, m, [=](int l) { return u32(v + step * u64(l)); });
}
static void do_ld_param(Warp &w, const Ins &I, u32 m) {
  u64 v = M->params[I.extra[0]] >> 8 * I.imm;
  if (I.o[0].wide)
    put<u64>(w, I, m, [=](int) { return v; });
  else
    put<u32>(w, I, m, [=](int) { return u32(v); });
}

// ld and st: the data are o[0 …] of a load, o[1 …] of a store; the address is the other operand.
static inline void set_data(Warp &w, const Opd &o, int l, const u8 *p, int bytes) {
  u64 v = 0;
  memcpy(&v, p, bytes);
  if (o.wide)
    lanes<u64>(w, o)[l] = v;
  else if (o.cls == REG)
    lanes<u32>(w, o)[l] = u32(v);
}
static inline void get_data(Warp &w, const Opd &o, int l, u8 *p, int bytes) {
  u64 v = o.wide ? lanes<u64>(w, o)[l] : lanes<u32>(w, o)[l];
  memcpy(p, &v, bytes);
}
static void do_global(Warp &w, const Ins &I, u32 m) {
  const u64 *base = lanes<u64>(w, I.store ? I.o[0] : I.o[I.count]);
  u64 a[32];
  for (int l = 0; l < 32; l++) a[l] = base[l] + u64(I.imm);
  for (int l = 0; l < 32; l++) {
    if (!(m >> l & 1)) continue;
    u8 data[16] = {0};
    Alloc *x = check_global(w, I, l, a[l]);
    if (I.store) {
      for (int e = 0; e < I.count; e++) get_data(w, I.o[1 + e], l, data + e * I.bytes, I.bytes);
      if (x) store_global(w, I, l, x, a[l], data);
    } else {
      if (x) load_global(w, I, l, x, a[l], u32(I.count * I.bytes), data);
      for (int e = 0; e < I.count; e++) set_data(w, I.o[e], l, data + e * I.bytes, I.bytes);
    }
  }
}
// atom.global.add.u32 d, [a], b: o[0], o[1], o[2].
static void do_atomic_add(Warp &w, const Ins &I, u32 m) {
  for (int l = 0; l < 32; l++) {
    if (!(m >> l & 1)) continue;
    u64 a = lanes<u64>(w, I.o[1])[l] + u64(I.imm);
    if (Alloc *x = check_global(w, I, l, a)) {
      u32 before = add_global(w, I, x, a, lanes<u32>(w, I.o[2])[l]);
      if (I.o[0].cls == REG) lanes<u32>(w, I.o[0])[l] = before;
    }
  }
}
static void do_shared(Warp &w, const Ins &I, u32 m) {
  const u32 *base = lanes<u32>(w, I.store ? I.o[0] : I.o[I.count]);
  u32 a[32], bytes = u32(I.count * I.bytes), serial = I.store ? new_store(w, I) : 0;
  for (int l = 0; l < 32; l++) a[l] = base[l] + u32(I.imm);
  for (int l = 0; l < 32; l++) {
    if (!(m >> l & 1)) continue;
    u8 data[16] = {0};
    bool fine = check_shared(w, I, l, a[l], bytes);
    if (I.store) {
      for (int e = 0; e < I.count; e++) get_data(w, I.o[1 + e], l, data + e * I.bytes, I.bytes);
      if (fine) store_shared(w, I, l, serial, a[l], data, bytes);
    } else {
      if (fine) {
        note_read(w, I, l, a[l], bytes);
        memcpy(data, &M->ctas[w.cta].shared[a[l]], bytes);
      }
      for (int e = 0; e < I.count; e++) set_data(w, I.o[e], l, data + e * I.bytes, I.bytes);
    }
  }
}

// ldmatrix, stmatrix (9.7.14.5.15, .16): lanes 8i … 8i+7 give the addresses of matrix i's rows.
// Without .trans, lane l holds the elements 2(l%4), +1 of row l/4.
static void do_matrix(Warp &w, const Ins &I, u32) {
  const u32 *base = lanes<u32>(w, I.store ? I.o[0] : I.o[I.count]);
  Cta &c = M->ctas[w.cta];
  u32 a[32], serial = I.store ? new_store(w, I) : 0;
  for (int l = 0; l < 32; l++) a[l] = base[l] + u32(I.imm);
  for (int i = 0; i < I.count; i++) {
    u16 e[8][8] = {{0}};
    u32 *d = lanes<u32>(w, I.o[I.store ? 1 + i : i]);
    auto at = [&](int l, int k) -> u16 & {
      return I.trans ? e[2 * (l % 4) + k][l / 4] : e[l / 4][2 * (l % 4) + k];
    };
    if (I.store)
      for (int l = 0; l < 32; l++) at(l, 0) = u16(d[l]), at(l, 1) = u16(d[l] >> 16);
    for (int r = 0; r < 8; r++) {
      int l = 8 * i + r;
      u32 row = a[l];
      if (!check_shared(w, I, l, row, 16)) continue;
      if (I.store)
        store_shared(w, I, l, serial, row, reinterpret_cast<u8 *>(e[r]), 16);
      else {
        note_read(w, I, l, row, 16);
        memcpy(e[r], &c.shared[row], 16);
      }
    }
    if (!I.store)
      for (int l = 0; l < 32; l++) d[l] = pair(at(l, 0), at(l, 1));
  }
}
