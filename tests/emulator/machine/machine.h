// The machine: what a launch is, the state of warps and CTAs, and what is found to be wrong.
#pragma once
#include "program.h"

struct Config {
  u64 seed, max_instructions;
  u32 grid[3];
  u32 threads, shared_bytes;
  u32 delay_mean, delay_max;    // of a store on its way to other CTAs, in turns of the scheduler
  u32 quantum;                  // the most instructions of a turn
  s64 missing_cta;              // never runs: what a failed group does
  u32 first_y, count_y;         // %ctaid.y of the first CTA, and %nctaid.y if it is not the grid's
};
struct AllocDesc {
  u64 address;
  void *host;
  u64 size;
  u32 initialised, once, sentinel_bytes, pad;
  const char *name;
  u32 *stored_at;  // out, if wanted: of each two bytes, the turn in which they were stored
  u64 unwritten;  // out: bytes that neither the caller nor the kernel wrote
};

struct Alloc {
  u64 base, end;
  u8 *host;
  bool once;
  u32 sentinel;
  string name;
  vector<u8> init;      // of each byte: written by the caller (1) or the kernel (2)
  vector<u32> writer;   // of each two bytes: 1 + thread that stored them in this launch
  vector<u32> writer_pc;
  u32 *stored_at;
};

struct Group {
  int pc;
  u32 mask;
};

struct WgmmaGroup {
  vector<u32> chunks;  // of 16 bytes, that are read until the group is waited for
  vector<u32> regs;
};

struct Warp {
  int cta, index;
  u32 *R;  // registers, each 32 lanes
  vector<Group> groups;
  u32 alive = ~0u;
  int waiting = -1;  // pc of the barrier
  u32 polls = 0;             // of a wait, one after another, since
  u64 polls_since = ~0ull;   // the last progress of anyone
  WgmmaGroup issuing;
  std::deque<WgmmaGroup> committed;
  std::unordered_map<u32, u32> in_flight;   // register -> pc of the wgmma
  std::unordered_map<u32, u64> written_at;  // registers of wgmma: when another instruction wrote
  u64 clock = 0, fenced_at = 0;             // instructions of this warp; of its last wgmma.fence
  u64 waited_at = 0;                        // and wgmma.wait_group
  vector<u32> proxy_fences;                 // the barrier epoch of each fence.proxy.async
};

struct StoreInfo {  // of a store instruction to shared memory, by serial number
  u32 epoch, pc;
  u16 warp, lane;
  u32 fences;  // that the warp had executed by then
};

struct Overlay {  // a word of global memory of which a CTA has stores on their way
  u8 b[4];
  u8 mask;
  u32 count;
  u64 due[2];  // when the last store of each half arrives
};
struct Line {
  u64 tag = ~0ull;
  u8 b[32];
};
static const u32 LINES = 2048;  // sectors of a CTA's L1

struct Cta {
  u32 id[3];
  vector<u8> shared;
  vector<u32> write, read;  // of each two bytes: the serial of the last store; epoch << 16 | warps
  vector<u32> read_pc;
  vector<u8> async_reads;   // of each 16 bytes: wgmma reads under way
  vector<StoreInfo> stores;
  u32 epoch = 1, first_store_of_epoch = 1;
  u32 live = 0, arrived = 0, exited = 0;
  std::unordered_map<u64, Overlay> overlay;
  vector<Line> l1;
};

struct Pending {
  u64 address, value;
  u32 cta;
  u8 bytes;
};
static const u32 RING = 8192;

struct Machine {
  Program P;
  Config C;
  vector<u32> constants32;
  vector<u64> constants64;
  vector<Alloc> allocs;
  vector<Cta> ctas;
  vector<Warp> warps;
  vector<u32> registers;
  vector<u64> params;
  std::mt19937_64 rng;
  u64 turn = 0, executed = 0, progress = 0, clock_ns = 1000;
  vector<Pending> ring[RING];
  u64 in_ring = 0;
  size_t last_alloc = 0;
  string fatal;
  struct Finding {
    u64 n;  // how often; the text is of the first time
    string text;
  };
  std::map<string, Finding> findings;  // by kind, pc and other pc
  string report;
  u64 barriers = 0, timeouts = 0;

  u64 random(u64 n) { return rng() % n; }
  void find(const char *kind, const Warp &w, const Ins &I, int lane, const string &what = "",
            const Ins *other = nullptr);
};
static Machine *M;  // the one that runs: the emulator is not reentrant

static int pc_of(const Ins &I) { return int(&I - M->P.code.data()); }
static string place(const Ins &I) {
  return format("ptx:%d `%.90s` [%s]", I.line, I.text.c_str(), I.where.c_str());
}
void Machine::find(const char *kind, const Warp &w, const Ins &I, int lane, const string &what,
                   const Ins *other) {
  string key = format("%s %d %d", kind, pc_of(I), other ? pc_of(*other) : -1);
  Finding &f = findings[key];
  if (f.n++) return;
  Cta &c = ctas[w.cta];
  f.text = format("%s: %s; cta (%u,%u,%u) warp %d lane %d at ", kind, what.c_str(), c.id[0],
                  c.id[1], c.id[2], w.index, lane) + place(I);
  if (other) f.text += " against " + place(*other);
}

// The lanes of an operand as an array; T's size picks the register's or constant's form.
template <class T> static inline T *lanes(Warp &w, const Opd &o) {
  static u64 sink[32];
  if (o.cls == REG) return reinterpret_cast<T *>(w.R + o.at);
  if (o.cls == SINK) return reinterpret_cast<T *>(sink);
  return sizeof(T) == 8 ? reinterpret_cast<T *>(&M->constants64[o.at * 32])
                        : reinterpret_cast<T *>(&M->constants32[o.at * 32]);
}
