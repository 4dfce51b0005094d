// From PTX to a Program.
#pragma once
#include "program.h"

static Fn instruction(const string &name, Ins &I);  // in instructions.h

struct Parser {
  Program &P;
  struct Scope {
    std::unordered_map<string, Opd> regs;
    std::unordered_map<string, int> labels;
    vector<std::pair<int, string>> branches;
  };
  vector<Scope> scopes;
  string where, pending;
  int line = 0;

  void declare(const string &text) {  // .reg .b32 t, a  or  .reg .b32 %r<390>
    size_t i = text.find('.', 4), j = text.find_first_of(" \t", i);
    bool wide = text.substr(i, j - i).find("64") != string::npos;
    for (string &name : names(text.substr(j))) {
      size_t k = name.find('<');
      int n = k == string::npos ? -1 : atoi(name.c_str() + k + 1);
      for (int x = 0; x < std::max(n, 1); x++) {
        scopes.back().regs[n < 0 ? name : name.substr(0, k) + std::to_string(x)] =
            Opd{REG, u8(wide), P.registers};
        P.registers += wide ? 64 : 32;
      }
    }
  }
  static vector<string> names(const string &s) {
    vector<string> r;
    for (string &x : split(s, ',')) r.push_back(trim(x));
    return r;
  }

  Opd operand(const string &s) {
    if (s == "_") return Opd{SINK, 0, 0};
    for (size_t i = scopes.size(); i-- > 0;) {
      auto it = scopes[i].regs.find(s);
      if (it != scopes[i].regs.end()) return it->second;
    }
    u64 v;
    if (s[0] == '0' && s.size() > 2 && strchr("fFdD", s[1]))  // a float or double, by its bits
      v = strtoull(s.c_str() + 2, nullptr, 16);
    else if (s[0] == '-')
      v = u64(strtoll(s.c_str(), nullptr, 0));
    else if (isdigit(s[0]))
      v = strtoull(s.c_str(), nullptr, 0);
    else if (s == "global_smem")
      v = SHARED_BASE;
    else
      fail(format("line %d: unknown operand '%s'", line, s.c_str()));
    return Opd{CONST, 0, P.constant(v)};
  }

  static vector<string> parts(const string &text) {  // at commas, but within no brackets
    int depth = 0;
    string part;
    vector<string> r;
    for (char c : text) {
      if (c == '{' || c == '[') depth++;
      if (c == '}' || c == ']') depth--;
      if ((c == ',' || c == '|') && !depth)
        r.push_back(trim(part)), part.clear();
      else
        part.push_back(c);
    }
    if (!trim(part).empty()) r.push_back(trim(part));
    return r;
  }

  // [a + b] becomes a, and b goes to imm; of a parameter its number goes to extra.
  Opd address(string a, Ins &I) {
    size_t plus = a.find('+');
    if (plus != string::npos) I.imm = strtoll(a.c_str() + plus + 1, nullptr, 0);
    a = trim(a.substr(0, plus));
    if (I.space != PARAM) return operand(a);
    auto it = std::find(P.params.begin(), P.params.end(), a);
    if (it == P.params.end()) fail(format("line %d: no parameter %s", line, a.c_str()));
    I.extra[0] = int(it - P.params.begin());
    return Opd{SINK, 0, 0};
  }

  void operands(const string &text, Ins &I) {
    for (string &p : parts(text)) {
      I.starts.push_back(u8(I.o.size()));
      string inside = p.size() > 1 ? trim(p.substr(1, p.size() - 2)) : "";
      if (p[0] == '{') {
        for (string &n : names(inside)) I.o.push_back(operand(n));
      } else if (p[0] == '[') {
        I.o.push_back(address(inside, I));
      } else if (p[0] == '%' && special(p) >= 0) {
        I.extra[0] = special(p), I.o.push_back(Opd{SINK, 0, 0});
      } else {
        I.o.push_back(operand(p));
      }
    }
    I.starts.push_back(u8(I.o.size()));
  }
  static int special(const string &s) {
    static const char *known[] = {"%tid.x", "%ctaid.x", "%ctaid.y", "%ctaid.z", "%nctaid.x",
                                  "%nctaid.y", "%nctaid.z", "%globaltimer", "%laneid", "%warpid"};
    for (int i = 0; i < 10; i++)
      if (s == known[i]) return i;
    return -1;
  }

  // @p or @!p before an instruction.
  string guard(const string &s, Ins &I) {
    if (s[0] != '@') return s;
    size_t i = s.find_first_of(" \t"), name = s[1] == '!' ? 2 : 1;
    I.guarded = true, I.negated = name == 2;
    I.guard = operand(s.substr(name, i - name));
    return trim(s.substr(i));
  }

  void statement(const string &text) {
    Ins I;
    I.line = line, I.where = where, I.text = text;
    string s = guard(text, I);
    size_t i = s.find_first_of(" \t");
    string name = s.substr(0, i), rest = i == string::npos ? "" : trim(s.substr(i));
    if (name == "bra" || name == "bra.uni") {
      I.kind = BRA;
      scopes.back().branches.emplace_back(int(P.code.size()), rest);
    } else if (name == "ret" || name == "exit") {
      I.kind = EXIT;
    } else if (name == "trap") {
      I.kind = TRAP;
    } else {
      if (name.find("param") != string::npos) I.space = PARAM;
      operands(rest, I);
      other(name, I);
    }
    if (I.wgmma) P.has_wgmma = true;
    P.code.push_back(std::move(I));
  }

  void other(const string &name, Ins &I) {
    if (name == "bar.sync" || name == "barrier.sync" || name == "barrier.sync.aligned") {
      I.kind = BAR, I.warpwide = true;
      if (I.starts.size() > 2) fail(format("line %d: barriers of some warps only", line));
    } else {
      I.fn = instruction(name, I);
    }
  }

  void close() {  // resolve the branches to labels of this scope; leave the others to the outer one
    Scope s = std::move(scopes.back());
    scopes.pop_back();
    for (auto &b : s.branches) {
      auto it = s.labels.find(b.second);
      if (it != s.labels.end())
        P.code[b.first].target = it->second;
      else if (scopes.empty())
        fail("no label " + b.second);
      else
        scopes.back().branches.push_back(b);
    }
  }

  // The header's parameters, up to the kernel's "{".
  void header(const string &l) {
    if (starts_with(l, ".param")) {
      string n = l.substr(l.find_last_of(" \t") + 1);
      P.params.push_back(n.substr(0, n.find_first_of(",)[")));
    }
    if (l == "{") scopes.emplace_back();
  }

  // Which line of the kernel's source follows.
  void location(const string &t) {
    size_t c = t.find("//");
    where = c == string::npos ? t : trim(t.substr(c + 2));
  }

  void end() {
    Ins I;
    I.kind = EXIT, I.text = "(end)", I.line = line;
    P.code.push_back(I);
  }

  bool label(string &l) {
    size_t semi = l.find(';'), colon = l.find(':');
    if (colon == string::npos || (semi != string::npos && colon > semi) ||
        l.find_first_of(" \t.{%") < colon)
      return false;
    scopes.back().labels[l.substr(0, colon)] = int(P.code.size());
    l = l.substr(colon + 1);
    return true;
  }

  bool brace(string &l) {
    if (l[0] != '{' && l[0] != '}') return false;
    if (l[0] == '{')
      scopes.emplace_back();
    else
      close();
    l = l.substr(1);
    return true;
  }

  // One line of the body; a statement may go on in the next.
  void body(string l) {
    for (l = trim(l); !l.empty() && !scopes.empty(); l = trim(l)) {
      if (pending.empty() && (brace(l) || label(l))) continue;
      size_t semi = l.find(';');
      pending += (pending.empty() ? "" : " ") + l.substr(0, semi);
      if (semi == string::npos) return;
      string s = trim(pending);
      pending.clear();
      l = l.substr(semi + 1);
      if (starts_with(s, ".reg"))
        declare(s);
      else if (!s.empty() && s[0] != '.')
        statement(s);
    }
  }

  // A wait is a loop that loads, strongly, what others store, and has no barrier.
  void mark_polls() {
    for (size_t i = 0; i < P.code.size(); i++) {
      Ins &I = P.code[i];
      if (I.kind != BRA || I.target < 0 || size_t(I.target) > i) continue;
      bool loads = false, barrier = false;
      for (size_t k = size_t(I.target); k < i; k++) {
        const Ins &J = P.code[k];
        loads |= J.space == GLOBAL && J.strong && !J.store;
        barrier |= J.kind == BAR;
      }
      I.polls = loads && !barrier;
    }
  }

  void parse(const string &text, const string &kernel) {
    size_t at = text.find(".entry " + kernel + "(");
    if (at == string::npos) fail("no kernel " + kernel);
    line = int(std::count(text.begin(), text.begin() + long(at), '\n'));
    bool in_header = true;
    for (string &raw : split(text.substr(at), '\n')) {
      line++;
      string t = trim(raw), l = trim(t.substr(0, t.find("//")));
      if (in_header) {
        header(l);
        in_header = scopes.empty();
      } else if (starts_with(t, ".loc")) {
        location(t);
      } else {
        body(l);
        if (scopes.empty()) return end(), mark_polls();
      }
    }
    fail("the kernel has no end");
  }
};
