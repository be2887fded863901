// Reports as JSON: there and back, and what is refused.
#include "kda/tuning_report.h"
#include "roofline.h"
#include "scratch.h"
#include <catch2/catch.hpp>
#include <cmath>
#include <limits>

using namespace kda;
using Catch::Matchers::Contains;

namespace {

TuneReport sample() {
  TuneReport report{
      "forward H=1", "T1024 N1", "NVIDIA \"H100\"", "13.0", "nvrtc 13.0.88", "cold L2, graph", 12.5, 3.75e7,
      2e9,           {}};
  report.rows.push_back(
      {"chunk c=64 vt=32", "ok", "", 451.25, 6.5, 3.5e-3, 168, 98304, true, "abc", "2026-01-02T03:04:05Z"});
  report.rows.push_back({"token r=4 sw=4", "faulted", "ünï \"quoted\"\n",
                         std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity(), 0,
                         0, 0, false, "", ""});
  return report;
}

std::string refusal(const std::string& text) {
  const auto reports = parse_reports(text);
  REQUIRE_FALSE(reports);
  CHECK(reports.error().code == ErrorCode::invalid_argument);
  return reports.error().message;
}
std::string replaced(std::string text, const std::string& from, const std::string& to) {
  const auto at = text.find(from);
  REQUIRE(at != text.npos);
  return text.replace(at, from.size(), to);
}

} // namespace

TEST_CASE("reports come back from JSON as they were; numbers that are not finite as unknown") {
  const TuneReport was = sample();
  const auto all = parse_reports(write_reports({was, was})).value();
  REQUIRE(all.size() == 2);
  const TuneReport& is = all[1];
  CHECK(is.problem == was.problem);
  CHECK(is.bucket == was.bucket);
  CHECK(is.device == was.device);
  CHECK(is.driver == was.driver);
  CHECK(is.compiler == was.compiler);
  CHECK(is.mode == was.mode);
  CHECK(is.floor_us == was.floor_us);
  CHECK(is.bytes == was.bytes);
  CHECK(is.flop == was.flop);
  REQUIRE(is.rows.size() == 2);
  for (std::size_t i = 0; i < 2; ++i) {
    CHECK(is.rows[i].variant == was.rows[i].variant);
    CHECK(is.rows[i].status == was.rows[i].status);
    CHECK(is.rows[i].reason == was.rows[i].reason);
    CHECK(is.rows[i].error == was.rows[i].error);
    CHECK(is.rows[i].registers == was.rows[i].registers);
    CHECK(is.rows[i].shared_bytes == was.rows[i].shared_bytes);
    CHECK(is.rows[i].chosen == was.rows[i].chosen);
    CHECK(is.rows[i].image == was.rows[i].image);
    CHECK(is.rows[i].written == was.rows[i].written);
  }
  CHECK(is.rows[0].median_us == 451.25);
  CHECK(is.rows[0].spread_us == 6.5);
  CHECK(std::isnan(is.rows[1].median_us));
  CHECK(std::isnan(is.rows[1].spread_us));
  CHECK(write_reports(all) == write_reports({was, was}));
  CHECK(parse_reports(write_reports({})).value().empty());
}

TEST_CASE("a reason that is no UTF-8 does not keep a report from being written") {
  TuneReport report = sample();
  report.rows[0].reason = "ptxas: \xff\xfe";
  CHECK_THAT(parse_reports(write_reports({report})).value()[0].rows[0].reason, Contains("ptxas"));
}

TEST_CASE("what is no report is refused with the place and the cause") {
  const std::string good = write_reports({sample()});
  CHECK_THAT(refusal(""), Contains("report 1"));
  CHECK_THAT(refusal("[]"), Contains("report 1"));
  CHECK_THAT(refusal(good.substr(0, good.size() / 2)), Contains("report 1"));
  CHECK_THAT(refusal(replaced(good, "\"schema\": 3", "\"schema\": 1")),
             Contains("schema 1; this build reads 2 to 3"));
  CHECK_THAT(refusal(replaced(good, "faulted", "great")), Contains("unknown status 'great'"));
  CHECK_THAT(refusal(replaced(good, "token r=4", "magic r=4")), Contains("magic"));
  CHECK_THAT(refusal(replaced(good, "\"bucket\"", "\"bukcet\"")), Contains("bucket"));
  CHECK_THAT(refusal(replaced(good, "\"image\": \"abc\"", "\"image\": 7")), Contains("string"));
  CHECK_THAT(refusal(replaced(good, "\"chosen\": false", "\"chosen\": true")), Contains("more than one"));
  CHECK_THAT(refusal(replaced(good, "\"floor_us\"", "\"roof_us\": 1, \"floor_us\"")), Contains("not known"));
  CHECK_THAT(refusal(replaced(good, "\"T1024 N1\"", "\"\"")), Contains("must not be empty"));
}

TEST_CASE("a file of reports is named where it cannot be read") {
  const cache::test::Scratch scratch;
  const auto file = scratch.path() / "pins.json";
  CHECK_THAT(read_reports(file).error().message, Contains("cannot open") && Contains("pins.json"));
  cache::test::spill(file, "no JSON");
  CHECK_THAT(read_reports(file).error().message, Contains("pins.json") && Contains("kda-jit report --json"));
  cache::test::spill(file, write_reports({sample()}));
  CHECK(read_reports(file).value().size() == 1);
}

TEST_CASE("reports and pins of schema 2 are read, their bytes and arithmetic as unknown") {
  std::string text = write_reports({sample()});
  for (const char* member : {"\"bytes\"", "\"flop\""}) {
    const auto at = text.find(member);
    text.erase(at, text.find('\n', at) - at);
  }
  const TuneReport is = parse_reports(replaced(text, "\"schema\": 3", "\"schema\": 2")).value().at(0);
  CHECK((std::isnan(is.bytes) && std::isnan(is.flop)));
  CHECK(is.rows.size() == 2);
  CHECK_THAT(refusal(text), Contains("bytes")); // schema 3 has them
}

TEST_CASE("the arithmetic of an operation is that of the recurrence, its bytes those of its tensors") {
  Problem p; // 128 x 128, bf16
  p.heads = 2;
  p.value_heads = 4;
  p.gate_dtype = DType::fp32;
  const Sizes s{1, 1000, 1};
  CHECK(recurrence_flop(p, s) == 7.0 * 128 * 128 * 4000); // docs/tuning.md
  // q, k: 2 heads; v, o: 4; g: 4 of fp32; beta: 4; a state in and out
  CHECK(compulsory_bytes(p, s) ==
        1000.0 * (2 * 2 * 128 * 2 + 2 * 4 * 128 * 2 + 4 * 128 * 4 + 4 * 2) + 2.0 * 4 * 128 * 128 * 4);
  p.operation = Operation::backward;
  CHECK(recurrence_flop(p, s) == 20.0 * 128 * 128 * 4000);
  p.operation = Operation::replay;
  CHECK(recurrence_flop(p, s) == 3.0 * 128 * 128 * 4000);
  p.operation = Operation::gate;
  CHECK(recurrence_flop(p, s) == 0);
}
