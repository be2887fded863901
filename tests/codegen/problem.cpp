// What validate refuses, and that names and variants survive a round trip.
#include "codegen/source_unit.h"
#include "codegen/variant.h"
#include <catch2/catch.hpp>

using namespace kda;

TEST_CASE("validate accepts the production problem and refuses what no kernel supports") {
  Problem p;
  p.heads = 32;
  p.value_heads = 32;
  CHECK(validate(p).has_value());

  const auto refused = [&](auto change, const char* word) {
    Problem bad = p;
    change(bad);
    const Status status = validate(bad);
    REQUIRE_FALSE(status.has_value());
    CHECK(status.error().code == ErrorCode::invalid_argument);
    CHECK_THAT(status.error().message, Catch::Matchers::Contains(word));
  };
  refused([](Problem& x) { x.key_dim = 17; }, "multiples of 4");
  refused([](Problem& x) { x.key_dim = 260; }, "16 to 256");
  refused([](Problem& x) { x.value_dim = 12; }, "16 to 256");
  refused([](Problem& x) { x.value_dim = 512; }, "16 to 256"); // B40
  refused([](Problem& x) { x.key_dim = 8; }, "16 to 256");     // B41
  refused([](Problem& x) { x.value_heads = 33; }, "multiple of heads");
  refused([](Problem& x) { x.heads = 0; }, "heads");
  refused([](Problem& x) { x.dt_bias = true; }, "activated gate");
  refused([](Problem& x) { x.beta_times_two = true; }, "beta_sigmoid");
  refused([](Problem& x) { x.state_pool = true; }, "recurrent");
  refused([](Problem& x) { x.every_state = true; }, "whose slots take the states");
  refused([](Problem& x) { x.updates = true; }, "recurrent alone");
  refused([](Problem& x) { x.tree = true; }, "branches start from them");
  p.operation = Operation::backward;
  refused([](Problem& x) { x.interior_states = true; }, "operation forward, not with backward");
  refused([](Problem& x) { x.batch_invariant = true; }, "operation forward, not with backward");
  refused([](Problem& x) { x.saved_interval = 96; }, "multiples of 64");
  refused([](Problem& x) { x.saved_interval = -64; }, "multiples of 64");
  p.operation = Operation::forward;
  refused([](Problem& x) { x.saved_interval = 64; }, "not with forward");
}

TEST_CASE("a state pool is part of the problem's line only where there is one") {
  Problem p;
  p.operation = Operation::recurrent;
  CHECK_THAT(to_string(p), !Catch::Matchers::Contains("pool"));
  p.state_pool = true;
  CHECK(validate(p).has_value());
  CHECK_THAT(to_string(p), Catch::Matchers::EndsWith(" pool"));
  p.every_state = p.updates = p.tree = true;
  CHECK(validate(p).has_value());
  CHECK_THAT(to_string(p), Catch::Matchers::EndsWith(" pool every_state updates tree"));
  p.operation = Operation::replay;
  p.every_state = p.updates = false;
  CHECK(validate(p).has_value());
}

TEST_CASE("interior states and batch invariance are part of the problem's line, and of its tuning rows") {
  Problem p;
  const std::string plain = to_string(p);
  p.interior_states = p.batch_invariant = true;
  CHECK(validate(p).has_value());
  CHECK(to_string(p) == plain + " interior_states batch_invariant");
}

TEST_CASE("few heads are cut into segments, many are not") {
  Problem p;
  p.gate = GateKind::bounded;
  const auto segments = [&](int heads, std::int64_t tokens) {
    p.heads = p.value_heads = heads;
    return choose(p, cuda_target("sm_90a").value(), {1, tokens, 1}).value().segments;
  };
  CHECK(segments(96, 8192) == 0);
  CHECK(segments(32, 8192) == 0); // they win there, but by less than the margin
  CHECK(segments(32, 32768) == 3);
  CHECK(segments(8, 65536) == 16);
  // The workspace is that of the segments alone: starts, transitions, marks.
  p.heads = p.value_heads = 8;
  const auto bytes = [&](const char* variant) {
    return workspace_layout(p, parse_variant(variant).value(), {1, 65536, 1}).bytes;
  };
  CHECK(bytes("fused c=16 vt=128 pw=7 sw=8 st=10") == 0);
  CHECK(bytes("fused c=16 vt=128 pw=7 sw=8 st=10 seg=16") == std::size_t{8} * (16 + 14) * 65536 + 1024);
}

TEST_CASE("what a forward saves for its backward: slots for any lengths, and bytes") {
  Problem p;
  p.heads = p.value_heads = 32;
  const SavedStates saved = saved_states(p, {1, 8192, 1}, 1024).value();
  CHECK(saved.slots == 8);
  CHECK(saved.columns == 8);
  CHECK(saved.bytes == 8 * 32 * 128 * 128 * 4 + 8 * 4);
  p.state_dtype = DType::bf16;
  CHECK(saved_states(p, {2, 100, 2}, 64).value().bytes == 2 * 32 * 128 * 128 * 2 + 2 * 4);
  p.varlen = true;
  CHECK(saved_states(p, {1, 8192, 3}, 1024).value().bytes == 8 * 32 * 128 * 128 * 2 + 3 * 8 * 4);
  CHECK(saved_states(p, {1, 8192, 3}, 0).value().bytes == 0);
  CHECK_THAT(saved_states(p, {1, 8192, 3}, 100).error().message,
             Catch::Matchers::Contains("multiples of 64"));
  p.operation = Operation::backward;
  CHECK_THAT(to_string(p), !Catch::Matchers::Contains("saved"));
  p.saved_interval = 1024;
  CHECK_THAT(to_string(p), Catch::Matchers::EndsWith(" saved=1024"));
}

TEST_CASE("a variant prints to one line and parses back") {
  Variant v{Algorithm::chunk, 64, 32, 4, 8, 0, 2};
  CHECK(to_string(v) == "chunk c=64 vt=32 pw=4 sw=8 st=2");
  CHECK(parse_variant(to_string(v)).value() == v);
  CHECK_FALSE(parse_variant("chunk c=x").has_value());
  CHECK_FALSE(parse_variant("chunk what=1").has_value());
  CHECK_FALSE(parse_variant("").has_value());
}

TEST_CASE("names parse back and unknown ones name the choices") {
  CHECK(parse_gate("bounded").value() == GateKind::bounded);
  CHECK_THAT(parse_dtype("fp8").error().message, Catch::Matchers::Contains("bf16, fp16, fp32"));
}
