// A program: its instructions, registers and constants.
#pragma once
#include "numbers.h"

// Section numbers are those of the PTX ISA 8.7 and 9.0 documents.

struct Warp;
struct Ins;
typedef void (*Fn)(Warp &, const Ins &, u32 mask);
enum Class : u8 { REG, CONST, SINK };
struct Opd {
  u8 cls;
  u8 wide;   // a register of 64 bits
  u32 at;    // first lane: in u32 of the register file; of a constant, its index
};
enum Kind : u8 { NORMAL, BRA, EXIT, BAR, TRAP };
enum Space : u8 { NONE, PARAM, GLOBAL, SHARED };

struct Ins {
  Fn fn = nullptr;
  Kind kind = NORMAL;
  bool warpwide = false;  // .sync.aligned: the whole warp has to be here
  bool polls = false;     // a branch back over a load of what others store: ends its warp's turn
  bool negated = false, guarded = false;  // @!p, @p
  bool strong = false, store = false, release = false, acquire = false;
  bool wgmma = false, trans = false;
  Space space = NONE;
  Opd guard{};
  vector<Opd> o;       // all operands in order, vectors flattened
  vector<u8> starts;   // where each operand starts in o; one more for the end
  int count = 1, bytes = 4;  // elements and their size, of a memory access
  s64 imm = 0;         // an address's offset, or a modifier's value
  int extra[6] = {0, 0, 0, 0, 0, 0};
  int target = -1, line = 0;
  string text, where;
};

static string format(const char *f, ...) {
  char b[1024];
  va_list v;
  va_start(v, f);
  vsnprintf(b, sizeof b, f, v);
  va_end(v);
  return b;
}
[[noreturn]] static void fail(const string &s) { throw std::runtime_error(s); }

static vector<string> split(const string &s, char c) {
  vector<string> r(1);
  for (char x : s)
    if (x == c)
      r.emplace_back();
    else
      r.back().push_back(x);
  return r;
}
static string trim(const string &s) {
  size_t a = s.find_first_not_of(" \t\n"), b = s.find_last_not_of(" \t\n");
  return a == string::npos ? "" : s.substr(a, b - a + 1);
}
static bool starts_with(const string &s, const char *p) { return s.compare(0, strlen(p), p) == 0; }

struct Program {
  vector<Ins> code;
  vector<string> params;
  vector<u64> constants;
  std::unordered_map<u64, u32> constant_index;
  u32 registers = 0;  // u32 per lane
  bool has_wgmma = false;
  u32 constant(u64 v) {
    auto it = constant_index.emplace(v, u32(constants.size()));
    if (it.second) constants.push_back(v);
    return it.first->second;
  }
};

static const u32 SHARED_BASE = 1024;  // where sm_90 places dynamic shared memory: 1 KiB is reserved
