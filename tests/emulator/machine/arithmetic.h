// Instructions that compute lane by lane, by name.
#pragma once
#include "machine.h"

// d = f(a), d = f(a, b), d = f(a, b, c) in the lanes of the mask. D, A, … pick the lanes' types.
template <class D, class F> static inline void put(Warp &w, const Ins &I, u32 m, F f) {
  D t[32], *d = lanes<D>(w, I.o[0]);
  for (int l = 0; l < 32; l++) t[l] = f(l);
  if (m == ~0u)
    memcpy(d, t, sizeof t);
  else
    for (int l = 0; l < 32; l++)
      if (m >> l & 1) d[l] = t[l];
}
template <class D, class A, class F> static inline void map1(Warp &w, const Ins &I, u32 m, F f) {
  const A *a = lanes<A>(w, I.o[1]);
  put<D>(w, I, m, [=](int l) { return D(f(a[l])); });
}
template <class D, class A, class B, class F>
static inline void map2(Warp &w, const Ins &I, u32 m, F f) {
  const A *a = lanes<A>(w, I.o[1]);
  const B *b = lanes<B>(w, I.o[2]);
  put<D>(w, I, m, [=](int l) { return D(f(a[l], b[l])); });
}
template <class D, class A, class B, class C, class F>
static inline void map3(Warp &w, const Ins &I, u32 m, F f) {
  const A *a = lanes<A>(w, I.o[1]);
  const B *b = lanes<B>(w, I.o[2]);
  const C *c = lanes<C>(w, I.o[3]);
  put<D>(w, I, m, [=](int l) { return D(f(a[l], b[l], c[l])); });
}
#define OP1(D, A, expr) \
  [](Warp &w, const Ins &I, u32 m) { map1<D, A>(w, I, m, [](A a) { return expr; }); }
#define OP2(D, A, B, expr) \
  [](Warp &w, const Ins &I, u32 m) { map2<D, A, B>(w, I, m, [](A a, B b) { return expr; }); }
#define OP3(D, A, B, C, expr) \
  [](Warp &w, const Ins &I, u32 m) { \
    map3<D, A, B, C>(w, I, m, [](A a, B b, C c) { return expr; });   \
  }
// 16-bit registers fill a 32-bit lane, zero-extended; an immediate may be sign-extended there.
#define H(x) u16(x)

// An approximation's error, a unit in the last place, is fixed by its argument: results repeat.
static inline float approximate(double exact, u32 key) {
  float x = float(exact);
  if (x != x || std::isinf(x) || x == 0) return canon(x);
  u32 h = key * 2654435761u;
  h ^= h >> 15;
  int off = int((h * 2246822519u >> 8) % 3) - 1;
  u32 b = bits_as<u32>(x) + u32(off);
  return std::isfinite(bits_as<float>(b)) ? bits_as<float>(b) : x;
}
static float ex2(float a) {
  return a == 0 ? 1.f : approximate(std::exp2(double(a)), bits_as<u32>(a));
}
static float divide(float a, float b) {
  return a == b && std::isfinite(a) && a != 0
             ? 1.f
             : approximate(double(a) / double(b), bits_as<u32>(a) * 31 + bits_as<u32>(b));
}
static float tanh_approx(float a) {  // its relative error is up to 2⁻¹¹: eleven bits are right
  return canon(bits_as<float>(bits_as<u32>(std::tanh(a)) & ~0xFFFu));
}
static float rna_tf32(float a) {
  if (a != a) return canon(a);
  return std::isinf(a) ? a : bits_as<float>((bits_as<u32>(a) + 0x1000) & ~0x1FFFu);
}
static u32 bfe_u32(u32 a, u32 b, u32 c) {  // 9.7.1.20
  b &= 255, c &= 255;
  return b > 31 || !c ? 0 : a >> b & (c > 31 ? ~0u : (1u << c) - 1);
}
static u32 bfe_s32(u32 a, u32 b, u32 c) {
  b &= 255, c &= 255;
  if (!c) return 0;
  u32 sign = a >> std::min(b + c - 1, 31u) & 1, r = 0;
  for (u32 i = 0; i < 32; i++) r |= (i < c && b + i <= 31 ? a >> (b + i) & 1 : sign) << i;
  return r;
}
static u32 prmt(u32 a, u32 b, u32 c) {  // 9.7.9.7, default mode
  u64 both = u64(b) << 32 | a;
  u32 r = 0;
  for (int i = 0; i < 4; i++) {
    u32 s = c >> 4 * i & 15, byte = u32(both >> 8 * (s & 7)) & 255;
    r |= (s & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * i;
  }
  return r;
}
static inline u32 pair(u32 lo, u32 hi) { return (lo & 0xFFFF) | hi << 16; }
template <class F> static inline u32 each_half(u32 a, u32 b, F f) {
  return pair(f(u16(a), u16(b)), f(u16(a >> 16), u16(b >> 16)));
}
static u16 least(u16 a, u16 b) { return std::min(a, b); }
static u16 most(u16 a, u16 b) { return std::max(a, b); }
static u16 add_h(const Half &h, u16 a, u16 b) { return h.down(double(h.up(a)) + double(h.up(b))); }
static u16 mul_h(const Half &h, u16 a, u16 b) { return h.down(double(h.up(a)) * double(h.up(b))); }
static u16 fma_h(const Half &h, u16 a, u16 b, u16 c) {
  return h.down(double(h.up(a)) * double(h.up(b)) + double(h.up(c)));
}

// setp.cmp.type; the float comparisons without u are false for NaN (9.7.6.2)
template <class T, bool is_float> static Fn compare(const string &cmp) {
#define CMP(name, expr) \
  if (cmp == name) return OP2(u32, T, T, u32(expr));
  CMP("eq", a == b) CMP("lt", a < b) CMP("le", a <= b) CMP("gt", a > b) CMP("ge", a >= b)
  CMP("ne", is_float ? a < b || a > b : a != b)
  CMP("neu", a != b) CMP("equ", !(a < b || a > b)) CMP("ltu", !(a >= b)) CMP("leu", !(a > b))
  CMP("gtu", !(a <= b)) CMP("geu", !(a < b))
  CMP("num", a == a && b == b) CMP("nan", a != a || b != b)
  CMP("lo", a < b) CMP("ls", a <= b) CMP("hi", a > b) CMP("hs", a >= b)
#undef CMP
  return nullptr;
}
static Fn compare16(const string &cmp, bool is_signed) {
#define AS(T, expr) ([](T a, T b) { return u32(expr); })(T(a), T(b))
#define CMP(name, expr)                                                     \
  if (cmp == name) {                                                        \
    if (is_signed) return OP2(u32, u32, u32, AS(int16_t, expr));            \
    return OP2(u32, u32, u32, AS(u16, expr));                               \
  }
  CMP("eq", a == b) CMP("ne", a != b) CMP("lt", a < b) CMP("le", a <= b)
  CMP("gt", a > b) CMP("ge", a >= b)
#undef AS
#undef CMP
  return nullptr;
}

static std::unordered_map<string, Fn> by_name;
static void both(const char *names, Fn f) {  // these names are one instruction to the emulator
  for (string &n : split(names, ' ')) by_name[n] = f;
}

static void moves() {
  both("mov.b32 mov.u32 mov.s32 mov.f32 mov.pred", OP1(u32, u32, a));
  both("mov.b16 mov.u16 mov.s16", OP1(u32, u32, H(a)));
  both("mov.b64 mov.u64 mov.s64 mov.f64", OP1(u64, u64, a));
}

static void integer_arithmetic() {
  both("add.s32 add.u32", OP2(u32, u32, u32, a + b));
  both("add.s64 add.u64", OP2(u64, u64, u64, a + b));
  both("add.s16 add.u16", OP2(u32, u32, u32, H(a + b)));
  both("sub.s32 sub.u32", OP2(u32, u32, u32, a - b));
  both("sub.s64 sub.u64", OP2(u64, u64, u64, a - b));
  both("sub.s16 sub.u16", OP2(u32, u32, u32, H(a - b)));
  both("mul.lo.s32 mul.lo.u32", OP2(u32, u32, u32, a * b));
  both("mul.lo.s64 mul.lo.u64", OP2(u64, u64, u64, a * b));
  both("mul.lo.s16 mul.lo.u16", OP2(u32, u32, u32, H(a * b)));
  both("mul.hi.u32", OP2(u32, u32, u32, u64(a) * b >> 32));
  both("mul.hi.s32", OP2(u32, s32, s32, s64(a) * b >> 32));
  both("mul.wide.s32", OP2(u64, s32, s32, s64(a) * b));
  both("mul.wide.u32", OP2(u64, u32, u32, u64(a) * b));
  both("mul.wide.u16", OP2(u32, u32, u32, H(a) * H(b)));
  both("mul.wide.s16", OP2(u32, s32, s32, int16_t(a) * int16_t(b)));
  both("mad.lo.s32 mad.lo.u32", OP3(u32, u32, u32, u32, a * b + c));
  both("mad.lo.s64 mad.lo.u64", OP3(u64, u64, u64, u64, a * b + c));
  both("mad.wide.s32", OP3(u64, s32, s32, s64, s64(a) * b + c));
  both("mad.wide.u32", OP3(u64, u32, u32, u64, u64(a) * b + c));
  both("mad.wide.u16", OP3(u32, u32, u32, u32, H(a) * H(b) + c));
  both("mad.wide.s16", OP3(u32, u32, u32, u32, u32(int16_t(a) * int16_t(b)) + c));
  both("div.s32", OP2(u32, s32, s32, b ? u32(s64(a) / b) : ~0u));
  both("div.u32", OP2(u32, u32, u32, b ? a / b : ~0u));
  both("rem.s32", OP2(u32, s32, s32, b ? u32(s64(a) % b) : u32(a)));
  both("rem.u32", OP2(u32, u32, u32, b ? a % b : a));
  both("neg.s32", OP1(u32, u32, 0 - a));
  both("neg.s64", OP1(u64, u64, 0 - a));
  both("abs.s32", OP1(u32, s32, u32(a < 0 ? 0 - u32(a) : u32(a))));
  both("min.u32", OP2(u32, u32, u32, std::min(a, b)));
  both("max.u32", OP2(u32, u32, u32, std::max(a, b)));
  both("min.s32", OP2(u32, s32, s32, std::min(a, b)));
  both("max.s32", OP2(u32, s32, s32, std::max(a, b)));
  both("min.u64", OP2(u64, u64, u64, std::min(a, b)));
  both("max.u64", OP2(u64, u64, u64, std::max(a, b)));
  both("min.s64", OP2(s64, s64, s64, std::min(a, b)));
  both("max.s64", OP2(s64, s64, s64, std::max(a, b)));
  both("min.u16", OP2(u32, u32, u32, std::min(H(a), H(b))));
  both("max.u16", OP2(u32, u32, u32, std::max(H(a), H(b))));
  both("min.u16x2", OP2(u32, u32, u32, each_half(a, b, least)));
  both("max.u16x2", OP2(u32, u32, u32, each_half(a, b, most)));
}

static void bits() {
  both("and.b32 and.pred", OP2(u32, u32, u32, a & b));
  both("or.b32 or.pred", OP2(u32, u32, u32, a | b));
  both("xor.b32 xor.pred", OP2(u32, u32, u32, a ^ b));
  both("not.b32", OP1(u32, u32, ~a));
  both("not.pred", OP1(u32, u32, !a));
  both("not.b16", OP1(u32, u32, H(~a)));
  both("not.b64", OP1(u64, u64, ~a));
  both("and.b64", OP2(u64, u64, u64, a & b));
  both("or.b64", OP2(u64, u64, u64, a | b));
  both("xor.b64", OP2(u64, u64, u64, a ^ b));
  both("and.b16", OP2(u32, u32, u32, H(a & b)));
  both("or.b16", OP2(u32, u32, u32, H(a | b)));
  both("xor.b16", OP2(u32, u32, u32, H(a ^ b)));
  both("shl.b32", OP2(u32, u32, u32, b > 31 ? 0 : a << b));
  both("shl.b64", OP2(u64, u64, u32, b > 63 ? 0 : a << b));
  both("shl.b16", OP2(u32, u32, u32, b > 15 ? 0 : H(a << b)));
  both("shr.u32 shr.b32", OP2(u32, u32, u32, b > 31 ? 0 : a >> b));
  both("shr.s32", OP2(u32, s32, u32, a >> std::min(b, 31u)));
  both("shr.u64 shr.b64", OP2(u64, u64, u32, b > 63 ? 0 : a >> b));
  both("shr.s64", OP2(u64, s64, u32, a >> std::min(b, 63u)));
  both("shr.u16 shr.b16", OP2(u32, u32, u32, b > 15 ? 0 : H(a) >> b));
  both("shr.s16", OP2(u32, s32, u32, H(int16_t(a) >> std::min(b, 15u))));
  both("shf.l.wrap.b32", OP3(u32, u32, u32, u32, u32((u64(b) << 32 | a) << (c & 31) >> 32)));
  both("shf.r.wrap.b32", OP3(u32, u32, u32, u32, u32((u64(b) << 32 | a) >> (c & 31))));
  both("bfe.u32", OP3(u32, u32, u32, u32, bfe_u32(a, b, c)));
  both("bfe.s32", OP3(u32, u32, u32, u32, bfe_s32(a, b, c)));
  both("popc.b32", OP1(u32, u32, u32(__builtin_popcount(a))));
  both("clz.b32", OP1(u32, u32, u32(a ? __builtin_clz(a) : 32)));
  both("prmt.b32", OP3(u32, u32, u32, u32, prmt(a, b, c)));
  both("selp.b32 selp.f32 selp.u32 selp.s32", OP3(u32, u32, u32, u32, c ? a : b));
  both("selp.b16 selp.u16 selp.s16", OP3(u32, u32, u32, u32, H(c ? a : b)));
  both("selp.b64 selp.f64 selp.u64 selp.s64", OP3(u64, u64, u64, u32, c ? a : b));
}

// NaN results are canonical; neg and abs become operand modifiers, which keep the payload.
static void floats() {
  both("add.f32 add.rn.f32", OP2(float, float, float, canon(a + b)));
  both("sub.f32 sub.rn.f32", OP2(float, float, float, canon(a - b)));
  both("mul.f32 mul.rn.f32", OP2(float, float, float, canon(a * b)));
  both("fma.rn.f32", OP3(float, float, float, float, canon(std::fma(a, b, c))));
  both("neg.f32", OP1(u32, u32, a ^ 0x80000000u));
  both("abs.f32", OP1(u32, u32, a & 0x7FFFFFFFu));
  both("max.f32", OP2(float, float, float, canon(a != a ? b : b != b ? a : std::max(a, b))));
  both("max.NaN.f32", OP2(float, float, float, canon(a != a ? a : b != b ? b : std::max(a, b))));
  both("min.NaN.f32", OP2(float, float, float, canon(a != a ? a : b != b ? b : std::min(a, b))));
  both("min.f32", OP2(float, float, float, canon(a != a ? b : b != b ? a : std::min(a, b))));
  both("ex2.approx.f32 ex2.approx.ftz.f32", OP1(float, float, ex2(a)));
  both("div.full.f32 div.rn.f32", OP2(float, float, float, divide(a, b)));
  both("rcp.approx.f32 rcp.approx.ftz.f32 rcp.rn.f32", OP1(float, float, divide(1.f, a)));
  both("tanh.approx.f32", OP1(float, float, tanh_approx(a)));
  both("add.f16", OP2(u32, u32, u32, add_h(F16, H(a), H(b))));
  both("mul.f16", OP2(u32, u32, u32, mul_h(F16, H(a), H(b))));
  both("fma.rn.f16", OP3(u32, u32, u32, u32, fma_h(F16, H(a), H(b), H(c))));
  both("add.bf16", OP2(u32, u32, u32, add_h(BF16, H(a), H(b))));
  both("fma.rn.bf16", OP3(u32, u32, u32, u32, fma_h(BF16, H(a), H(b), H(c))));
#define PAIRS(h, f) each_half(a, b, [](u16 x, u16 y) { return f(h, x, y); })
  both("add.f16x2", OP2(u32, u32, u32, PAIRS(F16, add_h)));
  both("mul.f16x2", OP2(u32, u32, u32, PAIRS(F16, mul_h)));
  both("add.bf16x2", OP2(u32, u32, u32, PAIRS(BF16, add_h)));
#define FMAS(h) pair(fma_h(h, H(a), H(b), H(c)), fma_h(h, H(a >> 16), H(b >> 16), H(c >> 16)))
  both("fma.rn.f16x2", OP3(u32, u32, u32, u32, FMAS(F16)));
  both("fma.rn.bf16x2", OP3(u32, u32, u32, u32, FMAS(BF16)));
}

// 9.7.9.21: of two sources the first goes to the upper half.
static void conversions() {
  both("cvt.f32.bf16", OP1(float, u32, bf16_to_f32(H(a))));
  both("cvt.f32.f16", OP1(float, u32, f16_to_f32(H(a))));
  both("cvt.rn.bf16.f32", OP1(u32, float, f32_to_bf16(a)));
  both("cvt.rn.f16.f32", OP1(u32, float, f64_to_f16(a)));
  both("cvt.rn.bf16x2.f32", OP2(u32, float, float, pair(f32_to_bf16(b), f32_to_bf16(a))));
  both("cvt.rn.f16x2.f32", OP2(u32, float, float, pair(f64_to_f16(b), f64_to_f16(a))));
  both("cvt.rna.tf32.f32", OP1(float, float, rna_tf32(a)));
  both("cvt.rn.f32.s32", OP1(float, s32, float(a)));
  both("cvt.rn.f32.u32", OP1(float, u32, float(a)));
  both("cvt.u32.u16 cvt.s32.u16 cvt.u16.u32 cvt.u16.s32 cvt.s16.s32", OP1(u32, u32, H(a)));
  both("cvt.s32.s16", OP1(u32, u32, s32(int16_t(a))));
  both("cvt.u16.u64", OP1(u32, u64, H(a)));
  both("cvt.u64.u16", OP1(u64, u32, H(a)));
  both("cvt.u64.u32 cvt.s64.u32", [](Warp &w, const Ins &I, u32 m) {
    I.o[1].wide ? map1<u64, u64>(w, I, m, [](u64 a) { return u32(a); })
                : map1<u64, u32>(w, I, m, [](u32 a) { return a; });
  });
  both("cvt.s64.s32 cvt.u64.s32", [](Warp &w, const Ins &I, u32 m) {
    I.o[1].wide ? map1<u64, u64>(w, I, m, [](u64 a) { return s64(s32(a)); })
                : map1<u64, s32>(w, I, m, [](s32 a) { return s64(a); });
  });
  both("cvt.u32.u64 cvt.s32.s64", OP1(u32, u64, u32(a)));
}

static Fn arithmetic(const string &name) {  // null if there is none of this name
  if (by_name.empty()) moves(), integer_arithmetic(), bits(), floats(), conversions();
  auto it = by_name.find(name);
  return it == by_name.end() ? nullptr : it->second;
}
