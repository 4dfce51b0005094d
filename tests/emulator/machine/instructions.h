// Instructions of a whole warp, and from an instruction's name to what runs it.
#pragma once
#include "matrix.h"

static void do_nothing(Warp &, const Ins &, u32) {}

// shfl.sync.mode.b32 d|p, a, b, c, membermask (9.7.9.6)
static void do_shfl(Warp &w, const Ins &I, u32 m) {
  bool has_p = I.starts.size() == 7;
  int base = has_p ? 2 : 1;
  const u32 *a = lanes<u32>(w, I.o[base]), *b = lanes<u32>(w, I.o[base + 1]),
            *c = lanes<u32>(w, I.o[base + 2]);
  u32 r[32], p[32];
  for (int l = 0; l < 32; l++) {
    int bv = int(b[l] & 31), cv = int(c[l] & 31), sm = int(c[l] >> 8 & 31);
    int max_lane = (l & sm) | (cv & ~sm), min_lane = l & sm, j = 0;
    bool ok = true;
    switch (I.extra[0]) {
      case 0: j = l - bv, ok = j >= max_lane; break;
      case 1: j = l + bv, ok = j <= max_lane; break;
      case 2: j = l ^ bv, ok = j <= max_lane; break;
      default: j = min_lane | (bv & ~sm), ok = j <= max_lane;
    }
    if (!ok) j = l;
    if (!(m >> j & 1)) M->find("synccheck: shfl from an inactive lane", w, I, l);
    r[l] = a[j], p[l] = ok;
  }
  put<u32>(w, I, m, [&](int l) { return r[l]; });
  if (has_p)
    for (int l = 0; l < 32; l++)
      if (m >> l & 1) lanes<u32>(w, I.o[1])[l] = p[l];
}
static void do_redux(Warp &w, const Ins &I, u32 m) {
  u32 sum = 0;
  for (int l = 0; l < 32; l++)
    if (m >> l & 1) sum += lanes<u32>(w, I.o[1])[l];
  put<u32>(w, I, m, [=](int) { return sum; });
}

static void do_ballot(Warp &w, const Ins &I, u32 m) {  // vote.sync.ballot.b32 d, p, mask
  u32 set = 0;
  for (int l = 0; l < 32; l++)
    if (m >> l & 1) set |= u32(lanes<u32>(w, I.o[1])[l] != 0) << l;
  put<u32>(w, I, m, [=](int) { return set; });
}

static Fn lop3() {  // d's bit is bit (a, b, c) of the table (9.7.8.6)
  return [](Warp &w, const Ins &I, u32 m) {
    const u32 *a = lanes<u32>(w, I.o[1]), *b = lanes<u32>(w, I.o[2]), *c = lanes<u32>(w, I.o[3]);
    u32 t = lanes<u32>(w, I.o[4])[0];
    put<u32>(w, I, m, [=](int l) {
      u32 r = 0;
      for (int i = 0; i < 8; i++)
        if (t >> i & 1)
          r |= (i & 4 ? a[l] : ~a[l]) & (i & 2 ? b[l] : ~b[l]) & (i & 1 ? c[l] : ~c[l]);
      return r;
    });
  };
}

struct Name {  // an instruction's, at its dots
  string whole;
  vector<string> p;
  explicit Name(const string &s) : whole(s), p(split(s, '.')) {}
  bool has(const char *s) const { return std::find(p.begin(), p.end(), s) != p.end(); }
  int bytes() const {  // of the type at its end
    size_t digit = p.back().find_first_of("0123456789");
    return digit == string::npos ? 4 : atoi(p.back().c_str() + digit) / 8;
  }
};

static Fn memory(const Name &n, Ins &I) {
  I.store = n.p[0] == "st", I.bytes = n.bytes();
  I.count = n.has("v2") ? 2 : n.has("v4") ? 4 : 1;
  I.acquire = n.has("acquire"), I.release = n.has("release");
  I.strong = n.has("volatile") || n.has("relaxed") || I.acquire || I.release;
  if (n.has("param")) return do_ld_param;
  if (n.has("global")) return I.space = GLOBAL, do_global;
  if (n.has("shared") || n.has("shared::cta")) return I.space = SHARED, do_shared;
  return nullptr;
}

static Fn atomic(const Name &n, Ins &I) {
  if (!n.has("global") || !n.has("add") || n.has("acquire") || n.has("acq_rel")) return nullptr;
  if (n.p.back() != "u32" && n.p.back() != "s32") return nullptr;
  I.release = n.has("release");
  return do_atomic_add;
}

static Fn move(const Name &n, Ins &I) {
  I.bytes = n.bytes();
  if (I.starts.size() == 3 && I.starts[1] == 2) return do_mov_unpack;
  if (I.starts.size() == 3 && I.o.size() == 3) return do_mov_pack;
  if (I.o.size() == 2 && I.o[1].cls == SINK) return do_mov_special;
  return arithmetic(n.whole);
}

static Fn comparison(const Name &n) {
  if (n.p.size() != 3) return nullptr;
  const string &cmp = n.p[1], &t = n.p[2];
  if (t == "f32") return compare<float, true>(cmp);
  if (t == "s32") return compare<s32, false>(cmp);
  if (t == "u32" || t == "b32") return compare<u32, false>(cmp);
  if (t == "s64") return compare<s64, false>(cmp);
  if (t == "u64" || t == "b64") return compare<u64, false>(cmp);
  if (t == "b16" || t == "u16" || t == "s16") return compare16(cmp, t == "s16");
  return nullptr;
}

static Fn matrices(const Name &n, Ins &I) {
  if (!n.has("m8n8") || !n.has("b16")) return nullptr;
  I.store = n.p[0] == "stmatrix", I.trans = n.has("trans"), I.warpwide = true, I.space = SHARED;
  I.count = n.has("x4") ? 4 : n.has("x2") ? 2 : 1;
  return do_matrix;
}

static int element(const Name &n) {
  return n.has("bf16") ? MMA_BF16 : n.has("f16") ? MMA_F16 : MMA_TF32;
}

static Fn mma(const Name &n, Ins &I) {
  int type = element(n);
  bool known = n.has("m16n8k16") ? type != MMA_TF32 : n.has("m16n8k8") && n.has("tf32");
  if (!n.has("f32") || !known) return nullptr;
  I.extra[0] = type, I.extra[1] = type == MMA_TF32 ? 8 : 16, I.warpwide = true;
  return do_mma;
}

static Fn wgmma(const Name &n, Ins &I) {
  I.warpwide = true, I.wgmma = true;
  if (n.p[1] == "fence") return do_wgmma_fence;
  if (n.p[1] == "commit_group") return do_wgmma_commit;
  if (n.p[1] == "wait_group") return do_wgmma_wait;
  int N = 0, K = 0;
  for (const string &s : n.p) sscanf(s.c_str(), "m64n%dk%d", &N, &K);
  if (!N || I.starts.size() < 4 || int(I.starts[1]) != N / 2) return nullptr;
  I.extra[0] = element(n), I.extra[1] = K, I.extra[2] = N, I.extra[3] = I.starts[2] - I.starts[1];
  return do_wgmma;
}

static Fn of_warp(const Name &n, Ins &I) {
  I.warpwide = true;
  if (n.p[0] == "shfl") {
    I.extra[0] = n.has("up") ? 0 : n.has("down") ? 1 : n.has("bfly") ? 2 : 3;
    return do_shfl;
  }
  if (n.p[0] == "redux") return n.has("add") && !n.has("f32") ? do_redux : nullptr;
  return n.has("ballot") ? do_ballot : nullptr;
}

static Fn fence(const Name &n) {
  if (n.whole == "fence.proxy.async" || n.whole == "fence.proxy.async.shared::cta")
    return do_proxy_fence;
  bool known = n.whole == "membar.gl" || n.whole == "membar.sys" ||
               n.whole == "fence.acq_rel.gpu" || n.whole == "fence.sc.gpu";
  return known ? do_nothing : nullptr;  // the exchange needs none: its data are the flag
}

static Fn find_instruction(const Name &n, Ins &I) {
  const string &first = n.p[0];
  if (first == "ld" || first == "st") return memory(n, I);
  if (first == "atom") return atomic(n, I);
  if (first == "mov") return move(n, I);
  if (first == "setp") return comparison(n);
  if (first == "lop3") return lop3();
  if (first == "ldmatrix" || first == "stmatrix") return matrices(n, I);
  if (first == "mma") return mma(n, I);
  if (first == "wgmma") return wgmma(n, I);
  if (first == "shfl" || first == "redux" || first == "vote") return of_warp(n, I);
  if (first == "fence" || first == "membar") return fence(n);
  if (n.whole == "bar.warp.sync") return do_nothing;
  return arithmetic(n.whole);
}

static Fn instruction(const string &name, Ins &I) {
  Fn fn = find_instruction(Name(name), I);
  if (!fn) fail(format("line %d: unknown instruction %s", I.line, name.c_str()));
  return fn;
}
