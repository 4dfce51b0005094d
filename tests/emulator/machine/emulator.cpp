// A functional emulator of PTX kernels with sanitizers, for kernels whose CTAs talk to each other.
//
// All CTAs of a grid are resident; a seeded random scheduler interleaves their warps. This file is
// its interface; emulator/__init__.py says what is modelled.
#include "parser.h"
#include "scheduler.h"

struct Launch {  // as run.py's Config, and its buffers
  const Config *config;
  AllocDesc *allocs;
  int count;
  const u64 *params;
};

static void add_buffer(const AllocDesc &d) {
  Alloc x{d.address, d.address + d.size, static_cast<u8 *>(d.host), d.once != 0,
          d.sentinel_bytes, d.name, {}, {}, {}, d.stored_at};
  x.init.assign(d.size, d.initialised ? 1 : 0);
  x.writer.assign(d.size / 2 + 1, 0), x.writer_pc.assign(d.size / 2 + 1, 0);
  M->allocs.push_back(std::move(x));
}

static void start_cta(u32 i, u32 warps) {
  const Config &C = M->C;
  Cta &c = M->ctas[i];
  c.id[0] = i % C.grid[0], c.id[1] = C.first_y + i / C.grid[0] % C.grid[1];
  c.id[2] = i / C.grid[0] / C.grid[1];
  size_t bytes = (C.shared_bytes + 15) / 16 * 16;
  c.shared.assign(bytes + 16, 0xCD);
  c.write.assign(bytes / 2 + 8, 0), c.read.assign(bytes / 2 + 8, 0);
  c.read_pc.assign(bytes / 2 + 8, 0), c.async_reads.assign(bytes / 16 + 1, 0);
  c.stores.push_back({0, 0, 0, 0, 0});
  c.live = warps;
  c.l1.resize(LINES);
  for (u32 k = 0; k < warps; k++) {
    Warp &w = M->warps[i * warps + k];
    w.cta = int(i), w.index = int(k);
    w.R = M->registers.data() + size_t(i * warps + k) * M->P.registers;
    w.groups.push_back({0, ~0u});
  }
}

static void start(const Launch &launch) {
  Machine &m = *M;
  m.C = *launch.config;
  m.C.delay_max = std::min(m.C.delay_max, RING - 2);
  m.rng.seed(m.C.seed);
  m.params.assign(launch.params, launch.params + m.P.params.size());
  m.turn = m.executed = m.progress = m.in_ring = m.barriers = m.timeouts = 0, m.clock_ns = 1000;
  m.last_alloc = 0;
  m.fatal.clear(), m.findings.clear(), m.allocs.clear(), m.report.clear();
  for (auto &r : m.ring) r.clear();
  for (int i = 0; i < launch.count; i++) add_buffer(launch.allocs[i]);
  u32 ctas = m.C.grid[0] * m.C.grid[1] * m.C.grid[2], warps = m.C.threads / 32;
  m.registers.assign(size_t(ctas) * warps * m.P.registers, ~0u);
  m.ctas.assign(ctas, Cta()), m.warps.assign(size_t(ctas) * warps, Warp());
  for (u32 i = 0; i < ctas; i++) start_cta(i, warps);
}

static void write_report(const Launch &launch) {
  Machine &m = *M;
  if (!m.fatal.empty()) m.report += "fatal: " + m.fatal + "\n";
  for (auto &f : m.findings)
    m.report += format("%llux ", (unsigned long long)f.second.n) + f.second.text + "\n";
  for (int i = 0; i < launch.count; i++) {
    const vector<u8> &init = m.allocs[size_t(i)].init;
    launch.allocs[i].unwritten = u64(std::count(init.begin(), init.end(), 0));
  }
  m.registers = vector<u32>();
  m.ctas.clear(), m.allocs.clear();
}

extern "C" {

void *emulator_load(const char *text, const char *kernel, char *error, int size) {
  if (half_table[1][1] == 0)
    for (u32 i = 0; i < 65536; i++)
      half_table[0][i] = f16_to_f32(u16(i)), half_table[1][i] = bf16_to_f32(u16(i));
  Machine *m = new Machine;
  try {
    Parser{m->P, {}, "", "", 0}.parse(text, kernel);
  } catch (std::exception &e) {
    snprintf(error, size_t(size), "%s", e.what());
    delete m;
    return nullptr;
  }
  for (u64 v : m->P.constants)
    for (int l = 0; l < 32; l++) m->constants32.push_back(u32(v)), m->constants64.push_back(v);
  return m;
}

int emulator_parameters(void *h) { return int(static_cast<Machine *>(h)->P.params.size()); }

// Runs a grid. Returns 0 if it ran to its end (there may be findings), else 1. *report: one finding
// a line. totals: instructions, barriers, expired waits.
int emulator_run(void *h, const Config *config, AllocDesc *allocs, int count, const u64 *params,
                 u64 *totals, const char **report) {
  M = static_cast<Machine *>(h);
  Launch launch{config, allocs, count, params};
  start(launch);
  try {
    run_grid();
  } catch (std::exception &e) {
    M->fatal = e.what();
  }
  write_report(launch);
  u64 t[3] = {M->executed, M->barriers, M->timeouts};
  memcpy(totals, t, sizeof t);
  *report = M->report.c_str();
  return M->fatal.empty() ? 0 : 1;
}
}
