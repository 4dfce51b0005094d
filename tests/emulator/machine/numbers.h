// Numbers as the instructions see them: bit casts, NaN, halves, TF32.
//
// All files here are one translation unit, emulator.cpp, each included after what it needs.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <map>
#include <random>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

using std::string;
using std::vector;
typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef int32_t s32;
typedef uint64_t u64;
typedef int64_t s64;

template <class To, class From> static To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To y;
  memcpy(&y, &x, sizeof y);
  return y;
}

static const u32 CANONICAL_NAN = 0x7FFFFFFF;  // 9.7.3: what f32 arithmetic returns for NaN
static const u16 CANONICAL_NAN16 = 0x7FFF;    // and f16 and bf16 arithmetic and conversions

static inline float canon(float x) { return x != x ? bits_as<float>(CANONICAL_NAN) : x; }

static float bf16_to_f32(u16 h) { return bits_as<float>(u32(h) << 16); }

static u16 f32_to_bf16(float x) {
  if (x != x) return CANONICAL_NAN16;
  u32 b = bits_as<u32>(x);
  return u16((b + 0x7FFF + (b >> 16 & 1)) >> 16);
}

static float f16_to_f32(u16 h) {
  int e = h >> 10 & 31, m = h & 1023;
  float s = h & 0x8000 ? -1.f : 1.f;
  // HADD2.F32, which cvt.f32.f16 becomes, canonicalises NaN
  if (e == 31) return m ? bits_as<float>(CANONICAL_NAN) : s * INFINITY;
  return e ? s * std::ldexp(float(m | 1024), e - 25) : s * std::ldexp(float(m), -24);
}

// Round a double to f16 or bf16 once, to nearest even, with subnormals.
static u16 round16(double x, int mantissa, int bias) {
  if (x != x) return CANONICAL_NAN16;
  u16 sign = std::signbit(x) ? 0x8000 : 0;
  x = std::fabs(x);
  int e;
  std::frexp(x, &e);                             // x in [2^(e-1), 2^e)
  e = std::max(e - 1, 1 - bias);                 // the exponent of its unit in the last place
  double scaled = std::nearbyint(std::ldexp(x, mantissa - e));  // an integer of mantissa + 1 bits
  double largest = std::ldexp(2 - std::ldexp(1.0, -mantissa), bias);
  if (std::isinf(x) || std::ldexp(scaled, e - mantissa) > largest)
    return sign | u16((2 * bias + 1) << mantissa);
  u32 m = u32(scaled);
  if (m >> (mantissa + 1)) m >>= 1, e++;
  return sign | u16(m >> mantissa ? ((e + bias) << mantissa) | (m & ((1u << mantissa) - 1)) : m);
}
static u16 f64_to_f16(double x) { return round16(x, 10, 15); }
static u16 f64_to_bf16(double x) { return round16(x, 7, 127); }

struct Half {  // f16 or bf16 as the instructions need it
  float (*up)(u16);
  u16 (*down)(double);
};
static const Half F16 = {f16_to_f32, f64_to_f16}, BF16 = {bf16_to_f32, f64_to_bf16};
static float half_table[2][65536];  // [0] f16, [1] bf16: for the matrix instructions

static float tf32_of(u32 b) { return bits_as<float>(b & ~0x1FFFu); }  // the rest is not read
