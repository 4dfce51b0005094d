// Products: mma, and wgmma with its fences and groups.
#pragma once
#include "data_movement.h"

static float toward_zero(double x) {
  float f = float(x);
  if (std::isfinite(f) && std::fabs(double(f)) > std::fabs(x)) f = std::nextafterf(f, 0.f);
  return f;
}
// One warp's share of a matrix product: acc[16][N] += A[16][K] · B[K][N]. Tensor cores multiply
// exactly and cut off what they add up, once an instruction here; how often they do is not told.
static void multiply(float *acc, const float *A, const float *B, int N, int K) {
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < N; j++) {
      double sum = acc[i * N + j];
      for (int k = 0; k < K; k++) sum += double(A[i * K + k]) * double(B[k * N + j]);
      acc[i * N + j] = toward_zero(sum);
    }
}
enum { MMA_F16 = 0, MMA_BF16 = 1, MMA_TF32 = 2 };
static inline void unpack(int type, u32 v, float *x, int step) {
  if (type == MMA_TF32)
    x[0] = tf32_of(v);
  else
    x[0] = half_table[type][v & 0xFFFF], x[step] = half_table[type][v >> 16];
}
// Fragments (9.7.14.5.4, .8): g = lane / 4, t = lane % 4; e elements in a register (2; TF32: 1).
// A: registers 0, 2 in row g, 1, 3 in row g + 8; 0, 1 in columns e·t …, 2, 3 in columns 4e + e·t ….
static void load_a(Warp &w, const Opd *o, int type, float *A, int K) {
  int e = type == MMA_TF32 ? 1 : 2;
  for (int r = 0; r < 4; r++) {
    const u32 *v = lanes<u32>(w, o[r]);
    for (int l = 0; l < 32; l++)
      unpack(type, v[l], A + (l / 4 + 8 * (r & 1)) * K + e * (l % 4) + (r & 2 ? 4 * e : 0), 1);
  }
}
// C and D: registers 4j, 4j + 1 in row g, columns 8j + 2t, + 1; 4j + 2, 4j + 3 in row g + 8.
static void copy_acc(Warp &w, const Opd *o, float *acc, int N, bool out) {
  for (int r = 0; r < N / 2; r++) {
    u32 *v = lanes<u32>(w, o[r]);
    for (int l = 0; l < 32; l++) {
      float &x = acc[(l / 4 + 8 * (r >> 1 & 1)) * N + 8 * (r / 4) + 2 * (l % 4) + (r & 1)];
      out ? void(v[l] = bits_as<u32>(canon(x))) : void(x = bits_as<float>(v[l]));
    }
  }
}
static void do_mma(Warp &w, const Ins &I, u32) {
  int type = I.extra[0], K = I.extra[1], e = type == MMA_TF32 ? 1 : 2;
  float A[16 * 16], B[16 * 8], acc[16 * 8];
  load_a(w, &I.o[4], type, A, K);
  for (int r = 0; r < 2; r++) {  // B: register r in column g, rows e·t + 4e·r …
    const u32 *v = lanes<u32>(w, I.o[8 + r]);
    for (int l = 0; l < 32; l++) unpack(type, v[l], B + (e * (l % 4) + 4 * e * r) * 8 + l / 4, 8);
  }
  copy_acc(w, &I.o[10], acc, 8, false);
  multiply(acc, A, B, 8, K);
  copy_acc(w, &I.o[0], acc, 8, true);
}

// wgmma (9.7.15). A warp computes its 16 of the 64 rows when it issues the instruction; that the
// hardware may read operands until the group is waited for is left to the race checks.
//
// Matrix descriptor: start address, leading and stride byte offset (14 bits each, / 16), swizzle.
// The address of 16 bytes of an operand, in CUTLASS's canonical layouts (mma_sm90_desc.hpp), with
// W bytes the swizzle's width (16: none):
//   K-major, row i, 16-byte column k:
//             (i%8)·W + (i/8)·SBO + (W == 16 ? k·LBO : 16k)
//   MN-major, 16-byte row i, column k:
//     W > 16: (i % (W/16))·16 + i/(W/16)·LBO + (k%8)·W + (k/8)·SBO
//     W = 16: i·SBO + (k%8)·16 + (k/8)·LBO
// Swizzling then XORs the address bits 4 … with bits 7 …, as many as log2(W/16).
struct Descriptor {
  u32 start, lbo, sbo, width;
  explicit Descriptor(u64 d)
      : start(u32(d & 0x3FFF) << 4), lbo(u32(d >> 16 & 0x3FFF) << 4),
        sbo(u32(d >> 32 & 0x3FFF) << 4), width(d >> 62 == 0 ? 16u : 256u >> (d >> 62)) {}
  u32 at(bool mn_major, u32 i, u32 k) const {  // k, or for MN-major i, counts 16 bytes
    u32 per = width / 16, off;
    if (!mn_major)
      off = i % 8 * width + i / 8 * sbo + (per == 1 ? k * lbo : 16 * k);
    else if (per == 1)
      off = i * sbo + k % 8 * 16 + k / 8 * lbo;
    else
      off = i % per * 16 + i / per * lbo + k % 8 * width + k / 8 * sbo;
    u32 a = start + off;
    return a ^ ((a >> 7 & (per - 1)) << 4);
  }
};

// Written by st.shared and read by wgmma: a proxy fence of the writer before a barrier, or one of
// the reader after it, stands between.
static void check_proxy(Warp &w, const Ins &I, u32 g) {
  Cta &c = M->ctas[w.cta];
  if (!c.write[g]) return;
  const StoreInfo &s = c.stores[c.write[g]];
  const vector<u32> &own = M->warps[w.cta * (M->C.threads / 32) + s.warp].proxy_fences;
  bool by_writer = own.size() > s.fences && (own[s.fences] < c.epoch || s.warp == w.index);
  bool by_reader = !w.proxy_fences.empty() && w.proxy_fences.back() > s.epoch;
  if (!by_writer && !by_reader)
    M->find("racecheck: wgmma reads what was stored with no fence.proxy.async between", w, I, 0,
            half_word(g), &M->P.code[s.pc]);
}

static const u8 *read_chunk(Warp &w, const Ins &I, u32 a) {  // 16 bytes; null if not in bounds
  if (!check_shared(w, I, 0, a, 16)) return nullptr;
  Cta &c = M->ctas[w.cta];
  note_read(w, I, 0, a, 16);
  w.issuing.chunks.push_back(a / 16);
  c.async_reads[a / 16]++;
  for (u32 g = a / 2; g < a / 2 + 8; g++) check_proxy(w, I, g);
  return &c.shared[a];
}

struct Operand {  // of a wgmma: a matrix [rows][K] from row `first`, and where its numbers go
  bool mn_major;
  int type, first, rows, K;
  float *x;
  int si, sk;  // steps in x from row to row, and along K
  float value(const u8 *p, int e) const {
    u32 v = 0;
    int size = type == MMA_TF32 ? 4 : 2;
    memcpy(&v, p + e * size, size_t(size));
    return type == MMA_TF32 ? tf32_of(v) : half_table[type][v];
  }
};

static void load_operand(Warp &w, const Ins &I, u64 descriptor, const Operand &o) {
  Descriptor d(descriptor);
  int per = o.type == MMA_TF32 ? 4 : 8;  // elements in 16 bytes
  if (descriptor >> 49 & 7) fail("wgmma: base offset");
  if (d.width > 16 && (d.start & (8 * d.width - 1) & ~(d.width - 1)))
    M->find("wgmma: operand not aligned to its swizzle's repeat", w, I, 0,
            format("at %u", d.start));
  int rows = o.mn_major ? o.rows / per : o.rows, columns = o.mn_major ? o.K : o.K / per;
  int first = o.mn_major ? o.first / per : o.first;
  int step = o.mn_major ? o.si : o.sk;  // between the elements of 16 bytes
  for (int i = 0; i < rows; i++)
    for (int k = 0; k < columns; k++) {
      const u8 *p = read_chunk(w, I, d.at(o.mn_major, u32(first + i), u32(k)));
      float *x = o.x + (o.mn_major ? i * per * o.si + k * o.sk : i * o.si + k * per * o.sk);
      for (int e = 0; p && e < per; e++) x[e * step] = o.value(p, e);
    }
}

// The registers of a wgmma: accumulators may be those of one under way, operands may not.
static void check_register(Warp &w, const Ins &I, const Opd &o, bool accumulator) {
  auto written = w.written_at.find(o.at);
  if (written != w.written_at.end() && written->second > w.fenced_at)
    M->find("note: register of a wgmma written after the last wgmma.fence", w, I, 0);
  auto it = w.in_flight.find(o.at);
  if (it != w.in_flight.end() && !accumulator)
    M->find("wgmma: operand register of a wgmma under way", w, I, 0, "", &M->P.code[it->second]);
}

static void check_registers(Warp &w, const Ins &I, int nd, int na) {
  if (w.fenced_at <= w.waited_at)
    M->find("wgmma: no wgmma.fence since the last wait_group", w, I, 0);
  for (int i = 0; i < nd + (na == 4 ? 4 : 0); i++) check_register(w, I, I.o[i], i < nd);
}

static void put_in_flight(Warp &w, const Ins &I, int registers) {
  for (int i = 0; i < registers; i++) {
    w.in_flight[I.o[i].at] = u32(pc_of(I));
    w.issuing.regs.push_back(I.o[i].at);
    w.written_at.erase(I.o[i].at);  // the next of a chain may follow with no fence
  }
}

// wgmma d, a, b, scale-d, scale-a, scale-b, and for 16 bit, of operands in shared memory, trans.
static void do_wgmma(Warp &w, const Ins &I, u32) {
  int type = I.extra[0], K = I.extra[1], N = I.extra[2], nd = N / 2, na = I.extra[3];
  vector<float> A(size_t(16 * K)), B(size_t(K * N)), acc(size_t(16 * N), 0.f);
  auto flag = [&](int i) { return int(lanes<u32>(w, I.o[nd + na + 1 + i])[0]); };
  if (flag(1) != 1 || flag(2) != 1) fail("wgmma: negated operands");
  bool trans_a = type != MMA_TF32 && na == 1 && flag(3);
  bool trans_b = type != MMA_TF32 && flag(na == 1 ? 4 : 3);
  check_registers(w, I, nd, na);
  if (na == 4)
    load_a(w, &I.o[nd], type, A.data(), K);
  else
    load_operand(w, I, lanes<u64>(w, I.o[nd])[0],
                 {trans_a, type, 16 * (w.index % 4), 16, K, A.data(), K, 1});
  load_operand(w, I, lanes<u64>(w, I.o[nd + na])[0], {trans_b, type, 0, N, K, B.data(), 1, N});
  if (flag(0)) copy_acc(w, &I.o[0], acc.data(), N, false);
  multiply(acc.data(), A.data(), B.data(), N, K);
  copy_acc(w, &I.o[0], acc.data(), N, true);
  put_in_flight(w, I, nd + (na == 4 ? 4 : 0));
}
static void do_wgmma_fence(Warp &w, const Ins &, u32) { w.fenced_at = w.clock; }
static void do_wgmma_commit(Warp &w, const Ins &, u32) {
  w.committed.push_back(std::move(w.issuing));
  w.issuing = WgmmaGroup();
}
static void do_wgmma_wait(Warp &w, const Ins &I, u32) {
  Cta &c = M->ctas[w.cta];
  u32 allowed = lanes<u32>(w, I.o[0])[0];
  w.waited_at = w.clock;
  while (w.committed.size() > allowed) {
    for (u32 chunk : w.committed.front().chunks) {
      c.async_reads[chunk]--;
      for (u32 g = chunk * 8; g < chunk * 8 + 8; g++) {  // it may have been read as late as now
        u32 e = c.epoch & 0xFFFF, me = 1u << w.index;
        c.read[g] = c.read[g] >> 16 == e ? c.read[g] | me : e << 16 | me;
      }
    }
    for (u32 r : w.committed.front().regs) w.in_flight.erase(r);
    w.committed.pop_front();
  }
  if (!allowed) w.in_flight.clear();
}
static void do_proxy_fence(Warp &w, const Ins &, u32) {
  w.proxy_fences.push_back(M->ctas[w.cta].epoch);
}
