// What validate refuses, and that names and variants survive a round trip.
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
