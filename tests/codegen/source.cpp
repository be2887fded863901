// Source units as one text, and the finite set of untuned choices.
#include "codegen/source_unit.h"
#include <algorithm>
#include <catch2/catch.hpp>
#include <charconv>
#include <cmath>
#include <map>
#include <random>
#include <set>

using namespace kda;

namespace {

std::vector<std::string> lines_of(const std::string& text) {
  std::vector<std::string> lines(1);
  for (const char c : text) {
    if (c == '\n')
      lines.emplace_back();
    else
      lines.back() += c;
  }
  if (lines.back().empty()) lines.pop_back();
  return lines;
}

Problem production(Operation operation) {
  Problem p;
  p.operation = operation;
  p.heads = p.value_heads = 12;
  p.gate = GateKind::bounded;
  p.dt_bias = p.beta_sigmoid = p.qk_l2norm = true;
  p.state_layout = StateLayout::v_k;
  return p;
}

} // namespace

TEST_CASE("a unit as one text: every line is where its #line says, every file stands there once") {
  const Target target = cuda_target("sm_90a").value();
  for (const Operation operation :
       {Operation::forward, Operation::recurrent, Operation::backward, Operation::gate}) {
    const Problem p = production(operation);
    const SourceUnit unit = emit(p, choose(p, target, {1, 8192, 1}).value(), target).value();
    std::map<std::string, std::vector<std::string>> files{{unit.name, lines_of(unit.main)}};
    for (const SourceFile& f : unit.files)
      files[f.name] = lines_of(f.text);
    std::map<std::string, std::set<std::size_t>> seen;
    std::string file;
    std::size_t number = 0;
    const std::vector<std::string> flat = lines_of(flatten(unit, "first\nsecond"));
    REQUIRE(flat.size() > 10);
    CHECK(flat[0] == "// first");
    CHECK(flat[1] == "// second");
    for (std::size_t i = 2; i < flat.size(); ++i) {
      const std::string& line = flat[i];
      if (line.rfind("#line ", 0) == 0) {
        std::from_chars(line.data() + 6, line.data() + line.size(), number);
        file = line.substr(line.find('"') + 1, line.rfind('"') - line.find('"') - 1);
        continue;
      }
      REQUIRE(files.count(file) == 1);
      REQUIRE(number >= 1);
      REQUIRE(number <= files[file].size());
      const std::string& original = files[file][number - 1];
      INFO(file << ":" << number);
      if (line != original)
        CHECK((line.empty() && (original.rfind("#include", 0) == 0 || original == "#pragma once")));
      CHECK(seen[file].insert(number).second);
      ++number;
    }
    CHECK(seen.size() == files.size());
  }
}

TEST_CASE("text of the host is commented as IR is") {
  SourceUnit unit;
  unit.name = "host.ll";
  unit.main = "define void @f() {\n  ret void\n}\n";
  CHECK(flatten(unit, "why") == "; why\n" + unit.main);
}

TEST_CASE(
    "what the cost model chooses for any sizes is among its choices, and each of these is chosen somewhere") {
  std::mt19937 random(3);
  const auto extent = [&](std::int64_t most) {
    return std::max<std::int64_t>(
        1, static_cast<std::int64_t>(
               std::exp2(std::uniform_real_distribution<double>(0, std::log2(most))(random))));
  };
  for (const char* arch : {"sm_80", "sm_90a", "sm_120a"})
    for (const Operation operation : {Operation::forward, Operation::recurrent, Operation::backward,
                                      Operation::replay, Operation::gate}) {
      Problem p = production(operation);
      p.varlen = random() % 2 == 0;
      const Target target = cuda_target(arch).value();
      const auto all = choices(p, target).value();
      INFO(to_string(p) << " on " << arch);
      CHECK_FALSE(all.empty());
      CHECK(all.size() < enumerate(p, target).size());
      for (int i = 0; i < 100; ++i) {
        const std::int64_t rows = extent(kMostSequences);
        const Sizes s =
            p.varlen ? Sizes{1, extent(kMostTokens), rows} : Sizes{rows, extent(kMostTokens / rows), rows};
        const Variant v = choose(p, target, s).value();
        INFO(to_string(v) << " for B=" << s.batch << " T=" << s.tokens << " N=" << s.sequences);
        CHECK(std::count(all.begin(), all.end(), v) == 1);
      }
    }
}

TEST_CASE("sizes that round to the same have the same choice") {
  const Target target = cuda_target("sm_90a").value();
  const Problem p = production(Operation::recurrent);
  CHECK(choose(p, target, {33, 1, 33}).value() == choose(p, target, {40, 1, 40}).value());
  CHECK(choose(p, target, {1, 7169, 1}).value() == choose(p, target, {1, 8192, 1}).value());
}
